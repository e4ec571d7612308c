"""nnU-Net's datasets: what asa-export writes is what data=nnunet reads, and what nnU-Net's own check accepts."""

import json
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from asa.config import compose
from asa.data.datasets import folder, nnunet
from asa.data.io.nifti import read_image, read_label, write_image, write_label
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.data.splits import read_split
from asa.data.store import Store
from asa.export.nnunet import export_nnunet
from asa.tasks.preparation import prepare_task
from tests.conftest import LABELS

REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}


def two_channels(root: Path, cases: int = 2, labelled: int = 2) -> Path:
    """Scans with T1 and FLAIR and labels 1, 2, 4 and, to be ignored, 9."""
    root.mkdir(parents=True)
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]])
    for case in range(cases):
        rng = np.random.default_rng(case)
        for channel in ("t1", "flair"):
            write_image(root / f"c{case}_{channel}.nii.gz", rng.uniform(1, 2, (20, 24, 18)), affine)
        if case < labelled:
            label = rng.choice([0, 1, 2, 4, 9], (20, 24, 18)).astype(np.uint8)
            write_label(root / f"c{case}_seg.nii.gz", label, read_image(root / f"c{case}_t1.nii.gz"))
    return root


def prepared(root: Path, out: Path, **settings) -> Path:
    found = folder.records(root, images={"t1": "*_t1.nii.gz", "flair": "*_flair.nii.gz"}, label="*_seg.nii.gz")
    for record in found:
        if not Path(record["label"]).is_file():
            del record["label"]
    options = {"labels": {1: "necrosis", 2: "oedema", 4: "enhancing"}, "ignored": [9]} | settings
    assert not prepare_cohort(found, out, CohortSettings(**options), progress=False).failures
    return out


def check_rules(dataset: Path) -> None:
    """What nnU-Net demands of a raw dataset: names, counts, consecutive labels, and one grid per case."""
    about = json.loads((dataset / "dataset.json").read_text())
    declared = {name: np.atleast_1d(values).tolist() for name, values in about["labels"].items()}
    assert declared["background"] == [0]
    values = sorted({value for group in declared.values() for value in group})
    assert values == list(range(len(values)))
    assert declared.get("ignore", [values[-1]]) == [values[-1]]
    if any(len(group) > 1 for group in declared.values()):
        assert len(about["regions_class_order"]) == len(declared.keys() - {"background", "ignore"})
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (dataset / "labelsTr").iterdir())
    assert len(cases) == about["numTraining"]
    expected = [
        f"{case}_{number}.nii.gz" for case, number in product(cases, ("0000", "0001")[: len(about["channel_names"])])
    ]
    assert sorted(path.name for path in (dataset / "imagesTr").iterdir()) == expected
    for case in cases:
        label = nib.load(dataset / f"labelsTr/{case}.nii.gz")
        assert set(np.unique(label.dataobj)) <= set(values)
        for path in (dataset / "imagesTr").glob(f"{case}_*"):
            image = nib.load(path)
            assert image.shape == label.shape and np.allclose(image.affine, label.affine, atol=1e-4)


def test_a_store_written_and_read_again_has_the_same_voxels_and_labels(store, raw, tmp_path):
    about = export_nnunet(store, tmp_path / "Dataset001_brains")
    check_rules(tmp_path / "Dataset001_brains")
    assert about["labels"] == {"background": 0, "csf": 1, "gm": 2, "wm": 3}  # 1, 2 and 5 in the sources
    assert (tmp_path / "Dataset001_brains/imagesTr/s0_0000.nii.gz").read_bytes() == (raw / "s0_T1.nii.gz").read_bytes()
    again = tmp_path / "again"
    prepare_task(compose("prepare", ["data=nnunet", f"data.root='{tmp_path}/Dataset001_brains'", f"out='{again}'"]))
    one, other = Store(store), Store(again)
    assert other.labels == dict(enumerate(LABELS.values(), start=1)) and other.channels == one.channels
    assert [record["id"] for record in other.records] == [record["id"] for record in one.records]
    for id in ("s0", "s1", "s2", "s3"):
        np.testing.assert_array_equal(one.image(id), other.image(id))
        np.testing.assert_array_equal(one.label(id), other.label(id))
        assert one.record(id)["chain"]["affine"] == other.record(id)["chain"]["affine"]


