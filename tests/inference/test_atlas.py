"""Registration of atlases: labels carried over to moved scans, fused, on other grids, and what is refused."""

import itertools
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from heads import centred, dice, scan
from scipy import ndimage

from asa.data.store import Store
from asa.inference import atlas as registration
from asa.inference.atlas import Atlas, carry_over, load_ants, majority, read_atlases
from asa.ops.labels import IGNORED

needs_ants = pytest.mark.skipif(find_spec("ants") is None, reason="antspyx is not installed: pip install antspyx")
CLASSES = {0: 0, 2: 1, 7: 2}  # value of the head's labels -> class index


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """So that the same input gives the same bits."""
    if find_spec("ants") is not None:
        load_ants(1)


def head(spacing: tuple[float, float, float] = (4, 4, 4), pose: np.ndarray | None = None, id: str = "a") -> Atlas:
    """The head as an atlas, on a grid of its own."""
    d, h, w = spacing
    shape = tuple(round(size / step) for size, step in zip((150, 190, 144), (w, h, d), strict=True))
    image, label = scan(shape, centred(shape, np.diag([w, h, d])), pose)
    indices = np.vectorize(CLASSES.get, otypes=[np.uint8])(label.data)
    return Atlas(id, image.data.T[None] / 700, indices.T, spacing, 3)


def moved(scale: float, *offset: float) -> np.ndarray:
    pose = np.diag([scale, scale, scale, 1.0])
    pose[:3, 3] = offset
    return pose


def overlaps(probabilities: np.ndarray, truth: np.ndarray) -> list[float]:
    found = probabilities.argmax(axis=0)
    return [dice(found == k, truth == k) for k in (1, 2)]


@needs_ants
@pytest.mark.parametrize("spacing", [(4, 4, 4), (5, 3, 4)])
def test_an_atlas_carries_its_labels_over_to_a_moved_and_scaled_copy_of_itself(spacing: tuple) -> None:
    atlas, new = head(), head(spacing, moved(0.95, 6, -9, 4))
    found = carry_over(new.image, new.spacing, [atlas], "majority")
    assert found.shape == (3, *new.label.shape) and found.dtype == np.float32
    assert set(np.unique(found)) == {0, 1} and (found.sum(axis=0) == 1).all()
    outer, inner = overlaps(found, new.label)
    assert outer > 0.97 and inner > 0.9
    before = ndimage.zoom(atlas.label, np.divide(new.label.shape, atlas.label.shape), order=0)  # without registration
    assert max(dice(before == k, new.label == k) for k in (1, 2)) < 0.93


@needs_ants
def test_class_indices_are_carried_over_as_they_are_and_ignored_voxels_have_no_class() -> None:
    atlas = head()
    label = np.array([0, 90, 254], np.uint8)[atlas.label]
    label[:20] = IGNORED
    found = carry_over(atlas.image, atlas.spacing, [replace(atlas, label=label, classes=255)], "majority")
    assert set(np.flatnonzero(found.any(axis=(1, 2, 3)))) == {0, 90, 254}
    unknown = found.sum(axis=0) == 0
    assert dice(unknown, label == IGNORED) > 0.97
    assert dice(found[254] == 1, label == 254) > 0.97


@needs_ants
def test_joint_fusion_of_identical_atlases_is_that_of_one_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    atlas, new = head((6, 6, 6)), head((6, 6, 6), pose=moved(1.03, 0, 5, 0))
    one, three = (carry_over(new.image, new.spacing, [atlas] * count) for count in (1, 3))
    np.testing.assert_allclose(three, one, atol=1e-5)
    assert min(overlaps(one, new.label)) > 0.9
    assert list(tmp_path.iterdir()) == []


@needs_ants
def test_the_search_of_joint_fusion_corrects_one_atlas_that_is_a_voxel_off() -> None:
    volume, images, _ = three()
    truth = np.zeros(volume.shape, np.uint8)
    truth[6:12, 6:14, 8:14] = 1
    moved = np.roll(truth, (0, 1, 0), (0, 1, 2))[None]
    found = registration._joint(load_ants(), volume, (1, 1, 1), images[:1], moved, majority(moved, 2))
    assert dice(moved[0] == 1, truth == 1) < 0.9 and dice(found.argmax(axis=0) == 1, truth == 1) > 0.98


@pytest.mark.parametrize("atlases", [1, 2, 5])
def test_majority_gives_the_fraction_of_the_atlases_that_vote_for_a_class(atlases: int) -> None:
    rng = np.random.default_rng(atlases)
    labels = rng.choice([0, 1, 3, IGNORED], (atlases, 4, 5, 6)).astype(np.uint8)
    labels[:, 0, 0] = IGNORED
    found = majority(labels, 5)
    for place in itertools.product(range(4), range(5), range(6)):
        votes = [label for label in labels[(slice(None), *place)] if label != IGNORED]
        expected = [votes.count(k) / len(votes) if votes else 0 for k in range(5)]
        np.testing.assert_allclose(found[(slice(None), *place)], expected, rtol=1e-6)


