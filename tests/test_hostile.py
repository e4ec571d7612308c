"""Files of others: nothing is written outside `out=`, no memory is taken that a file does not account for, and what
cannot be read is named while the rest is done.
"""

import contextlib
import gzip
import json
import multiprocessing
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LABELS
from ranks import Job, command
from safetensors import safe_open
from safetensors.torch import save_file
from stores import read_tree, write_tree
from torch import nn
from untrained import DATA, a_scan, call, checkpoint

from asa.cli import COMMANDS, export, orient, predict, regions, simulate
from asa.config import build
from asa.data.datasets import folder as datasets_folder
from asa.data.io.files import DIGESTS, LARGEST_YAML, open_unlinked, read_json, read_yaml, write_json, write_whole
from asa.data.io.formats import PADDING
from asa.data.io.lock import LOCK, locked
from asa.data.io.nifti import read_image, read_label, write_label
from asa.data.io.tables import csv_text, read_rows
from asa.data.preprocessing.settings import PrepareSettings
from asa.data.splits import read_split
from asa.data.store import Store
from asa.evaluation.comparison import read_run
from asa.inference.preprocessing import ScanPreprocessor, exported
from asa.models.classifier import asa_regressor_tiny
from asa.restoration.images import checked_window, read_picture, write_picture
from asa.tasks.evaluation import compare_folders, evaluate_folder
from asa.tasks.prediction import SegmentationPredictor
from asa.tasks.studies import _predict_fold
from asa.tasks.volumes import choose_split
from asa.training.checkpoint import FORMAT, DamagedCheckpoint, load_model, read_model, read_weights, save_checkpoint
from asa.training.checkpoint_files import WEIGHTS
from asa.training.device import Backend
from asa.training.loop import TrainSettings
from asa.training.pretrained import read_source
from asa.training.run_folder import _check_config, open_run
from asa.training.run_log import RunLog

FORK = multiprocessing.get_context("fork")


