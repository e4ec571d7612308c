"""The log of a run: progress bar, JSON lines and TensorBoard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from asa.config import flatten
from asa.data.io.files import open_unlinked, write_whole

READABLE = 900  # width in pixels that a picture is enlarged to
TITLE = 30  # height in pixels of the titles


class RunLog:
    """Scalars and pictures of a run. The progress bar, the JSON lines and TensorBoard show the same numbers.

    If TensorBoard fails, it is given up with a warning, and the JSON lines continue.

    Args:
        run: the run folder; holds `log.jsonl` and `tensorboard/`.
        total: steps of the run.
        start: steps done before. Lines that an earlier process logged beyond them are removed, so that the log reads as
            that of one uninterrupted run.
    """

    def __init__(self, run: Path, total: int, start: int) -> None:
        self.path = run / "log.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= start]
            write_whole(self.path, "".join(f"{line}\n" for line in lines).encode())
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
            self._configuration(run / "config.yaml")
        except Exception as error:
            self._give_up_board(error)

    def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Log the numbers of a step under a group ("train", "validation")."""
        self.record(step, group, values)
        for name, value in values.items():
            self._track("add_scalar", f"{group}/{name}", value, step)

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None:
        """Write a line of JSON about a step."""
        with open_unlinked(self.path, "a") as file:
            file.write(json.dumps({"step": step, "group": group, **content}) + "\n")

    def has(self, step: int, group: str) -> bool:
        """Whether there is a line about a step under a group."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return any(_step(line) == step and json.loads(line).get("group") == group for line in lines)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Log pictures (H, W, 3) uint8 in TensorBoard, by "FIGURE: COLUMN, COLUMN" or "COLUMN, COLUMN"."""
        for name, picture in pictures.items():
            figure, _, columns = name.rpartition(": ")
            if self.board:
                self._track("add_image", figure or name, titled(picture, columns.split(", ")), step, dataformats="HWC")

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
        self.bar.close()
        self._track("close")

    def _configuration(self, file: Path) -> None:
        """Show the run's configuration in TensorBoard, as a text and as hyperparameters."""
        if not file.exists():  # of a method trained without the commands
            return
        from torch.utils.tensorboard.summary import hparams

        text = file.read_text()
        self.board.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()))
        flat = flatten(yaml.safe_load(text))
        values = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in flat.items()
            if not key.startswith("method.model.")  # the same as model
        }
        for summary in hparams(values, dict.fromkeys(("train/loss", "validation/loss"), 0.0)):
            self.board.file_writer.add_summary(summary)

    def _track(self, call: str, *arguments: Any, **options: Any) -> None:
        """Call a method of the TensorBoard writer, if there is one."""
        if self.board:
            try:
                getattr(self.board, call)(*arguments, **options)
            except Exception as error:  # of any kind: TensorBoard must not end a run
                self._give_up_board(error)

    def _give_up_board(self, error: Exception) -> None:
        self.board = None
        self.message(f"warning: TensorBoard failed ({error}); {self.path} still receives the numbers")


class SilentLog(RunLog):
    """The log of all ranks but the main one: nothing is written."""

    def __init__(self) -> None:
        self.board = None

    def record(self, step: int, group: str, content: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, values: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


def titled(picture: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """A picture (H, W, 3) enlarged to a readable size, by whole factors, with a title above each of its columns."""
    from PIL import Image, ImageDraw, ImageFont  # comes with TensorBoard

    large = _readable(picture)
    bar = Image.new("RGB", (large.shape[1], TITLE))
    draw, font = ImageDraw.Draw(bar), ImageFont.load_default(TITLE * 0.6)
    for column, title in enumerate(titles):
        draw.text(((column + 0.5) * bar.width / len(titles), TITLE / 2), title, font=font, anchor="mm")
    return np.concatenate([np.asarray(bar), large])


def with_legend(picture: np.ndarray, names: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) enlarged as by `titled`, and below it the names of labels, each after its colour (RGB)."""
    from PIL import Image, ImageDraw, ImageFont

    large, font = _readable(picture), ImageFont.load_default(TITLE * 0.6)
    square, places, right, row = TITLE // 2, [], 0, 0
    for name in names:
        width = 2 * square + round(font.getlength(name)) + square
        if right + width > large.shape[1] and right:
            right, row = 0, row + 1
        places.append((right, row * TITLE))
        right += width
    bar = Image.new("RGB", (large.shape[1], (row + 1) * TITLE))
    draw = ImageDraw.Draw(bar)
    for name, colour, (x, y) in zip(names, colours, places, strict=True):
        draw.rectangle((x, y + square // 2, x + square, y + square // 2 + square), fill=tuple(map(int, colour)))
        draw.text((x + 2 * square, y + TITLE / 2), name, font=font, anchor="lm")
    return np.concatenate([large, np.asarray(bar)])


def _readable(picture: np.ndarray) -> np.ndarray:
    factor = max(round(READABLE / picture.shape[1]), 1)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**63  # a line cut off by a crash
