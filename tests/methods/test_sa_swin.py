"""Symmetry-aware pretraining: SACA, mirrored crops, the four proxy tasks, the asymmetry of whole volumes."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import log, ranks
from torch.nn import functional as F

from asa.data.io.nifti import to_ras
from asa.data.loading.crops import CropDataset, sample_seed
from asa.data.loading.loader import LoaderSettings, collate
from asa.data.store import Store
from asa.losses import contrastive
from asa.losses.contrastive import NTXent, SymmetryLoss
from asa.methods.sa_swin import SASwinPretraining, partners, proxy_metrics
from asa.models.sa_swin import MAP_LEVEL, SASwin, SymmetryAwareBlock, SymmetryAwareCrossAttention, sa_swin_tiny
from asa.models.sa_swin_unet import sa_swin_unet_tiny
from asa.ops.patches import random_boxes
from asa.ops.symmetry import asymmetry, flip, mirrored_start, pad_to_multiple, rotate_about_left_right
from asa.training.distributed import is_main, process_group
from asa.training.loop import TrainSettings, train
from asa.training.optim import OptimSettings, set_training

SMALL_UNET = dict(embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)
SMALLEST = dict(**SMALL_UNET, projection=8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(*size: int, **options) -> SASwin:
    torch.manual_seed(0)
    return sa_swin_tiny(img_size=size or (32, 32, 64), **{**SMALLEST, **options})


def batch_of(samples: int, *size: int, health: float = 1.0) -> dict:
    image = draw(samples, 1, *(size or (32, 32, 64))).sigmoid()
    seeds = torch.tensor([sample_seed(k) for k in range(samples)])
    return {"image": image, "mirror": flip(image), "seed": seeds, "health": torch.full((samples,), health)}


# ---------------------------------------------------------------------------------------------- SACA


def test_saca_is_the_formula_head_by_head() -> None:
    torch.manual_seed(0)
    saca = SymmetryAwareCrossAttention(12, 3)
    f, mirrored = draw(2, 5, 12), draw(2, 7, 12, seed=1)
    q = f @ saca.query.weight.T + saca.query.bias
    k, v = (mirrored @ saca.key_value.weight.T + saca.key_value.bias).chunk(2, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4), dim=-1)
        heads.append(weights @ v[..., part])
    expected = torch.cat(heads, dim=-1) @ saca.proj.weight.T + saca.proj.bias
    torch.testing.assert_close(saca(f, mirrored), expected)


def test_saca_of_f_and_f_is_self_attention() -> None:
    torch.manual_seed(0)
    saca, reference = SymmetryAwareCrossAttention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    reference.in_proj_weight.data = torch.cat([saca.query.weight, saca.key_value.weight]).data
    reference.in_proj_bias.data = torch.cat([saca.query.bias, saca.key_value.bias]).data
    reference.out_proj.load_state_dict(saca.proj.state_dict())
    f = draw(2, 5, 12)
    torch.testing.assert_close(saca(f, f), reference(f, f, f)[0])


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("self_attention", [True, False])
def test_the_order_of_the_mirrored_tokens_has_an_effect_with_position_encoding_only(norm, self_attention) -> None:
    torch.manual_seed(0)
    block = SymmetryAwareBlock(12, 3, norm=norm, self_attention=self_attention)
    f, mirrored, grid = draw(2, 6, 12), draw(2, 6, 12, seed=1), (1, 2, 3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(f, mirrored[:, order]), block(f, mirrored))
    torch.testing.assert_close(block(f[:, order], mirrored), block(f, mirrored)[:, order])
    block.position = True
    assert (block(f, mirrored[:, order], grid) - block(f, mirrored, grid)).abs().max() > 1e-3


@pytest.mark.parametrize("self_attention", [True, False])
def test_the_block_normalises_the_input_of_each_part_or_the_sum_after_it(self_attention: bool) -> None:
    for norm in ("pre", "post"):
        torch.manual_seed(0)
        block = SymmetryAwareBlock(12, 3, norm=norm, self_attention=self_attention)
        for name, weight in block.named_parameters():
            if "norm" in name:  # neither 1 nor 0
                torch.nn.init.normal_(weight)
        f, mirrored = draw(2, 5, 12), draw(2, 5, 12, seed=1)
        expected = f
        if norm == "pre":
            if self_attention:
                expected = expected + block.attention(block.norm1(expected), block.norm1(expected))
            expected = expected + block.cross(block.norm2(expected), block.norm2(mirrored))
            expected = expected + block.mlp(block.norm3(expected))
        else:
            if self_attention:
                expected = block.norm1(expected + block.attention(expected, expected))
            expected = block.norm2(expected + block.cross(expected, mirrored))
            expected = block.norm3(expected + block.mlp(expected))
        torch.testing.assert_close(block(f, mirrored), expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 27])
def test_any_batch_size_and_token_count_works(batch: int, length: int) -> None:
    tokens = draw(batch, length, 12)
    assert SymmetryAwareBlock(12, 3)(tokens, tokens).shape == tokens.shape


def test_a_wrong_norm_or_head_count_raises_an_error() -> None:
    with pytest.raises(ValueError, match="pre or post"):
        SymmetryAwareBlock(12, 3, norm="middle")
    with pytest.raises(ValueError, match="not divisible by 5 attention heads"):
        SymmetryAwareCrossAttention(12, 5)


# ---------------------------------------------------------------------------------------------- the mirror


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "SLA"])
def test_the_flip_maps_x_to_minus_x_for_every_orientation(codes: str) -> None:
    axes = ["RL", "AP", "SI"]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, code in enumerate(codes):
        row = next(k for k, pair in enumerate(axes) if code in pair)
        affine[row, column] = 1.0 if code == axes[row][0] else -1.0
    shape = (7, 9, 11)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2  # the centre at 0 mm
    data = np.random.default_rng(0).random(shape).astype(np.float32)
    turned, ras, _ = to_ras(data, affine)
    flipped = flip(torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 1, 0)))).numpy().transpose(2, 1, 0)
    for voxel in itertools.product((0, 2), (1, 4), (3, 5)):
        x, y, z, _ = ras @ (*voxel, 1)
        there = np.rint(np.linalg.inv(affine) @ (-x, y, z, 1))[:3].astype(int)
        assert flipped[voxel] == data[tuple(there)]


def test_a_quarter_turn_brings_superior_to_anterior_and_anterior_to_inferior() -> None:
    volume = torch.zeros(3, 3, 1)  # D inferior to superior, H posterior to anterior
    volume[2, 1], volume[1, 2] = 1, 2
    turned = rotate_about_left_right(volume, 1)
    assert turned[1, 2] == 1 and turned[0, 1] == 2
    assert torch.equal(rotate_about_left_right(turned, 2), rotate_about_left_right(volume, 3))


def test_only_rotations_about_left_right_commute_with_the_flip() -> None:
    volume = draw(2, 6, 6, 6)
    for quarters in range(4):
        one = flip(rotate_about_left_right(volume, quarters))
        assert torch.equal(one, rotate_about_left_right(flip(volume), quarters))
    for dims in ((-3, -1), (-2, -1)):
        assert not torch.equal(flip(volume.rot90(1, dims)), flip(volume).rot90(1, dims))


@pytest.mark.parametrize("size", [4, 5, 9])
@pytest.mark.parametrize("width", [8, 9])
def test_the_mirrored_box_of_a_volume_is_the_same_box_of_its_flip(size: int, width: int) -> None:
    volume = torch.arange(width)[None, None]
    for start in range(max(width - size, 0) + 1):
        there = mirrored_start([0, 0, start], (1, 1, size), width)[2]
        if there >= 0 and there + size <= width and start + size <= width:
            assert torch.equal(flip(volume)[..., start : start + size], flip(volume[..., there : there + size]))
        assert mirrored_start([0, 0, there], (1, 1, size), width)[2] == start


class Memory:
    """A volume in memory, as a source of crops."""

    def __init__(self, image: np.ndarray) -> None:
        self.array = image

    def image(self, record_id: str) -> np.ndarray:
        return self.array

    def label(self, record_id: str) -> None:
        return None


@pytest.mark.parametrize("width", [12, 13])
@pytest.mark.parametrize("size", [(6, 6, 6), (6, 6, 7), (14, 14, 15)])
@pytest.mark.parametrize("crop", ["centre", "random"])
def test_flipping_the_volume_swaps_the_two_crops_of_a_pair(width, size, crop) -> None:
    volume = draw(1, 10, 11, width).numpy()
    for epoch in range(4):
        pair, swapped = (
            CropDataset(Memory(image), [{"id": "a"}], size, crop=crop, mirrored=True)[0, epoch]
            for image in (volume, volume[..., ::-1].copy())
        )
        assert torch.equal(pair["image"], swapped["mirror"]) and torch.equal(pair["mirror"], swapped["image"])


def test_a_symmetric_volume_has_equal_crops_on_both_sides_with_any_augmentation() -> None:
    from asa.data.loading.augment import AugmentSettings

    strong = AugmentSettings(
        rotation=30, rotation_probability=1, scale=[0.8, 1.2], scale_probability=1, mirror_probability=0.5,
        gamma=[0.7, 1.4], gamma_probability=1, noise=0.1, brightness=0.2,
    )  # fmt: skip
    half = draw(1, 16, 16, 16)
    volume = (half + flip(half)).numpy()
    data = CropDataset(Memory(volume), [{"id": "a"}], (8, 8, 8), crop="random", mirrored=True, augment=strong)
    for epoch in range(4):
        assert torch.equal(data[0, epoch]["image"], data[0, epoch]["mirror"])


def test_attached_numbers_are_in_the_batch() -> None:
    records = [{"id": "a"}, {"id": "b"}]
    attached = {"a": {"health": 1.0}, "b": {"health": math.nan}}
    data = CropDataset(Memory(draw(1, 4, 4, 4).numpy()), records, (4, 4, 4), attached=attached)
    torch.testing.assert_close(
        collate([data[0, 0], data[1, 0]])["health"], torch.tensor([1.0, math.nan]), equal_nan=True
    )


# ---------------------------------------------------------------------------------------------- the network


def test_a_symmetric_volume_has_equal_features_and_no_asymmetry_to_the_bit() -> None:
    half = draw(2, 1, 32, 32, 64).sigmoid()
    volume, model = half + flip(half), network()
    f, mirrored, fused = model.tokens(volume, flip(volume))
    assert torch.equal(f, mirrored) and torch.equal(fused, model.saca(mirrored, f))
    score, found = model.asymmetry(volume)
    assert score.tolist() == [0.0, 0.0] and not found.any()


@pytest.mark.parametrize("size", [(32, 32, 64), (20, 40, 33), (33, 31, 30)])
def test_whole_volumes_of_any_size_have_a_map_of_their_own_size(size: tuple[int, int, int]) -> None:
    volume, model = draw(1, 1, *size), network()
    with torch.no_grad():
        score, found = model.asymmetry(volume)
        again, flipped = model.asymmetry(flip(volume))
    assert found.shape == (1, *size) and 0 < float(score) < 1 and 0 < float(found.max()) < 1
    torch.testing.assert_close(score, again)
    torch.testing.assert_close(flipped, flip(found))
    torch.testing.assert_close(found, flip(found))  # both sides of a difference have the same value
    with torch.no_grad():
        once = model.asymmetry(volume, flip(volume))[1]
    torch.testing.assert_close(found, (once + flip(once)) / 2)


@pytest.mark.parametrize("level", [0, 2])
def test_the_map_is_of_features_standardised_over_both_sides_of_the_foreground(level: int) -> None:
    volume, model = draw(1, 1, 32, 32, 64).sigmoid(), network()
    volume[..., :10] = 0  # background along W, half of it opposite the head
    with torch.no_grad():
        _, found = model.asymmetry(volume, flip(volume), level=level)
        levels = model.encoder.levels(torch.cat([volume, flip(volume)]))[level].double()
    head = F.avg_pool3d((torch.cat([volume, flip(volume)]) != 0).double(), 2 ** (level + 1))[:, 0]
    channels = []
    for channel in levels.unbind(dim=1):
        mean = (channel * head).sum() / head.sum()
        channels.append((channel - mean) / ((channel - mean).square() * head).sum().div(head.sum()).sqrt())
    here, there = torch.stack(channels, dim=-1)  # two of D/2 H/2 W/2 E
    expected = ((1 - F.cosine_similarity(here, there, dim=-1)) / 2)[None, None]
    expected = F.interpolate(expected, found.shape[1:], mode="trilinear")[:, 0]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)


def test_the_score_is_of_the_mean_tokens_of_both_sides_and_the_map_of_the_level_asked_for() -> None:
    model, volume = network(), draw(1, 1, 32, 32, 64)
    with torch.no_grad():
        score, found = model.asymmetry(volume)
        sides = [model.symmetry(model.encoder.levels(one)[-1].flatten(2).mean(dim=2)) for one in (volume, flip(volume))]
        torch.testing.assert_close(score, (1 - F.cosine_similarity(*sides)) / 2)
        assert torch.equal(found, model.asymmetry(volume, level=MAP_LEVEL)[1]) and MAP_LEVEL == 0
        assert not torch.equal(found, model.asymmetry(volume, level=2)[1])


def test_an_empty_volume_has_no_asymmetry() -> None:
    score, found = network().asymmetry(torch.zeros(1, 1, 32, 32, 64))
    assert score.tolist() == [0] and not found.any()


def test_the_symmetric_template_scores_0() -> None:
    pytest.importorskip("nilearn")
    from asa.data.preprocessing.registration import load_map

    template = torch.from_numpy(np.array(load_map("t1")[0][::3, ::3, 2:-2:4]))[None, None]
    assert torch.equal(template, flip(template))
    score, found = network(64, 64, 64).asymmetry(template)
    assert score.tolist() == [0] and not found.any()


@pytest.mark.parametrize("position", [False, True])
def test_every_parameter_gets_a_gradient_and_temperatures_are_parameters(position: bool) -> None:
    for form in ("cosine", "bce"):
        method = SASwinPretraining(model=network(position=position), form=form)
        names = [name for name, _ in method.named_parameters()]
        assert "contrast.log_temperature" in names and ("symmetry.affine" in names) == (form == "bce")
        method(batch_of(2))["loss"].backward()
        assert [
            name for name, weight in method.named_parameters() if weight.grad is None or not weight.grad.any()
        ] == []


def test_rotation_contrast_and_inpainting_read_the_cross_attention_and_symmetry_what_is_before_it() -> None:
    model, volume = network(), draw(2, 1, 32, 32, 64).sigmoid()
    output = model(volume, flip(volume))
    f, counterpart, fused = model.tokens(volume, flip(volume))
    mean = sum(fused.unbind(dim=1)) / fused.shape[1]
    torch.testing.assert_close(output.rotation, model.rotation(mean))
    torch.testing.assert_close(output.contrast, model.contrast(mean))
    torch.testing.assert_close(output.volume, model.decoder(fused.unflatten(1, (1, 1, 2)).permute(0, 4, 1, 2, 3)))
    assert torch.equal(output.side, model.symmetry(f.mean(dim=1)))
    assert torch.equal(output.mirrored, model.symmetry(counterpart.mean(dim=1)))


def test_the_pooled_feature_depends_on_all_octants_equally() -> None:
    model, volume = network(64, 64, 64), draw(1, 1, 64, 64, 64).sigmoid().requires_grad_()
    tokens = model.encoder(volume)

    def gradients(feature: torch.Tensor) -> list[float]:
        (gradient,) = torch.autograd.grad(feature.square().sum(), volume, retain_graph=True)
        halves = [slice(0, 32), slice(32, 64)]
        return [float(gradient[0, 0][octant].abs().sum()) for octant in itertools.product(halves, repeat=3)]

    pooled, corner = gradients(tokens.mean(dim=1)), gradients(tokens[:, 0])
    assert max(pooled) < 2 * min(pooled)
    assert max(corner) > 2 * min(corner)


def test_the_sizes_of_the_network_decrease() -> None:
    from asa.models import sa_swin

    with torch.device("meta"):
        base, small, tiny = (getattr(sa_swin, f"sa_swin_{name}")() for name in ("base", "small", "tiny"))
    assert base.encoder.widths == [48, 96, 192, 384, 768]
    convolutions = [stage for stage in base.decoder if isinstance(stage, torch.nn.Conv3d)]
    assert [stage.out_channels for stage in convolutions] == [384, 192, 96, 48, 48, 1]
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (base, small, tiny)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_size_that_is_not_divisible_by_32_raises_an_error() -> None:
    with pytest.raises(ValueError, match="whole number of patches of 32"):
        sa_swin_tiny(img_size=40)


# ---------------------------------------------------------------------------------------------- losses


def test_nt_xent_is_the_loop_over_its_definition() -> None:
    one, other = draw(3, 4), draw(3, 4, seed=1)
    loss = NTXent(0.3)
    views = F.normalize(torch.cat([one, other]), dim=1)
    total = 0.0
    for i in range(6):
        similar = [math.exp(float(views[i] @ views[k]) / 0.3) for k in range(6) if k != i]
        total -= math.log(math.exp(float(views[i] @ views[(i + 3) % 6]) / 0.3) / sum(similar))
    assert float(loss(one, other)) == pytest.approx(total / 6, rel=1e-5)
    assert float(loss(one[:1], other[:1])) == 0
    for wrong in (0, math.nan):
        with pytest.raises(ValueError, match="temperature=.*must be above 0"):
            NTXent(wrong)


def test_a_learnt_temperature_is_at_least_a_fiftieth_of_its_first_value() -> None:
    one, other, loss = draw(3, 4), draw(3, 4, seed=1), NTXent(0.5)
    torch.nn.init.constant_(loss.log_temperature, -20.0)
    torch.testing.assert_close(loss(one, other), NTXent(0.01)(one, other))
    torch.nn.init.constant_(loss.log_temperature, math.log(0.011))
    torch.testing.assert_close(loss(one, other), NTXent(0.011)(one, other))


def test_a_temperature_that_is_not_learnt_gets_no_gradient() -> None:
    method = SASwinPretraining(model=network(), temperature=0.3, learn_temperature=False)
    method(batch_of(2))["loss"].backward()
    assert method.contrast.log_temperature.grad is None
    assert float(method.contrast.log_temperature) == pytest.approx(math.log(0.3))


def test_law_a_fixed_temperature_compares_the_samples_of_all_ranks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    method = SASwinPretraining(model=network(), learn_temperature=False)
    set_training(method)
    asked = []
    monkeypatch.setattr(contrastive, "gather", lambda own: (asked.append(len(own)), (own, 0))[1])
    method(batch_of(2))
    assert asked


def test_nt_xent_is_computed_in_float32_under_autocast() -> None:
    one, other = draw(3, 64), draw(3, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        low = NTXent()(one, other)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, NTXent()(one, other))


def contrast(out, world: int) -> None:
    """A rank's share of four samples: the loss, and the gradients of features and temperature."""
    with process_group(torch.device("cpu"), 0.5):
        from asa.training.distributed import rank

        mine = slice(rank() * 4 // world, (rank() + 1) * 4 // world)
        parts = [draw(4, 5, seed=k)[mine].requires_grad_() for k in (0, 1)]
        loss = NTXent()
        value = loss(*parts)
        value.backward()
        grads = [*(part.grad for part in parts), loss.log_temperature.grad]
        torch.save([value.detach(), *grads, loss.eval()(*parts).detach()], out / f"{world}-{rank()}.pt")


@pytest.mark.distributed
def test_nt_xent_over_two_ranks_has_the_value_and_the_gradient_of_one(tmp_path) -> None:
    for world in (1, 2):
        ended = ranks(tmp_path, world, contrast, tmp_path, world)
        assert [one.code for one in ended] == [0] * world, [one.text for one in ended]
    whole = torch.load(tmp_path / "1-0.pt")
    halves = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole[0])
    torch.testing.assert_close((halves[0][3] + halves[1][3]) / 2, whole[3])
    for k in (1, 2):  # averaged over ranks, as gradients of shared weights are
        torch.testing.assert_close(torch.cat([half[k] for half in halves]) / 2, whole[k])
    for rank, half in enumerate(halves):  # in evaluation mode each rank has a batch of its own
        mine = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(half[4], NTXent()(draw(4, 5)[mine], draw(4, 5, seed=1)[mine]).detach())


