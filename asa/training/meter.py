"""What training steps return and how long they take, for the log."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from asa.training import distributed


class Meter:
    """Sums what the steps return on the device, and times them; read back only for the log."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget what was timed and summed."""
        self.sums: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.left_out: Tensor | float = 0.0
        self.micro_batches, self.accumulate, self.waited = 0, 1, 0.0
        self.start = time.perf_counter()

    def wait(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch, its waiting time counted."""
        start = time.perf_counter()
        try:
            batch = next(batches)
        except (ValueError, OSError) as error:
            # A worker hands over its whole traceback as the message; its last line says what happened.
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        self.waited += time.perf_counter() - start
        return batch

    def mark(self) -> None:
        """A step begins."""
        self.before = dict(self.sums)

    def add(self, result: Mapping[str, Tensor], accumulate: int) -> None:
        """Add a micro-batch's numbers."""
        for name, value in result.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.micro_batches += 1
        self.accumulate = accumulate

    def leave_out(self, skipped: Tensor) -> None:
        """Forget the numbers of the step that ends, if it is skipped (1.0, else 0.0)."""
        for name, value in self.sums.items():
            self.sums[name] = torch.where(skipped > 0, self.before.get(name, torch.zeros_like(value)), value)
        self.left_out = self.left_out + skipped

    def read(self, *, gradient_norm: Tensor, lr: float) -> dict[str, float]:
        """Means since the last reading and over the ranks, waiting for the device, and start again.

        Steps that were skipped are left out; where all were, so are the names of what is averaged.
        """
        counted = self.micro_batches - int(self.left_out) * self.accumulate
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
