"""Collapse shows, and a linear probe finds what is linear."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from asa.cli import pretrain
from asa.data.loading.crops import CropDataset
from asa.data.store import Store
from asa.inference.feature_health import (
    FeatureHealth,
    alarms,
    class_fractions,
    feature_health,
    freedom,
    linear_dice,
    normal_equations,
    open_labelled,
    predict_linear,
    solve_ridge,
)
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_tiny
from asa.models.swin import Swin, SwinPatches

HEALTHY = {"effective_rank": 40.0, "feature_variance": 0.5, "loss": 0.5, "mean_predictor_loss": 1.0}
ERROR = ("loss", "mean_predictor_loss")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("volumes", [1, 4])
def test_the_effective_rank_of_r_equal_directions_is_r(rank: int, volumes: int) -> None:
    directions = torch.linalg.qr(draw(16, 16))[0][:rank]
    features = (draw(volumes * 4096, rank) @ directions).reshape(volumes, 4096, 16)
    found = feature_health(features)
    assert found["effective_rank"] == pytest.approx(rank, rel=0.01)
    assert found["feature_variance"] == pytest.approx(rank / 16, rel=0.1)


def test_unequal_directions_count_by_their_entropy() -> None:
    scale = torch.tensor([4.0, 2.0, 1.0])
    share = scale / scale.sum()
    expected = float((-share * share.log()).sum().exp())
    assert feature_health(draw(4, 8192, 3) * scale)["effective_rank"] == pytest.approx(expected, rel=0.01)


def test_what_all_volumes_share_at_a_place_is_no_feature() -> None:
    own, place = draw(3, 2048, 8), 10 * torch.randn(1, 2048, 8, generator=torch.Generator().manual_seed(1))
    one, other = feature_health(own), feature_health(own + place)
    assert one == pytest.approx(other, rel=1e-4)
    assert feature_health(place.expand(3, -1, -1))["effective_rank"] == 0.0


def test_constant_features_alarm_and_healthy_ones_do_not() -> None:
    constant = feature_health(torch.ones(2, 64, 96)) | {"loss": 0.5, "mean_predictor_loss": 1.0}
    (line,) = alarms(constant, 96, ERROR, warm=True)
    assert line.startswith("ALARM") and "collapsed" in line and "\n" not in line
    (line,) = alarms({**HEALTHY, "effective_rank": 0.9}, 96, ERROR, warm=False)
    assert "effective rank 0.9 of 96" in line
    # What rounding leaves may point anywhere, and is nothing.
    noise = feature_health(1 + 1e-4 * draw(2, 64, 96)) | {"loss": 0.5, "mean_predictor_loss": 1.0}
    assert noise["effective_rank"] > 10 and "collapsed" in alarms(noise, 96, ERROR, warm=True)[0]
    assert alarms(HEALTHY, 96, ERROR, warm=True) == []


def test_the_rank_of_a_single_token_does_not_alarm() -> None:
    token = draw(1, 1, 96)
    assert alarms({**HEALTHY, **feature_health(token)}, min(96, freedom(token)), ERROR, warm=True) == []


def test_no_better_than_the_mean_alarms_after_the_warm_up_only() -> None:
    numbers = {**HEALTHY, "loss": 0.99}
    assert alarms(numbers, 96, ERROR, warm=False) == []
    (line,) = alarms(numbers, 96, ERROR, warm=True)
    assert "no better than the mean" in line and "0.99" in line


def test_a_fresh_encoder_does_not_alarm_and_one_that_forgets_its_input_does(store: Path) -> None:
    opened = Store(store)
    dataset = CropDataset(opened, opened.records, (32, 32, 32))
    torch.manual_seed(0)
    method = MaskedPretraining(model=asa_tiny(img_size=32))
    encoder = method.model.encoder
    health = FeatureHealth(method, dataset, None, warmup=0)
    numbers = {"loss": 0.5, "mean_predictor_loss": 1.0}
    assert health.measure(1, numbers)[1] == []
    torch.nn.init.zeros_(encoder.patch_embed.weight)  # tells places apart still
    found, lines = health.measure(1, numbers)
    assert found["effective_rank"] < 1 and "collapsed" in lines[0]


def test_ridge_equals_least_squares_on_well_conditioned_features() -> None:
    x, true = draw(500, 6), torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    y = x @ true[:-1] + true[-1]
    torch.testing.assert_close(predict_linear(solve_ridge(*normal_equations(x, y)), x), y, atol=1e-3, rtol=0)


def test_class_fractions_count_the_voxels_of_each_patch() -> None:
    label = torch.zeros(1, 4, 4, 8, dtype=torch.uint8)
    label[0, :, :, 4:] = 2
    label[0, 0, 0, :4] = torch.tensor([1, 1, 255, 2])
    expected = torch.tensor([[2 / 64, 1 / 64, 0], [0, 1, 0]])
    torch.testing.assert_close(class_fractions(label, 4, 3), expected)


class Planted:
    """Volumes of blocks of three classes, and the classes as an image."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 3, (4, 2, 2, 2))
        self.labels = blocks.repeat(32, 1).repeat(32, 2).repeat(32, 3).astype(np.uint8)
        self.records = [{"id": str(k)} for k in range(4)]

    def image(self, record_id: str) -> np.ndarray:
        return self.labels[int(record_id)][None].astype(np.float32)

    def label(self, record_id: str) -> np.ndarray:
        return self.labels[int(record_id)][None]