def test_the_symmetry_loss_is_minimal_for_symmetric_healthy_and_opposite_patient_features() -> None:
    z = draw(2, 6)
    sides = {1.0: z, 0.0: draw(2, 6, seed=1), -1.0: -z}
    health = torch.tensor([1.0, 0.0])
    for form in ("cosine", "bce"):
        loss = SymmetryLoss(form)
        right = loss(z, torch.stack([z[0], -z[1]]), health)
        for first, second in itertools.product(sides.values(), repeat=2):
            assert right <= loss(z, torch.stack([first[0], second[1]]), health) + 1e-6
        assert right != loss(z, torch.stack([z[0], -z[1]]), 1 - health)
    assert float(SymmetryLoss()(z, torch.stack([z[0], -z[1]]), health)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="cosine or bce"):
        SymmetryLoss("hinge")


def test_the_symmetry_loss_is_the_loop_over_its_definition() -> None:
    z, other, health = draw(5, 4), draw(5, 4, seed=1), torch.tensor([1.0, 0.0, math.nan, 1.0, 0.0])
    cosine, entropy = 0.0, 0.0
    bce = SymmetryLoss("bce")
    for row, h in enumerate(health.tolist()):
        if math.isnan(h):
            continue
        s = float(F.cosine_similarity(z[row], other[row], dim=0))
        cosine += h * (1 - s) / 2 + (1 - h) * (1 + s) / 2
        p = 1 / (1 + math.exp(-(5 * s)))
        entropy -= h * math.log(p) + (1 - h) * math.log(1 - p)
    assert float(SymmetryLoss()(z, other, health)) == pytest.approx(cosine / 5, rel=1e-5)
    assert float(bce(z, other, health)) == pytest.approx(entropy / 5, rel=1e-4)


