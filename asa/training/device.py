"""The device and precision of a computation, and CPU memory settings."""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asa.training.process import is_main, local_rank, world_size

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Instructions for bfloat16 products, as torch.cpu.get_capabilities names them: two of x86, two of Arm.
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
# Options of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
ON_HOST = ("seed", "air", "regions")  # of a batch: values that decide shapes, for which the host would wait
HEAP_GROWTH = 64 * 2**20  # bytes requested from the system at a time


@dataclass(frozen=True)
class Backend:
    """Where a run computes, and in which precision."""

    device: torch.device
    dtype: torch.dtype  # of autocast

    @classmethod
    def of(cls, device: str, precision: str) -> "Backend":
        """What settings stand for on this machine; see `pick_device` and `pick_precision`."""
        place = pick_device(device)
        return cls(place, pick_precision(precision, place))

    @property
    def precision(self) -> str:
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.dtype)


def pick_device(name: str) -> torch.device:
    """The device of a setting, a ValueError if it is not here; of several processes each uses the GPU of its rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        advice = "use device=cpu or install a CUDA build"
        raise ValueError(f"device={name}, but torch {torch.__version__} sees no GPU: {advice}")
    if device.type != "cuda" or world_size() == 1:
        return device
    if device.index is not None:
        raise ValueError(f"device={name}: with several processes each uses its own GPU: use device=cuda")
    if local_rank() >= torch.cuda.device_count():
        raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
    return torch.device("cuda", local_rank())


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of a precision setting on a device; a ValueError for an unknown name, or fp16 on a CPU."""
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if has_bf16_units() else torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in PRECISIONS:
        raise ValueError(f"precision is auto, {', '.join(PRECISIONS)}, not {name!r}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU: use fp32, or bf16 if the CPU supports it")
    if name == "bf16" and device.type == "cpu" and not has_bf16_units() and is_main():
        warnings.warn(
            "precision=bf16 on a CPU without bfloat16 units: matrix products can take several times as long as in "
            "fp32; precision=auto chooses fp32 here",
            stacklevel=2,
        )
    return PRECISIONS[name]


def has_bf16_units() -> bool:
    """Whether this CPU has instructions for bfloat16 products, and PyTorch the library that uses them (oneDNN)."""
    # Older versions of torch cannot tell; float32 is always right there.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.mkldnn.is_available() and any(capabilities.get(unit) for unit in BF16_UNITS)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision of a device and dtype; float32 disables an enclosing autocast."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels inside the block, if wanted; a ValueError for an operation that has none on its device."""
    if not wanted:
        yield
        return
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        lacking = f"{str(error).split()[0]} has no deterministic kernel on this device"
        raise ValueError(f"train.deterministic=true: {lacking}: train with false, or another network") from error
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of what a run draws from: the host's generator, and that of its GPU, which drops units there."""
    state = {"random": torch.get_rng_state()}
    return state | ({"device_random": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Continue from what `random_state` returned, also on another device, whose own generator then stays as it is."""
    torch.set_rng_state(state["random"])
    if device.type == "cuda" and "device_random" in state:
        torch.cuda.set_rng_state(state["device_random"], device)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; what masks and regions are computed from stays on the CPU."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key not in ON_HOST else value
        for key, value in batch.items()
    }


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory, for the whole process; returns whether it does: only on Linux with glibc.

    By default it returns every large block to the system. Each tensor of a training step then lies in fresh pages,
    which the system maps and zeroes at first access; this takes a tenth of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    options = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, HEAP_GROWTH))
    return mallopt is not None and all(mallopt(*option) == 1 for option in options)
