"""The page of a preparation that only checks: a table, and one row of thumbnails a scan.

FOLDER/checkup.csv        one line a scan
FOLDER/checkup.html       for reading; needs the `report` extra (jinja2, matplotlib)
FOLDER/thumbnails/ID.png  three slices of each scan that could be read
"""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from asa.data.io.files import write_whole
from asa.data.preprocessing.quality_control import ScanQuality
from asa.errors import require
from asa.reporting.evaluation import render
from asa.reporting.figures import MIDLINE, OUTLINE, encode_png, hex_colour, thumbnail_row

TABLE, PAGE, THUMBNAILS = "checkup.csv", "checkup.html", "thumbnails"
STATUSES = ("failed", "warning", "good")  # in the order of the page
SECONDS = "seconds_"  # a fact of this prefix is the time of a stage

_UNFINISHED = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Checkup, not finished</title>
<p>This checkup has not finished. If asa-prepare is no longer running, start it again.</p></html>
"""
_TITLES = {
    "brain_ml": "brain volume",
    "mirror_correlation": "left-right correlation",
    "spacing_mm": "voxel size",
    "template_dice": "template Dice",
}
_UNITS = {"degrees": ("°", 1), "mm": (" mm", 1), "ml": (" ml", 0), "seconds": (" s", 1)}  # digits after the point


@dataclass(frozen=True)
class _Measure:
    """One numeric fact over the cohort, as text; `least` and `most` come with the number of their scan."""

    title: str
    scans: int
    median: str
    least: tuple[str, int]
    most: tuple[str, int]


class Checkup:
    """Writes a checkup while its scans come in; only the words and numbers of a scan are kept.

    Args:
        folder: made where it is missing. The thumbnails, the table and the page of an earlier checkup go.

    Raises:
        ImportError: the `report` extra is not installed.
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path) -> None:
        for module in ("jinja2", "matplotlib.image"):
            require(module, "report", "the page of check=only")
        self.folder = Path(folder)
        self._visits: dict[str, ScanQuality] = {}
        self._drawn: set[str] = set()
        _clear(self.folder)
        write_whole(self.folder / PAGE, _UNFINISHED.encode())

    def add(self, visit: ScanQuality) -> None:
        """Draw a scan's thumbnails and keep its row; scans come in any order."""
        if visit.thumbnail is not None:
            look = visit.thumbnail
            row = thumbnail_row(look.grey, look.brain, spacing=look.spacing, midline=look.midline)
            write_whole(self.folder / THUMBNAILS / f"{visit.id}.png", encode_png(row))
            self._drawn.add(visit.id)
        self._visits[visit.id] = replace(visit, thumbnail=None)

    def finish(self, settings: dict[str, Any]) -> None:
        """Write the table and the page.

        Args:
            settings: what the scans were prepared with, for the page.
        """
        visits = [self._visits[id] for id in sorted(self._visits)]
        self._write(TABLE, _table(visits))
        self._write(PAGE, self._page(visits, settings))

    def _write(self, name: str, text: str) -> None:
        # a file name need not be valid Unicode, and its id stands in both files
        write_whole(self.folder / name, text.encode("utf-8", errors="backslashreplace"))

    def _page(self, visits: Sequence[ScanQuality], settings: dict[str, Any]) -> str:
        rows = [self._row(number, visit) for number, visit in enumerate(visits)]
        measures = _measures(visits)
        return render(
            "quality_control.html.j2",
            total=len(visits),
            groups=[(status, [row for row in rows if row["status"] == status]) for status in STATUSES],
            found=[measure for key, measure in measures.items() if not key.startswith(SECONDS)],
            times=[measure for key, measure in measures.items() if key.startswith(SECONDS)],
            settings=[(key, _setting(value)) for key, value in settings.items()],
            outline=hex_colour(OUTLINE),
            midline=hex_colour(MIDLINE),
        )

    def _row(self, number: int, visit: ScanQuality) -> dict[str, Any]:
        known = {key: _cell(value, key) for key, value in visit.facts.items() if not key.startswith(SECONDS)}
        return {
            "number": number,
            "visit": visit,
            "status": _status(visit),
            "picture": f"{THUMBNAILS}/{quote(os.fsencode(visit.id))}.png" if visit.id in self._drawn else "",
            "facts": [(_title(key), text) for key, text in known.items() if text],
        }


def _clear(folder: Path) -> None:
    """Remove an earlier checkup from a folder, and refuse a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder for the checkup")
    held = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    if held and not held & {TABLE, PAGE}:
        raise ValueError(f"{folder}: not empty, and not an earlier checkup; give a new folder for the checkup")
    (folder / TABLE).unlink(missing_ok=True)
    for stale in (folder / THUMBNAILS).glob("*.png*"):  # with what an interruption left unfinished
        stale.unlink()


def _status(visit: ScanQuality) -> str:
    return "failed" if visit.reason else "warning" if visit.warnings else "good"


def _table(visits: Sequence[ScanQuality]) -> str:
    """The table as CSV; a fact that a scan lacks, or that is not finite, is an empty cell."""
    keys = list(dict.fromkeys(key for visit in visits for key in visit.facts))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "subject", "site", "status", "reason", "warnings", *keys])
    for visit in visits:
        words = [visit.id, visit.subject, visit.site, _status(visit), visit.reason, "; ".join(visit.warnings)]
        writer.writerow([*words, *(_cell(visit.facts.get(key)) for key in keys)])
    return text.getvalue()


def _cell(value: Any, key: str | None = None) -> str:
    """A fact as text: plain for the table, with the unit in its key for the page; empty if there is none."""
    if value is None or value == "" or (isinstance(value, Real) and not math.isfinite(value)):
        return ""
    if key is None:
        return f"{float(value):.6g}" if _is_float(value) else str(value)
    unit, digits = _UNITS.get(_unit(key), ("", 2))
    if _is_float(value):
        return f"{round(float(value), digits) + 0.0:.{digits}f}{unit}".replace("-", "\N{MINUS SIGN}")  # never -0.0
    return f"{value}{unit}"


def _is_float(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, Integral)


def _unit(key: str) -> str:
    return "seconds" if key.startswith(SECONDS) else key.rpartition("_")[2]


def _title(key: str) -> str:
    """A fact's name in words, without its unit."""
    words = key.removeprefix(SECONDS).split("_")
    return _TITLES.get(key, " ".join(words[:-1] if len(words) > 1 and words[-1] in _UNITS else words))


def _measures(visits: Sequence[ScanQuality]) -> dict[str, _Measure]:
    """Every numeric fact over the cohort, in the order of first appearance."""
    values: dict[str, list[tuple[float, int]]] = {}
    for number, visit in enumerate(visits):
        for key, value in visit.facts.items():
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
                values.setdefault(key, []).append((float(value), number))
    measures = {}
    for key, found in values.items():
        (least, at_least), (most, at_most) = min(found), max(found)
        middle = _cell(median(value for value, _ in found), key)
        ends = (_cell(least, key), at_least), (_cell(most, key), at_most)
        measures[key] = _Measure(_title(key), len(found), middle, *ends)
    return measures


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