@pytest.mark.parametrize("form", ["cosine", "bce"])
def test_one_sample_only_patients_and_unknown_health_have_finite_losses(form: str) -> None:
    loss, z = SymmetryLoss(form), draw(3, 6).requires_grad_()
    for rows, health in ((1, 1.0), (3, 0.0)):
        value = loss(z[:rows], draw(rows, 6, seed=1), torch.full((rows,), health))
        assert value.isfinite() and value > 0
    unknown = loss(z, draw(3, 6, seed=1), torch.full((3,), math.nan))
    unknown.backward()
    assert float(unknown) == 0 and not z.grad.any()


def test_asymmetry_is_half_of_one_minus_the_cosine_and_exactly_0_for_equal_vectors() -> None:
    one, other = draw(4, 7), draw(4, 7, seed=1)
    torch.testing.assert_close(asymmetry(one, other), (1 - F.cosine_similarity(one, other)) / 2)
    assert not asymmetry(one, one).any()
    torch.testing.assert_close(asymmetry(one, -one), torch.ones(4))
    torch.testing.assert_close(asymmetry(one.T, other.T, dim=0), asymmetry(one, other))


# ---------------------------------------------------------------------------------------------- the method


def test_the_loss_is_the_weighted_sum_of_the_losses_of_the_four_tasks() -> None:
    weights = dict(rotation=0.3, contrastive=0.5, inpainting=0.7, symmetry=1.1)
    method, batch = SASwinPretraining(model=network(), **weights), batch_of(2)
    batch["health"] = torch.tensor([1.0, 0.0])
    found, views = method(batch), method.views(batch)
    output = method.model(views.cut, views.mirror)
    errors = [(output.volume[row] - views.whole[row]).abs().mean() for row in range(4)]
    symmetry = []
    for row, healthy in enumerate((True, False, True, False)):  # the second views after the first ones
        s = F.cosine_similarity(output.side[row], output.mirrored[row], dim=0)
        symmetry.append((1 - s) / 2 if healthy else (1 + s) / 2)
    expected = {
        "rotation": F.cross_entropy(output.rotation, views.quarters),
        "contrastive": NTXent()(output.contrast[:2], output.contrast[2:]),
        "inpainting": sum(errors) / 4,
        "symmetry": sum(symmetry) / 4,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())
    torch.testing.assert_close(found["loss"], sum(weights[name] * value for name, value in expected.items()))


