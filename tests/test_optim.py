"""Layer-wise learning rates."""

import pytest
import torch

from asa.engine.optim import OptimSettings, make_optimizer, set_learning_rate
from asa.methods.segment import Segmentation
from asa.models.unet import unet_tiny

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


def test_without_layer_decay_all_learn_alike(method: Segmentation) -> None:
    assert set(rates(method, 0.3).values()) == {0.3}
    assert len(make_optimizer(method, OptimSettings()).param_groups) == 2


def test_each_block_learns_slower_than_the_one_above_by_the_same_factor(method: Segmentation) -> None:
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


def test_layer_decay_leaves_weight_decay_as_it_was(method: Segmentation) -> None:
    def decays(settings: OptimSettings) -> dict[int, float]:
        optimizer = make_optimizer(method, settings)
        return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}

    plain, layered = decays(OptimSettings(weight_decay=0.1)), decays(OptimSettings(weight_decay=0.1, layer_decay=0.7))
    assert plain == layered and len(plain) == len(list(method.parameters())) and set(plain.values()) == {0.0, 0.1}


def test_a_step_moves_deep_layers_less(method: Segmentation) -> None:
    optimizer = make_optimizer(method, OptimSettings(name="sgd", momentum=0.0, weight_decay=0.0, layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - p.detach()).mean().item() for name, p in method.named_parameters()}
    assert moved["model.heads.0.conv.conv.bias"] == pytest.approx(1.0, rel=1e-3)
    assert moved["model.encoder.blocks.0.mlp.0.weight"] == pytest.approx(0.5**DEPTH, rel=1e-3)


def test_a_factor_that_is_none_is_refused() -> None:
    for wrong in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match=r"optim\.layer_decay"):
            OptimSettings(layer_decay=wrong)
