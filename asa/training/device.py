"""Where a computation runs, and in what precision."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from asa.training import distributed

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device that a setting means. Of several processes on a machine each has the GPU of its local rank.

    Raises:
        ValueError: a GPU is asked for and there is none, or fewer than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: not a device; give auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name}, but torch {torch.__version__} sees no GPU here: use device=cpu or install a CUDA build"
        )
    if device.type != "cuda" or distributed.world_size() == 1:
        return device
    if device.index is not None:
        raise ValueError(f"device={name}: of several processes each has its own GPU; give cuda")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
    return torch.device("cuda", distributed.local_rank())


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in.

    Raises:
        ValueError: an unknown name, or fp16 on a CPU.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in PRECISIONS:
        raise ValueError(f"precision is auto, {', '.join(PRECISIONS)}, not {name!r}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("train.precision=fp16 needs a GPU: use fp32, or bf16 where the CPU computes it")
    return PRECISIONS[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision of a device and type; float32 switches an outer one off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device; seeds stay on the CPU, where masks are drawn from them."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key != "seed" else value
        for key, value in batch.items()
    }