def test_hidden_l1_is_the_error_inside_the_boxes_beside_that_of_the_mean_of_what_is_visible() -> None:
    method, batch = SASwinPretraining(model=network()), batch_of(3)
    found, views = method(batch), method.views(batch)
    output = method.model(views.cut, views.mirror)
    errors, of_mean = [], []
    for row in range(6):
        inside, whole = views.hidden[row], views.whole[row]
        errors.append((output.volume[row] - whole)[inside].abs())
        of_mean.append((whole[~inside].mean() - whole[inside]).abs())
    torch.testing.assert_close(found["hidden_l1"], torch.cat(errors).mean().detach())
    torch.testing.assert_close(found["mean_predictor_l1"], torch.cat(of_mean).mean())


def test_the_rotation_accuracy_is_the_fraction_of_views_whose_quarter_turns_have_the_highest_logit() -> None:
    method, batch = SASwinPretraining(model=network()), batch_of(3)
    views = method.views(batch)
    predicted = (views.quarters + torch.tensor([0, 0, 1, 0, 2, 0])) % 4
    logits = -(torch.arange(4) - predicted[:, None]).abs().float()
    output = replace(method.model(views.cut, views.mirror), rotation=logits)
    assert float(proxy_metrics(output, views)["rotation_accuracy"]) == pytest.approx(4 / 6)


