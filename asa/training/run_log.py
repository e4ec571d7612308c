"""The log of a run: progress bar, JSON lines and trackers."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.data.io.files import open_unlinked, write_whole
from asa.training.trackers import TRACKERS, Queued


class RunLog:
    """Scalars and pictures of a run. The progress bar, the JSON lines and the trackers show the same numbers.

    A tracker that fails or hangs is given up with a warning, and the JSON lines continue.

    Args:
        run: the run folder; holds `log.jsonl` and what the trackers write.
        total: steps of the run.
        start: steps done before. Lines that an earlier process logged beyond them are removed, so that the log reads as
            that of one uninterrupted run.
        trackers: names.
    """

    def __init__(self, run: Path, total: int, start: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= start]
            write_whole(self.path, "".join(f"{line}\n" for line in lines).encode())
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)
        kinds = [TRACKERS[name] for name in trackers]
        self.trackers = [Queued(kind.title, partial(kind, run, start), self._warn) for kind in kinds]

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Log the numbers of a step under a group ("train", "validation")."""
        self.record(step, group, values)
        named = {f"{group}/{name}": value for name, value in values.items()}
        for tracker in self.trackers:
            tracker.put("scalars", step, named)

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None:
        """Write a line of JSON about a step."""
        with open_unlinked(self.path, "a") as file:
            file.write(json.dumps({"step": step, "group": group, **content}) + "\n")

    def has(self, step: int, group: str) -> bool:
        """Whether there is a line about a step under a group."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return any(_step(line) == step and json.loads(line).get("group") == group for line in lines)

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
    except (ValueError, KeyError, TypeError):
        return 2**63  # a line cut off by a crash
