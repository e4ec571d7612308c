"""Layer-wise learning rates and frozen parts."""

import math

import pytest
import torch
from torch import nn

from asa.baselines.primus import primus_tiny
from asa.baselines.resenc import resenc_tiny
from asa.methods.segment import Segmentation
from asa.models.sa_swin_unet import sa_swin_unet_tiny
from asa.models.unet import unet_tiny
from asa.models.vit_seg import vit_linear_tiny
from asa.ops.patches import patchify
from asa.settings import OptimSettings, TrainSettings
from asa.training.optim import Schedule, freeze, make_optimizer, set_learning_rate, set_training
from asa.training.plan import make_plan, volume_batch
from scripts.benchmark.memory import step_memory

DEPTH = 4  # of unet_tiny's encoder


@pytest.fixture(scope="module")
def method() -> Segmentation:
    return Segmentation(model=unet_tiny(out_channels=3, feature_size=4, img_size=(64, 32, 32)))


def rates(method: Segmentation, lr: float, **settings: float) -> dict[str, float]:
    """Learning rate of every parameter, by name."""
    optimizer = make_optimizer(method, OptimSettings(**settings))
    set_learning_rate(optimizer, lr)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in method.named_parameters()}


def test_without_layer_decay_all_parameters_have_the_same_learning_rate(method: Segmentation) -> None:
    assert set(rates(method, 0.3).values()) == {0.3}
    assert len(make_optimizer(method, OptimSettings()).param_groups) == 2


def test_the_learning_rate_of_each_block_is_that_of_the_block_above_times_the_decay(method: Segmentation) -> None:
    found = rates(method, 1.0, layer_decay=0.5)
    for name, rate in found.items():
        inner = name.removeprefix("model.encoder.")
        if inner == name or inner.startswith("norm."):
            expected = 1.0
        elif inner.startswith("patch_embed."):
            expected = 0.5 ** (DEPTH + 1)
        else:
            expected = 0.5 ** (DEPTH - int(inner.split(".")[1]))
        assert rate == pytest.approx(expected), name
    assert found["model.encoder.blocks.3.mlp.0.weight"] == 0.5 and found["model.encoder.patch_embed.bias"] == 0.5**5


def test_the_blocks_of_a_swin_have_learning_rates_of_their_own_too() -> None:
    own = dict(img_size=(32, 32, 64), embed_dim=4, num_heads=(1, 1, 2, 2), window=2)
    found = rates(Segmentation(model=sa_swin_unet_tiny(out_channels=3, cross_heads=2, **own)), 1.0, layer_decay=0.5)
    swin = {name.partition("encoder.swin.")[2]: rate for name, rate in found.items() if "encoder.swin." in name}
    assert swin["layers4.0.blocks.1.mlp.linear1.weight"] == 0.5 and swin["layers4.0.blocks.0.norm1.bias"] == 0.5**2
    assert swin["layers1.0.blocks.0.attn.qkv.weight"] == 0.5**8 and swin["layers1.0.downsample.norm.bias"] == 0.5**7
    assert swin["patch_embed.proj.weight"] == 0.5**9
    assert {rate for name, rate in found.items() if "encoder." not in name} == {1.0}


def test_the_blocks_of_comparators_have_learning_rates_of_their_own_too() -> None:
    resenc, primus = (
        rates(Segmentation(model=make(out_channels=3, img_size=(32, 32, 64))), 1.0, layer_decay=0.5)
        for make in (resenc_tiny, primus_tiny)
    )
    stages = {int(name.split(".")[3]) for name in resenc if name.startswith("model.encoder.stages.")}
    for name, rate in resenc.items():
        if name.startswith("model.encoder.stages."):
            assert rate == 0.5 ** (max(stages) - int(name.split(".")[3])), name
    assert {rate for name, rate in resenc.items() if ".stem." in name} == {0.5 ** (max(stages) + 1)}
    blocks = {int(name.split(".")[3]) for name in primus if name.startswith("model.encoder.blocks.")}
    for name, rate in primus.items():
        if name.startswith("model.encoder.blocks."):
            assert rate == 0.5 ** (max(blocks) + 1 - int(name.split(".")[3])), name


def test_rates_of_layers_that_no_encoder_orders_are_told() -> None:
    with pytest.warns(UserWarning, match="optim.encoder_lr and optim.layer_decay have no effect"):
        make_optimizer(nn.Linear(2, 2), OptimSettings(encoder_lr=0.1))


def test_layer_decay_does_not_change_weight_decay(method: Segmentation) -> None:
    def decays(settings: OptimSettings) -> dict[int, float]:
        optimizer = make_optimizer(method, settings)
        return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}

    plain, layered = decays(OptimSettings(weight_decay=0.1)), decays(OptimSettings(weight_decay=0.1, layer_decay=0.7))
    assert plain == layered and len(plain) == len(list(method.parameters())) and set(plain.values()) == {0.0, 0.1}


def test_a_step_changes_early_layers_less(method: Segmentation) -> None:
    optimizer = make_optimizer(method, OptimSettings(name="sgd", momentum=0.0, weight_decay=0.0, layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p.detach()).mean().item() for name, p in method.named_parameters()}
    assert moved["model.heads.0.conv.conv.bias"] == pytest.approx(1.0, rel=1e-3)
    assert moved["model.encoder.blocks.0.mlp.0.weight"] == pytest.approx(0.5**DEPTH, rel=1e-3)


def test_sgd_has_nesterov_momentum() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimSettings(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01))
    weight, velocity = model.weight.detach().clone(), torch.zeros(2, 3)
    for step in range(3):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizer.step()
        gradient = gradient + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.9 * velocity)
        torch.testing.assert_close(model.weight.detach(), weight)


