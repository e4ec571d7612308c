"""Time, memory and operations of a piece of work."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

BUDGET = 60.0  # seconds: after these, a call is not repeated
SECOND = 5.0  # seconds: faster calls are warmed up twice
SHORTEST = 0.2  # seconds: a repeat of a faster call consists of several calls

Rates = Callable[[], dict[str, float]]


@dataclass
class Work:
    """The call that a row times.

    `volumes` is the number of volumes per call. `operations` counts the operations of a call, after its memory was
    measured. `warm_up` replaces a first call that would be too long. `prepare` runs untimed before every repeat of
    `calls` calls. `waited` returns the seconds that all calls so far have waited for data. `before` is the peak memory
    before any call.
    """

    call: Callable[[], object]
    volumes: float = 1.0
    operations: Callable[[], int] | None = None
    warm_up: Callable[[], object] | None = None
    prepare: Callable[[], object] | None = None
    calls: int | None = None
    waited: Callable[[], float] | None = None
    before: int | None = None


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_peak() -> int:
    """Peak memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of the GPU's tensors, or of the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak()


def count_operations(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def time_work(work: Work, device: torch.device, repeats: int, rates: Rates | None, precision: str) -> dict[str, Any]:
    """Time a call after warm-up, relative to the matrix-product rates measured around every repeat.

    Returns:
        "seconds" (median) and "seconds_best" of a call, "seconds_all" of the "repeats", "calls" in each,
        "volumes_per_second", "peak_bytes", "host_peak_bytes". With `waited` also "waiting", as a fraction of the time;
        with `before` also "extra_bytes". With rates also "matrix_rate" (of the precision in use), "matrix_rate_fp32",
        and "equivalent": operations that large matrix products would have done in the time of a volume. With operations
        also "operations" of a call, and their ratio to the equivalent, "fraction" (median) and "fraction_best".
    """
    warm_up = work.warm_up or work.call
    first = seconds_of(warm_up, device)
    if first < SECOND:
        first = seconds_of(warm_up, device)
    calls = work.calls or max(1, min(int(SHORTEST / first), 100))
    before = rates() if rates else {}
    measured = [before]
    seconds: list[float] = []
    equivalents: list[float] = []
    waits: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) * calls < BUDGET):
        if work.prepare:
            work.prepare()
        elif calls > 1:
            work.call()  # the first call after a pause is slower
        waited = work.waited() if work.waited else 0.0
        seconds.append(seconds_of(work.call, device, calls) / calls)
        if work.waited:
            waits.append(work.waited() - waited)
        if rates:
            measured.append(rates())
            equivalents.append(seconds[-1] * (measured[-2][precision] + measured[-1][precision]) / 2)
    median = statistics.median(seconds)
    row: dict[str, Any] = {
        "seconds": median,
        "seconds_best": min(seconds),
        "seconds_all": seconds,
        "repeats": len(seconds),
        "calls": calls,
        "volumes_per_second": work.volumes / median,
        "peak_bytes": peak_memory(device),
        "host_peak_bytes": host_peak(),
    }
    if work.before is not None:
        row["extra_bytes"] = row["peak_bytes"] - work.before
    if work.waited:
        row["waiting"] = sum(waits) / (sum(seconds) * calls)
    if work.operations:
        row["operations"] = work.operations()  # after the memory was measured
    if rates:
        row |= _against_machine(row.get("operations"), work.volumes, measured, equivalents, precision)
    return row


def _against_machine(
    operations: int | None, volumes: float, rates: list[dict[str, float]], equivalents: list[float], precision: str
) -> dict[str, float]:
    """A row relative to the machine's rates; `equivalents` are operations that matrix products would do in a call."""
    median = statistics.median(equivalents)
    found = {
        "matrix_rate": statistics.median(rate[precision] for rate in rates),
        "matrix_rate_fp32": statistics.median(rate["fp32"] for rate in rates),
        "equivalent": median / volumes,
    }
    if operations is not None:
        found |= {"fraction": operations / median, "fraction_best": operations / min(equivalents)}
    return found


def alternating_seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[list[float]]:
    """Seconds of each call, made in turn; the first two of each are not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 2):
        for call, taken in zip(calls, seconds, strict=True):
            one = seconds_of(call, device)
            if repeat > 1:
                taken.append(one)
    return seconds


def step_seconds(
    trained: Mapping[str, tuple[Callable[..., Any], torch.optim.Optimizer, Mapping[str, Any]]], repeats: int
) -> dict[str, float]:
    """Median CPU seconds of the steps of methods with their optimizers and batches, taken in turn.

    The first step of each, which also allocates, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in trained}
    for _ in range(repeats + 1):
        for name, (method, optimizer, batch) in trained.items():
            started = time.process_time()
            method(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of some calls together."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return time.perf_counter() - start
