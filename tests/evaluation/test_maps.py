"""Anomaly maps against lesions."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_brain
from sklearn.metrics import average_precision_score, roc_auc_score
from stores import read_tree, write_tree

from asa.data.datasets import folder
from asa.data.io.files import read_json, write_whole
from asa.data.io.nifti import read_image, read_label, write_image, write_label
from asa.data.io.tables import csv_text, read_rows
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.splits import write_split
from asa.data.store import Store, write_array
from asa.evaluation.scans import voxel_scores
from asa.evaluation.tables import evaluate_maps
from asa.tasks.run import evaluate


@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_voxels_are_those_of_scikit_learn_and_of_every_threshold(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for size in (2, 30, 400):
        lesion = np.arange(size) < max(1, size // 9)
        values = rng.normal(size=size) + lesion
        values = np.round(values) if ties else values
        found = voxel_scores(values, lesion)
        assert found["auc"] == pytest.approx(roc_auc_score(lesion, values))
        assert found["average_precision"] == pytest.approx(average_precision_score(lesion, values))
        assert found["by_chance"] == lesion.mean()
        dice = [2 * (lesion & (values >= t)).sum() / (lesion.sum() + (values >= t).sum()) for t in np.unique(values)]
        assert found["best_dice"] == pytest.approx(max(dice))
        assert found["peak_in_lesion"] == float(lesion[int(np.argmax(values))])


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans with a lesion to the left, and one without; voxels that are ignored in the first."""
    root = tmp_path_factory.mktemp("lesions")
    for k in range(4):
        write_brain(root, f"s{k}", seed=k, size=(40, 44, 42))
        like = read_image(root / f"s{k}_T1.nii.gz")
        label = np.zeros(like.data.shape, np.uint8)
        if k < 3:
            label[24:30, 18:24, 20:24] = 1  # to the left, as x runs to the left
            label[24:30, 18:24, 24:26] = 3 if k == 0 else 0
        write_label(root / f"s{k}_seg.nii.gz", label, like)
    records = folder.records(root, images={"t1": "*_T1.nii.gz"}, label="*_seg.nii.gz")
    settings = CohortSettings({1: "lesion"}, [3], settings=PrepareSettings(crop=[48, 48, 48]))
    assert not prepare_cohort(records, root / "store", settings, progress=False).failures
    return root


def write_maps(root: Path, out: Path, table: str, *, exchanged: bool = False, inverted: bool = False) -> Path:
    """The labels as maps, those of the other side if `exchanged`, and a table that ranks the healthy scan last."""
    for k in range(4):
        label = read_label(root / f"s{k}_seg.nii.gz")
        values = (label.data[::-1] if exchanged else label.data) == 1
        write_image(out / f"s{k}.nii.gz", (~values if inverted else values).astype(np.float32), label.affine)
    header = (["score"] if table == "asymmetry.csv" else []) + ["mean", "top", "peak", "x", "y", "z"]
    rows = [[f"s{k}", *([3 - k] * len(header))] for k in range(4)]
    write_whole(out / table, csv_text(["id", *header], rows).encode())
    return out / table


def test_a_map_that_is_the_lesion_is_perfect_and_its_opposite_the_worst(lesions: Path, tmp_path: Path) -> None:
    store = Store(lesions / "store")
    table = write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    found = evaluate_maps(table, store, tmp_path / "out")
    assert found == read_json(tmp_path / "out/summary.json") and list(found["scans"].values()) == [3, 1, 0, 0]
    for score in ("auc", "average_precision", "best_dice", "peak_in_lesion"):
        assert found["voxels"][score] == {"mean": 1, "low": 1, "high": 1}
    assert list(found["results"]) == ["mean", "top", "peak"] and found["results"]["top"]["auc"] == 1
    rows = read_rows(tmp_path / "out/scans.csv")
    assert [row["id"] for row in rows] == ["s0", "s1", "s2"]
    head = np.count_nonzero(np.array(store.image("s0")))
    assert float(rows[0]["by_chance"]) == pytest.approx(144 / (head - 72), rel=1e-4)  # less the ignored voxels
    inverted = write_maps(lesions, tmp_path / "inverted", "anomaly.csv", inverted=True)
    worst = evaluate_maps(inverted, store, tmp_path / "out")["voxels"]
    assert worst["auc"]["mean"] == worst["peak_in_lesion"]["mean"] == 0


def test_of_a_map_that_compares_the_sides_the_mirror_image_of_the_lesion_is_right(
    lesions: Path, tmp_path: Path
) -> None:
    store = Store(lesions / "store")
    of_one_side, of_both = (
        evaluate_maps(write_maps(lesions, tmp_path / table, table, exchanged=True), store, tmp_path / "out")["voxels"]
        for table in ("anomaly.csv", "asymmetry.csv")
    )
    assert of_one_side["peak_in_lesion"]["mean"] == 0 and of_both["peak_in_lesion"]["mean"] == 1
    assert of_both["auc"]["mean"] > 0.7 > of_one_side["auc"]["mean"]