def test_views_depend_only_on_the_seed_of_their_sample() -> None:
    method, batch = SASwinPretraining(model=network()), batch_of(4)
    whole = method.views(batch)
    again = method.views({name: value[2:] for name, value in batch.items()})
    rows = torch.tensor([2, 3, 6, 7])
    for name in ("cut", "whole", "mirror", "hidden", "quarters"):
        assert torch.equal(getattr(whole, name)[rows], getattr(again, name))


def test_a_view_is_the_rotated_image_with_noise_and_another_sample_in_boxes_and_its_mirror_has_no_boxes() -> None:
    method, batch = SASwinPretraining(model=network()), batch_of(3)
    views = method.views(batch)
    for row in range(6):
        turns = int(views.quarters[row])
        assert torch.equal(views.whole[row], rotate_about_left_right(batch["image"][row % 3], turns))
        assert torch.equal(views.mirror[row], flip(views.whole[row]))
        hidden, cut = views.hidden[row], views.cut[row]
        assert torch.equal(cut[~hidden], views.whole[row][~hidden])
        assert cut[hidden].min() >= 0 and cut[hidden].max() <= 1
    assert len(views.quarters.unique()) > 1


def test_the_partner_of_a_sample_is_of_another_scan() -> None:
    assert partners("abc").tolist() == [1, 0, 1] and partners("abcd").tolist() == [1, 0, 3, 2]
    assert partners("aabc").tolist() == [0, 1, 3, 2] and partners("abb").tolist() == [1, 0, 2]
    assert partners("a").tolist() == [0]