def nifti_header(shape: tuple[int, ...], offset: float = 352, code: int = 16, bits: int = 32) -> bytes:
    """A NIfTI-1 header of 352 bytes, RAS with 1 mm voxels."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<2h", header, 70, code, bits)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, offset)
    struct.pack_into("<h", header, 254, 1)  # sform
    for axis in range(3):
        struct.pack_into("<4f", header, 280 + 16 * axis, *[float(axis == other) for other in range(3)], 0)
    header[344:348] = b"n+1\0"
    return bytes(header)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("write", [
    lambda path: write_whole(path, b"mine"),
    lambda path: write_json(path, {}),
    lambda path: write_picture(path, np.zeros((1, 2, 2))),
])  # fmt: skip
def test_a_planted_link_is_replaced_and_its_target_kept(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "precious").write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("file.png", ".file.png.part"):
        (run / name).symlink_to(tmp_path / "precious")
    write(run / "file.png")
    assert (tmp_path / "precious").read_text() == "kept" and not (run / "file.png").is_symlink()


def test_a_lock_or_a_log_that_is_a_link_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    for name in (LOCK, "log.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"/\.lock: is a symbolic link.*remove it"), locked(tmp_path):
        pass
    with pytest.raises(OSError, match="is a symbolic link"), open_unlinked(tmp_path / "log.jsonl", "a"):
        pass
    log = RunLog(tmp_path, total=1, start=0)  # lines of an earlier process are written anew
    log.record(1, "train", {"loss": 1.0})
    log.close()
    assert (tmp_path / "precious").read_text() == "kept" and '"loss"' in (tmp_path / "log.jsonl").read_text()


def _write_often(path: Path, letter: bytes) -> None:
    for _ in range(50):
        write_whole(path, letter * 100_000)


def test_processes_that_write_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    writers = [FORK.Process(target=_write_often, args=(tmp_path / "x", letter)) for letter in (b"a", b"b", b"c")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            seen.add((tmp_path / "x").read_bytes())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen <= {letter * 100_000 for letter in (b"a", b"b", b"c")} and [
        path.name for path in tmp_path.iterdir()
    ] == ["x"]


@pytest.mark.parametrize(
    "text", ["", "- a\n- b", "{", "a: [1", "1: 2", "x: &x [1]\n? *x\n: 1", "a: 2026-99-99", "[" * 1500]
)
def test_a_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.yaml: .*restore the file"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config.yaml: "):
        _check_config(tmp_path, {"model": {}})


def test_a_configuration_of_aliases_cannot_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"] + [
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)
    ]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"more than {LARGEST_YAML} values"):
        read_yaml(tmp_path / "config.yaml")


def test_a_configuration_of_merge_keys_is_refused_at_once(tmp_path: Path) -> None:
    merged = [f"a{k}: &a{k}\n  <<: [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(["a0: &a0 {x: 1}", *merged]))
    started = time.process_time()
    with pytest.raises(ValueError, match=r"config.yaml: not valid YAML \(a merge key, <<"):
        read_yaml(tmp_path / "config.yaml")
    assert time.process_time() - started < 5
    (tmp_path / "config.yaml").write_text("a: {'<<': 1, '=': 2}")  # texts, as in the names of labels
    assert read_yaml(tmp_path / "config.yaml") == {"a": {"<<": 1, "=": 2}}


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "NaN", '{"a": Infinity}', "\udcff"])
def test_json_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_malformed_lock_is_taken(tmp_path: Path) -> None:
    for holder in (
        "[]",
        '{"host": 1, "pid": 1, "born": "", "job": null}',
        '{"host": "a", "pid": "x", "born": "", "job": null}',
    ):
        (tmp_path / LOCK).write_text(holder)
        with locked(tmp_path):
            assert read_json(tmp_path / LOCK)["host"]


# ------------------------------------------------------------------------------------------- tables


def test_a_spreadsheet_computes_no_cell_and_reading_undoes_the_quotes(tmp_path: Path) -> None:
    texts = [
        "=cmd|' /C calc'!A0",
        "+1+1",
        "-2+3",
        "@SUM(A1)",
        "-1.5",
        "1e-3",
        "'quoted",
        "'=x",
        "plain, with comma",
        "-inf",
    ]
    rows = [[f"s{k}", text] for k, text in enumerate(texts)]
    path = tmp_path / "t.csv"
    path.write_text(csv_text(["id", "subject"], rows))
    assert [row["subject"] for row in read_rows(path)] == texts
    cells = [line.partition(",")[2].strip('"') for line in path.read_text().splitlines()[1:]]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+")) or cell.startswith("-2")]


@pytest.mark.parametrize("content", [b"id,t1\n\xff\xfe,x", b"id\n" + b"x" * 200_000])
def test_a_table_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/t.csv: not a table"):
        read_rows(tmp_path / "t.csv")


@pytest.mark.parametrize("summary", ["[]", "{}", '{"policy": 3}', '{"policy": {"name": "ibsr", "metrics": [{}]}}'])
def test_an_evaluation_that_is_none_is_named(tmp_path: Path, summary: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    (tmp_path / "cases.csv").write_text("id,label\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path}.*evaluate again"):
        read_run("x", tmp_path)


# ------------------------------------------------------------------------------------------- images


BOMB = nifti_header((4, 4, 4)) + bytes(50_000_000)
HUGE = nifti_header((32767, 32767, 32767)) + bytes(1000)
BAD_SCANS = {
    "bomb.nii.gz": gzip.compress(BOMB),
    "huge.nii": HUGE,
    "huge.nii.gz": gzip.compress(HUGE),
    "offset.nii": nifti_header((4, 4, 4), float("inf")) + bytes(256),
    "nan.nii": nifti_header((4, 4, 4), float("nan")) + bytes(256),
    "before.nii": nifti_header((4, 4, 4), -1e9) + bytes(256),
    "negative.nii": nifti_header((-4, 4, 4)) + bytes(256),
    "short.nii": nifti_header((40, 40, 40)) + bytes(256),
}


def test_a_file_is_not_unpacked_beyond_what_its_header_announces(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "bomb.nii.gz").write_bytes(BAD_SCANS["bomb.nii.gz"])
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/bomb.nii.gz: holds more than the 608 bytes"):
        read_image(tmp_path / "bomb.nii.gz")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    padded = nifti_header((4, 4, 4)) + np.arange(64, dtype="<f4").tobytes() + bytes(PADDING)
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(padded))
    assert read_image(tmp_path / "padded.nii.gz").data.max() == 63


@pytest.mark.parametrize("name", BAD_SCANS)
def test_an_impossible_header_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD_SCANS[name])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: "):
        read_image(tmp_path / name)


def test_bad_scans_are_named_and_the_good_one_is_predicted(tmp_path: Path, monkeypatch, capsys) -> None:
    trained, scans = checkpoint(tmp_path / "run"), tmp_path / "scans"
    scans.mkdir()
    for number, (name, content) in enumerate(BAD_SCANS.items()):
        (scans / f"bad{number}{name[name.index('.') :]}").write_bytes(content)
    a_scan(scans, "good")
    assert call(predict, monkeypatch, f"checkpoint={trained}", f"input={scans}", f"out={tmp_path}/out") == 1
    captured = capsys.readouterr()
    assert f"{len(BAD_SCANS)} scans failed, listed above" in captured.err
    assert sorted(re.findall(r"^(bad\d): failed: ", captured.out + captured.err, re.M)) == [f"bad{k}" for k in range(8)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.nii.gz", "volumes.csv"]


def test_predictions_that_end_at_the_same_moment_share_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        **{"checkpoint": str(checkpoint(tmp_path / "run")), "out": str(tmp_path / "out"), "predict": {"device": "cpu"}},
        **dict.fromkeys(("probabilities", "mirror"), False),
        **dict.fromkeys(("uncertainty", "strip", "layout"), None),
        "plugins": [],
    }
    predictors = {id: SegmentationPredictor(config) for id in "ab"}
    before = SegmentationPredictor.rows_before

    def slow(self: SegmentationPredictor) -> dict[str, dict[str, str]]:
        rows = before(self)
        time.sleep(0.5)  # the other one's time to write its rows
        return rows

    monkeypatch.setattr(SegmentationPredictor, "rows_before", slow)
    (tmp_path / "out").mkdir()
    for id in predictors:
        (tmp_path / "out" / f"{id}.nii.gz").touch()
    threads = [
        threading.Thread(target=predictor.add, args=(id, {"id": id, "x_ml": "1.000"}))
        for id, predictor in predictors.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row["id"] for row in read_rows(tmp_path / "out" / "volumes.csv")] == ["a", "b"]


def test_a_damaged_table_of_volumes_is_named_before_the_work(tmp_path: Path, monkeypatch, capsys) -> None:
    trained, out = checkpoint(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "volumes.csv").write_bytes(b"id,x_ml\n\xff,1\n")
    assert call(predict, monkeypatch, f"checkpoint={trained}", f"input={a_scan(tmp_path)}", f"out={out}") == 1
    assert f"{out / 'volumes.csv'}: not a table" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["volumes.csv"]


def test_a_png_bomb_is_named_and_the_others_are_done(tmp_path: Path, monkeypatch, capsys) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    for name in ("b", "c"):
        write_picture(folder / f"{name}.png", np.random.default_rng(0).uniform(size=(1, 32, 32)))
    image.new("1", (20000, 20000)).save(folder / "a.png")
    arguments = [f"input={folder}", f"out={tmp_path}/out"]
    assert call(regions, monkeypatch, *arguments) == 1
    captured = capsys.readouterr()
    assert f"a: failed: {folder}/a.png: not a usable PNG" in captured.out and "1 images failed" in captured.err
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"b.png", "c.png"}
    assert call(simulate, monkeypatch, f"input={folder}", f"out={tmp_path}/pairs", "kind=pet") == 1
    assert "a: failed: " in capsys.readouterr().out and len(list((tmp_path / "pairs/low").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "window", [[-np.inf, 1], [0, np.nan], [1, 0], [0], "01", {"a": 1}, [[0], 1], None, [-1e308, 1e308]]
)
def test_a_window_is_two_finite_increasing_numbers(window: object) -> None:
    with pytest.raises(ValueError, match="two finite values"):
        checked_window(window)


@pytest.mark.parametrize("text", ["[-Infinity, 1]", "3", "{", "[" * 100_000, '["a", "b"]'])
def test_a_png_with_a_window_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    png = pytest.importorskip("PIL.PngImagePlugin")
    from PIL import Image

    notes = png.PngInfo()
    notes.add_text("asa-window", text)
    Image.new("L", (8, 8)).save(tmp_path / "x.png", pnginfo=notes)
    with pytest.raises(ValueError, match=rf"{tmp_path}/x.png: "):
        read_picture(tmp_path / "x.png")


@pytest.mark.parametrize(("rows", "columns"), [(65535, 65535), (8, 0), (9, 9)])
def test_a_dicom_that_holds_less_than_it_says_is_named(tmp_path: Path, rows: int, columns: int) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(str(tmp_path / "x.dcm"), {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns, data.BitsAllocated, data.BitsStored, data.HighBit = rows, columns, 16, 16, 15
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    data.PixelData = bytes(128)
    data.save_as(tmp_path / "x.dcm", enforce_file_format=False)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x.dcm: "):
        read_picture(tmp_path / "x.dcm", [0, 1])


@pytest.mark.parametrize("deflated", [False, True])
def test_a_dicom_is_not_unpacked_beyond_a_limit(tmp_path: Path, deflated: bool) -> None:
    """60,000 x 60,000 pixels by run-length coding, and 100 MB of zeros as a deflated file of 100 kB."""
    import tracemalloc

    pydicom = pytest.importorskip("pydicom")
    meta, edge = pydicom.dataset.FileMetaDataset(), 7000 if deflated else 60000
    syntaxes = (pydicom.uid.RLELossless, pydicom.uid.DeflatedExplicitVRLittleEndian)
    meta.TransferSyntaxUID = syntaxes[deflated]
    data = pydicom.dataset.FileDataset(str(tmp_path / "x.dcm"), {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns, data.BitsAllocated, data.BitsStored, data.HighBit = edge, edge, 16, 16, 15
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    coded = pydicom.encaps.encapsulate([struct.pack("<16I", 2, 64, 68, *[0] * 13) + b"\x81\0\0\0" * 2])
    data.PixelData = bytes(2 * edge * edge) if deflated else coded
    data["PixelData"].is_undefined_length = not deflated
    data.save_as(tmp_path / "x.dcm", enforce_file_format=False)
    del data
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x.dcm: .*(deflated|pixels, more than)"):
        read_picture(tmp_path / "x.dcm", [0, 1])
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_a_file_that_cannot_be_oriented_is_named_and_the_others_are_written(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    unstated = bytearray(nifti_header((4, 4, 4)) + np.arange(64, dtype="<f4").tobytes())
    struct.pack_into("<h", unstated, 254, 0)
    (source / "a.nii").write_bytes(HUGE)
    (source / "b.nii").write_bytes(unstated)
    assert call(orient, monkeypatch, f"input={source}", f"out={tmp_path}/out", "axes=LAS") == 1
    assert f"a: failed: {source}/a.nii: " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


# ------------------------------------------------------------------------------------------- stores


def test_a_changed_array_is_not_read(store: Path, tmp_path: Path) -> None:
    """Zeros in the second half of an array, which keep its shape and type."""
    copy = shutil.copytree(store, tmp_path / "store")
    for kind, read in (("images", Store.image), ("labels", Store.label)):
        path = copy / kind / "s1.npy"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        with pytest.raises(ValueError, match=rf"^{path}: bytes changed; delete it and run asa-prepare again"):
            read(Store(copy), "s1")
        assert read(Store(copy), "s0") is not None


def test_an_npz_named_npy_is_damage(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    with (copy / "images/s1.npy").open("wb") as file:
        np.savez(file, x=np.zeros(3))
    with pytest.raises(ValueError, match=r"images/s1.npy: missing or damaged"):
        Store(copy).image("s1")


@pytest.mark.parametrize("change", [
    {"labels": {"x": "y"}}, {"channels": None}, {"settings": []},
    {"regions": 1}, {"regions": {"a": True}}, {"regions": {"a": []}},
    {"shape": [1, 2]}, {"shape": None}, {"sources": {"t1": 3}}, {"arrays": {"../x": ""}}, {"subject": 1}, {"chain": []},
    {"chain": {}}, {"chain": {"stored_affine": [[1, 0], [2]]}}, {"identity": {"t1": 3}}, {"identity": None},
])  # fmt: skip
def test_a_store_with_other_types_is_named(store: Path, tmp_path: Path, change: dict) -> None:
    manifest = read_tree(store)
    (key,) = change
    file = "manifest.json" if key in manifest else "records.jsonl"
    (manifest if key in manifest else manifest["records"][0]).update(change)
    write_tree(tmp_path, manifest)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{file}: .*(?:{key.removesuffix('s')}|record 1)"):
        list(Store(tmp_path).records)


def _hold(folder: Path, mark: Path) -> None:
    with locked(folder):
        mark.touch()
        time.sleep(60)


@pytest.mark.parametrize("command", ["prepare", "ablate", "finetune"])
def test_a_store_an_ablation_and_folds_have_one_writer(
    raw: Path, store: Path, tmp_path: Path, command: str, monkeypatch, capsys
) -> None:

    out, mark = tmp_path / "out", tmp_path / "mark"
    out.mkdir()
    holder = FORK.Process(target=_hold, args=(out, mark))
    holder.start()
    while not mark.exists():
        time.sleep(0.01)
    arguments = {
        "prepare": [f"data.root={raw}", "data.images={t1: '*_T1.nii.gz'}"],
        "ablate": [f"store={store}", "split.test=1", "labelled=[1]"],
        "finetune": [f"data.store={store}", "data.split.folds=2", "data.split.fold=all", "model=unet_tiny"],
    }[command]
    try:
        assert call(COMMANDS[command], monkeypatch, *arguments, f"out={out}") == 1
        assert f"{out} is in use by process {holder.pid}" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [LOCK]
    finally:
        holder.kill()
        holder.join()


# ------------------------------------------------------------------------------------------- checkpoints


def tampered(folder: Path, weights: dict[str, torch.Tensor] | None = None, **description: object) -> Path:
    """An untrained network's weights file with another description."""
    source = next(checkpoint(folder).rglob(WEIGHTS))
    with safe_open(source, framework="pt") as opened:
        header = json.loads(opened.metadata()["asa"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for key, value in description.items():
        header[key] = {**header[key], **value} if isinstance(value, dict) else value
    save_file(tensors if weights is None else weights, folder / "x.safetensors", metadata={"asa": json.dumps(header)})
    return folder / "x.safetensors"


@pytest.mark.parametrize("size", [
    {"window": 6000}, {"window": 20000}, {"window": 10**12}, {"depth": 10**9}, {"depth": 3000}, {"depth": -3},
    {"img_size": [32000] * 3}, {"img_size": [4096] * 3, "patch_size": 8}, {"embed_dim": 60000}, {"mlp_ratio": 1e300},
    {"window": "x"}, {"window": None}, {"img_size": "abc"}, {"unknown": 1}, {"_target_": "os.system"},
])  # fmt: skip
def test_a_checkpoint_takes_no_memory_that_its_file_does_not_account_for(tmp_path: Path, size: dict) -> None:
    file, started = tampered(tmp_path, model=size), time.process_time()
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):  # noqa: PT011 - the reasons differ
        read_model(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "kind", ["asa_classifier_tiny", "rat_tiny", "sa_swin_unet_tiny", "vit_seg_tiny", "sa_swin_classifier_tiny"]
)
def test_networks_of_all_tasks_are_built_twice_and_loaded(tmp_path: Path, kind: str) -> None:
    from asa.models import create_model, list_models

    if kind not in list_models():
        pytest.skip(f"no {kind}")
    own = {
        "rat_tiny": {"in_channels": 1},
        "vit_seg_tiny": {"out_channels": 3},
        "sa_swin_unet_tiny": {"out_channels": 3},
    }
    own = own.get(kind, {"classes": 2})
    shell = nn.Module()
    shell.model = create_model(kind, **own)
    module = type(shell.model).__module__
    target = next(
        f"{name}.{kind}" for name in (module, "asa.models.unet", "asa.models") if hasattr(sys.modules[name], kind)
    )
    description = {"model": {"_target_": target, **own}, "data": {}}
    save_checkpoint(tmp_path, 1, shell, description, {}, keep=1)
    loaded = load_model(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in shell.model.state_dict().items())
    source = next(tmp_path.rglob(WEIGHTS))
    with safe_open(source, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    changed = {
        "format": 1,
        "step": 1,
        **description,
        "model": {**description["model"], "depth": 10**9, "depths": [10**9] * 4},
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"asa": json.dumps(changed)})
    with pytest.raises(ValueError, match="does not match the model: depth"):
        load_model(tmp_path / "x.safetensors")


def test_the_mean_of_large_numbers_is_no_size(tmp_path: Path) -> None:
    shell, own = nn.Module(), dict(img_size=32, mean=1.4e6, sd=2.0e5)
    shell.model = asa_regressor_tiny(**own)
    node = {"_target_": "asa.models.classifier.asa_regressor_tiny", **own}
    save_checkpoint(tmp_path, 1, shell, {"model": node, "data": {}}, {}, keep=1)
    assert load_model(tmp_path).state_dict().keys() == shell.model.state_dict().keys()


@pytest.mark.parametrize("edge", [2**62, 2**63])
def test_a_header_with_sizes_that_no_tensor_has_is_a_damaged_checkpoint(tmp_path: Path, edge: int) -> None:
    asa = json.dumps({"format": FORMAT, "step": 1, "model": {}, "data": {}})
    weight = {"dtype": "F32", "shape": [0, edge, edge], "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": {"asa": asa}, "w": weight}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedCheckpoint, match="x.safetensors"):
        read_weights(tmp_path / "x.safetensors", shapes=True)