def test_the_command_takes_a_store_as_the_truth(lesions: Path, tmp_path: Path, capsys) -> None:
    write_maps(lesions, tmp_path / "maps", "asymmetry.csv")
    summary = evaluate(tmp_path / "maps", lesions / "store", tmp_path / "out", policy="asymmetry")
    said = capsys.readouterr().out
    assert summary["scans"]["with_lesion"] == 3 and "AUC of score  1.000 (" in said
    assert "3 scans with a lesion, 1 without" in said and "average_precision" in said


def test_the_reader_is_told_of_scans_trained_on_and_of_labels_that_changed(lesions, tmp_path, capsys) -> None:
    shutil.copytree(lesions / "store", tmp_path / "store")
    manifest = read_tree(tmp_path / "store")
    manifest["records"][1]["sources"]["label"]["sha256"] = "0" * 64
    write_tree(tmp_path / "store", manifest)
    table = write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    rows = [{**row, "trained_on": "yes" if row["id"] == "s2" else "no"} for row in read_rows(table)]
    table.write_text(csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    summary = evaluate(tmp_path / "maps", tmp_path / "store", tmp_path / "out", policy="asymmetry")
    changed, seen = summary["notes"]
    assert changed.startswith("warning: 1 label map has changed since asa-prepare (s1)")
    assert seen.startswith("warning: the network, or the encoder") and "was trained on 1 of 4 scans (s2)" in seen
    assert f"{changed}\n{seen}\n" in capsys.readouterr().out


def test_maps_of_other_scans_are_refused(lesions: Path, tmp_path: Path) -> None:
    table = write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    write_image(tmp_path / "maps/s1.nii.gz", np.ones((4, 4, 4), np.float32), np.eye(4))
    with pytest.raises(ValueError, match=r"s1.nii.gz and its label map in .*: shapes .* differ"):
        evaluate_maps(table, Store(lesions / "store"), tmp_path / "out")
    table.write_text(table.read_text().replace("\ns", "\nother"))
    with pytest.raises(ValueError, match=r"anomaly.csv: none of its scans has a lesion in .*: predict input="):
        evaluate_maps(table, Store(lesions / "store"), tmp_path / "out")


def test_maps_of_a_flipped_copy_of_the_scan_are_refused(lesions: Path, tmp_path: Path) -> None:
    table = write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    label = read_label(lesions / "s1_seg.nii.gz")
    flipped = label.affine.copy()
    flipped[0] *= -1
    write_image(tmp_path / "maps/s1.nii.gz", label.data.astype(np.float32), flipped)
    with pytest.raises(ValueError, match=r"s1.nii.gz and its label map in .*corners are .* mm apart"):
        evaluate_maps(table, Store(lesions / "store"), tmp_path / "out")


def test_a_lesion_outside_the_head_is_one_that_was_missed(lesions: Path, tmp_path: Path) -> None:
    """As of a skull stripping that removed it."""
    store, table = Store(lesions / "store"), write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    manifest = read_tree(lesions / "store")
    image = np.array(store.image("s1"))
    image[:, np.array(store.label("s1"))[0] > 0] = 0
    shutil.copytree(lesions / "store", tmp_path / "store")
    record = next(record for record in manifest["records"] if record["id"] == "s1")
    record["arrays"]["image"] = write_array(tmp_path / "store", "s1", "image", image)
    write_tree(tmp_path / "store", manifest)
    write_image(
        tmp_path / "maps/s1.nii.gz", np.zeros((40, 44, 42), np.float32), read_image(table.with_name("s1.nii.gz")).affine
    )
    evaluate_maps(table, Store(tmp_path / "store"), tmp_path / "out")
    row = read_rows(tmp_path / "out/scans.csv")[1]
    assert row["id"] == "s1" and float(row["auc"]) == 0.5 and float(row["average_precision"]) == float(row["by_chance"])


def test_on_a_resampled_store_maps_and_labels_are_compared_on_the_scans_own_grid(lesions: Path, tmp_path: Path) -> None:
    records = folder.records(lesions, images={"t1": "*_T1.nii.gz"}, label="*_seg.nii.gz")
    settings = CohortSettings({1: "lesion"}, [3], settings=PrepareSettings(spacing=2.5))
    assert not prepare_cohort(records, tmp_path / "store", settings, progress=False).failures
    table = write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    found = evaluate_maps(table, Store(tmp_path / "store"), tmp_path / "out")["voxels"]
    assert found["best_dice"]["mean"] == found["auc"]["mean"] == 1


def test_the_parts_of_a_split_choose_scans(lesions: Path, tmp_path: Path, capsys) -> None:
    write_maps(lesions, tmp_path / "maps", "anomaly.csv")
    split = {"train": ["s0"], "validation": [], "test": ["s1", "s2", "s3"]}
    write_split(tmp_path / "split.json", split)
    chosen = {"policy": "asymmetry", "split_file": str(tmp_path / "split.json")}
    summary = evaluate(tmp_path / "maps", lesions / "store", tmp_path / "out", **chosen)
    assert summary["scans"] == {"with_lesion": 2, "without": 1, "left_out": 1, "without_prediction": 0}
    with pytest.raises(ValueError, match="regions= is for label maps"):
        evaluate(tmp_path / "maps", lesions / "store", tmp_path / "out", **chosen, regions={"a": [1]})
    with pytest.raises(FileNotFoundError, match=r"anomaly.csv: no such table"):
        evaluate(tmp_path / "out", lesions / "store", tmp_path / "new", **chosen)