@pytest.mark.parametrize("scans", ["a", "aa", "ab", "abb"])
def test_boxes_hold_voxels_of_the_partner_and_no_voxel_of_the_scan_itself(scans: str) -> None:
    method, batch = SASwinPretraining(model=network()), batch_of(len(scans)) | {"id": list(scans)}
    batch["image"] = batch["image"] + 2 + 2 * torch.arange(len(scans))[:, None, None, None, None]  # noise is below 1
    views, others = method.views(batch), partners(scans).tolist()
    for row in range(2 * len(scans)):
        inside, own = views.cut[row][views.hidden[row]], row % len(scans)
        held = {0 if value < 1 else int(value / 2) for value in inside.tolist()}
        assert held == ({0} if others[own] == own else {0, others[own] + 1})


def test_boxes_are_the_partners_voxels_at_their_own_places() -> None:
    method, batch = SASwinPretraining(model=network()), batch_of(2)
    batch["image"] = batch["image"] + 2
    views = method.views(batch)
    for row, partner in enumerate((1, 0, 3, 2)):
        taken = views.hidden[row] & (views.cut[row] > 1)
        assert taken.any() and torch.equal(views.cut[row][taken], views.whole[partner][taken])


def test_pictures_are_a_view_inpainted_and_a_scan_beside_its_mirror_image() -> None:
    method, batch = SASwinPretraining(model=network(in_channels=2)), batch_of(2)
    batch["image"] = batch["image"].expand(-1, 2, -1, -1, -1) * torch.tensor([1.0, 0.5])[:, None, None, None]
    batch["mirror"] = flip(batch["image"])
    shown, views = method.pictures(batch), method.views(batch)
    view, scan = shown["reconstruction"], shown["symmetry"]
    inpainted = method.model(views.cut[:2], views.mirror[:2]).volume
    torch.testing.assert_close(view["prediction"], inpainted)
    torch.testing.assert_close(view["error"], sum((inpainted - views.whole[:2]).abs().split(1, dim=1)) / 2)
    assert torch.equal(view["input"], views.whole[:2]) and torch.equal(view["cut"], views.cut[:2])
    assert torch.equal(scan["image"], batch["image"]) and torch.equal(scan["mirror"], batch["mirror"])
    assert torch.equal(scan["difference"], (batch["image"] - batch["mirror"]).abs())
    torch.testing.assert_close(scan["asymmetry"][:, 0], method.model.asymmetry(batch["image"], batch["mirror"])[1])


