"""Checks before a run starts on a GPU: does this PyTorch support it, and does a step fit in its memory?"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asa.settings import OptimSettings, TrainSettings
from asa.training.device import Backend, on_device
from asa.training.optim import EMA, freeze, make_optimizer

GIB = 2**30
VOLTA = (7, 0)
FOR_VOLTA = "torch 2.8 built for CUDA 12.6 (pytorch.org/get-started/previous-versions)"
USABLE = 0.9  # fraction of a GPU's free memory that a step may take; the allocator needs some


def preflight(
    make: Callable[[], nn.Module],
    example: Callable[[Any], Mapping[str, Any]],
    settings: TrainSettings,
    optim: OptimSettings,
    backend: Backend,
) -> list[str]:
    """Lines about the GPU of a run, if it uses one: advice, and the memory of a step compared with the free memory.

    The arguments are those of `step_peak`; a ValueError if this PyTorch does not support the GPU.
    """
    if backend.device.type != "cuda":
        return []
    advice = check_gpu(backend.device)
    return [*advice, fit_line(step_peak(make, example, settings, optim, backend), backend.device)]


def step_peak(
    make: Callable[[], Any],
    example: Callable[[Any], Mapping[str, Any]],
    settings: TrainSettings,
    optim: OptimSettings,
    backend: Backend,
) -> int | None:
    """Bytes that tensors take on a GPU at the peak of a training step, measured in two steps; None: they do not fit.

    `make` makes the method, and `example` a micro-batch of it, in which tensors on the meta device become zeros.
    """
    try:
        method = make()
        if not optim.freeze_until:
            freeze(method.model, optim.freeze)
        tensors = {key: value for key, value in example(method).items() if isinstance(value, Tensor)}
        filled = {k: torch.zeros_like(v, device="cpu") if v.is_meta else v for k, v in tensors.items()}
        batch = on_device(filled, backend.device)
        method.to(backend.device)
        optimizer, average = make_optimizer(method, optim), EMA(method, settings.ema)
        torch.cuda.reset_peak_memory_stats(backend.device)
        for step in (1, 2):  # the first one makes the optimizer's states
            for _ in range(min(settings.accumulate, 2)):
                with backend.autocast():
                    loss = method(batch)["loss"]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
        return torch.cuda.max_memory_allocated(backend.device)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def check_gpu(device: torch.device) -> list[str]:
    """Lines of advice on a GPU and this PyTorch, usually none; a ValueError if it has no kernels for this GPU."""
    if device.type != "cuda":
        return []
    capability = torch.cuda.get_device_capability(device)
    name, built = torch.cuda.get_device_name(device), torch.cuda.get_arch_list()
    own = "sm_{}{}".format(*capability)
    if not any(_runs(architecture, capability) for architecture in built):
        advice = FOR_VOLTA if capability <= VOLTA else "a newer build of torch, see pytorch.org/get-started"
        raise ValueError(
            f"{name} is {own}, and torch {torch.__version__} is built for {', '.join(built) or 'no GPU'}: "
            f"install {advice}, or set train.device=cpu"
        )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if capability == VOLTA and version > (2, 8):
        return [
            f"note: {name} is {own}: from torch 2.9 on (here {torch.__version__}) fp16 3-D convolutions may run "
            f"without cuDNN on it, which is slow: {FOR_VOLTA}"
        ]
    return []


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture (like "sm_80", "sm_90a", "compute_90") runs on a GPU of this capability."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return False
    kind, major, minor, suffix = found[1], int(found[2]), int(found[3]), found[4]
    if suffix == "a":
        return (major, minor) == capability
    if kind == "compute" and not suffix:  # the driver compiles it for any newer GPU
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def fit_line(needed: int | None, device: torch.device) -> str:
    """A line that compares the bytes that a step needs at its peak, None if they do not fit, with a GPU's free ones."""
    torch.cuda.empty_cache()  # of what the measurement has left
    free, total = torch.cuda.mem_get_info(device)
    takes = "does not fit" if needed is None else f"takes {needed / GIB:.1f} GiB"
    line = (
        f"memory: a step {takes}, {free / GIB:.1f} of {total / GIB:.1f} GiB are free on "
        f"{torch.cuda.get_device_name(device)}"
    )
    if needed is not None and needed <= USABLE * free:
        return line
    return f"warning: {line}: raise train.accumulate, set model.checkpointing=true, or take a smaller crop"
