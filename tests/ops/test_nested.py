"""Nested regions: masks and label maps, their loss, and prediction."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import LABELS
from torch import nn
from untrained import SETTINGS, WINDOW, a_scan, call, metadata, predicted

from asa.cli import finetune, predict
from asa.config import build
from asa.data.datasets import folder
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.inference.label_maps import Outputs
from asa.inference.segmentation import Segmenter
from asa.losses.segmentation import DeeplySupervisedRegionLoss
from asa.methods.segment import RegionSegmentation
from asa.models.unet import unet_tiny
from asa.ops.labels import IGNORED
from asa.ops.nested import paint, painting_order, region_masks
from asa.training.checkpoint import read_weights, save_checkpoint

BRATS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}


def one_hot_regions(label: np.ndarray, regions: dict[str, list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.isin(label, values) for values in regions.values()]).astype(np.float32))


def test_a_voxel_is_in_every_region_that_has_its_label() -> None:
    label = torch.tensor([0, 1, 2, 4, IGNORED]).view(1, 1, 1, 1, 5)
    found = region_masks(label, list(BRATS.values()))[0].flatten(1).int().tolist()
    assert found == [[0, 1, 1, 1, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize(
    "regions", [BRATS, dict(reversed(BRATS.items())), {"a": [7], "b": [2, 1000], "c": [2]}, {"one": [3]}]
)
def test_the_regions_of_a_label_map_paint_that_label_map(regions: dict[str, list[int]]) -> None:
    values = sorted({value for labels in regions.values() for value in labels})
    label = np.random.default_rng(0).choice([0, *values], (5, 6, 7))
    painted = paint(one_hot_regions(label, regions), painting_order(regions))
    np.testing.assert_array_equal(painted.numpy(), label)


def test_a_voxel_gets_the_label_of_the_innermost_region_predicted_there() -> None:
    probabilities = torch.tensor([[0.9, 0.9, 0.1, 0.5, 0.6], [0.1, 0.9, 0.1, 0.5, 0.4], [0.1, 0.6, 0.6, 0.5, 0.4]])
    painted = paint(probabilities.view(3, 1, 1, 5), painting_order(BRATS)).flatten().tolist()
    assert painted == [2, 4, 4, 0, 2]


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({}, "no regions"),
        ({"a": [1, 2], "b": [2, 3]}, "a and b overlap"),
        ({"a": [1, 2]}, r"region a must have exactly one label .* it has \[1, 2\]"),
        ({"a": [1, 2], "b": [1], "c": [2]}, r"region a .* it has \[\]"),
        ({"a": [1], "b": [1]}, "region a .* no equal region"),
    ],
)
def test_regions_that_cannot_be_converted_to_labels_raise_an_error(regions: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        painting_order(regions)


def loss_of_counted_voxels(logits: np.ndarray, label: np.ndarray, regions: dict[str, list[int]]) -> float:
    """Dice + binary cross-entropy of a sample's counted voxels, written out: logits (n, R), label (n,)."""
    logits, label = logits[label != IGNORED], label[label != IGNORED]
    if not len(label):
        return 0.0
    p, dice, entropy = 1 / (1 + np.exp(-logits)), [], []
    for r, values in enumerate(regions.values()):
        inside = np.isin(label, values)
        dice.append(1 - (2 * p[inside, r].sum() + 1e-5) / (p[:, r].sum() + inside.sum() + 1e-5))
        entropy += [-np.log(p[inside, r]), -np.log(1 - p[~inside, r])]
    return float(np.mean(dice) + np.concatenate(entropy).mean())