def test_boxes_cover_up_to_the_largest_fraction_and_one_box_more() -> None:
    fractions = []
    for seed in range(40):
        boxes = random_boxes((20, 24, 28), 0.3, torch.Generator().manual_seed(seed))
        fractions.append(float(boxes.float().mean()))
    assert max(fractions) <= 0.3 + 0.25**3 + 0.01 and 0.1 < np.mean(fractions) < 0.2
    assert not random_boxes((8, 8, 8), 0.0, torch.Generator()).any()


def test_a_box_has_edges_of_5_to_25_percent_and_lies_anywhere() -> None:
    sizes, starts = [], set()
    for seed in range(300):
        box = random_boxes((20, 20, 20), 1e-9, torch.Generator().manual_seed(seed)).nonzero()  # a single one
        first, last = box.amin(dim=0), box.amax(dim=0)
        assert len(box) == (last - first + 1).prod()
        sizes += (last - first + 1).tolist()
        starts |= {("first", *first.tolist()), ("last", *last.tolist())}
    assert {*sizes} == {1, 2, 3, 4, 5} and np.mean(sizes) == pytest.approx(3, abs=0.2)  # 15 %
    for axis in (1, 2, 3):
        assert {start[axis] for start in starts if start[0] == "first"} >= {*range(16)}
        assert {start[axis] for start in starts if start[0] == "last"} >= {*range(4, 20)}
    assert random_boxes((2, 2, 2), 1e-9, torch.Generator().manual_seed(0)).sum() == 1


