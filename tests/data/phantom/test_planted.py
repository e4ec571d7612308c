"""Lesions planted into scans: where nothing is planted not a voxel changes, and what is planted is what is stated."""

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from asa.cli import phantom as command
from asa.cli import prepare
from asa.data.io.nifti import read_image, read_label
from asa.data.phantom import reader as phantom
from asa.data.phantom.lesions import FLUID
from asa.data.phantom.planted import DEEP, PLANTERS, VALUES, Planted, Scan, plant, plant_cohort
from asa.data.phantom.warp import grid_points
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.store import Store

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn, which carries the template, is not here"
)
SPACING = (3.0, 3.0, 3.0)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four healthy phantoms at 3 mm."""
    root = tmp_path_factory.mktemp("healthy")
    records = phantom.records(root / "raw", kind="t1", subjects=4, resolution=3)
    assert not prepare_cohort(records, root / "store", CohortSettings(), progress=False).failures
    return Store(root / "store")


@pytest.fixture(scope="module")
def image(healthy: Store) -> np.ndarray:
    return np.array(healthy.image(healthy.records[0]["id"]), np.float32)


def planted(kind: str, image: np.ndarray, seed: int = 0, channels: tuple[str, ...] = ("t1",)) -> Planted:
    return plant(kind, image, channels, SPACING, np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", PLANTERS)
def test_law_where_nothing_is_planted_not_a_voxel_changes(kind: str, seed: int, image: np.ndarray) -> None:
    found = planted(kind, image, seed)
    np.testing.assert_array_equal(found.image[0][~found.changed], image[0][~found.changed])
    assert found.label.any() and found.changed.any() and found.changed.mean() < 0.25
    assert (found.image[0] != image[0])[found.changed].mean() > 0.9  # it is no larger than what changes
    assert not (found.label > 0)[~found.changed].any()
    brain = Scan(torch.from_numpy(image), 0, SPACING, np.random.default_rng(0)).brain.numpy()
    assert not found.label[~brain].any() and not found.image[0][~brain].any()  # nothing leaves the brain
    again = planted(kind, image, seed)
    np.testing.assert_array_equal(again.image, found.image)
    assert again.drawn == found.drawn


@pytest.mark.parametrize(("kind", "value", "least", "most"), [("wmh", 1, 0.6, 0.85), ("tumour", 3, 0.4, 0.8)])
def test_a_lesion_has_the_contrast_to_white_matter_that_is_stated(
    kind: str, value: int, least: float, most: float, image: np.ndarray
) -> None:
    scan = Scan(torch.from_numpy(image), 0, SPACING, np.random.default_rng(0))
    for seed in range(3):
        found = planted(kind, image, seed)
        assert least < found.image[0][found.label == value].mean() / scan.image[0][scan.white > 0.9].mean() < most


def test_each_channel_has_its_own_contrast_and_one_that_is_missing_stays_empty(image: np.ndarray) -> None:
    both = np.concatenate([image, image, np.zeros_like(image)])
    found = planted("wmh", both, 1, ("t1", "flair", "t2"))
    inside = found.label == 1
    assert found.image[0][inside].mean() < image[0][inside].mean() < found.image[1][inside].mean()
    assert not found.image[2].any()
    alone, beside = planted("tumour", image, 1), planted("tumour", both[1:], 1, ("t1", "t2"))
    np.testing.assert_array_equal(beside.image[0], alone.image[0])
    np.testing.assert_array_equal(beside.changed, alone.changed)


def test_a_tumour_pushes_tissue_away_and_has_its_size(image: np.ndarray) -> None:
    found = planted("tumour", image, 2)
    points = grid_points(image.shape[1:], tuple(3.0 * (n - 1) for n in image.shape[1:])).numpy()
    away = np.linalg.norm(points - np.array(found.drawn["centre"]), axis=-1)
    radius = found.drawn["radius"]
    inside = found.label == 3
    assert 0.5 < inside.sum() * 27 / (4 / 3 * np.pi * radius**3) < 1.8
    assert away[inside].mean() < radius
    pushed = found.changed & (found.label == 0)
    assert pushed.any() and away[pushed].max() < 3 * (radius + 6.0) + 3


@pytest.mark.parametrize("seed", range(3))
def test_atrophy_is_of_one_side_and_leaves_csf(image: np.ndarray, seed: int) -> None:
    found = planted("atrophy", image, seed)
    middle = image.shape[-1] // 2
    sides = [found.changed[..., :middle], found.changed[..., -middle:]]
    assert sorted(bool(side.any()) for side in sides) == [False, True]
    np.testing.assert_array_equal(found.label == 5, found.label > 0)
    scan, inside = Scan(torch.from_numpy(image), 0, SPACING, np.random.default_rng(0)), found.label == 5
    fluid = FLUID["t1"] * scan.image[0][scan.white > 0.9].mean()
    before, after = image[0][inside].mean(), found.image[0][inside].mean()
    assert before - after > 0.5 * (before - fluid)  # labelled is what it fills by more than half
    assert not found.changed[scan.csf.numpy()].any()


def test_a_volume_without_ventricles_or_white_matter_has_no_place(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=rf"no CSF deeper than {DEEP:g} mm"):
        points = grid_points(image.shape[1:], tuple(3.0 * (n - 1) for n in image.shape[1:])).numpy()
        planted("wmh", image * (np.linalg.norm(points, axis=-1) < 0.9 * DEEP))
    with pytest.raises(ValueError, match="its T1 is empty"):
        planted("wmh", np.zeros_like(image))
    noise = np.random.default_rng(0).uniform(0.01, 1, image.shape).astype(np.float32)
    with pytest.raises(ValueError, match="no white matter to compare a lesion with"):
        planted("wmh", np.where(image > 0, noise, 0))
    with pytest.raises(ValueError, match="no place for a lesion"):
        planted("tumour", image[..., 26:34])  # all of it is less than 16 mm from the middle


def table(out: Path) -> list[dict[str, str]]:
    with (out / "health.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_cohort_has_healthy_scans_as_they_are_and_patients_with_their_truth(healthy: Store, tmp_path: Path) -> None:
    out = tmp_path / "planted"
    assert command.main(["kind=lesions", f"source={healthy.path}", f"out={out}", "seed=4", "planted=0.5"]) == 0
    rows = table(out)
    assert [row["id"] for row in rows] == [record["id"] for record in healthy.records]
    assert sorted(row["health"] for row in rows) == ["0", "0", "1", "1"]
    for row in rows:
        before = healthy.image(row["id"])[0].transpose(2, 1, 0)
        found, label = read_image(out / f"{row['id']}_t1.nii.gz"), read_label(out / f"{row['id']}_lesions.nii.gz")
        assert np.allclose(found.affine, healthy.records[0]["chain"]["stored_affine"], atol=50)
        if row["health"] == "1":
            np.testing.assert_array_equal(found.data, before)
            assert not label.data.any() and (row["lesion"], row["ml"], row["contrast"]) == ("", "0.000", "1.000")
        else:
            inside = label.data > 0
            assert float(row["ml"]) == pytest.approx(inside.sum() * 0.027, abs=6e-4)
            ratio = found.data[inside].mean() / np.asarray(before, np.float32)[inside].mean()
            assert float(row["contrast"]) == pytest.approx(ratio, abs=6e-4)
            assert row["lesion"] in PLANTERS
    again = tmp_path / "again"
    plant_cohort(healthy.path, again, seed=4)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path
    names = ", ".join(f"{value}: {name}" for value, name in VALUES.items())
    own = ["data=folder", f"data.root={out}", "data.images={t1: '*_t1.nii.gz'}", "data.label='*_lesions.nii.gz'"]
    assert prepare.main([*own, f"labels={{{names}}}", f"out={tmp_path / 'store'}"]) == 0
    assert len(Store(tmp_path / "store").records) == 4


def test_one_scan_of_a_subject_is_used_and_all_or_some_get_a_lesion(healthy: Store, tmp_path: Path) -> None:
    plant_cohort(healthy.path, tmp_path / "all", lesions=["infarct"], planted=1, subjects=2)
    rows = table(tmp_path / "all")
    assert [(row["health"], row["lesion"]) for row in rows] == 2 * [("0", "infarct")]
    assert len(list((tmp_path / "all").glob("*_t1.nii.gz"))) == 2


def test_draws_are_of_the_same_people_with_other_lesions(healthy: Store, tmp_path: Path) -> None:
    out, once = tmp_path / "drawn", tmp_path / "once"
    few = ["lesions=[infarct]", "subjects=2", "planted=1"]
    assert command.main(["kind=lesions", f"source={healthy.path}", f"out={out}", "draws=2", "joined=true", *few]) == 0
    plant_cohort(healthy.path, once, lesions=["infarct"], subjects=2, planted=1)
    rows, ids = table(out), [row["id"] for row in table(once)]
    assert [row["id"] for row in rows] == [f"{id}_draw{draw}" for draw in (1, 2) for id in ids]
    assert [row["subject"] for row in rows] == 2 * [row["subject"] for row in table(once)]
    for id in ids:
        first, second = (read_image(out / f"{id}_draw{draw}_t1.nii.gz").data for draw in (1, 2))
        np.testing.assert_array_equal(first, read_image(once / f"{id}_t1.nii.gz").data)
        assert (first != second).any()
        both = [read_label(path / f"{name}_lesions.nii.gz").data for path, name in ((out, f"{id}_draw1"), (once, id))]
        np.testing.assert_array_equal(both[0], both[1] > 0)
    store, names = tmp_path / "store", "1: lesion"
    own = ["data=folder", f"data.root={out}", "data.images={t1: '*_t1.nii.gz'}", "data.label='*_lesions.nii.gz'"]
    assert prepare.main([*own, "data.subject='(.*)_draw'", f"labels={{{names}}}", f"out={store}"]) == 0
    assert {record["subject"] for record in Store(store).records} == {*ids} and len(Store(store).records) == 4


def test_another_cohort_is_not_written_over(healthy: Store, tmp_path: Path) -> None:
    few = {"lesions": ["infarct"], "subjects": 2}
    plant_cohort(healthy.path, tmp_path / "out", **few)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    plant_cohort(healthy.path, tmp_path / "out", **few)
    for other in ({"seed": 5}, {"draws": 2}, {"subjects": 1}, {"joined": True}):
        with pytest.raises(ValueError, match="holds another phantom cohort"):
            plant_cohort(healthy.path, tmp_path / "out", **few | other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_lesions_have_no_intensity_in_standardised_scans(tmp_path: Path) -> None:
    records = phantom.records(tmp_path / "raw", kind="t1", subjects=1, resolution=4)
    standardised = CohortSettings(settings=PrepareSettings(normalise="zscore"))
    assert not prepare_cohort(records, tmp_path / "store", standardised, progress=False).failures
    with pytest.raises(ValueError, match="prepare without normalise=zscore"):
        plant_cohort(tmp_path / "store", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["draws=0"], "draws=0: give how often each scan is written, a whole number from 1"),
        (["lesions=[cyst]"], "lesions=['cyst']: choose some of tumour, wmh, infarct, atrophy"),
        (["lesions=[]"], "lesions=[]: choose some of"),
        (["subjects=0"], "subjects=0: give how many of the store's, a whole number from 1"),
        (["subjects=-1"], "subjects=-1: give how many of the store's"),
        (["planted=0"], "planted=0: give the fraction of subjects"),
        (["planted=1.5"], "planted=1.5: give the fraction"),
        (["source=null"], "source= is a store for kind=lesions, which needs one"),
        (["kind=t1"], "source= is a store for kind=lesions"),
        (["source=nowhere"], "nowhere: no prepared store here"),
        (["out={theirs}"], "is not empty and not a phantom cohort"),
    ],
)
def test_what_cannot_be_planted_is_said_and_nothing_is_written(
    settings: list[str], message: str, healthy: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "mine.txt").write_text("mine")
    own = {"kind": "lesions", "source": str(healthy.path), "out": str(tmp_path / "out")}
    own |= dict(setting.replace("{theirs}", str(theirs)).split("=", 1) for setting in settings)
    assert command.main([f"{key}={value}" for key, value in own.items()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and [path.name for path in theirs.iterdir()] == ["mine.txt"]


def test_channels_without_an_intensity_are_named(tmp_path: Path, image: np.ndarray) -> None:
    records = phantom.records(tmp_path / "raw", kind="t1", subjects=1, resolution=4)
    for channel, message in (("ct", "no intensity in ct"), ("flair", "a T1 has to show the tissues")):
        renamed = [{**record, "images": {channel: record["images"]["t1"]}} for record in records]
        assert not prepare_cohort(renamed, tmp_path / channel, CohortSettings(), progress=False).failures
        with pytest.raises(ValueError, match=message):
            plant_cohort(tmp_path / channel, tmp_path / "out")
