"""What scripts/compare-checkouts compares, and what it leaves out."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
checkouts = importlib.import_module("scripts.compare_checkouts")


def write_weights(folder: Path, value: float) -> None:
    save_file({"w": torch.full((2, 3), value)}, folder / "run" / "model.safetensors", metadata={"asa": folder.name})


def write_log(folder: Path, loss: float, rate: float) -> None:
    line = {"step": 1, "group": "train", "loss": loss, "volumes_per_second": rate}
    (folder / "run" / "log.jsonl").write_text(json.dumps(line) + "\n")


def write_volume(folder: Path, voxel: int, shift: float = 0) -> None:
    affine = np.eye(4)
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), voxel, np.uint8), affine), folder / "run" / "map.nii.gz")


def write_manifest(folder: Path, version: str) -> None:
    source = {"path": str(folder / "a.nii.gz"), "mtime_ns": folder.stat().st_mtime_ns, "sha256": "0" * 64}
    (folder / "run" / "manifest.json").write_text(json.dumps({"software": version}))
    (folder / "run" / "records.jsonl").write_text(json.dumps({"sources": {"t1": source}}) + "\n")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same results; versions, speed and paths differ."""
    for name, rate in (("before", 1.0), ("after", 2.0)):
        folder = tmp_path / name
        (folder / "run").mkdir(parents=True)
        write_weights(folder, 0.5)
        write_log(folder, float("nan"), rate)
        write_volume(folder, 3)
        write_manifest(folder, name)
        np.save(folder / "run" / "image.npy", np.zeros(3))
        (folder / "run" / "report.html").write_text(name)
        (folder / "run" / "digests.json").write_text(json.dumps({"summary.json": name}))
    return tmp_path / "before", tmp_path / "after"


def test_versions_speed_paths_dates_digests_and_pages_are_not_compared(folders: tuple[Path, Path], capsys) -> None:
    assert checkouts.compare(*folders)
    shown = capsys.readouterr().out
    assert shown.count("same") == 5 and "DIFFERS" not in shown and "html" not in shown


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: write_weights(folder, 0.5000001), "model.safetensors, w:"),
        (lambda folder: write_log(folder, 0.1, 1.0), "log.jsonl, [0].loss: nan before, 0.1 after"),
        (lambda folder: write_volume(folder, 4), "map.nii.gz, voxels:"),
        (lambda folder: write_volume(folder, 3, shift=1), "map.nii.gz, header:"),
        (lambda folder: np.save(folder / "run" / "image.npy", np.ones(3)), "image.npy, bytes:"),
        (lambda folder: (folder / "run" / "image.npy").unlink(), "image.npy: only before"),
        (lambda folder: (folder / "cases.csv").write_text("id,dice\n"), "cases.csv: only after"),
    ],
)
def test_every_change_of_a_result_is_named(
    folders: tuple[Path, Path], capsys, change: Callable[[Path], None], named: str
) -> None:
    change(folders[1])
    assert not checkouts.compare(*folders)
    assert named in capsys.readouterr().out


def test_the_inputs_are_readable_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    checkouts.write_inputs(tmp_path)
    pixels = [np.asarray(image.open(path)) for path in sorted((tmp_path / "clean").iterdir())]
    assert {one.shape for one in pixels} == {(64, 64)} and len({one.tobytes() for one in pixels}) == 5
    again = tmp_path / "again"
    checkouts.write_inputs(again)
    assert (again / "clean" / "0.png").read_bytes() == (tmp_path / "clean" / "0.png").read_bytes()