def test_channels_regions_and_the_ignored_value_survive_and_unlabelled_scans_are_tests(tmp_path):
    scans = two_channels(tmp_path / "raw", cases=3, labelled=2)
    store = prepared(scans, tmp_path / "store", regions=REGIONS)
    about = export_nnunet(store, tmp_path / "Dataset002_tumours")
    check_rules(tmp_path / "Dataset002_tumours")
    assert about["labels"] == {"background": 0, "WT": [1, 2, 3], "TC": [1, 3], "ET": [3], "ignore": 4}
    assert about["regions_class_order"] == [2, 1, 3]
    scheme = nnunet.label_scheme(tmp_path / "Dataset002_tumours")
    assert scheme.labels == {1: "label_1", 2: "label_2", 3: "ET"} and scheme.ignored == [4]
    assert scheme.regions == {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
    records = nnunet.records(tmp_path / "Dataset002_tumours")
    assert [record["id"] for record in records] == ["c0", "c1"] and list(records[0]["images"]) == ["t1", "flair"]
    renumbered = {0: 0, 1: 1, 2: 2, 4: 3, 9: 4}
    for record in records:
        source, written = read_label(scans / f"{record['id']}_seg.nii.gz"), read_label(record["label"])
        np.testing.assert_array_equal(np.vectorize(renumbered.get)(source.data), written.data)
        np.testing.assert_allclose(source.affine, written.affine)
    (test,) = nnunet.records(tmp_path / "Dataset002_tumours", part="test")
    assert test["id"] == "c2" and "label" not in test


@pytest.mark.parametrize("names", list(permutations(REGIONS)))
def test_a_label_map_painted_region_by_region_is_the_label_map(tmp_path, names):
    """nnU-Net paints the value of each region over those before it, so inner ones are last, however declared."""
    regions = {name: REGIONS[name] for name in names}
    about = export_nnunet(prepared(two_channels(tmp_path / "raw"), tmp_path / "store", regions=regions), tmp_path / "x")
    check_rules(tmp_path / "x")
    declared = {name: values for name, values in about["labels"].items() if name in regions}
    assert declared.keys() == regions.keys()
    for value in {value for values in declared.values() for value in values}:
        painted = 0
        for values, colour in zip(declared.values(), about["regions_class_order"], strict=True):
            painted = colour if value in values else painted
        assert painted == value, (declared, about)


def test_files_of_another_export_are_not_left_among_the_cases(tmp_path):
    scans = two_channels(tmp_path / "raw", cases=3)
    export_nnunet(prepared(scans, tmp_path / "three"), tmp_path / "Dataset004_x")
    export_nnunet(tmp_path / "three", tmp_path / "Dataset004_x")
    for path in scans.glob("c2*"):
        path.unlink()
    before = (tmp_path / "Dataset004_x/dataset.json").read_bytes()
    with pytest.raises(ValueError, match=r"c2_0000\.nii\.gz: no case of .*two has this file: remove it"):
        export_nnunet(prepared(scans, tmp_path / "two"), tmp_path / "Dataset004_x")
    assert (tmp_path / "Dataset004_x/dataset.json").read_bytes() == before


@pytest.mark.parametrize(("name", "warned"), [("Dataset012_ours-2", False), ("ours", True), ("Dataset12_ours", True)])
def test_a_folder_that_nnunet_would_not_find_is_warned_about(tmp_path, recwarn, name, warned):
    export_nnunet(prepared(two_channels(tmp_path / "raw"), tmp_path / "store"), tmp_path / name)
    text = "nnU-Net takes only folders called DatasetNNN_NAME, like Dataset001_ours: rename it"
    assert any(text in str(one.message).replace("Dataset12_", "") for one in recwarn) == warned


def test_regions_without_one_of_the_labels_are_left_out(tmp_path):
    regions = {"core": [1, 4], "enhancing_tumour": [4]}  # label 2 is in none
    about = export_nnunet(prepared(two_channels(tmp_path / "raw"), tmp_path / "store", regions=regions), tmp_path / "x")
    check_rules(tmp_path / "x")
    assert about["labels"] == {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3, "ignore": 4}


@pytest.mark.parametrize(
    "regions", [{"whole": [1, 2, 4]}, {"a": [1, 2], "b": [2, 4]}, {"a": [1, 2, 4], "b": [4, 2, 1]}]
)
def test_regions_that_cannot_be_painted_are_left_out(tmp_path, regions):
    store = prepared(two_channels(tmp_path / "raw"), tmp_path / "store", regions=regions)
    about = export_nnunet(store, tmp_path / "Dataset003_x")
    assert about["labels"] == {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3, "ignore": 4}
    assert "regions_class_order" not in about


def test_files_that_dataset_json_lists_are_read_from_where_it_says(tmp_path):
    dataset = tmp_path / "Dataset004_listed"
    scans = two_channels(tmp_path / "raw")
    cases = {
        f"c{k}": {"images": [f"../raw/c{k}_t1.nii.gz", f"../raw/c{k}_flair.nii.gz"], "label": f"../raw/c{k}_seg.nii.gz"}
        for k in range(2)
    }
    dataset.mkdir()
    about = {"channel_names": {"1": "FLAIR", "0": "T1"}, "labels": {"background": 0, "core": 1, "rest": 2, "x": 4}}
    (dataset / "dataset.json").write_text(
        json.dumps(about | {"numTraining": 2, "file_ending": ".nii.gz", "dataset": cases})
    )
    records = nnunet.records(dataset, subject=r"c(\d)")
    assert [record["subject"] for record in records] == ["0", "1"]
    assert list(records[0]["images"]) == ["T1", "FLAIR"]
    assert Path(records[1]["images"]["FLAIR"]).resolve() == (scans / "c1_flair.nii.gz").resolve()


def test_folds_of_nnunet_are_read_as_training_and_test(tmp_path):
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    split = read_split(tmp_path / "splits_final.json", fold=1)
    assert split == {"train": ["b", "c"], "validation": [], "test": ["a"]}
    for fold in (None, 2):
        with pytest.raises(ValueError, match="has 2 folds: give data.split.fold=0 to 1"):
            read_split(tmp_path / "splits_final.json", fold=fold)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_ending": ".png"}, "file_ending is '.png'; asa reads .nii.gz, .nii, .mgz, .mgh, .nrrd, .mha"),
        ({"labels": ["csf"]}, "has no labels, like"),
        ({"labels": {"background": 1}}, "background has to be declared as 0"),
        ({"labels": {"background": 0, "csf": "1"}}, "the label csf is '1'; give values above 0"),
        ({"channel_names": {"0": "T1", "1": "T1"}}, "two channels have one name"),
        ({"channel_names": ["T1"]}, "channel_names has to be like"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(tmp_path, change, message):
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "csf": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=message):
        nnunet.label_scheme(tmp_path)
        nnunet.records(tmp_path)


def test_a_store_that_nnunet_cannot_train_on_is_refused_and_nothing_written(tmp_path):
    scans = two_channels(tmp_path / "raw")
    two_ignored = prepared(scans, tmp_path / "ignored", ignored=[2, 9], labels={1: "a", 4: "b"})
    with pytest.raises(ValueError, match=r"ignores the values \[2, 9\]"):
        export_nnunet(two_ignored, tmp_path / "out")
    store = prepared(scans, tmp_path / "store")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(ValueError, match="not empty and not a dataset of nnU-Net"):
        export_nnunet(store, tmp_path / "full")
    flair = scans / "c1_flair.nii.gz"
    write_image(flair, np.ones((20, 24, 18)), read_image(flair).affine)
    with pytest.raises(ValueError, match=r"c1_flair.nii.gz: has changed since it was prepared"):
        export_nnunet(store, tmp_path / "out")
    flair.unlink()
    with pytest.raises(FileNotFoundError, match=r"c1_flair.nii.gz: no such file; put it back"):
        export_nnunet(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nnunets_own_check_accepts_the_dataset(tmp_path):
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    store = prepared(two_channels(tmp_path / "raw", cases=3, labelled=2), tmp_path / "store", regions=REGIONS)
    export_nnunet(store, tmp_path / "Dataset002_tumours")
    verify(str(tmp_path / "Dataset002_tumours"), 1)
