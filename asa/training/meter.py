"""Averages of what training steps return, and their timing, for the log."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asa.training import distributed


class Meter:
    """Sums the values that steps return on the device, and times the steps. The sums are read only for the log.

    Args:
        batch_size: samples per step, over all processes.
        accumulate: micro-batches per step.
    """

    def __init__(self, batch_size: int, accumulate: int) -> None:
        self.batch_size, self.accumulate = batch_size, accumulate
        self.restart()

    def restart(self) -> None:
        """Discard all sums and times."""
        self.sums: dict[str, Tensor] = {}
        self.sums_before: dict[str, Tensor] = {}  # of the current step
        self.skipped: Tensor | float = 0.0
        self.micro_batches, self.waited = 0, 0.0
        self.start = time.perf_counter()

    def start_step(self) -> None:
        """Remember the sums, in case the step that begins is discarded."""
        self.sums_before = dict(self.sums)

    def next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; the time spent waiting for it is counted."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except (ValueError, OSError) as error:
            # The message of an error in a loader worker is its whole traceback; the last line is the error itself.
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        self.waited += time.perf_counter() - start
        return batch

    def add(self, result: Mapping[str, Tensor]) -> None:
        """Add the values of a micro-batch."""
        for name, value in result.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1

    def discard_step(self, skipped: Tensor) -> None:
        """Discard the values of the current step where `skipped` is 1.0; keep them where it is 0.0."""
        for name, value in self.sums.items():
            self.sums[name] = torch.where(skipped > 0, self.sums_before.get(name, torch.zeros_like(value)), value)
        self.skipped = self.skipped + skipped

    def read(self, *, gradient_norm: Tensor, lr: float) -> dict[str, float]:
        """Means since the last reading and over the ranks; waits for the device, and restarts.

        Skipped steps do not count. If all steps were skipped, the averaged values are missing from the result.
        """
        counted = self.micro_batches - int(self.skipped) * self.accumulate
        means = distributed.mean_over_ranks({name: value / max(counted, 1) for name, value in self.sums.items()})
        values = {name: value.item() for name, value in means.items()} if counted else {}
        seconds = time.perf_counter() - self.start
        values |= {
            "lr": lr,
            "volumes_per_second": self.micro_batches * self.batch_size / self.accumulate / seconds,
            "data_wait": self.waited / seconds,
        }
        if math.isfinite(norm := gradient_norm.item()):
            values["gradient_norm"] = norm
        self.restart()
        return values
