"""The steps of a run: means of what they return, their timing, and those with a non-finite loss or gradient.

These are skipped on all ranks and logged; too many in a row stop the run. The averaging of gradients carries a
non-finite one to all ranks, so they agree without further communication. The optimizer reads the check on the device;
this process reads it one step later, so that it never waits for the device.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asa.data.io.files import naming, open_unlinked
from asa.errors import listed
from asa.training.checkpoint import newest_name
from asa.training.distributed import gather_objects, mean_over_ranks, rank, take_from_main
from asa.training.run_log import RunLog

MAX_IN_A_ROW = 10
# Halvings of fp16's loss scale from 65536 to 1. Steps skipped while the scale is found are not a fault of the data.
SCALE_HALVINGS = 16
WORKER_KILLED = (
    "a worker process of the loader was killed, perhaps because memory ran out: lower loader.workers (0 needs none); "
    "the same command goes on from the last checkpoint"
)


class Meter:
    """Sums the values that steps return, on the device, and times the steps.

    A step has `batch_size` samples, over all processes, in `accumulate` micro-batches.
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
        except (EOFError, ConnectionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise OSError(WORKER_KILLED) from error
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
        """Means over the ranks since the last reading, without skipped steps; waits for the device, and restarts.

        The means are missing if all steps were skipped.
        """
        counted = self.micro_batches - int(self.skipped) * self.accumulate
        means = mean_over_ranks({name: value / max(counted, 1) for name, value in self.sums.items()})
        values = {name: value.item() for name, value in means.items() if not value.dim()} if counted else {}
        ratios = {name: value.tolist() for name, value in means.items() if value.dim()}  # of a sum and a number
        values |= {name: total / number for name, (total, number) in ratios.items() if number}
        seconds = time.perf_counter() - self.start
        values["lr"] = lr
        values["volumes_per_second"] = self.micro_batches * self.batch_size / self.accumulate / seconds
        values["data_wait"] = self.waited / seconds
        if math.isfinite(norm := gradient_norm.item()):
            values["gradient_norm"] = norm
        self.restart()
        return values


@dataclass
class StepCheck:
    """The check of one step, on its way from the device."""

    step: int  # from 1
    flags: Tensor  # bool [gradient is not finite, loss of micro-batch 1 is not finite, ...]
    copied: torch.cuda.Event | None  # when `flags` has arrived on the CPU; None: it was computed there
    ids: list[list[str]]  # record ids of each micro-batch
    batches: list[dict[str, Any]]  # the micro-batches, kept only after a skipped step


class NonFiniteGuard:
    """Skips non-finite steps. Call `add` for each micro-batch, then `check`, then the optimizer's step.

    The optimizer is a fused one, which changes nothing where its `found_inf` is 1. With `fp16` the loss is scaled.
    """

    def __init__(self, run: Path, log: RunLog, optimizer: torch.optim.Optimizer, *, fp16: bool = False) -> None:
        self.run, self.log, self.optimizer, self.fp16 = run, log, optimizer, fp16
        self.skipped = self.in_a_row = 0
        self.losses: list[Tensor] = []
        self.ids: list[list[str]] = []
        self.batches: list[dict[str, Any]] = []
        self.pending: StepCheck | None = None
        for group in optimizer.param_groups:
            for weight in group["params"] if group.get("momentum") else ():
                # A fused SGD that skips its first step would otherwise continue from uninitialised memory.
                optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))

    def add(self, batch: dict[str, Any], loss: Tensor) -> Tensor:
        """Record a micro-batch and its loss; returns the loss with a gradient that is finite only if the loss is."""
        self.losses.append(loss.detach())
        self.ids.append(batch["id"])
        if self.in_a_row:  # a dump may be needed soon
            self.batches.append(batch)
        return loss * (1 + 0 * loss.detach())

    def check(self, step: int, norm: Tensor) -> Tensor:
        """Make the optimizer skip step 1, 2, ... if its gradient norm is not finite, and resolve the previous check.

        Returns 1.0 on the device if the step is skipped, else 0.0; a FloatingPointError after too many in a row.
        """
        self.resolve()
        flags = ~torch.isfinite(torch.stack([norm.detach(), *self.losses]))
        skip = flags[0].to(torch.float32)  # the dtype that fused kernels read, whatever the weights' dtype
        # GradScaler sets this attribute for fused optimizers; here it covers the loss too, and every precision.
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        copied = None
        if flags.is_cuda:
            flags, copied = flags.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record(torch.cuda.current_stream(skip.device))
        self.pending = StepCheck(step, flags, copied, self.ids, self.batches)
        self.losses, self.ids, self.batches = [], [], []
        return skip

    def resolve(self) -> None:
        """Read the result of the pending check; raises as `check`."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        if pending.copied:
            pending.copied.synchronize()
        gradient, *losses = pending.flags.tolist()
        if not gradient:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        self._report(pending, [k for k, nonfinite in enumerate(losses) if nonfinite])

    def _report(self, skipped: StepCheck, suspects: list[int]) -> None:
        """Log a skipped step; `suspects` are the micro-batches with a non-finite loss."""
        parts = gather_objects([skipped.ids[k] for k in suspects])
        what = "loss" if any(parts) else "gradient"
        if not any(parts):  # every loss is finite, so it may be any of them
            parts, suspects = gather_objects(skipped.ids), list(range(len(skipped.ids)))
        ids = [id for part in parts for micro_batch in part for id in micro_batch]
        self.log.record(skipped.step, "skipped", {"what": what, "ids": ids, "in_a_row": self.in_a_row})
        if what == "loss" or not self.fp16:
            self.log.message(f"warning: skipped step {skipped.step}: its {what} is not finite (scans {listed(ids, 8)})")
        if self.in_a_row < MAX_IN_A_ROW + SCALE_HALVINGS * self.fp16:
            return
        if suspects and skipped.batches:
            dump = self.run / "nonfinite" / f"step-{skipped.step:08d}-rank-{rank()}.pt"
            dump.parent.mkdir(exist_ok=True)
            with naming(dump), open_unlinked(dump, "wb") as file:
                torch.save({"step": skipped.step, "batches": [skipped.batches[k] for k in suspects]}, file)
        raise FloatingPointError(
            f"the {what} was not finite in {self.in_a_row} steps in a row, the last of them step {skipped.step}: "
            f"stopped before saving; the last checkpoint is {newest_name(self.run)}. The batch is in "
            f"{self.run / 'nonfinite'}. Lower optim.lr, or check the scans {listed(ids, 8)}"
        )

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue the counts of a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class RunningStatistics:
    """The statistics of batch normalisation, if any, which a forward pass changes: also of a step that is not made."""

    def __init__(self, method: nn.Module) -> None:
        layers = [layer for layer in method.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [buffer for layer in layers for buffer in layer.buffers()]
        self.before = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        """Remember them, before a step."""
        for before, buffer in zip(self.before, self.buffers, strict=True):
            before.copy_(buffer)

    def finish(self, skipped: Tensor) -> None:
        """After a step: of all ranks those of the first; as before where it was `skipped`, 1.0 on the device."""
        for before, buffer in zip(self.before, self.buffers, strict=True):
            take_from_main(buffer)
            buffer.copy_(torch.where(skipped > 0, before, buffer))

    def restore(self) -> None:
        """As before the step, which was interrupted."""
        for before, buffer in zip(self.before, self.buffers, strict=True):
            buffer.copy_(before)
