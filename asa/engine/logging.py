"""Where a run writes what it measures: progress bar, JSON lines, TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm


class RunLog:
    """Scalars and pictures of one run, the same numbers in three places.

    Args:
        run: the run folder; holds `log.jsonl` and `tensorboard/`.
        total: steps of the run.
        start: steps done before. What an earlier process logged beyond them is dropped, so that the log reads as one
            run.
    """

    def __init__(self, run: Path, total: int, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= start]
            self.path.write_text("".join(f"{line}\n" for line in lines))
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Log numbers of a step under a group ("train", "validation")."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "group": group, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{group}/{name}", value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Log pictures (H, W, 3) uint8."""
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step, dataformats="HWC")

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar and show the numbers beside it."""
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['volumes_per_second']:.2f} volumes/s  "
            f"data {values['data_wait']:.0%}",
            refresh=False,
        )
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Flush and close all three."""
        self.bar.close()
        self.board.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**63  # a line that a crash cut short