def test_padding_keeps_the_correspondence_of_the_two_sides() -> None:
    volume = draw(1, 1, 3, 5, 7)
    one, other = pad_to_multiple(volume, 4), pad_to_multiple(flip(volume), 4)
    assert one.shape[2:] == (4, 8, 8)
    assert torch.equal(one[..., :7], flip(other[..., :7])) and torch.equal(one[..., :3, :5, :7], volume)


def test_merging_reads_all_eight_neighbours() -> None:
    """MONAI's "merging" read some twice and others never, as in the released code."""
    merging = network().encoder.swin.layers1[0].downsample
    voxels = torch.zeros(1, 4, 4, 4, merging.dim, requires_grad=True)
    merging(voxels + 1e-3 * draw(*voxels.shape)).square().sum().backward()
    assert (voxels.grad != 0).all()


def test_a_wrong_model_or_size_raises_an_error() -> None:
    with pytest.raises(ValueError, match="needs model=sa_swin"):
        SASwinPretraining(model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="D and H must be equal"):
        SASwinPretraining(model=network(32, 64, 32))
    with pytest.raises(ValueError, match="cutout=1"):
        SASwinPretraining(model=network(), cutout=1)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"method.rotation=.*: a task's weight must be 0 or more"):
            SASwinPretraining(model=network(), rotation=wrong)


def pretrain(run, store) -> None:
    """Some steps on four scans, in as many processes as the environment sets."""
    opened = Store(store)
    method = SASwinPretraining(model=network(32, 32, 32))
    attached = {record["id"]: {"health": float(k % 2)} for k, record in enumerate(opened.records)}
    dataset = CropDataset(opened, opened.records, (32, 32, 32), crop="random", mirrored=True, attached=attached)
    settings = TrainSettings(steps=3, batch_size=4, log_every=1, device="cpu", precision="fp32")
    if is_main():
        run.mkdir()
    with process_group(torch.device("cpu"), 0.5):
        train(
            method, dataset, run, settings=settings, optim=OptimSettings(lr=1e-3), loader=LoaderSettings(workers=0),
            description={"model": {}},
        )  # fmt: skip


@pytest.mark.distributed
def test_two_ranks_pretrain_like_one(tmp_path, store) -> None:
    for world in (1, 2):
        (tmp_path / f"out{world}").mkdir()
        ended = ranks(tmp_path / f"out{world}", world, pretrain, tmp_path / str(world), store)
        assert [one.code for one in ended] == [0] * world, [one.text for one in ended]
    one, two = (
        np.array(log(tmp_path / str(world), "loss", "contrastive", "symmetry", "gradient_norm")) for world in (1, 2)
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.parametrize("depth", [32, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 96))])
@pytest.mark.parametrize("kind", ["pretraining", "segmentation"])
def test_bfloat16_on_a_cpu_is_close_to_float32_at_every_depth(depth: int, kind: str) -> None:
    torch.manual_seed(0)
    size = (depth, 64, 64)
    model = network(*size) if kind == "pretraining" else sa_swin_unet_tiny(2, img_size=size, **SMALL_UNET)
    volume, weights, results = draw(1, 1, *size).sigmoid(), [], []
    for enabled in (False, True, True):
        # Fill freed memory with NaN, to detect kernels that read memory that was never written.
        garbage = [torch.full((2**k,), float("nan")) for k in range(8, 22)]
        del garbage
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(volume, mirrored=flip(volume))
        out = out.volume if kind == "pretraining" else out
        weights = weights or [draw(*out.shape, seed=1)]
        (out.float() * weights[0]).sum().backward()
        gradients = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        results.append((out.detach().double().flatten(), torch.cat(gradients).double()))
    for one, other in zip(results[0], results[1], strict=True):
        assert F.cosine_similarity(one, other, dim=0) > 0.98
    assert all(torch.equal(one, other) for one, other in zip(results[1], results[2], strict=True))
