"""Steps whose loss or gradient is not finite: skipped on all ranks, counted and logged; too many in a row stop the run.

A loss that is not finite makes the gradient so, and the exchange of gradients carries it to all ranks: they agree
without another message. The optimizer reads the verdict on the device; this process reads it a step later, so nothing
waits for the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asa.training.checkpoint import list_checkpoints
from asa.training.distributed import gathered, rank
from asa.training.run_log import RunLog

PATIENCE = 10
HALVINGS = 16  # of fp16's loss scale from 65536 to 1: skipped steps that find the scale, and no fault of the data


@dataclass
class Verdict:
    """What the device says of a step: [gradient is not finite, loss of micro-batch 1 is not finite, ...]."""

    step: int
    flags: Tensor
    arrived: torch.cuda.Event | None
    ids: list[list[str]]
    batches: list[dict[str, Any]]


class Guard:
    """Watches the steps of a run; used in the order `add` for each micro-batch, `judge`, the optimizer's step.

    Args:
        run: the run folder, where a dump goes.
        log: hears of skipped steps.
        optimizer: a fused one: it leaves weights and state alone where its `found_inf` is 1.
        fp16: whether the loss is scaled, so that steps are skipped until the scale is found.
    """

    def __init__(self, run: Path, log: RunLog, optimizer: torch.optim.Optimizer, *, fp16: bool = False) -> None:
        self.run, self.log, self.optimizer, self.fp16 = run, log, optimizer, fp16
        self.skipped = self.in_a_row = 0
        self.losses: list[Tensor] = []
        self.ids: list[list[str]] = []
        self.batches: list[dict[str, Any]] = []
        self.pending: Verdict | None = None
        for group in optimizer.param_groups:
            for weight in group["params"] if group.get("momentum") else ():
                # Else a fused SGD whose first step is skipped goes on from memory that nobody wrote.
                optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))

    def add(self, batch: dict[str, Any], loss: Tensor) -> Tensor:
        """Take a micro-batch and its loss; the loss to go on with, whose gradient is finite only if the loss is."""
        self.losses.append(loss.detach())
        self.ids.append(batch["id"])
        if self.in_a_row:  # only then may a dump be near
            self.batches.append(batch)
        return loss * (1 + 0 * loss.detach())

    def judge(self, step: int, norm: Tensor) -> Tensor:
        """Have the optimizer skip step 1, 2, ... if its gradient norm is not finite, and read the verdict before.

        Returns:
            1.0 where the step is skipped, else 0.0, on the device.

        Raises:
            FloatingPointError: too many in a row were skipped.
        """
        self.settle()
        flags = ~torch.isfinite(torch.stack([norm.detach(), *self.losses]))
        bad = flags[0].to(torch.float32)  # what the kernels want, whatever the weights are
        # Read by fused optimizers, as GradScaler sets it; here it covers the loss too, and every precision.
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        arrived = None
        if flags.is_cuda:
            flags, arrived = flags.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        self.pending = Verdict(step, flags, arrived, self.ids, self.batches)
        self.losses, self.ids, self.batches = [], [], []
        return bad

    def settle(self) -> None:
        """Read the verdict that is under way.

        Raises:
            FloatingPointError: too many in a row were skipped.
        """
        verdict, self.pending = self.pending, None
        if verdict is None:
            return
        if verdict.arrived:
            verdict.arrived.synchronize()
        gradient, *losses = verdict.flags.tolist()
        if not gradient:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        self._report(verdict, [k for k, bad in enumerate(losses) if bad])

    def _report(self, verdict: Verdict, suspects: list[int]) -> None:
        parts = gathered([verdict.ids[k] for k in suspects])
        what = "loss" if any(parts) else "gradient"
        if not any(parts):  # every loss is finite: it may be any of them
            parts, suspects = gathered(verdict.ids), list(range(len(verdict.ids)))
        ids = [id for part in parts for micro_batch in part for id in micro_batch]
        self.log.note(verdict.step, "skipped", {"what": what, "ids": ids, "in_a_row": self.in_a_row})
        if what == "loss" or not self.fp16:
            self.log.say(f"warning: the {what} of step {verdict.step} is not finite: skipped (scans {_some(ids)})")
        patience = PATIENCE + HALVINGS * self.fp16
        if self.in_a_row < patience:
            return
        if suspects and verdict.batches:
            dump = self.run / "nonfinite" / f"step-{verdict.step:08d}-rank-{rank()}.pt"
            dump.parent.mkdir(exist_ok=True)
            torch.save({"step": verdict.step, "batches": [verdict.batches[k] for k in suspects]}, dump)
        saved = [path.name for path in list_checkpoints(self.run)[-1:]]
        raise FloatingPointError(
            f"the {what} was not finite in {self.in_a_row} steps in a row, the last of them step {verdict.step}: "
            f"stopped before saving; the last checkpoint is {saved[0] if saved else 'none'}. The batch is in "
            f"{self.run / 'nonfinite'}. Lower optim.lr, or look at the scans {_some(ids)}"
        )

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _some(ids: list[str], shown: int = 8) -> str:
    return ", ".join(ids[:shown]) + (f" and {len(ids) - shown} more" if len(ids) > shown else "")
