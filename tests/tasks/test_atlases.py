"""asa-predict atlas=: which scans are atlases, resuming, refusals, layouts, and the scan's own grid."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from heads import centred, dice, scan, turn
from untrained import a_scan, call, checkpoint, voxels

import asa
from asa.cli import evaluate, predict
from asa.config import CONFIG_DIR, compose
from asa.data.datasets import folder
from asa.data.io.nifti import read_image, write_image, write_label
from asa.data.io.tables import read_rows
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.pipeline import to_native
from asa.data.preprocessing.settings import CohortSettings
from asa.data.splits import write_split
from asa.data.store import Store
from asa.inference import atlas as registration
from asa.inference.atlas import load_ants
from asa.inference.segmentation import PredictSettings, Segmenter
from asa.tasks.atlases import FOR_ATLASES

pytestmark = pytest.mark.skipif(find_spec("ants") is None, reason="antspyx is not installed: pip install antspyx")
LABELS = {2: "outer", 7: "inner"}
SHAPE = (38, 48, 36)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    load_ants(1)


def write_head(folder_: Path, name: str, number: int, axes: np.ndarray | None = None, shape: tuple = SHAPE) -> None:
    """A head that differs by its number: NAME_T1w.nii.gz and NAME_dseg.nii.gz."""
    pose = np.diag([1 - 0.02 * number] * 3 + [1.0])
    pose[:3, 3] = 3 * number, -2 * number, number
    affine = centred(shape, np.diag([-4.0, 4.0, 4.0]) if axes is None else axes)
    image, label = scan(shape, affine, pose)
    write_image(folder_ / f"{name}_T1w.nii.gz", image.data, affine)
    write_label(folder_ / f"{name}_dseg.nii.gz", label.data, read_image(folder_ / f"{name}_T1w.nii.gz"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of four subjects, all but the last labelled."""
    root = tmp_path_factory.mktemp("heads")
    for number in range(4):
        write_head(root, f"s{number}", number)
    return root


