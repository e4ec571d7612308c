"""Where a run writes what it measures: progress bar, JSON lines, TensorBoard."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm


class RunLog:
    """Scalars and pictures of one run, the same numbers in three places.

    TensorBoard that fails is given up with a warning; the JSON lines go on.

    Args:
        run: the run folder; holds `log.jsonl` and `tensorboard/`.
        total: steps of the run.
        start: steps done before. What an earlier process logged beyond them is dropped, so that the log reads as one
            run.
    """

    def __init__(self, run: Path, total: int, start: int) -> None:
        self.path = run / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= start]
            self.path.write_text("".join(f"{line}\n" for line in lines))
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.board: Any = None
        self._track(lambda: self._open(run / "tensorboard", start))

    def _open(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Log numbers of a step under a group ("train", "validation")."""
        self.note(step, group, values)
        if self.board:
            self._track(lambda: self._add_scalars(step, group, values))

    def _add_scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"{group}/{name}", value, step)

    def note(self, step: int, group: str, content: Mapping[str, Any]) -> None:
        """Log anything of a step, for machines only."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "group": group, **content}) + "\n")

    def has(self, step: int, group: str) -> bool:
        """Whether something was logged of a step under a group."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return any(_step(line) == step and json.loads(line).get("group") == group for line in lines)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Log pictures (H, W, 3) uint8."""
        if self.board:
            self._track(lambda: self._add_pictures(step, pictures))

    def _add_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step, dataformats="HWC")

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar and show the numbers beside it."""
        self.bar.set_postfix_str(
            f"loss {values.get('loss', float('nan')):.4f}  lr {values['lr']:.2e}  "
            f"{values['volumes_per_second']:.2f} volumes/s  data {values['data_wait']:.0%}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Flush and close all three."""
        self.bar.close()
        if self.board:
            self._track(self.board.close)

    def _track(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: a picture of the run is not worth the run
            self.board = None
            self.say(f"warning: TensorBoard failed ({error}); the numbers go on into {self.path}")


class SilentLog(RunLog):
    """What the ranks log that are not the main one: nothing."""

    def __init__(self) -> None:
        self.board = None

    def note(self, step: int, group: str, content: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, values: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**63  # a line that a crash cut short