def test_a_layer_decay_outside_its_range_is_refused() -> None:
    for wrong in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match=r"optim\.layer_decay"):
            OptimSettings(layer_decay=wrong)
    for name in ("lr", "weight_decay", "warmup_lr", "final_lr"):
        for number in (-1e-3, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"optim.{name}=.*: must be 0 or more"):
                OptimSettings(**{name: number})
    with pytest.raises(ValueError, match=r"train.clip=nan: must be 0 or more"):
        TrainSettings(clip=math.nan)


def test_the_encoder_may_have_a_lower_learning_rate(method: Segmentation) -> None:
    plain, found = rates(method, 1e-3), rates(method, 1e-3, encoder_lr=0.3, layer_decay=0.5)
    alone = rates(method, 1e-3, layer_decay=0.5)
    for name, rate in found.items():
        factor = 0.3 if name.startswith("model.encoder.") else 1.0
        assert rate == pytest.approx(factor * alone[name]) and plain[name] == 1e-3


# --- frozen parts


def test_each_phase_has_its_own_warm_up() -> None:
    settings = OptimSettings(lr=1.0, warmup=4, warmup_lr=0.0, freeze=["encoder"], freeze_until=10)
    schedule = Schedule(settings, 30, 1)
    alone = Schedule(OptimSettings(lr=1.0, warmup=4, warmup_lr=0.0), 20, 1)
    assert [schedule[k] for k in range(4)] == [0.0, 0.25, 0.5, 0.75] and all(schedule[k] == 1.0 for k in range(4, 10))
    assert [schedule[k] for k in range(10, 30)] == [alone[k] for k in range(20)]
    with pytest.raises(ValueError, match=r"optim\.freeze_until=10 and the warm-up of 4"):
        Schedule(settings, 14, 1)
    with pytest.raises(ValueError, match=r"optim\.freeze_until=10: give a step, and in optim\.freeze"):
        OptimSettings(freeze_until=10)
    with pytest.raises(ValueError, match=r"optim\.encoder_lr=0"):
        OptimSettings(encoder_lr=0)


def tiny() -> Segmentation:
    return Segmentation(model=unet_tiny(out_channels=3, feature_size=4, img_size=(64, 32, 32)))


def test_a_frozen_encoder_keeps_its_weights_and_the_rest_is_trained() -> None:
    torch.manual_seed(0)
    method = tiny()
    freeze(method.model, ["encoder"])
    optimizer = make_optimizer(method, OptimSettings(lr=0.1))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    batch = {"image": torch.rand(1, 1, 64, 32, 32), "label": torch.randint(0, 3, (1, 1, 64, 32, 32)).byte()}
    method(batch)["loss"].backward()
    optimizer.step()
    for name, parameter in method.named_parameters():
        frozen = name.startswith("model.encoder.")
        assert torch.equal(before[name], parameter) == frozen, name
        assert (parameter.grad is None) == frozen and (id(parameter) in held) != frozen


def test_a_part_of_the_encoder_can_be_frozen_and_names_match_whole_components() -> None:
    method = tiny()
    freeze(method.model, ["encoder.blocks.1", "heads.0.conv.conv.bias"])
    frozen = {name for name, p in method.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in frozen if name.startswith("encoder.blocks.1.")} | {"heads.0.conv.conv.bias"}
    assert len(frozen) > 5
    with pytest.raises(ValueError, match=r"no part 'encod'; the network's parts are encoder, image_block, skips"):
        freeze(method.model, ["encod"])
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        freeze(method.model, ["encoder", "image_block", "skips", "ups", "heads"])


def test_modules_that_are_entirely_frozen_are_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    freeze(model, ["0"])
    set_training(model.eval())
    assert model.training and not any(module.training for module in model[0].modules())
    assert all(module.training for module in model[1].modules())


def test_a_frozen_encoder_reduces_the_cost_of_a_step() -> None:
    settings = TrainSettings(steps=200, batch_size=1, precision="fp32")
    plain, frozen = (
        make_plan(tiny, lambda m: volume_batch(m, 1, label=True), settings=settings, optim=OptimSettings(freeze=parts))
        for parts in ([], ["encoder"])
    )
    assert frozen.forward == plain.forward and frozen.step < plain.step
    assert plain.gradients - frozen.gradients == 4 * plain.encoder and frozen.states == 2 * frozen.gradients
    before, now = (
        step_memory(
            tiny, lambda m: volume_batch(m, 1, label=True), settings=settings, optim=OptimSettings(freeze=parts)
        )
        for parts in ([], ["encoder"])
    )
    assert now + plain.states - frozen.states < before  # no activations are kept for it


def test_the_linear_network_maps_each_token_to_the_voxels_of_its_patch_by_one_matrix() -> None:
    torch.manual_seed(0)
    model = vit_linear_tiny(out_channels=2, img_size=(16, 16, 24))
    image = torch.rand(1, 1, 16, 16, 24)
    (logits,) = model(image, deep_supervision=True)
    assert torch.equal(logits, model(image))
    tokens = model.encoder(image)[0]
    for token, patch in zip(tokens, patchify(logits, 8)[0], strict=True):
        torch.testing.assert_close(patch, model.head.weight @ token + model.head.bias)


def test_only_the_matrix_of_the_linear_network_on_a_frozen_encoder_is_trained() -> None:
    method = Segmentation(model=vit_linear_tiny(out_channels=2, img_size=(16, 16, 24)))
    freeze(method.model, ["encoder"])
    batch = {"image": torch.rand(1, 1, 16, 16, 24), "label": torch.randint(0, 2, (1, 1, 16, 16, 24)).byte()}
    method(batch)["loss"].backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {
        "model.head.weight",
        "model.head.bias",
    }