@pytest.mark.parametrize(
    "prepare",
    [{"spacing": 0.1}, {"crop": 100_000}, {"crop": [3000, 30000, 3000]}],
)
def test_a_checkpoints_preparation_takes_no_more_memory_than_there_is(
    tmp_path: Path, monkeypatch, capsys, prepare: dict
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096)  # a machine of 16 MiB
    file = tampered(tmp_path, data={"prepare": prepare})
    scan = tmp_path / "scan.nii"
    scan.write_bytes(nifti_header((40, 40, 40), code=2, bits=8) + bytes(range(1, 251)) * 256)
    code = call(predict, monkeypatch, f"checkpoint={file}", f"input={scan}", f"out={tmp_path}/out", "predict.overlap=0")
    assert code == 1 and "do not fit into the memory" in "".join(capsys.readouterr())


@pytest.mark.parametrize("data", [
    {"prepare": {"unknown": 1}}, {"prepare": {"crop": "x"}}, {"prepare": 3}, {"prepare": {"strip": 7}},
    {"prepare": {"spacing": "a"}}, {"channels": 3}, {"channels": [["t1"]]}, {"labels": {"x": "y"}}, {"labels": 3},
    {"labels": {"1": "a", "2": "a", "5": "b"}}, {"regions": {"a": 3}}, {"regions": {"a": ["x"]}}, {"lateral_pairs": 1},
    {"lateral_pairs": [["left_x"]]}, {"spacing": "x"}, {"spacing": [[1, 1, 1]]},
    {"spacing": [[0, 1, 1], [1, 1, float("nan")]]}, {"spacing": [[1, 1, 1], [1, 1, float("inf")]]}, {"channels": []},
    {"range": 3}, {"range": {"brain_ml": None}}, {"range": {"brain_ml": ["x", 1]}}, {"prepare": {"crop": True}},
    {"overlap": 0.99}, {"overlap": "x"}, {"modalities": 3}, {"modalities": {"ct": 3}},
    {"modalities": {"ct": {"channels": ["ct"]}}}, {"modalities": {"ct": {"channels": [3], "prepare": {}}}},
])  # fmt: skip
def test_a_checkpoints_metadata_of_other_types_is_one_line_with_its_name(
    tmp_path: Path, monkeypatch, capsys, data: dict
) -> None:
    file, scan = tampered(tmp_path, data=data), a_scan(tmp_path)
    assert call(predict, monkeypatch, f"checkpoint={file}", f"input={scan}", f"out={tmp_path}/out") == 1
    captured = capsys.readouterr()
    assert str(file) in captured.err and "--traceback" not in captured.err, captured.err