def three(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume, and three registered atlases that differ from it: images and labels of classes 0, 1 and 4."""
    rng = np.random.default_rng(seed)
    volume = ndimage.gaussian_filter(rng.normal(size=(18, 20, 22)), 2)
    volume = (volume / volume.std()).astype(np.float32)
    shifts = [(0, 1, 0), (1, 0, 0), (0, 0, -1)]
    images = np.stack([np.roll(volume, shift, (0, 1, 2)) for shift in shifts]).astype(np.float32)
    labels = np.zeros(images.shape, np.uint8)
    labels[:, 6:12, 6:14, 8:14] = 1
    labels[0, 6:8, 7:9, 9:11], labels[1, 7:9, 7:9, 9:11] = 4, 4
    return volume, images, labels


@needs_ants
def test_joint_fusion_near_boundaries_is_that_of_the_whole_volume() -> None:
    ants = load_ants()
    volume, images, labels = three()
    found = registration._joint(ants, volume, (1, 1, 1), images, labels, majority(labels, 6))
    with tempfile.TemporaryDirectory() as folder:
        whole = ants.joint_label_fusion(
            ants.from_numpy(volume),
            ants.from_numpy(np.ones_like(volume)),
            [ants.from_numpy(image) for image in images],
            rad=2,
            r_search=3,
            label_list=[ants.from_numpy(label.astype(np.float32) + 10) for label in labels],
            output_prefix=f"{folder}/",
        )
    expected = np.zeros_like(found)
    for value, image in zip(whole["segmentation_numbers"], whole["probabilityimages"], strict=True):
        expected[value - 10] = image.numpy()
    fused = found != majority(labels, 6)
    assert 100 < fused.any(axis=0).sum() < 0.5 * volume.size
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    assert not found[[2, 3, 5]].any() and found[4].any()


@needs_ants
def test_joint_fusion_does_not_count_what_an_atlas_ignores() -> None:
    ants = load_ants()
    volume, images, labels = three()
    labels[0, :, :, 12:], labels[:, :3] = IGNORED, IGNORED
    found = registration._joint(ants, volume, (1, 1, 1), images, labels, majority(labels, 6))
    total = found.sum(axis=0)
    assert not total[:3].any() and np.allclose(total[3:], 1, atol=1e-5)
    counted = registration._joint(ants, volume, (1, 1, 1), images[1:], labels[1:], majority(labels[1:], 6))
    alike = found[:, 3:, :, 16:].argmax(axis=0) == counted[:, 3:, :, 16:].argmax(axis=0)  # beyond the search
    assert alike.all()


@needs_ants
def test_joint_fusion_follows_the_atlas_that_matches_the_scan_against_a_majority_that_does_not() -> None:
    volume, images, labels = three()
    images[0] = volume
    images[1:] = three(seed=1)[1][1:]
    labels[:] = 0
    labels[0, 6:12, 6:14, 8:14] = 4
    found = registration._joint(load_ants(), volume, (1, 1, 1), images, labels, majority(labels, 6))
    assert dice(found.argmax(axis=0) == 4, labels[0] == 4) > 0.95
    assert not majority(labels, 6).argmax(axis=0).any()


@needs_ants
def test_a_channel_that_one_of_them_lacks_is_not_registered() -> None:
    atlas, new = head(), head(pose=moved(0.97, 0, 0, 4))
    noise, nothing = np.random.default_rng(0).random(new.image.shape, np.float32), np.zeros_like(new.image)
    found = carry_over(
        np.concatenate([noise, new.image]),
        new.spacing,
        [replace(atlas, image=np.concatenate([np.zeros_like(atlas.image), atlas.image]))],
        "majority",
    )
    assert np.array_equal(found, carry_over(new.image, new.spacing, [atlas], "majority"))
    with pytest.raises(ValueError, match="no channel that this scan and all atlases have"):
        carry_over(nothing, new.spacing, [atlas])
    with pytest.raises(ValueError, match="the scan has 2 channels, and the atlases have 1"):
        carry_over(np.concatenate([noise, new.image]), new.spacing, [atlas])


@needs_ants
def test_a_registration_that_fails_names_the_atlas(capfd: pytest.CaptureFixture[str]) -> None:
    atlas = head(id="s1")
    with pytest.raises(ValueError, match="the atlas s1 could not be registered"):
        carry_over(np.ones_like(atlas.image), atlas.spacing, [atlas])


@needs_ants
def test_no_atlas_and_an_unknown_fusion_are_refused() -> None:
    atlas = head()
    with pytest.raises(ValueError, match="no atlas to register"):
        carry_over(atlas.image, atlas.spacing, [])
    with pytest.raises(ValueError, match="fusion=mean: choose joint or majority"):
        carry_over(atlas.image, atlas.spacing, [atlas], "mean")


def test_without_ants_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ants", None)
    atlas = head()
    with pytest.raises(ImportError, match=r'ants is not installed.*pip install "asa-mri\[atlas\]"'):
        carry_over(atlas.image, atlas.spacing, [atlas])


def test_the_atlases_of_a_store_are_the_labelled_scans_of_the_subjects(store: Path) -> None:
    opened = Store(store)
    atlases = read_atlases(opened, ["s2", "s0"])
    assert [atlas.id for atlas in atlases] == ["s2", "s0"]
    for atlas in atlases:
        assert np.array_equal(atlas.image, opened.image(atlas.id)) and atlas.spacing == (1, 1, 1)
        assert np.array_equal(atlas.label, opened.label(atlas.id)[0]) and atlas.classes == 4
    with pytest.raises(ValueError, match="not in the cohort"):
        read_atlases(opened, ["s9"])