class Told(torch.nn.Module):
    """An encoder whose tokens hold the label of their patch linearly, or nothing."""

    def __init__(self, tell: bool) -> None:
        super().__init__()
        self.patch_size, self.grid, self.embed_dim, self.tell = 8, (8, 8, 8), 12, tell
        self.anywhere = torch.nn.Parameter(torch.zeros(1))
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(volume), 512, self.embed_dim, generator=self.generator)
        if not self.tell:
            return noise
        classes = torch.nn.functional.max_pool3d(volume, 8).flatten(1).long()
        mix = torch.randn(3, self.embed_dim, generator=torch.Generator().manual_seed(2))
        return torch.nn.functional.one_hot(classes, 3).float() @ mix + 0.01 * noise


def test_a_probe_reads_what_features_hold_linearly_and_nothing_from_noise() -> None:
    source = Planted()
    dataset = CropDataset(source, source.records, (64, 64, 64), labelled=True)
    told, noise = (linear_dice(Told(tell), dataset, ["a", "b"]) for tell in (True, False))
    assert told["linear_dice"] > 0.99
    share = float((torch.from_numpy(source.labels[:, ::32, ::32, ::32].copy()) > 0).float().mean()) / 2
    assert noise["linear_dice"] == pytest.approx(
        2 * share / (1 + share), abs=0.1
    )  # that of the class's share everywhere
    assert told["linear_dice"] == pytest.approx((told["linear_dice_a"] + told["linear_dice_b"]) / 2)