def trained_as(folder: Path, task: str, model: dict[str, object], data: dict) -> Path:
    """An untrained network of a task, as asa-finetune saves it."""
    shell = nn.Module()
    shell.model = build(model)
    save_checkpoint(folder, 1, shell, {"model": model, "task": task, "data": data}, {}, keep=1)
    return folder


@pytest.mark.parametrize("classes", [3, ["a"], ["a", "b", "c"], [1, 2], ["a", "a"], [["x"], {}], {"a": 1, "b": 2}])
def test_a_classifier_with_other_classes_is_refused_by_name(
    tmp_path: Path, monkeypatch, capsys, classes: object
) -> None:
    model = {"_target_": "asa.models.classifier.asa_classifier_tiny", "classes": 2, "img_size": 32, "embed_dim": 24}
    data = {"channels": ["t1"], "classes": classes, "prepare": {"crop": "foreground"}}
    run = trained_as(tmp_path / "run", "classification", {**model, "depth": 1, "num_heads": 2}, data)
    assert call(predict, monkeypatch, f"checkpoint={run}", f"input={a_scan(tmp_path)}", f"out={tmp_path}/out") == 1
    captured = capsys.readouterr()
    assert f"error: {run}: " in captured.err and "--traceback" not in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"window": 3}, {"window": [1, 0]}, {"subject": "("}, {"subject": 3}, {"regions": 3}]
)
def test_a_restoration_with_other_metadata_is_refused_by_name(
    tmp_path: Path, monkeypatch, capsys, change: dict
) -> None:
    pytest.importorskip("PIL")
    write_picture(tmp_path / "images" / "a.png", np.random.default_rng(0).uniform(size=(1, 32, 32)))
    model = {"_target_": "asa.restoration.rat.rat_tiny", "in_channels": 1}
    data = {"window": None, "regions": None, "subject": None}
    arguments = [f"input={tmp_path}/images", f"out={tmp_path}/out"]
    run = trained_as(tmp_path / "good", "restoration", model, data)
    assert call(predict, monkeypatch, f"checkpoint={run}", *arguments) == 0
    shutil.rmtree(tmp_path / "out")
    for metadata in ({**data, **change}, {}):
        run = trained_as(tmp_path / f"run{len(metadata)}", "restoration", model, metadata)
        assert call(predict, monkeypatch, f"checkpoint={run}", *arguments) == 1
        captured = capsys.readouterr()
        assert f"error: {run}: its metadata" in captured.err and not (tmp_path / "out").exists()


