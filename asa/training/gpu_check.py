"""Checks before a run starts on a GPU: does this PyTorch support it, and does a step fit in its memory?"""

import re
from collections.abc import Callable

import torch
from torch import nn

from asa.settings import OptimSettings, TrainSettings
from asa.training.device import pick_device, pick_precision
from asa.training.plan import GIB, ExampleBatch, step_memory

VOLTA = (7, 0)
FOR_VOLTA = "torch 2.8 built for CUDA 12.6 (pytorch.org/get-started/previous-versions)"
USABLE = 0.9  # fraction of a GPU's free memory that a step may take; the allocator needs some


def preflight(
    make: Callable[[], nn.Module], batch: ExampleBatch, settings: TrainSettings, optim: OptimSettings
) -> list[str]:
    """Check the GPU of a run, if it uses one.

    Args:
        make, batch, settings, optim: see `asa.training.plan.make_plan`.

    Returns:
        Lines to print: advice, and the memory of a step compared with the free memory.

    Raises:
        ValueError: this PyTorch does not support the GPU.
    """
    device = pick_device(settings.device)
    if device.type != "cuda":
        return []
    advice, dtype = check_gpu(device), pick_precision(settings.precision, device)
    _, memory = step_memory(make, dtype, batch, settings=settings, optim=optim, gpu=True)
    return [*advice, fit_line(memory.peak, device)]


def check_gpu(device: torch.device) -> list[str]:
    """Lines of advice on the GPU of a run and this PyTorch, usually none.

    Raises:
        ValueError: PyTorch has no kernels for this GPU; the message says what to install.
    """
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


def fit_line(needed: int, device: torch.device) -> str:
    """A line that compares the memory that a step needs at its peak, in bytes, with the free memory of a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    line = (
        f"memory: a step takes about {needed / GIB:.1f} GiB, {free / GIB:.1f} of {total / GIB:.1f} GiB are free "
        f"on {torch.cuda.get_device_name(device)}"
    )
    if needed <= USABLE * free:
        return line
    return f"warning: {line}: raise train.accumulate, set model.checkpointing=true, or take a smaller crop"
