"""Each method's training step on a GPU: the values of the CPU, and no waiting. Skipped without a GPU."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asa.inference.segmentation import sliding_window
from asa.models.kernels import InstanceNorm
from asa.settings import OptimSettings, PredictSettings
from asa.training.device import PRECISIONS, autocast, on_device
from asa.training.optim import EMA, make_optimizer
from asa.training.run_log import SilentLog
from asa.training.steps import NonFiniteGuard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of the checkout, not of the package
simulation = importlib.import_module("scripts.simulate_cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
GPU = torch.device("cuda")
EAGER = [name for name in simulation.ROWS if "compiled" not in name]


@pytest.fixture(autouse=True)
def convolutions_in_float32() -> Any:
    """Without TF32, which PyTorch uses in convolutions unless it is told not to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def loss_and_gradient(
    method: nn.Module, batch: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Of one batch; the gradient as one vector."""
    method.to(device).train().zero_grad()
    torch.manual_seed(0)
    with autocast(device, dtype):
        loss = method(on_device(batch, device))["loss"]
    loss.backward()
    gradients = [p.grad.flatten().float().cpu() for p in method.parameters() if p.grad is not None]
    return loss.detach().cpu(), torch.cat(gradients)


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A method and a batch, each from the same seed."""
    torch.manual_seed(0)
    method = simulation.ROWS[name]()
    for module in method.modules():  # their numbers are drawn on the device
        for key in ("p", "drop_prob"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    return method, simulation.example(method)


@pytest.mark.parametrize("name", simulation.ROWS)
def test_loss_and_gradient_are_those_of_the_cpu(name: str) -> None:
    method, batch = made(name)
    loss, gradient = loss_and_gradient(method, batch, torch.device("cpu"))
    found, there = loss_and_gradient(method, batch, GPU)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    assert torch.cosine_similarity(there, gradient, dim=0) > 0.999
    torch.testing.assert_close(there.norm(), gradient.norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", EAGER)
def test_half_precision_has_nearly_the_loss_and_direction_of_float32(name: str, precision: str) -> None:
    method, batch = made(name)
    loss, gradient = loss_and_gradient(method, batch, GPU)
    half, there = loss_and_gradient(method, batch, GPU, PRECISIONS[precision])
    assert half.dtype == torch.float32 and there.isfinite().all()
    torch.testing.assert_close(half, loss, rtol=0.02, atol=1e-3)
    assert torch.cosine_similarity(there, gradient, dim=0) > 0.9


@pytest.mark.parametrize("name", EAGER)
def test_no_step_waits_for_the_gpu(name: str) -> None:
    method, batch = made(name)
    method.to(GPU).train()
    optimizer = make_optimizer(method, OptimSettings())
    guard = NonFiniteGuard(Path(), SilentLog(), optimizer)
    ema = EMA(method, 0.9)
    pinned = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
    for step in (1, 2):
        if step == 2:  # the first one makes the optimizer's states and loads kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            inputs = on_device(pinned, GPU)
            with autocast(GPU, torch.bfloat16):
                result = method(inputs)
            guard.add(inputs, result["loss"]).backward()
            guard.check(step, nn.utils.clip_grad_norm_(method.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["unet", "vit_conv", "vit_seg", "resenc_tiny"])
def test_probabilities_of_a_volume_in_half_precision_are_nearly_those_of_float32(name: str, precision: str) -> None:
    method, _ = made(name)
    model, volume = method.get_submodule("model").eval().to(GPU), torch.rand(1, 64, 73, 90, device=GPU)
    full, half = (
        sliding_window(model, volume, PredictSettings(device="cuda", precision=own)).float().softmax(dim=0)
        for own in ("fp32", precision)
    )
    difference = (half - full).abs()
    assert difference.mean() < 0.002 and difference.max() < 0.05


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2), ("fp16", 5e-3)])
@pytest.mark.parametrize("offset", [0.0, 30.0])  # a large mean: the variance must not be a small difference
def test_the_norm_of_large_maps_is_pytorchs(precision: str, tolerance: float, offset: float) -> None:
    maps = 3 * torch.randn(2, 5, 48, 64, 40, device=GPU) + offset
    maps = maps.to(PRECISIONS[precision]).requires_grad_()
    seed = torch.randn_like(maps)
    norm = InstanceNorm(5)
    assert norm._in_parts(maps)
    found, expected = norm(maps), nn.functional.instance_norm(maps.double())
    assert found.dtype == maps.dtype
    for one, other in (
        (found, expected),
        (*torch.autograd.grad(found, maps, seed), *torch.autograd.grad(expected, maps, seed.double())),
    ):
        assert (one.double() - other).abs().max() < tolerance * other.abs().max()


@pytest.mark.parametrize("name", simulation.PREDICTED)
def test_logits_of_a_volume_are_those_of_the_cpu(name: str) -> None:
    method, _ = made(name)
    model = method.get_submodule("model").eval()
    volume = torch.rand(1, 64, 73, 90)
    expected = sliding_window(model, volume, PredictSettings(device="cpu", precision="fp32"))
    found = sliding_window(model.to(GPU), volume.to(GPU), PredictSettings(device="cuda", precision="fp32"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