def test_tensors_that_repeat_a_value_are_refused(tmp_path: Path) -> None:
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(1).expand(1_000_000, 1_000_000)}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 2000
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x.pt: a tensor repeats the values"):
        read_source(tmp_path / "x.pt")


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(1_000_000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain:
        entries = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, content in entries.items():
            compressed.writestr(name, content)
    assert torch.load(tmp_path / "x.pt", weights_only=True)  # torch does
    with pytest.raises(ValueError, match=rf"^{tmp_path}/x.pt: a compressed archive of 4\d+ bytes"):
        read_source(tmp_path / "x.pt")


def test_an_export_holds_no_command_and_no_path(tmp_path: Path, monkeypatch) -> None:
    command = "/home/somebody/secret/bet {image} {mask}"
    trained = checkpoint(tmp_path / "run", prepare={"strip": command})
    assert call(export, monkeypatch, f"checkpoint={trained}", f"out={tmp_path}/bundle", "format=bundle") == 0
    for path in (tmp_path / "bundle").rglob("*"):
        assert path.is_dir() or b"somebody" not in path.read_bytes(), path
    facts = exported({**DATA, "prepare": {"strip": command}})
    assert "somebody" not in json.dumps(facts)
    PrepareSettings(**facts["prepare"])  # a bundle still loads, and asks for the command
    with pytest.raises(ValueError, match="give strip= the command"):
        ScanPreprocessor("bundle", facts, None)


# ------------------------------------------------------------------------------------------- digests and interruptions


def test_folds_predict_again_when_their_weights_or_maps_changed_whatever_the_clock_says(
    store: Path, tmp_path: Path, monkeypatch
) -> None:
    from asa.tasks import studies

    calls: list[object] = []

    def fake(command: str, *settings: dict) -> None:
        calls.append(settings)
        write_whole(tmp_path / "out" / "s0.nii.gz", b"a label map")

    run = checkpoint(tmp_path / "run")
    write_json(run / "split.json", {"train": ["s1"], "test": ["s0"]})
    monkeypatch.setattr(studies, "call", fake)
    config = {"data": {"store": str(store)}, "predict": {"overlap": 0.5}, "plugins": []}
    for expected in (1, 1):
        _predict_fold(run, tmp_path / "out", config)
        assert len(calls) == expected
    shutil.rmtree(run / "checkpoints")
    checkpoint(run, seed=1)  # retrained
    for path in run.rglob("*"):
        subprocess.run(["touch", "-d", "2000-01-01", path], check=True)  # the clock went back
    _predict_fold(run, tmp_path / "out", config)
    assert len(calls) == 2
    (tmp_path / "out" / "s0.nii.gz").write_bytes(b"another one")
    _predict_fold(run, tmp_path / "out", config)
    assert len(calls) == 3
    _predict_fold(run, tmp_path / "out", {**config, "predict": {"overlap": 0.25}})
    assert len(calls) == 4


def an_evaluation(raw: Path, folder: Path) -> Path:
    """Label maps that are the truth, two voxels of each changed, and their evaluation in FOLDER/scores."""
    for path in raw.glob("*_seg.nii.gz"):
        label = read_label(path)
        label.data[40, 40, 40:42] = 0
        write_label(folder / "maps" / path.name.replace("_seg", ""), label.data, label)
    records = datasets_folder.records(raw, images={"label": "*_seg.nii.gz"})
    truths = {record["id"]: Path(record["images"]["label"]) for record in records}
    evaluate_folder(folder / "maps", truths, LABELS, "ibsr", folder / "scores", progress=False)
    return folder / "scores"


def test_a_flipped_bit_of_scores_is_noticed_before_they_are_compared(raw: Path, tmp_path: Path) -> None:
    scores = an_evaluation(raw, tmp_path)
    assert read_run("x", scores).values
    for name in ("cases.csv", "summary.json"):
        whole, draws = (scores / name).read_bytes(), np.random.default_rng(0)
        for position in draws.integers(0, 8 * len(whole), 20):
            changed = bytearray(whole)
            changed[position // 8] ^= 1 << (position % 8)
            (scores / name).write_bytes(changed)
            with pytest.raises(ValueError, match=rf"^{scores}/{name}: has changed.*evaluate again"):
                read_run("x", scores)
        (scores / name).write_bytes(whole)
    (scores / DIGESTS).unlink()
    assert read_run("x", scores).values  # of an earlier version


def test_a_flipped_bit_of_a_label_map_is_noticed_before_it_is_scored(tmp_path: Path) -> None:
    """By the CRC of gzip: whatever the bit, the voxels are the same or the file is refused."""
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_header((20, 20, 20), code=2, bits=8) + bytes(range(8)) * 1000)
    label = read_label(path)
    write_label(tmp_path / "a.nii.gz", label.data, label)
    whole, refused = (tmp_path / "a.nii.gz").read_bytes(), 0
    for position in np.random.default_rng(0).integers(0, 8 * len(whole), 300):
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << (position % 8)
        (tmp_path / "a.nii.gz").write_bytes(changed)
        try:
            found = read_label(tmp_path / "a.nii.gz")
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/a.nii.gz: ")
            refused += 1
        else:
            assert np.array_equal(found.data, label.data) and np.array_equal(found.affine, label.affine), position
    assert refused > 200


def test_a_label_map_that_is_another_than_the_scored_one_is_not_drawn(raw: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scores = an_evaluation(raw, tmp_path)
    for path in (tmp_path / "maps").iterdir():
        shutil.copy(raw / path.name.replace(".nii", "_seg.nii"), path)
    records = datasets_folder.records(raw, images={"label": "*_seg.nii.gz"})
    truths = {record["id"]: Path(record["images"]["label"]) for record in records}
    evaluate_folder(tmp_path / "maps", truths, LABELS, "ibsr", tmp_path / "other", progress=False)
    compare_folders({"a": scores, "b": tmp_path / "other"}, tmp_path / "out")
    without = (tmp_path / "out" / "comparison.html").read_text().count("<img")
    (tmp_path / "again").mkdir()
    compare_folders({"b": tmp_path / "other", "a": an_evaluation(raw, tmp_path / "again")}, tmp_path / "out")
    assert (tmp_path / "out" / "comparison.html").read_text().count("<img") > without


def test_a_changed_split_of_a_run_is_not_used(store: Path, tmp_path: Path) -> None:
    config, split = (
        {"out": str(tmp_path / "run"), "train": {}},
        {"train": ["s0", "s1"], "validation": [], "test": ["s2"]},
    )
    settings = TrainSettings(steps=1, device="cpu")
    with open_run(config, split, settings, Backend.of("cpu", "fp32")) as run:
        pass
    assert read_split(run / "split.json") == split
    text = (run / "split.json").read_text()
    (run / "split.json").write_text(text.replace("s2", "s3"))
    (run / "checkpoints/step-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"^{run}/split.json: has changed since it was written"):
        choose_split([], {"split_file": None}, run)
    shutil.copy(run / "split.json", tmp_path / "mine.json")
    assert read_split(tmp_path / "mine.json")["test"] == ["s3"]  # a file of one's own


@pytest.mark.slow
def test_an_evaluation_that_is_killed_leaves_whole_files_and_can_be_repeated(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for path in raw.glob("*_seg.nii.gz"):
        shutil.copy(path, tmp_path / "p" / path.name.replace("_seg", ""))
    arguments = ["evaluate", f"predictions={tmp_path}/p", f"truth={raw}", f"out={tmp_path}/out"]
    arguments += ["pattern=*_seg.nii.gz", "labels={1: csf, 2: gm, 5: wm}"]
    (whole,) = Job(tmp_path, 1, command, *arguments).wait()
    assert whole.code == 0, whole.text
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("cases.csv", "summary.json")}
    job = Job(tmp_path, 1, command, *arguments)
    time.sleep(1)
    job.processes[0].kill()
    job.wait()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert Job(tmp_path, 1, command, *arguments).wait()[0].code == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


def _ablate_and_die(store: Path, out: Path) -> None:
    """An ablation that is killed while it evaluates its first run."""
    import os

    from asa.tasks import studies

    studies.call = lambda name, *_, **__: os.kill(os.getpid(), signal.SIGKILL) if name == "evaluate" else None
    settings = {"store": str(store), "out": str(out), "split": {"test": 1}, "labelled": [1], "only": ["scratch"]}
    from asa.tasks.run import configure

    studies.ablate(configure("ablate", settings))


def test_an_ablation_that_is_killed_is_continued_by_the_same_command(
    store: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from asa.tasks import studies
    from asa.tasks.run import configure

    process = FORK.Process(target=_ablate_and_die, args=(store, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "out" / LOCK).exists()
    called = []
    monkeypatch.setattr(studies, "call", lambda name, *_, **__: called.append(name))
    settings = {
        "store": str(store),
        "out": str(tmp_path / "out"),
        "split": {"test": 1},
        "labelled": [1],
        "only": ["scratch"],
    }
    with pytest.raises(ValueError, match="1 of 1 runs failed"):  # there is no evaluation to read
        studies.ablate(configure("ablate", settings))
    assert called == ["finetune", "predict", "evaluate"] and "taking over the lock" in capsys.readouterr().out
    assert not (tmp_path / "out" / LOCK).exists()