def with_ignored(batch: int = 2) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits of three regions at three scales, and a label with ignored voxels."""
    torch.manual_seed(0)
    label = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)[torch.randint(0, 4, (batch, 1, 8, 8, 8))]
    label[torch.rand(label.shape) < 0.3] = IGNORED
    return [torch.randn(batch, 3, 8 // 2**k, 8 // 2**k, 8 // 2**k) for k in range(3)], label


@pytest.mark.parametrize("ignored", [True, False])
def test_the_loss_is_dice_plus_binary_cross_entropy_of_counted_voxels_halved_at_each_scale(ignored: bool) -> None:
    logits, label = with_ignored()
    if not ignored:
        label[label == IGNORED] = 0
    expected = 0.0
    for k, out in enumerate(logits):
        near = slice(2**k // 2, None, 2**k)
        for one, values in zip(out.double().numpy(), label[:, 0, near, near, near].numpy(), strict=True):
            expected += 0.5**k * loss_of_counted_voxels(one.reshape(3, -1).T, values.ravel(), BRATS) / len(out)
    found = DeeplySupervisedRegionLoss(list(BRATS.values()))(logits, label)
    assert float(found) == pytest.approx(expected / 1.75, rel=1e-5)


def test_predictions_at_ignored_voxels_change_nothing_and_a_sample_of_them_adds_nothing() -> None:
    logits, label = with_ignored()
    loss = DeeplySupervisedRegionLoss(list(BRATS.values()))
    finest = logits[0].requires_grad_()
    before = loss(logits, label)
    before.backward()
    ignored = (label == IGNORED).expand_as(finest)
    assert finest.grad is not None and (finest.grad[ignored] == 0).all() and (finest.grad[~ignored] != 0).all()
    assert torch.equal(loss([torch.where(ignored, 9.0, finest.detach()), *logits[1:]], label), before)
    label[1] = IGNORED
    torch.testing.assert_close(loss(logits, label), loss([out[:1] for out in logits], label[:1]) / 2)


def test_micro_batches_give_the_loss_of_the_whole_batch() -> None:
    logits, label = with_ignored(4)
    loss = DeeplySupervisedRegionLoss(list(BRATS.values()))
    parts = [loss([out[k : k + 2] for out in logits], label[k : k + 2]) for k in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, loss(logits, label))


def test_the_method_learns_regions_and_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = unet_tiny(out_channels=3, feature_size=4, img_size=(64, 32, 32))
    method = RegionSegmentation(model=model, regions={"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]})
    label = torch.randint(0, 4, (2, 1, 64, 32, 32), dtype=torch.uint8)
    method({"image": torch.rand(2, 1, 64, 32, 32), "label": label})["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    logits = 9 * (2 * region_masks(label[:1], method.loss.regions)[0].float() - 1)
    assert torch.equal(method.label_map(logits), label[0, 0].int())
    with pytest.raises(ValueError, match="3 output channels for 1 regions"):
        RegionSegmentation(model=model, regions={"WT": [1]})


# --- prediction

SIDED = {"all": [1, 2, 5], "left": [1], "right": [2]}


def checkpoint(folder: Path, seed: int = 0, **data: object) -> Path:
    """An untrained network of three regions as asa-finetune saves it."""
    torch.manual_seed(seed)
    node = dict(_target_="asa.models.unet.unet_tiny", out_channels=3, in_channels=1, feature_size=4, img_size=WINDOW)
    shell = nn.Module()
    shell.model = build(node)
    nn.init.normal_(shell.model.heads[0].conv.conv.weight)  # far from one half
    content = metadata(**{"regions": [list(item) for item in SIDED.items()], **data})
    save_checkpoint(folder, 1, shell, {"model": node, "data": content}, {}, keep=1)
    return folder


@pytest.mark.parametrize("prepare", [{"crop": "foreground"}, {"crop": "foreground", "spacing": 1.4}])
def test_the_saved_region_probabilities_give_the_label_map(tmp_path: Path, prepare: dict) -> None:
    path = a_scan(tmp_path)
    segmenter = Segmenter(checkpoint(tmp_path / "run", prepare=prepare), SETTINGS)
    label = predicted(segmenter, path, tmp_path / "p")
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["all.nii.gz", "left.nii.gz", "right.nii.gz"]
    probabilities = {name: np.asarray(nibabel.load(tmp_path / "p" / f"{name}.nii.gz").dataobj) for name in SIDED}
    expected = np.zeros(label.shape)
    for name, value in (("all", 5), ("left", 1), ("right", 2)):
        expected[probabilities[name] > 0.5] = value
    np.testing.assert_array_equal(label, expected)
    assert len(np.unique(label)) > 2


def test_an_ensemble_of_regions_is_the_mean_of_sigmoids(tmp_path: Path) -> None:
    image, folders = torch.rand(1, 32, 32, 64), [checkpoint(tmp_path / f"{k}", seed=k) for k in range(2)]
    parts = [Segmenter(folder, SETTINGS) for folder in folders]
    with torch.no_grad():
        torch.testing.assert_close(parts[0].probabilities(image), parts[0].models[0](image[None])[0].sigmoid())
    one, two = (part.probabilities(image) for part in parts)
    torch.testing.assert_close(Segmenter(folders, SETTINGS).probabilities(image), (one + two) / 2)
    with pytest.raises(ValueError, match="agree in regions"):
        Segmenter([folders[0], checkpoint(tmp_path / "x", regions=[["all", [1, 2, 5]]])], SETTINGS)


def test_mirroring_exchanges_the_regions_of_the_two_sides(tmp_path: Path) -> None:
    image = torch.rand(1, 32, 32, 64)
    segmenter = Segmenter(checkpoint(tmp_path / "run"), SETTINGS, mirror=True)
    assert segmenter.mirrored_channels == [0, 2, 1]
    here, there = segmenter.probabilities(image), segmenter.probabilities(image.flip(-1))
    torch.testing.assert_close(there.flip(-1)[[0, 2, 1]], here)
    with pytest.raises(ValueError, match="'left' has no partner"):
        labels = {1: "left_x", 2: "right_x", 5: "m"}
        Outputs(labels, {"all": [1, 2, 5], "left": [1]}, [["left_x", "right_x"]]).mirrored()


def test_the_stores_regions_are_learnt_validated_and_predicted_as_labels(
    raw: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = folder.records(raw, images={"t1": "*_T1.nii.gz"}, label="*_seg.nii.gz")[:3]
    plan = CohortSettings(labels=LABELS, regions={"whole": [1, 2, 5], "core": [2, 5], "inner": [5]})
    assert not prepare_cohort(records, tmp_path / "store", plan, progress=False).failures
    tiny = [
        "method=regions", "model=unet_tiny", "+model.feature_size=4", "crop=[64,32,32]", "train.steps=1",
        "train.batch_size=1", "loader.workers=0", "train.device=cpu", "optim.warmup=0", "predict.overlap=0",
        "data.split={validation: 1, test: 1}",
    ]  # fmt: skip
    assert call(finetune, monkeypatch, f"data.store={tmp_path}/store", f"out={tmp_path}/run", *tiny) == 0
    shown = capsys.readouterr().out
    assert all(f"dice_{name} " in shown for name in ("whole", "core", "inner"))
    description = read_weights(tmp_path / "run")[1]
    assert description["model"]["out_channels"] == 3
    assert description["data"]["regions"] == [["whole", [1, 2, 5]], ["core", [2, 5]], ["inner", [5]]]
    arguments = [f"checkpoint={tmp_path}/run", f"input={tmp_path}/store", "part=test", f"out={tmp_path}/out"]
    assert call(predict, monkeypatch, *arguments, "predict.overlap=0") == 0
    (file,) = (tmp_path / "out").glob("*.nii.gz")
    assert set(np.unique(nibabel.load(file).dataobj)) <= {0, 1, 2, 5}
    assert call(finetune, monkeypatch, f"data.store={store}", f"out={tmp_path}/none", *tiny) == 1
    assert "the store has no regions" in capsys.readouterr().err
