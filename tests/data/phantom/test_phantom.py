"""The phantom is a brain, another one for each subject, the same one for each seed."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from asa.data.datasets import bids, folder, freesurfer, ibsr
from asa.data.io.nifti import axis_codes, check_same_geometry, read_image, read_label, spacing_of
from asa.data.phantom import anatomy
from asa.data.phantom import reader as phantom
from asa.data.phantom.anatomy import ELLIPSOIDS, STRUCTURES, aseg_label, structure_maps
from asa.data.phantom.cohort import KINDS, make_cohort
from asa.data.phantom.lesions import TumourPlan
from asa.data.phantom.warp import displacement_of, random_velocity, smooth_noise
from asa.data.preprocessing import registration
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings

EXTENT = (96.0, 120.0, 100.0)
needs_template = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn, which carries the template, is not here"
)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def cohort(root: Path, kind: str, subjects: int = 2, seed: int = 5, **options) -> Path:
    make_cohort(kind, subjects, seed, root, **{"resolution": 4, "progress": False, **options})
    return root


# ---------------------------------------------------------------------------------------------- fields


def test_smooth_noise_has_unit_variance_and_its_width():
    field = smooth_noise(np.random.default_rng(0), (400.0, 400.0, 400.0), 8.0, step=4.0)[0]
    assert abs(field.mean()) < 0.05 and abs(field.std() - 1) < 0.05
    apart = (field[:, :, 2:] * field[:, :, :-2]).mean()  # 8 mm: the correlation of two such Gaussians
    assert abs(apart - np.exp(-0.25)) < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_the_deformation_does_not_fold(seed):
    rng = np.random.default_rng(seed)
    velocity = random_velocity(rng, EXTENT, asymmetry=0.5)
    plan = TumourPlan(centre=(20.0, 5.0, 3.0), radius=19.0, core=9.0, oedema=20.0, push=11.0)
    velocity = velocity + plan.velocity(tuple(velocity.shape[1:]), EXTENT)
    moved = displacement_of(velocity, EXTENT).double()
    gradient = torch.stack([torch.stack(torch.gradient(part)[::-1]) for part in moved])  # rows x, y, z; columns x, y, z
    jacobian = torch.eye(3)[:, :, None, None, None] + gradient / 4.0
    assert torch.linalg.det(jacobian.permute(2, 3, 4, 0, 1)).min() > 0.05


def test_going_back_along_the_velocity_undoes_the_deformation():
    velocity = random_velocity(np.random.default_rng(1), EXTENT, asymmetry=0.3)
    there, back = displacement_of(velocity, EXTENT), displacement_of(-velocity, EXTENT)
    points = anatomy.grid_points(tuple(there.shape[1:]), EXTENT)
    left = there + anatomy.sample(back, points + there.permute(1, 2, 3, 0), EXTENT)
    inner = (slice(None), *(slice(6, -6),) * 3)
    assert left[inner].abs().max() < 0.5 < there[inner].abs().max()


def test_without_asymmetry_the_deformation_is_mirror_symmetric():
    moved = displacement_of(random_velocity(np.random.default_rng(0), EXTENT, asymmetry=0.0), EXTENT)
    mirrored = moved.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(moved, mirrored, atol=1e-4, rtol=0)


def test_a_tumour_pushes_tissue_away():
    plan = TumourPlan(centre=(20.0, 0.0, 0.0), radius=10.0, core=5.0, oedema=10.0, push=5.0)
    look = displacement_of(plan.velocity((25, 31, 26), EXTENT), EXTENT)
    right_of_it = look[:, 12, 15, 23]  # x is about 42 mm
    assert right_of_it[0] < -0.3 and right_of_it[1:].abs().max() < 0.3  # its tissue was nearer to the tumour before


# ---------------------------------------------------------------------------------------------- people


@needs_template
def test_the_template_is_mirror_symmetric():
    maps = anatomy.load_template().maps
    torch.testing.assert_close(maps, maps.flip(-1), atol=1e-4, rtol=0)


@needs_template
def test_the_same_seed_gives_the_same_bytes_and_more_subjects_change_nothing(tmp_path):
    two, again, three = (contents(cohort(tmp_path / name, "ibsr", n)) for name, n in (("a", 2), ("b", 2), ("c", 3)))
    assert two == again
    assert two == {name: payload for name, payload in three.items() if "IBSR_03" not in name}
    other = contents(cohort(tmp_path / "d", "ibsr", 2, seed=6))
    images = [name for name in two if name.endswith(".nii.gz")]
    assert len(images) == 4 and all(two[name] != other[name] for name in images)
    assert two["IBSR_01/IBSR_01_ana_strip.nii.gz"] != two["IBSR_02/IBSR_02_ana_strip.nii.gz"]


@needs_template
def test_one_thread_and_two_make_the_same_bytes(tmp_path):
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(contents(cohort(tmp_path / str(threads), "t1", 1)))
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


@needs_template
def test_t1_is_an_unlabelled_bids_dataset(tmp_path):
    root = cohort(tmp_path, "t1")
    assert "phantom" in json.loads((root / "dataset_description.json").read_text())["Name"]
    found = bids.records(root)
    assert [record["id"] for record in found] == ["sub-001", "sub-002"]
    image = read_image(found[0]["images"]["t1"])
    assert axis_codes(image.affine) == "RAS" and np.allclose(spacing_of(image.affine), 4)
    centre = image.affine @ [*(np.array(image.data.shape) - 1) / 2, 1]  # the template's, at any resolution
    np.testing.assert_allclose(centre[:3], anatomy.load_template().centre, atol=1e-4)
    volume = (image.data > 0).sum() * 4**3 / 1e6
    assert 1.3 < volume < 2.6  # litres: brain with its fluid
    sidecar = json.loads(Path(found[0]["images"]["t1"].replace(".nii.gz", ".json")).read_text())
    assert sidecar["phantom"] is True and "not patients" in sidecar["description"]


@needs_template
def test_ibsr_subjects_have_the_tissue_contrast_of_t1(tmp_path):
    for record in ibsr.records(cohort(tmp_path, "ibsr", 3, resolution=3)):
        image, label = read_image(record["images"]["t1"]), read_label(record["label"])
        check_same_geometry(image, label, record["id"])
        np.testing.assert_array_equal(image.data > 0, label.data > 0)  # skull-stripped, labelled throughout
        csf, gm, wm = (np.median(image.data[label.data == value]) for value in (1, 2, 3))
        assert csf < 0.8 * gm and gm < 0.88 * wm
        shares = np.bincount(label.data.ravel(), minlength=4)[1:] / (label.data > 0).sum()
        assert 0.04 < shares[0] < 0.35 and 0.4 < shares[1] < 0.7 and 0.2 < shares[2] < 0.45
        middle = label.data.shape[0] // 2
        assert 0.4 < (label.data[:middle] > 0).sum() / (label.data > 0).sum() < 0.6


@needs_template
def test_a_rim_surrounds_the_same_brain_and_fills_the_air_with_noise(tmp_path):
    plain, rim = cohort(tmp_path / "plain", "ibsr", 1), cohort(tmp_path / "rim", "ibsr", 1, rim=True)
    name = "IBSR_01/IBSR_01_{}.nii.gz"
    np.testing.assert_array_equal(*(read_label(root / name.format("segTRI_fill_ana")).data for root in (plain, rim)))
    image, brain = (
        read_image(rim / name.format("ana_strip")).data,
        read_label(rim / name.format("segTRI_fill_ana")).data > 0,
    )
    scalp = (image > 0.7 * np.median(image[brain])) & ~brain
    assert 0.05 < scalp.sum() / brain.sum() < 0.9
    assert 0 < np.median(image[:4]) < 0.1 * np.median(image[brain])


@needs_template
@pytest.mark.parametrize(("year", "values"), [(2021, [1, 2, 4]), (2023, [1, 2, 3])])
def test_a_tumour_has_its_contrast_in_every_modality(tmp_path, year, values):
    root = cohort(tmp_path, "brats", 2, seed=1, resolution=2.5, names=year)
    globs = {"t1": "_t1", "t1ce": "_t1ce", "t2": "_t2", "flair": "_flair"}
    if year == 2023:
        globs = {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f"}
    found = folder.records(
        root,
        images={channel: f"*/*{ending}.nii.gz" for channel, ending in globs.items()},
        label="*/*_seg.nii.gz" if year == 2021 else "*/*-seg.nii.gz",
    )
    assert found[0]["id"] == ("BraTS2021_00001" if year == 2021 else "BraTS-GLI-00001-000")
    for record in found:
        label = read_label(record["label"]).data
        assert set(np.unique(label)) <= {0, *values} and (label == values[1]).any() and (label == values[2]).any()
        necrotic, oedema, enhancing = (label == value for value in values)
        images = {name: read_image(path).data for name, path in record["images"].items()}
        brain = images["t1"] > 0
        assert all(np.array_equal(image > 0, brain) for image in images.values())
        healthy = brain & (label == 0)
        median = {name: (lambda where, image=image: np.median(image[where])) for name, image in images.items()}
        assert median["t1ce"](enhancing) > 1.2 * np.percentile(images["t1ce"][healthy], 90)
        assert median["flair"](oedema) > 1.2 * median["flair"](healthy)
        assert median["t2"](oedema) > 1.1 * median["t2"](healthy)
        assert median["t1"](enhancing) < median["t1"](healthy & (images["t1"] > np.median(images["t1"][healthy])))
        if necrotic.sum() > 20:
            assert median["t1ce"](necrotic) < 0.7 * median["t1ce"](enhancing)
        if necrotic.any():  # the core lies inside its rim
            centre, core = (np.argwhere(part).mean(axis=0) for part in (enhancing, necrotic))
            assert np.linalg.norm(centre - core) * 2.5 < 10
        assert 2 < (label > 0).sum() * 2.5**3 / 1000 < 250  # ml


@needs_template
def test_hyperintensities_lie_in_white_matter_near_the_ventricles_and_are_bright_on_flair(tmp_path):
    root = cohort(tmp_path, "wmh", 4, seed=1, resolution=2.5)
    sites = ("Utrecht/1", "Singapore/2", "Amsterdam/GE3T/3", "Utrecht/4")
    assert all((root / site / "pre/FLAIR.nii.gz").is_file() for site in sites)
    found = folder.records(
        root, images={"t1": "**/pre/T1.nii.gz", "flair": "**/pre/FLAIR.nii.gz"}, label="**/wmh.nii.gz"
    )
    assert len(found) == 4
    values = set()
    for record in found:
        label = read_label(record["label"]).data
        t1, flair = (read_image(record["images"][name]).data for name in ("t1", "flair"))
        values |= set(np.unique(label))
        lesion, brain = label == 1, t1 > 0
        assert 0.2 < lesion.sum() * 2.5**3 / 1000 < 90  # ml
        assert np.median(flair[lesion]) > 1.25 * np.median(flair[brain & ~lesion])
        bright = brain & (t1 > np.percentile(t1[brain], 65))  # about the white matter
        assert np.median(t1[lesion]) < 0.95 * np.median(t1[bright])
        outer = np.argwhere(brain).max(axis=0) - np.argwhere(brain).min(axis=0)
        place = np.abs(np.argwhere(lesion) - np.argwhere(brain).mean(axis=0)) / outer
        assert np.median(place[:, 0]) < 0.25  # in the middle of the brain, not in its cortex
    assert {0, 1, 2} >= values > {0}


# Volumes of both sides in adults, in ml: FreeSurfer's and manual atlases' means lie well within them.
VOLUMES = {
    "ventricle": (10, 40),
    "thalamus": (10, 18),
    "caudate": (6, 11),
    "putamen": (7, 13),
    "hippocampus": (6, 12),
    "brainstem": (18, 32),
}


@needs_template
def test_structures_of_the_template_are_symmetric_and_disjoint_and_of_adult_size():
    template = anatomy.load_template(structures=True)
    masks = {name: template.maps[template.names[name]] for name in STRUCTURES.values()}
    assert set(masks) == set(VOLUMES)
    assert torch.stack(list(masks.values())).sum(dim=0).max() == 1
    for name, mask in masks.items():
        assert torch.equal(mask, mask.flip(-1)), name
        low, high = VOLUMES[name]
        assert low < mask.sum() / 1000 < high, name


def test_in_grey_matter_alone_a_structure_is_its_ellipsoid_and_the_mirror_image():
    grey = np.zeros((3, 60, 90, 80))
    grey[1] = 1
    maps = structure_maps(grey, np.array([0.0, -18.0, -5.0]))
    z, y, x = np.indices(grey.shape[1:]) - np.array([34.5, 62.5, 39.5])[:, None, None, None]
    for name, tolerance in (("thalamus", 0.01), ("hippocampus", 0.03)):  # the tail of the latter meets the putamen
        (centre, radii, slope), mask = ELLIPSOIDS[name][1][0], maps[name]
        assert mask.sum() == pytest.approx(2 * 4 / 3 * math.pi * math.prod(radii), rel=tolerance), name
        assert (mask == mask[..., ::-1]).all(), name
        assert [part[mask].mean() for part in (abs(x), y, z)] == pytest.approx(centre, abs=0.2), name
        assert np.polyfit(y[mask], z[mask], 1)[0] == pytest.approx(slope, abs=0.02), name


def test_aseg_values_of_mirrored_voxels_are_those_of_the_two_sides():
    rng = np.random.default_rng(0)
    structures, tissues = (rng.integers(0, high, (4, 5, 3), np.uint8) for high in (7, 4))
    structures, tissues = (np.concatenate([half, half[..., ::-1]], axis=2) for half in (structures, tissues))
    label = aseg_label(structures, tissues)
    names = freesurfer.label_scheme().labels
    expected = {"thalamus": "Left-Thalamus", "hippocampus": "Left-Hippocampus", "brainstem": "Brain-Stem"}
    for place in np.ndindex(4, 5, 3):
        left, right = (names.get(int(value), "") for value in (label[place], label[..., ::-1][place]))
        assert right == left.replace("Left", "Right"), place
        name = STRUCTURES.get(int(structures[place]))
        assert left == expected.get(name, left) and (name or tissues[place] or not left)


@needs_template
def test_structures_follow_the_anatomy_of_each_subject(tmp_path):
    records = phantom.records(tmp_path, kind="structures", subjects=2, resolution=3)
    assert [record["id"] for record in records] == ["subject_001", "subject_002"]
    labels = []
    for record in records:
        image, label = read_image(record["images"]["t1"]), read_label(record["label"])
        check_same_geometry(image, label, record["id"])
        labels.append(label.data)
        assert set(np.unique(label.data)) == {0, *STRUCTURES}
        assert (image.data[label.data > 0] > 0).all()
        level = {name: np.median(image.data[label.data == value]) for value, name in STRUCTURES.items()}
        white = np.percentile(image.data[image.data > 0], 90)
        assert level["ventricle"] < 0.8 * level["caudate"] and level["caudate"] < 0.9 * white
    assert labels[0].shape == labels[1].shape and (labels[0] != labels[1]).any()


@needs_template
def test_phantoms_go_through_preparation(tmp_path):
    root = cohort(tmp_path / "raw", "ibsr", 1)
    settings = CohortSettings(labels={1: "csf", 2: "gm", 3: "wm"})
    report = prepare_cohort(ibsr.records(root), tmp_path / "store", settings, progress=False)
    assert report.prepared == ["IBSR_01"] and not report.warnings


@needs_template
def test_every_subject_has_a_json_that_marks_it_as_a_phantom(tmp_path):
    for kind in KINDS:
        root = cohort(tmp_path / kind, kind, 1, resolution=6)
        assert json.loads((root / "phantom.json").read_text())["phantom"] is True
        for image in root.rglob("*.nii.gz"):
            notes = [*image.parent.glob("*.json"), *image.parent.parent.glob("phantom.json")]
            assert notes and all(json.loads(note.read_text())["phantom"] is True for note in notes)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("content", ["[]", "3"])
def test_a_folder_with_the_description_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "phantom.json").write_text(content)
    with pytest.raises(ValueError, match="holds another phantom cohort"):
        phantom.records(tmp_path, kind="t1", subjects=1)
    assert (tmp_path / "phantom.json").read_text() == content


@needs_template
def test_two_cohorts_are_not_mixed_in_one_folder(tmp_path):
    root = cohort(tmp_path, "t1", 1)
    with pytest.raises(ValueError, match=r"holds another phantom cohort \(kind, seed differ\)"):
        cohort(root, "ibsr", 1, seed=6)


@pytest.mark.parametrize("wrong", [{"kind": "ct"}, {"subjects": 0}, {"seed": -1}, {"resolution": 0.1}, {"names": 2022}])
def test_invalid_options_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_cohort(**{"kind": "t1", "subjects": 1, "seed": 0, "out": tmp_path / "out", "progress": False, **wrong})
    assert not (tmp_path / "out").exists()


def test_without_nilearn_the_install_command_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    anatomy.load_template.cache_clear()
    registration.load_map.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "asa-mri\[phantom\]"'):
        make_cohort("t1", 1, 0, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
