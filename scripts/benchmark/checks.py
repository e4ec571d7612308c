"""Rows of the GPU check that are right or wrong, and measured once. Letters: B images, M heads, L tokens of width d."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asa.cli import COMMANDS
from asa.models.sw_vit import fused_attention, written_attention
from asa.restoration.regions import find_varlen, region_attention, region_index, runs_varlen
from asa.training.device import PRECISIONS
from scripts.benchmark.clock import seconds_of, synchronise
from scripts.benchmark.plan import Spec

ROOT = Path(__file__).resolve().parents[2]
# Largest difference to the reference in float32, relative to its largest value.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
WINDOWS = {"base": (512, 12, 64, 64), "tiny": (8, 3, 16, 32)}  # N windows, M heads, S tokens, width d
IMAGES = {"base": (1, 8, 64, 32), "tiny": (1, 2, 16, 8)}  # B, M, edge of the token grid, d

Attention = Callable[[Tensor], Tensor]


def agreement(spec: Spec, device: torch.device) -> dict[str, Any]:
    """An operation as it runs on this device against the written-out one in float32: value, gradient and time.

    Raises:
        ArithmeticError: they differ.
    """
    fast, written, inputs = {"windows": windows, "regions": regions}[spec["operation"]](spec, device)
    precision = spec["precision"]
    reference, gradient = value_and_gradient(written, inputs)
    own = inputs.to(PRECISIONS[precision])
    found = value_and_gradient(fast, own)
    errors = [difference(a, b) for a, b in zip(found, (reference, gradient), strict=True)]
    times = {"seconds": fast, "written_seconds": written}
    row: dict[str, Any] = {key: seconds(call, own, device) for key, call in times.items()}
    row |= {"error": errors[0], "gradient_error": errors[1], "tolerance": TOLERANCE[precision]}
    if not max(errors) <= TOLERANCE[precision]:
        raise ArithmeticError(f"value and gradient differ by {errors[0]:.2g} and {errors[1]:.2g} of the largest")
    return row


def windows(spec: Spec, device: torch.device) -> tuple[Attention, Attention, Tensor]:
    """Attention inside linear windows: PyTorch's fused kernel and the products."""
    n, m, s, d = WINDOWS[spec["size"]]
    bias = torch.randn(m, s, s, device=device)
    inputs = torch.randn(3, n, m, s, d, device=device)
    return (
        lambda x: fused_attention(x, bias.to(x.dtype)),
        lambda x: written_attention(x, bias.to(x.dtype)),
        inputs,
    )


def regions(spec: Spec, device: torch.device) -> tuple[Attention, Attention, Tensor]:
    """Attention inside regions: variable-length attention where the device has it, and one masked product."""
    b, m, edge, d = IMAGES[spec["size"]]
    index = region_index(voronoi(edge, 10).flatten(1)).to(device)
    inputs = torch.randn(3, b, m, edge**2, d, device=device)
    varlen = runs_varlen(inputs.to(PRECISIONS[spec["precision"]])[0]) and find_varlen() is not None
    chosen = "varlen" if varlen else "segments"
    return (
        lambda x: region_attention(x[0], x[1], x[2], index, chosen),
        lambda x: region_attention(x[0], x[1], x[2], index, "dense"),
        inputs,
    )


def voronoi(edge: int, regions: int) -> torch.Tensor:
    """A label map `(1, edge, edge)` of the Voronoi cells of random points."""
    points = torch.rand(regions, 2, generator=torch.Generator().manual_seed(0)) * edge
    pixels = torch.cartesian_prod(torch.arange(edge), torch.arange(edge)).float()
    return torch.cdist(pixels, points).argmin(dim=1).view(1, edge, edge)


def value_and_gradient(call: Attention, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """An operation's value, and the gradient of the sum of its squares."""
    leaf = inputs.detach().requires_grad_()
    value = call(leaf)
    (gradient,) = torch.autograd.grad(value.float().square().sum(), leaf)
    return value.detach(), gradient


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def seconds(call: Attention, inputs: Tensor, device: torch.device, calls: int = 10) -> float:
    """Seconds of a forward and backward pass, the shortest of a few."""
    return min(seconds_of(lambda: value_and_gradient(call, inputs), device) for _ in range(calls))


def collectives(spec: Spec, device: torch.device) -> dict[str, Any]:
    """A gradient through DistributedDataParallel in one process, over NCCL on a GPU, is that without it.

    Raises:
        ArithmeticError: it is another one.
    """
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).to(device)
    inputs = torch.randn(16, 64, device=device)
    plain = torch.autograd.grad(model(inputs).square().mean(), list(model.parameters()))
    start = time.perf_counter()
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=[0] if device.type == "cuda" else None)
    parallel(inputs).square().mean().backward()
    synchronise(device)
    taken = time.perf_counter() - start
    error = max(difference(w.grad, g) for w, g in zip(model.parameters(), plain, strict=True) if w.grad is not None)
    del parallel  # before its process group
    dist.destroy_process_group()
    if not error <= TOLERANCE["fp32"]:
        raise ArithmeticError(f"the gradient differs by {error:.2g} of the largest")
    return {"seconds": taken, "gradient_error": error, "backend": backend}


def tests(spec: Spec, device: torch.device) -> dict[str, Any]:
    """The tests that need a GPU.

    Raises:
        AssertionError: a test failed.
    """
    start, processes = time.perf_counter(), str(min(8, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", processes, "-p", "no:cacheprovider"]
    command.append(spec["tests"])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        raise AssertionError(f"pytest -m gpu: {last}")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", last)}
    return {"seconds": time.perf_counter() - start, **counts}


def demo(spec: Spec, device: torch.device) -> dict[str, Any]:
    """Phantoms, their preparation and a short pretraining with the settings of scripts/demo.

    Raises:
        ArithmeticError: the loss did not decrease.
    """
    import asa

    start, folder = time.perf_counter(), Path(spec["scratch"])
    own = {"kind": "t1", "subjects": spec["subjects"], "resolution": spec["resolution"], "out": folder / "raw"}
    phantom = COMMANDS["phantom"]
    if phantom.main(arguments=[f"{key}={value}" for key, value in own.items()]):
        raise RuntimeError("asa-phantom failed")
    asa.prepare(folder / "store", data="bids", **{"data.root": str(folder / "raw")})
    train = {"steps": spec["steps"], "log_every": 1, "device": str(device), "validate_every": 0}
    settings: dict[str, Any] = {f"train.{key}": value for key, value in train.items()}
    settings |= {"optim.warmup": spec["warmup"], "loader.workers": 2 if device.type == "cuda" else 0}
    settings["data.split"] = {"validation": 0, "test": 0}
    began = time.perf_counter()
    asa.pretrain(folder / "store", folder / "run", experiment="demo_pretrain", **settings)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["group"] == "train"]
    part = max(1, len(losses) // 5)
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    if not last < first:
        raise ArithmeticError(f"the loss did not decrease: {first:.3g}, then {last:.3g}")
    found = {"steps_per_second": spec["steps"] / (time.perf_counter() - began), "loss": last, "first_loss": first}
    return {"seconds": time.perf_counter() - start, **found}


CHECKS: dict[str, Callable[[Spec, torch.device], dict[str, Any]]] = {
    "agreement": agreement,
    "collectives": collectives,
    "tests": tests,
    "demo": demo,
}
