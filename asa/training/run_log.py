"""The log of a run: averages of what steps return and their timing; progress bar, JSON lines and trackers."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from asa.data.io.files import naming, open_unlinked, write_whole
from asa.training import distributed
from asa.training.trackers import TRACKERS, Queued

WORKER_KILLED = (
    "a worker process of the loader was killed, perhaps because memory ran out: lower loader.workers (0 needs none); "
    "the same command goes on from the last checkpoint"
)


class RunLog:
    """Scalars and pictures of a run. The progress bar, the JSON lines and the trackers show the same numbers.

    A tracker that fails or hangs is given up with a warning, and the JSON lines continue.

    The run folder holds `log.jsonl` and what the trackers write. Lines that an earlier process logged beyond `start`,
    the steps done before, are removed, so that the log reads as that of one uninterrupted run.
    """

    def __init__(self, run: Path, total: int, start: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text(errors="replace").splitlines() if _step(line) <= start]
            write_whole(self.path, "".join(f"{line}\n" for line in lines).encode())
        often = 1.0 if sys.stderr.isatty() else 10.0  # in a file each update stays
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=often)
        kinds = [TRACKERS[name] for name in trackers]
        self.trackers = [Queued(kind.title, partial(kind, run, start), self._warn) for kind in kinds]

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Log the numbers of a step under a group ("train", "validation")."""
        self.record(step, group, values)
        named = {f"{group}/{name}": value for name, value in values.items()}
        for tracker in self.trackers:
            tracker.put("scalars", step, named)

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None:
        """Write a line of JSON about a step, with null for numbers that are not finite."""
        content = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in content.items()
        }
        with naming(self.path), open_unlinked(self.path, "a") as file:
            file.write(json.dumps({"step": step, "group": group, **content}, allow_nan=False) + "\n")

    def steps(self, group: str) -> list[int]:
        """The steps that have a line under a group."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        return [step for line in lines if (step := _step(line)) >= 0 and json.loads(line).get("group") == group]

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Show pictures (H, W, 3) uint8 by name."""
        for name, picture in pictures.items():
            for tracker in self.trackers:
                tracker.put("picture", step, name, picture)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Update the progress bar and the numbers beside it."""
        self.bar.set_postfix_str(
            f"loss {values.get('loss', float('nan')):.4f}  lr {values['lr']:.2e}  "
            f"{values['volumes_per_second']:.2f} volumes/s  data {values['data_wait']:.0%}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Flush and close everything."""
        for tracker in self.trackers:
            tracker.close()
        self.bar.close()

    def _warn(self, text: str) -> None:
        self.message(f"{text}; {self.path} still receives the numbers")


class SilentLog(RunLog):
    """The log of all ranks but the main one: nothing is written."""

    def __init__(self) -> None:
        self.trackers = []

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return 2**63  # a line cut off by a crash, or damaged


class Meter:
    """Sums the values that steps return on the device, and times the steps. The sums are read only for the log.

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
        except (EOFError, ConnectionError) as error:
            raise OSError(WORKER_KILLED) from error
        except RuntimeError as error:
            if str(error).startswith("DataLoader worker"):
                raise OSError(WORKER_KILLED) from error
            raise
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
        values = {name: value.item() for name, value in means.items() if not value.dim()} if counted else {}
        ratios = {name: value.tolist() for name, value in means.items() if value.dim()}  # of a sum and a number
        values |= {name: total / number for name, (total, number) in ratios.items() if number}
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