@pytest.fixture(scope="module")
def heads(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of these heads."""
    out = tmp_path_factory.mktemp("stores") / "heads"
    records = folder.records(raw, images={"t1": "*_T1w.nii.gz"}, label="*_dseg.nii.gz")
    del records[3]["label"]
    assert not prepare_cohort(records, out, CohortSettings(labels=LABELS), progress=False).failures
    return out


@pytest.fixture
def run(heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Run asa-predict with the store's atlases: exit code, and what it printed."""

    def predicted(*settings: str, input: Path = heads, out: str = "out") -> tuple[int, str]:
        code = call(predict, monkeypatch, f"atlas={heads}", f"input={input}", f"out={tmp_path}/{out}", *settings)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return predicted


def test_all_others_of_the_store_are_predicted_and_evaluated(
    run: Callable, heads: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown = run("labelled=1", "fusion=majority")
    assert code == 0 and "left out, as atlases or other scans of their subjects: s0\n" in shown
    assert "atlases, registered to each scan: s0, fusion majority\n" in shown and "s per scan (median of 3)" in shown
    rows = read_rows(tmp_path / "out" / "volumes.csv")
    assert [list(row) for row in rows] == [["id", "outer_ml", "inner_ml"]] * 3  # no expected Dice
    assert [row["id"] for row in rows] == ["s1", "s2", "s3"]
    truth = voxels(raw / "s3_dseg.nii.gz")
    found = voxels(tmp_path / "out" / "s3.nii.gz")
    assert set(np.unique(found)) == {0, 2, 7} and found.shape == truth.shape
    assert dice(found == 2, truth == 2) > 0.96 and dice(found == 7, truth == 7) > 0.85
    write_split(tmp_path / "split.json", {"train": ["s0"], "validation": [], "test": ["s1", "s2"]})
    truth = (f"truth={heads}", f"split_file={tmp_path}/split.json", "part=test", "allow_missing=true")
    assert call(evaluate, monkeypatch, f"predictions={tmp_path}/out", f"out={tmp_path}/scores", *truth) == 0
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["cases"] == 2


def test_a_stopped_command_goes_on_with_what_is_missing(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    done: list[np.ndarray] = []
    carry_over = registration.carry_over

    def stopped(*arguments: object, **options: object) -> np.ndarray:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(carry_over(*arguments, **options))
        return done[-1]

    monkeypatch.setattr(registration, "carry_over", stopped)
    out = tmp_path / "out"
    assert run("labelled=1")[0] == 130
    assert [row["id"] for row in read_rows(out / "volumes.csv")] == ["s1", "s2"]
    times = {id: (out / f"{id}.nii.gz").stat().st_mtime_ns for id in ("s1", "s2")}
    done.clear()
    code, shown = run("labelled=1")
    assert code == 0 and len(done) == 1 and "2 of 3 scans are done already" in shown
    assert times == {id: (out / f"{id}.nii.gz").stat().st_mtime_ns for id in times}
    assert [row["id"] for row in read_rows(out / "volumes.csv")] == ["s1", "s2", "s3"]
    done.clear()
    assert run("labelled=1")[0] == 0 and not done
    (out / "s2.nii.gz").unlink()
    assert run("labelled=1")[0] == 0 and len(done) == 1 and (out / "s2.nii.gz").exists()


def test_another_scan_of_the_same_name_is_not_done(run: Callable, raw: Path, tmp_path: Path, monkeypatch) -> None:
    quick(monkeypatch)
    for site, source in (("a", "s1"), ("b", "s2")):
        (tmp_path / site).mkdir()
        shutil.copy(raw / f"{source}_T1w.nii.gz", tmp_path / site / "new.nii.gz")
    code, shown = run("labelled=[s0]", input=tmp_path / "a")
    assert code == 0 and "done already" not in shown
    assert "1 of 1 scans are done already" in run("labelled=[s0]", input=tmp_path / "a")[1]
    code, shown = run("labelled=[s0]", input=tmp_path / "b")
    assert code == 0 and "done already" not in shown
    assert "1 of 1 scans are done already" in run("labelled=[s0]", input=tmp_path / "b")[1]


def test_a_scan_whose_file_is_gone_fails_by_itself(run: Callable, raw: Path, tmp_path: Path, monkeypatch) -> None:
    quick(monkeypatch)
    away = (raw / "s3_T1w.nii.gz").rename(tmp_path / "away.nii.gz")
    try:
        code, shown = run("labelled=1")
    finally:
        away.rename(raw / "s3_T1w.nii.gz")
    assert code == 1 and "s3: failed: " in shown and "1 scan failed" in shown
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["s1.nii.gz", "s2.nii.gz"]


def test_label_maps_of_other_atlases_and_of_networks_are_not_mixed(
    run: Callable, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    assert run("labelled=1")[0] == 0
    before = (tmp_path / "out" / "atlas.json").read_text()
    record = json.loads(before)
    assert record["store"] == str(heads) and record["fusion"] == "joint" and record["antspyx"]
    assert {id: one["subject"] for id, one in record["atlases"].items()} == {"s0": "s0"}
    for setting in ("labelled=[s1]", "labelled=2"):
        code, shown = run(setting)
        assert code == 1 and "with other atlases: choose" in shown
    assert (tmp_path / "out" / "atlas.json").read_text() == before
    code, shown = run("labelled=1", "fusion=majority")
    assert code == 1 and "with other fusion: choose" in shown
    network = checkpoint(tmp_path / "run", prepare=Store(heads).settings, channels=["t1"])
    arguments = (f"checkpoint={network}", f"input={heads}", f"out={tmp_path}/out", "predict.device=cpu")
    assert call(predict, monkeypatch, *arguments) == 1
    assert "holds label maps that atlases made (atlas.json): choose another out=" in capsys.readouterr().err
    (tmp_path / "out" / "atlas.json").unlink()
    code, shown = run("labelled=1")
    assert code == 1 and "is not empty and not a folder of asa-predict with these atlases" in shown


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each scan random votes in place of registered labels."""

    def votes(image: np.ndarray, spacing: object, atlases: list, fusion: str, **_: object) -> np.ndarray:
        labels = np.random.default_rng(0).integers(0, 3, (len(atlases), *image.shape[1:]), np.uint8)
        return registration.majority(labels, atlases[0].classes)

    monkeypatch.setattr(registration, "carry_over", votes)


def test_a_split_chooses_the_atlases_and_the_scans(run: Callable, tmp_path: Path, monkeypatch) -> None:
    quick(monkeypatch)
    split = tmp_path / "split.json"
    write_split(split, {"train": ["s3", "s2", "s1"], "validation": [], "test": ["s0"]})
    code, shown = run(f"split_file={split}", "labelled=1", "part=test")  # s3 has no label map
    assert code == 0 and "each scan: s2, fusion joint\n" in shown
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["s0.nii.gz"]
    code, shown = run(f"split_file={split}", out="all")
    assert code == 0 and "each scan: s2, s1, fusion joint\n" in shown
    assert sorted(path.name for path in (tmp_path / "all").glob("*.nii.gz")) == ["s0.nii.gz", "s3.nii.gz"]
    assert json.loads((tmp_path / "all" / "atlas.json").read_text())["fusion"] == "joint"


def test_law_networks_beside_atlases_do_not_predict_the_scans_they_were_trained_on(
    run: Callable, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    folds = [network_of(heads, tmp_path / f"fold{k}", seed=k) for k in (0, 1)]
    write_split(folds[0] / "split.json", {"train": ["s1", "s2"], "validation": [], "test": ["s0", "s3"]})
    write_split(folds[1] / "split.json", {"train": ["s0", "s2"], "validation": [], "test": ["s1", "s3"]})
    given = (f"split_file={folds[0]}/split.json", "part=test", "labelled=1")
    code, shown = run(*given, f"checkpoint=[{folds[0]},{folds[1]}]")
    assert code == 1 and f"{folds[1]} has other subjects there than {folds[0]}/split.json" in shown
    assert run(*given, f"checkpoint={folds[0]}")[0] == 0


def test_beside_networks_raw_scans_get_the_voxels_that_these_take(
    run: Callable, heads: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    scan = read_image(raw / "s3_T1w.nii.gz")
    finer = np.repeat(np.repeat(np.repeat(scan.data, 2, 0), 2, 1), 2, 2)
    (tmp_path / "raw").mkdir()
    write_image(tmp_path / "raw" / "fine.nii.gz", finer, scan.affine @ np.diag([0.5, 0.5, 0.5, 1]))
    network = network_of(heads, tmp_path / "run")
    code, shown = run("labelled=1", f"checkpoint={network}", input=tmp_path / "raw")
    assert code == 0 and "resampled to 4 mm, and the result back" in shown
    assert read_image(tmp_path / "out" / "fine.nii.gz").data.shape == finer.shape


def test_votes_of_several_atlases_are_written_as_probabilities_that_sum_to_1(
    run: Callable, heads: Path, tmp_path: Path
) -> None:
    settings = ("labelled=[s0,s1,s2]", "fusion=majority", "probabilities=true", "uncertainty=entropy")
    assert run(*settings)[0] == 0
    out = tmp_path / "out"
    names = ("background", "outer", "inner")
    shares = np.stack([voxels(out / "probabilities" / "s3" / f"{name}.nii.gz") for name in names])
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-6)
    assert set(np.unique(np.rint(shares * 3))) == {0, 1, 2, 3} and np.allclose(shares * 3, np.rint(shares * 3))
    assert np.array_equal(np.array([0, 2, 7])[shares.argmax(axis=0)], voxels(out / "s3.nii.gz"))
    uncertainty = voxels(out / "uncertainty" / "s3.nii.gz")
    assert np.array_equal(uncertainty > 0, shares.max(axis=0) < 0.9) and uncertainty.max() <= 1
    shutil.rmtree(out / "probabilities" / "s3")
    assert run(*settings)[0] == 0 and (out / "probabilities" / "s3" / "inner.nii.gz").exists()  # not complete


def test_processes_give_the_same_label_maps_as_one(run: Callable, raw: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        settings = ("labelled=2", "fusion=majority", f"workers={workers}")
        code, shown = run(*settings, input=raw_folder(raw, tmp_path), out=str(workers))
        assert code == 0, shown
    for id in ("new", "s2"):
        assert np.array_equal(*(voxels(tmp_path / out / f"{id}.nii.gz") for out in "12"))
    assert [row["id"] for row in read_rows(tmp_path / "2" / "volumes.csv")] == ["new", "s2"]


def raw_folder(raw: Path, tmp_path: Path) -> Path:
    """A folder with a scan of the store that is no atlas, and a new one."""
    scans = tmp_path / "scans"
    scans.mkdir(exist_ok=True)
    shutil.copy(raw / "s2_T1w.nii.gz", scans / "s2.nii.gz")
    shutil.copy(raw / "s3_T1w.nii.gz", scans / "new.nii.gz")
    return scans


def test_an_oblique_scan_with_anisotropic_voxels_gets_its_labels_on_its_own_grid(run: Callable, tmp_path: Path) -> None:
    axes = turn((12, -8, 15)) @ np.array([[0, 0, 6.0], [-3.0, 0, 0], [0, 3.0, 0]])
    write_head(tmp_path / "one", "oblique", 2, axes, (62, 54, 28))
    truth = read_image(tmp_path / "one" / "oblique_dseg.nii.gz")
    (tmp_path / "one" / "oblique_dseg.nii.gz").unlink()
    assert run("labelled=1", "fusion=majority", input=tmp_path / "one" / "oblique_T1w.nii.gz")[0] == 0
    made = read_image(tmp_path / "out" / "oblique_T1w.nii.gz")
    assert np.allclose(made.affine, truth.affine) and made.data.shape == truth.data.shape
    assert dice(made.data == 2, truth.data == 2) > 0.95 and dice(made.data == 7, truth.data == 7) > 0.8


def test_a_scan_that_fails_is_named_and_the_others_are_done(run: Callable, raw: Path, tmp_path: Path) -> None:
    scans = raw_folder(raw, tmp_path)
    (scans / "broken.nii.gz").write_bytes(b"no image")
    shutil.copy(raw / "s0_T1w.nii.gz", scans / "copy.nii.gz")
    image = read_image(raw / "s3_T1w.nii.gz")
    write_image(scans / "thin.nii.gz", image.data[18:20], image.affine)  # two slices
    for done in ("", "2 of 5 scans are done already"):
        code, shown = run("labelled=1", "fusion=majority", input=scans)
        assert code == 1 and "3 scans failed, listed above" in shown and done in shown
        assert "broken: failed: " in shown
        assert "copy: failed: its voxels are those of the atlas s0, which has a label map: leave the scan out" in shown
        assert "thin: failed: the atlas s0 could not be registered" in shown
        assert [row["id"] for row in read_rows(tmp_path / "out" / "volumes.csv")] == ["new", "s2"]


def test_the_files_of_atlases_are_left_out_of_a_folder(run: Callable, raw: Path, tmp_path: Path, monkeypatch) -> None:
    quick(monkeypatch)
    code, shown = run("labelled=1", "images={t1: '*_T1w.nii.gz'}", input=raw)
    assert code == 0 and "left out, as atlases or other scans of their subjects: s0\n" in shown
    assert [row["id"] for row in read_rows(tmp_path / "out" / "volumes.csv")] == ["s1", "s2", "s3"]
    code, shown = run(out="none", input=raw / "s0_T1w.nii.gz")
    assert code == 1 and "are atlases" in shown and "choose labelled=" in shown


def test_a_subject_of_another_store_with_the_name_of_an_atlas_is_predicted_with_a_note(
    run: Callable, raw: Path, tmp_path: Path, monkeypatch
) -> None:
    quick(monkeypatch)
    write_head(tmp_path / "other", "s0", 3)
    records = folder.records(tmp_path / "other", images={"t1": "*_T1w.nii.gz"})
    prepare_cohort(records, tmp_path / "store", CohortSettings(), progress=False)
    code, shown = run("labelled=1", input=tmp_path / "store")
    assert code == 0 and "note: subjects of s0 are called as atlases are" in shown
    assert (tmp_path / "out" / "s0.nii.gz").exists()


def test_a_bids_derivative_names_the_atlases(
    run: Callable, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    root = tmp_path / "dataset"
    for number in range(2):
        write_head(root / f"sub-{number}" / "anat", f"sub-{number}", 2 + number)
        (root / f"sub-{number}" / "anat" / f"sub-{number}_dseg.nii.gz").unlink()
    out = root / "derivatives" / "asa"
    settings = ("labelled=2", "layout=bids", "probabilities=true")
    for _ in range(2):
        code, shown = run(*settings, input=root, out=out.relative_to(tmp_path).as_posix())
        assert code == 0, shown
    assert "2 of 2 scans are done already" in shown
    anat = out / "sub-1" / "anat"
    assert (anat / "sub-1_label-inner_probseg.nii.gz").exists()
    (made,) = [json.loads((anat / "sub-1_dseg.json").read_text())["GeneratedBy"]]
    digests = {record["id"]: record["arrays"]["label"] for record in Store(heads).records if record["id"] < "s2"}
    assert made["Atlases"] == [{"Name": id, "SHA256": digest} for id, digest in digests.items()]
    assert made["Fusion"] == "joint" and made["Registration"].startswith("SyN of ANTs (antspyx ")
    assert "atlas.json" in (out / ".bidsignore").read_text() and (out / "atlas.json").exists()
    rows = read_rows(out / "volumes.csv")
    assert [row["file"] for row in rows] == [f"sub-{k}/anat/sub-{k}_dseg.nii.gz" for k in (0, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mirror=true"], "mirror= is for networks"),
        (["predict.overlap=0.7"], "predict.* is for networks"),
        (["labelled=1", "probabilities=true"], "of the votes of several atlases, and there is one"),
        (["labelled=1", "uncertainty=entropy"], "of the votes of several atlases, and there is one"),
        (["uncertainty=spread"], "uncertainty=spread: with atlases choose entropy"),
        (["labelled=0"], "has 3 labelled subjects: give a number from 1 to 3"),
        (["labelled=4"], "has 3 labelled subjects: give a number from 1 to 3"),
        (["labelled=0.5"], "give a number from 1 to 3, or a list of subjects, like [s0]"),
        (["labelled=s1"], "or a list of subjects, like [s0]"),
        (["labelled=[s1,s3]"], "s3 is no subject of"),
        (["labelled=[]"], "nobody is no subject of"),
        (["fusion=mean"], "fusion=mean: choose joint or majority"),
        (["workers=0"], "workers=0: give 1 or more"),
        (["workers=two"], "workers=two: give 1 or more processes"),
        (["part=test"], "atlases have no split as a run has: give split_file="),
        (["split_file={split}", "part=test"], "has no subjects under that name"),
        (["split_file={split}", "labelled=2"], "the training part of"),
        (["layout=flat"], "layout=flat: choose bids"),
        (["strip=nothing"], "strip='nothing': choose none"),
        (["checkpoint=runs/x"], "runs/x: no checkpoint here"),
        (["healthy=x"], "healthy= is for networks"),
    ],
)
def test_settings_that_do_not_fit_atlases_are_refused_before_the_work(
    run: Callable, tmp_path: Path, settings: list[str], message: str
) -> None:
    write_split(tmp_path / "split.json", {"train": ["s0"], "validation": ["s1"], "test": []})
    code, shown = run(*(setting.replace("{split}", str(tmp_path / "split.json")) for setting in settings))
    assert code == 1 and message in shown and shown.count("\n") <= 2, shown
    assert not (tmp_path / "out").exists()


def test_settings_of_atlases_are_refused_with_a_network(
    heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = yaml.safe_load((CONFIG_DIR / "predict.yaml").read_text())
    assert {key: shipped[key] for key in FOR_ATLASES} == FOR_ATLASES
    network = checkpoint(tmp_path / "run")
    write_split(tmp_path / "split.json", {"train": ["s0"], "validation": [], "test": []})
    for setting in ("labelled=1", "fusion=majority", "workers=2", f"split_file={tmp_path}/split.json"):
        paths = (f"checkpoint={network}", f"input={a_scan(tmp_path)}", f"out={tmp_path}/out")
        assert call(predict, monkeypatch, *paths, setting) == 1
        assert f"{setting.partition('=')[0]}= is for atlas=, which was not given" in capsys.readouterr().err


def network_of(store: Path, folder_: Path, **other: object) -> Path:
    """An untrained network for the scans and labels of the store."""
    own = {"labels": LABELS, "prepare": Store(store).settings, "lateral_pairs": [], "spacing": [[4.0] * 3] * 2}
    return checkpoint(folder_, out_channels=1 + len(LABELS), **{**own, **other})


def test_networks_vote_beside_the_atlases(
    run: Callable, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    prepared = Store(heads).settings | {"nan": "zero"}  # which changes no scan without NaN
    networks = [network_of(heads, tmp_path / name, seed=k, prepare=prepared) for k, name in enumerate(("one", "two"))]
    windows = ("predict.overlap=0.25", "predict.precision=fp32")
    written = ("labelled=2", "probabilities=true", "uncertainty=entropy")
    given = (*windows, *written, f"checkpoint=[{networks[0]},{networks[1]}]")
    code, shown = run(*given)
    assert code == 0 and f"averaged with the networks {networks[0]}, {networks[1]}\n" in shown, shown
    store, settings = Store(heads), PredictSettings(device="cpu", overlap=0.25, precision="fp32")
    image, chain = torch.from_numpy(np.asarray(store.image("s2"), np.float32)), store.record("s2")["chain"]
    predicted = Segmenter(networks, settings).probabilities(image).numpy()
    votes = registration.carry_over(image.numpy(), (4, 4, 4), registration.read_atlases(store, ["s0", "s1"]), "joint")
    expected = (2 * votes + 0.5 * predicted) / 2.5
    for name, wanted in zip(("outer", "inner"), expected[1:], strict=True):
        found = voxels(tmp_path / "out" / "probabilities" / "s2" / f"{name}.nii.gz")
        np.testing.assert_allclose(found, to_native(wanted[None], chain)[0], atol=1e-5)
    assert (tmp_path / "out" / "uncertainty" / "s2.nii.gz").exists()
    made = json.loads((tmp_path / "out" / "atlas.json").read_text())["networks"]
    assert [each["Name"] for each in made["Networks"]] == ["one", "two"] and made["votes"] == 0.5
    assert "2 of 2 scans are done already" in run(*given)[1]
    code, shown = run(*given[:-1], f"checkpoint={networks[0]}")
    assert code == 1 and "were made with other networks" in shown


def test_networks_take_the_voxels_of_a_store_without_a_warning(
    run: Callable, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    torch.set_warn_always(True)  # else some are given once in a process
    try:
        code, shown = run("labelled=2", f"checkpoint={network_of(heads, tmp_path / 'run')}")
    finally:
        torch.set_warn_always(False)
    assert code == 0 and "writable" not in shown


def test_votes_are_averaged_voxel_by_voxel_and_where_atlases_have_none_networks_decide() -> None:
    rng = np.random.default_rng(0)
    votes, predicted = rng.dirichlet(np.ones(4), 6).T, rng.dirichlet(np.ones(3), 6).T
    votes[:, 1], votes[:, 2] = [0, 1, 0, 0], 0  # all for one class; the atlases ignore the next voxel
    expected = predicted.copy()
    for voxel in (0, 1, 3, 4, 5):
        joined = [votes[0, voxel], votes[1, voxel] + votes[3, voxel], votes[2, voxel]]  # class 3 is the other side of 1
        expected[:, voxel] = [(5 * vote + 0.5 * p) / 5.5 for vote, p in zip(joined, predicted[:, voxel], strict=True)]
    shaped = (torch.tensor(each).float()[..., None, None] for each in (votes, predicted))
    found = registration.average(*shaped, atlases=5, channels=[0, 1, 2, 1])[..., 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected).float())
    torch.testing.assert_close(found.sum(dim=0), torch.ones(6))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"channels": ["flair"]}, "its channels, ['flair'], are not those of the atlases' store"),
        ({"labels": {2: "outer", 5: "inner"}}, "its labels, {2: 'outer', 5: 'inner'}, are not those"),
        ({"regions": [["both", [2, 7]], ["core", [7]]], "out_channels": 2}, "its regions, "),
        ({"prepare": {"crop": "foreground", "spacing": 3.0}}, "its preparation, "),
    ],
)
def test_networks_of_other_scans_or_labels_do_not_vote(
    run: Callable, heads: Path, tmp_path: Path, other: dict, message: str
) -> None:
    own = {"out_channels": 1 + len(LABELS), **other}
    shared = {"labels": LABELS, "prepare": Store(heads).settings, "lateral_pairs": []}
    network = checkpoint(tmp_path / "run", **{**shared, **own})
    code, shown = run(f"checkpoint={network}")
    assert code == 1 and message in shown and "leave checkpoint= or atlas= out" in shown, shown
    assert not (tmp_path / "out").exists()


def test_one_of_checkpoint_and_atlas_has_to_be_given() -> None:
    with pytest.raises(ValueError, match=r"^checkpoint, input has to be given: add checkpoint=\.\.\. or atlas=\.\.\.$"):
        compose("predict", ["out=x"])
    with pytest.raises(ValueError, match=r"^input has to be given: add input=\.\.\.$"):
        compose("predict", ["out=x", "atlas=y"])


def test_stores_that_do_not_fit_are_refused(
    run: Callable, heads: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    records = folder.records(raw, images={"t1": "*_T1w.nii.gz"})
    prepare_cohort(records[:1], tmp_path / "unlabelled", CohortSettings(), progress=False)
    others = (f"atlas={tmp_path}/unlabelled", f"input={heads}", f"out={tmp_path}/out")
    assert call(predict, monkeypatch, *others) == 1
    assert "none of the scans has a label map: prepare it with" in capsys.readouterr().err
    records = folder.records(raw, images={"flair": "*_T1w.nii.gz"})
    prepare_cohort(records[:1], tmp_path / "flair", CohortSettings(), progress=False)
    code, shown = run(input=tmp_path / "flair")
    assert code == 1 and f"than the scans of {heads} (channels: t1 there, flair here): predict the raw scans" in shown


def test_from_python_one_atlas_is_corrected_by_joint_fusion(heads: Path, raw: Path, tmp_path: Path) -> None:
    out = asa.predict(None, raw / "s3_T1w.nii.gz", tmp_path / "out", atlas=heads, labelled=["s0"])
    found, truth = voxels(out / "s3_T1w.nii.gz"), voxels(raw / "s3_dseg.nii.gz")
    assert dice(found == 2, truth == 2) > 0.96 and dice(found == 7, truth == 7) > 0.85
    assert json.loads((out / "atlas.json").read_text())["fusion"] == "joint"
    with pytest.raises(ValueError, match=r"checkpoint has to be given: add checkpoint=\.\.\. or atlas="):
        asa.predict(None, raw, tmp_path / "out")
