"""Left and right labels that share a class, and are separated by the mid-sagittal plane in the scan's own space."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import centred, head_at, scan, turn
from untrained import DATA, SETTINGS, a_scan, call, checkpoint, predicted, voxels

from asa.cli import finetune
from asa.data.datasets import folder
from asa.data.io.nifti import Volume, write_image
from asa.data.loading.crops import JoinedSides
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.midsagittal import distance_to_the_right
from asa.data.preprocessing.pipeline import prepare_case, to_native
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.store import Store
from asa.inference.label_maps import Outputs
from asa.inference.segmentation import Segmenter
from asa.ops.labels import IGNORED, joined_sides
from asa.training.checkpoint import read_model

# Values that are not in the order of the pairs, on purpose.
LABELS = {3: "right_inner", 4: "right_outer", 8: "left_inner", 9: "left_outer"}
PAIRS = [["left_outer", "right_outer"], ["left_inner", "right_inner"]]
JOINED = Outputs(LABELS, lateral_pairs=PAIRS, join_sides=True)
TILT = (4.0, 10.0, 10.0)  # degrees about x, y, z: pitch, roll, yaw


def tilted_head(spacing: tuple[float, float, float]) -> tuple[Volume, np.ndarray]:
    """A tilted head off the centre in an LAS file, and its true map of `LABELS`."""
    shape = tuple(math.ceil(200 / step) for step in spacing)
    affine = centred(shape, np.diag([-1.0, 1.0, 1.0]) @ np.diag(spacing))
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn(TILT), [6.0, -5.0, 4.0]
    image, _ = scan(shape, affine, pose)
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    to_head = np.linalg.inv(pose) @ affine
    points = grid @ to_head[:3, :3].T + to_head[:3, 3]
    inner, outer = (head_at(points)[1] == value for value in (7, 2))
    right = points[..., 0] > 0
    return image, np.select([inner & right, outer & right, inner, outer], [3, 4, 8, 9], 0).astype(np.uint8)


def prepared(image: Volume, truth: np.ndarray, **settings: object):
    """The prepared case, and the probabilities of a network that knows the joined labels: `(3, D, H, W)`."""
    label = Volume(truth, image.affine, image.header)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the head is tilted
        case = prepare_case({"t1": image}, label, LABELS, PrepareSettings(**settings))
    joined = torch.tensor(JOINED.channels)[torch.from_numpy(case.label[0]).long()]
    return case, torch.nn.functional.one_hot(joined, 3).movedim(-1, 0).float()


@pytest.mark.parametrize("spacing", [(1.6, 1.6, 1.6), (1.0, 1.0, 3.0)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"spacing": 2.0}, {"spacing": 2.0, "midway": True}], ids=str)
def test_in_a_head_tilted_by_10_degrees_every_voxel_gets_its_side(spacing, settings) -> None:
    image, truth = tilted_head(spacing)
    case, probabilities = prepared(image, truth, **settings)
    found = JOINED.native_label_map(probabilities, case.chain, image)
    both = (truth > 0) & (found > 0)
    assert both.sum() > 0.97 * (truth > 0).sum()
    assert (np.isin(truth, (3, 4)) != np.isin(found, (3, 4)))[both].mean() <= 0.001
    # The middle of the volume, without the plane, would not do: the law can fail.
    middle = np.indices(truth.shape)[0] < truth.shape[0] / 2  # of an LAS file: the right
    assert (np.isin(truth, (3, 4)) != middle)[both].mean() > 0.05


def test_separation_changes_no_joined_label_and_cuts_at_the_plane() -> None:
    image, truth = tilted_head((2.0, 2.0, 2.0))
    case, probabilities = prepared(image, truth, spacing=3.0)
    alone = Outputs({3: "inner", 4: "outer"}).native_label_map(probabilities, case.chain, image)
    found = JOINED.native_label_map(probabilities, case.chain, image)
    assert np.array_equal(np.select([np.isin(found, (3, 8)), np.isin(found, (4, 9))], [3, 4], 0), alone)
    paired = probabilities.argmax(dim=0).numpy() > 0
    distance = to_native(distance_to_the_right(case.chain, paired)[None], case.chain)[0]
    assert (distance[np.isin(found, (3, 4))] > 0).all() and (distance[np.isin(found, (8, 9))] <= 0).all()
    scores = JOINED.expected_dice(probabilities, case.chain)
    assert list(scores) == [LABELS[value] for value in sorted(LABELS)] and min(scores.values()) > 0.999


def test_the_classes_of_a_pair_share_an_index() -> None:
    assert joined_sides(6, []) == [0, 1, 2, 3, 4, 5]
    assert joined_sides(6, [(4, 1), (2, 5)]) == [0, 1, 2, 3, 1, 2]
    assert JOINED.channels == [0, 1, 2, 1, 2]
    assert JOINED.channel_names == ["background", "right_inner+left_inner", "right_outer+left_outer"]
    for wrong in ([(1, 2), (2, 3)], [(1, 1)]):
        with pytest.raises(ValueError, match="pair each label with one other"):
            joined_sides(4, wrong)


def test_ignored_voxels_stay_ignored_where_sides_are_joined() -> None:
    class Memory:
        def image(self, record_id: str) -> np.ndarray:
            return np.ones((1, 1, 1, 5), np.float16)

        def label(self, record_id: str) -> np.ndarray | None:
            return np.array([[[[0, 1, 2, 3, IGNORED]]]], np.uint8) if record_id == "a" else None

    source = JoinedSides(Memory(), joined_sides(4, [(1, 3)]))
    assert source.label("a").tolist() == [[[[0, 1, 2, 1, IGNORED]]]] and source.label("a").dtype == np.uint8
    assert source.label("b") is None and source.image("a").shape == (1, 1, 1, 5)


@pytest.mark.parametrize("prepare", [{"crop": "foreground"}, {"crop": "foreground", "spacing": 1.4}])
def test_a_network_of_joined_sides_gives_labels_and_probabilities_of_each_side(tmp_path: Path, prepare: dict) -> None:
    run = checkpoint(tmp_path / "run", out_channels=3, prepare=prepare, join_sides=True)
    segmenter = Segmenter(run, SETTINGS, mirror=True)
    assert segmenter.mirrored_channels == [0, 1, 2]
    label = predicted(segmenter, a_scan(tmp_path), tmp_path / "p")
    parts = np.stack([voxels(tmp_path / "p" / f"{name}.nii.gz") for name in ("background", *DATA["labels"].values())])
    np.testing.assert_allclose(parts.sum(axis=0), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 1, 2, 5])[parts.argmax(axis=0)], label)
    assert {1, 2} <= set(np.unique(label)) and not (parts[1] * parts[2]).any()


def test_a_scan_without_a_plane_is_refused_where_sides_are_joined(tmp_path: Path) -> None:
    segmenter = Segmenter(checkpoint(tmp_path / "run", out_channels=3, join_sides=True), SETTINGS)
    case, like = segmenter.preprocessor.prepare({"t1": a_scan(tmp_path)})
    del case.chain["plane"]  # as in a store of an older release
    with pytest.raises(ValueError, match=r"mid-sagittal plane, and none is known here.*predict the raw scan"):
        segmenter.segment_prepared(case.image, case.chain, like, tmp_path / "out.nii.gz")


def test_networks_with_and_without_joined_sides_are_no_ensemble(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one")
    other = checkpoint(tmp_path / "other", out_channels=3, join_sides=True)
    with pytest.raises(ValueError, match="must agree in join_sides"):
        Segmenter([one, other], SETTINGS)


FINETUNE = [
    "model=unet_tiny", "+model.feature_size=4", "crop=[64,32,32]", "train.steps=1", "train.batch_size=1",
    "loader.workers=0", "train.device=cpu", "optim.warmup=0", "data.lateral_pairs=[[csf, gm]]",
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ([], True),
        (["data.join_sides=false"], False),
        (["model.position=sincos"], False),
        (["model.position=sincos", "model.symmetry=true"], True),
    ],
    ids=str,
)
def test_pairs_are_joined_where_the_network_is_symmetric_or_on_request(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], joined: bool
) -> None:
    split = "data.split={validation: 1, test: 1}"
    assert call(finetune, monkeypatch, f"data.store={store}", f"out={tmp_path}/run", split, *FINETUNE, *words) == 0
    model, description = read_model(tmp_path / "run")
    assert model.out_channels == (3 if joined else 4)
    assert description["data"].get("join_sides", False) is joined
    assert description["data"]["lateral_pairs"] == [["csf", "gm"]]
    assert ("dice_csf+gm" in (tmp_path / "run" / "log.jsonl").read_text()) is joined


@pytest.mark.parametrize(("names", "told"), [(("left_x", "right_x"), False), (("right_x", "left_x"), True)])
def test_names_of_sides_that_the_header_contradicts_are_refused_where_the_plane_separates_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: tuple, told: bool
) -> None:
    image, truth = tilted_head((4.0, 4.0, 4.0))
    write_image(tmp_path / "raw" / "s_t1.nii.gz", image.data, image.affine)
    sides = np.select([truth >= 8, truth > 0], [1, 2], 0)  # on the left, on the right
    write_image(tmp_path / "raw" / "s_seg.nii.gz", sides, image.affine, dtype=np.uint8)
    records = folder.records(tmp_path / "raw", images={"t1": "*_t1.nii.gz"}, label="*_seg.nii.gz")
    labels = dict(enumerate(names, start=1))
    assert not prepare_cohort(records, tmp_path / "store", CohortSettings(labels=labels), progress=False).failures
    words = [f"data.store={tmp_path / 'store'}", "data.split={validation: 0, test: 0}", *FINETUNE[:-1], "plan=only"]
    assert call(finetune, monkeypatch, f"out={tmp_path}/a", *words, "plan_rate=1") == told
    said = capsys.readouterr().err
    assert ("voxels named left_x lie on the right, by the header" in said) is told
    assert call(finetune, monkeypatch, f"out={tmp_path}/b", *words, "plan_rate=1", "data.join_sides=false") == 0


def test_a_scan_without_a_label_map_is_left_out_and_named_where_labels_have_sides(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = folder.records(raw, images={"t1": "*_T1.nii.gz"}, label="*_seg.nii.gz")
    del records[0]["label"]
    cohort = CohortSettings(labels={1: "left_x", 2: "right_x", 5: "wm"})
    assert not prepare_cohort(records, tmp_path / "store", cohort, progress=False).failures
    words = [f"data.store={tmp_path / 'store'}", "data.split={validation: 0, test: 0}", *FINETUNE[:-1]]
    assert call(finetune, monkeypatch, f"out={tmp_path}/a", *words) == 0
    told = capsys.readouterr().out
    assert f"left out, without a label map: {records[0]['id']}\n" in told and "on 3 scans" in told


def test_a_pair_in_the_wrong_order_is_refused_where_the_plane_separates_it(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {1: "rh_x", 2: "lh_x", 3: "wm"}
    monkeypatch.setattr(Store, "labels", property(lambda self: names, lambda self, value: None), raising=False)
    words = [f"data.store={store}", "data.split={validation: 1, test: 1}", *FINETUNE[:-1]]
    pair = "data.lateral_pairs=[[rh_x, lh_x]]"
    assert call(finetune, monkeypatch, f"out={tmp_path}/a", *words, pair) == 1
    assert "[rh_x, lh_x] the left one has to be the first" in capsys.readouterr().err
    assert call(finetune, monkeypatch, f"out={tmp_path}/b", *words, pair, "data.join_sides=false") == 0
    assert call(finetune, monkeypatch, f"out={tmp_path}/c", *words, "data.lateral_pairs=[[lh_x, rh_x]]") == 0