class Placed(Told):
    """An encoder whose tokens hold nothing but their place in the crop."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return torch.eye(512).expand(len(volume), -1, -1)


def test_a_probe_of_random_crops_does_not_learn_places(store: Path) -> None:
    centred, placed = (open_labelled(str(store), ["t1"], (64, 64, 64), how)[0] for how in ("centre", "random"))
    names = ["csf", "gm", "wm"]
    at_centre, anywhere = (linear_dice(Placed(True), dataset, names)["linear_dice"] for dataset in (centred, placed))
    assert 0 < anywhere < at_centre


def test_the_probe_computes_in_float32_whatever_the_encoder_does() -> None:
    source = Planted()
    dataset = CropDataset(source, source.records, (64, 64, 64), labelled=True)
    full = linear_dice(Told(True), dataset, ["a", "b"])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_dice(Told(True), dataset, ["a", "b"]) == pytest.approx(full, abs=1e-3)


def test_a_labelled_store_has_to_fit(store: Path) -> None:
    dataset, names = open_labelled(str(store), ["t1"], (32, 32, 32), "centre")
    assert len(dataset) == 4 and names == ["csf", "gm", "wm"] and "label" in dataset[0, 0]
    with pytest.raises(ValueError, match=r"data\.labelled_store=.*channels"):
        open_labelled(str(store), ["flair"], (32, 32, 32), "centre")
    with pytest.raises(ValueError, match="no prepared store"):
        open_labelled("absent", ["t1"], (32, 32, 32), "centre")


def test_the_log_of_a_run_holds_health_and_probe(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = [
        f"data.store={store}", f"data.labelled_store={store}", f"out={tmp_path}/run", "model=asa_tiny", "crop=32",
        "loader.workers=0", "train.device=cpu", "train.steps=2", "optim.warmup=1",
        "data.split={validation: 2, test: 0}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["asa-pretrain", *arguments])
    assert pretrain.main() == 0
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"effective_rank", "feature_variance", "linear_dice", "linear_dice_first", "linear_dice_wm"} <= last.keys()
    # Two steps teach nothing, and the run says so.
    alarm = r"ALARM: no better than the mean predictor: after the warm-up loss is [\d.]+ times mean_predictor_loss: "
    assert re.search(alarm, capsys.readouterr().out)


def test_the_probe_of_a_swin_reads_its_features_at_an_eighth(store: Path) -> None:
    encoder = Swin(64, embed_dim=4, num_heads=(1, 1, 2, 2), window=2)
    patches = SwinPatches(encoder)
    volume = draw(1, 1, 64, 64, 64)
    tokens = patches(volume)
    assert tokens.shape == (1, 8**3, 16)
    at = (1 * 8 + 2) * 8 + 3  # the patch whose voxels begin at 8, 16, 24
    torch.testing.assert_close(tokens[0, at], encoder.levels(volume)[2][0, :, 1, 2, 3])
    dataset, names = open_labelled(str(store), ["t1"], (64, 64, 64), "centre")
    assert {"linear_dice", "linear_dice_wm"} <= linear_dice(patches, dataset, names).keys()


def test_a_linear_dice_below_that_of_the_first_weights_alarms() -> None:
    numbers = {**HEALTHY, "linear_dice": 0.2, "linear_dice_first": 0.21}
    assert alarms(numbers, 96, ERROR, warm=False) == []
    (line,) = alarms(numbers, 96, ERROR, warm=True)
    assert "0.200 is below that of the first weights, 0.210" in line
    assert alarms({**numbers, "linear_dice": 0.22}, 96, ERROR, warm=True) == []


def test_the_linear_dice_of_the_first_weights_is_kept(store: Path) -> None:
    dataset, names = open_labelled(str(store), ["t1"], (32, 32, 32), "centre")
    torch.manual_seed(0)
    method = MaskedPretraining(model=asa_tiny(img_size=32))
    health = FeatureHealth(method, dataset, (dataset, names), warmup=0)
    before = health.measure(1, {"loss": 0.5, "mean_predictor_loss": 1.0})[0]
    assert before["linear_dice"] == before["linear_dice_first"] > 0
    torch.nn.init.zeros_(method.model.encoder.patch_embed.weight)
    after = health.measure(2, {"loss": 0.5, "mean_predictor_loss": 1.0})[0]
    assert after["linear_dice"] < after["linear_dice_first"] == before["linear_dice_first"]


def test_few_tokens_are_not_taken_for_a_collapse() -> None:
    features = draw(4, 2, 192)  # all different, and in six directions at most
    assert freedom(features) == 6 and freedom(features[:1]) == 1
    numbers = {**HEALTHY, **feature_health(features)}
    assert numbers["effective_rank"] < 6.01
    assert alarms(numbers, min(192, freedom(features)), ERROR, warm=True) == []
