"""The page of a quality control (QC): a table, and one row of thumbnails per scan.

FOLDER/quality_control.csv        one line per scan
FOLDER/quality_control.html       for reading; needs the `report` extra (jinja2, matplotlib)
FOLDER/thumbnails/ID.png          three slices of each scan that could be read
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from asa.data.io.files import write_whole
from asa.data.io.tables import csv_text
from asa.data.preprocessing.scan import ScanQuality
from asa.reporting.figures import MIDLINE, OUTLINE, encode_png, hex_colour, thumbnail_row
from asa.reporting.pages import check_page, require_report_extra, write_page

TABLE, PAGE, THUMBNAILS = "quality_control.csv", "quality_control.html", "thumbnails"
STATUSES = ("failed", "warning", "good")  # in the order of the page
SECONDS, VOXELS = "seconds_", "voxels_"  # prefixes of facts: the time of a stage, the size of a label
MOST_LABELS = 8  # shown openly; the sizes of more are folded

_UNFINISHED = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Quality control, not finished</title>
<p>This quality control has not finished. If asa-prepare is no longer running, start it again.</p></html>
"""
_TITLES = {
    "brain_ml": "brain volume",
    "mirror_correlation": "left-right correlation",
    "raw_roll_degrees": "roll before registration",
    "raw_shift_mm": "shift before registration",
    "raw_yaw_degrees": "yaw before registration",
    "spacing_mm": "voxel size",
    "template_dice": "template Dice",
}
_UNITS = {"degrees": ("°", 1), "mm": (" mm", 1), "ml": (" ml", 0), "seconds": (" s", 1)}  # unit and decimals


class QualityControlReport:
    """Writes a quality control while scans are being prepared; thumbnails are written at once and not kept.

    An earlier quality control in the folder is removed; a ValueError if it holds something else.
    """

    def __init__(self, folder: Path) -> None:
        require_report_extra("check=only")
        self.folder = folder
        self._scans: dict[str, ScanQuality] = {}
        check_page(folder / PAGE)
        _clear(folder)
        write_whole(folder / PAGE, _UNFINISHED.encode())

    def add(self, scan: ScanQuality) -> None:
        """Draw a scan's thumbnails and keep its row; scans may come in any order."""
        if (thumbnail := scan.thumbnail) is not None:
            row = thumbnail_row(thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, midline=thumbnail.midline)
            write_whole(self.folder / THUMBNAILS / f"{scan.id}.png", encode_png(row))
        self._scans[scan.id] = replace(scan, thumbnail=None)

    def finish(self, settings: dict[str, Any]) -> None:
        """Write the table, and the page with the settings of the preparation."""
        scans = [self._scans[id] for id in sorted(self._scans)]
        # An id may come from a file name that is not valid Unicode.
        write_whole(self.folder / TABLE, _table(scans).encode("utf-8", errors="backslashreplace"))
        rows = [self._row(number, scan) for number, scan in enumerate(scans)]
        shown, folded = _folded(_summarise(scans))
        write_page(
            self.folder / PAGE,
            "quality_control.html.j2",
            total=len(scans),
            groups=[(status, [row for row in rows if row["status"] == status]) for status in STATUSES],
            measurements=[fact for key, fact in shown.items() if not key.startswith(SECONDS)],
            times=[fact for key, fact in shown.items() if key.startswith(SECONDS)],
            labels=folded,
            settings=[
                (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
                for key, value in settings.items()
            ],
            outline=hex_colour(OUTLINE),
            midline=hex_colour(MIDLINE),
            table=TABLE,
        )

    def _row(self, number: int, scan: ScanQuality) -> dict[str, Any]:
        texts = {key: _cell(value, key) for key, value in scan.facts.items() if not key.startswith(SECONDS)}
        shown, folded = _folded({key: (_title(key), text) for key, text in texts.items() if text})
        drawn = (self.folder / THUMBNAILS / f"{scan.id}.png").is_file()
        return {
            "number": number,
            "scan": scan,
            "status": _status(scan),
            "thumbnail": f"{THUMBNAILS}/{quote(os.fsencode(scan.id))}.png" if drawn else "",
            "facts": [*shown.values()],
            "labels": folded,
        }


def _folded(facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Facts by key that are shown openly, and the sizes of labels, if these are more than `MOST_LABELS`."""
    labels = [key for key in facts if key.startswith(VOXELS)]
    folded = labels if len(labels) > MOST_LABELS else []
    return {key: fact for key, fact in facts.items() if key not in folded}, [facts[key] for key in folded]


def _clear(folder: Path) -> None:
    """Remove an earlier quality control from a folder; raise a ValueError if it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; give a folder for the quality control")
    held = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    if held and not held & {TABLE, PAGE}:
        raise ValueError(f"{folder}: not empty, and not an earlier quality control; give a new folder")
    (folder / TABLE).unlink(missing_ok=True)
    for stale in (folder / THUMBNAILS).glob("*.png*"):  # and files left unfinished by an interruption
        stale.unlink()


def _status(scan: ScanQuality) -> str:
    return "failed" if scan.reason else "warning" if scan.warnings else "good"


def _table(scans: Sequence[ScanQuality]) -> str:
    """The table as CSV; a fact that is missing or not finite is an empty cell."""
    keys = list(dict.fromkeys(key for scan in scans for key in scan.facts))
    rows = []
    for scan in scans:
        words = [scan.id, scan.subject, scan.site, _status(scan), scan.reason, "; ".join(scan.warnings)]
        rows.append([*words, *(_cell(scan.facts.get(key)) for key in keys)])
    return csv_text(["id", "subject", "site", "status", "reason", "warnings", *keys], rows)


def _cell(value: Any, key: str | None = None) -> str:
    """A fact as text: plain for the table, or with the unit of its key for the page; "" if there is none."""
    if value is None or value == "" or (isinstance(value, Real) and not math.isfinite(value)):
        return ""
    unit, digits = _UNITS.get("seconds" if key.startswith(SECONDS) else _unit(key), ("", 2)) if key else ("", 2)
    if not isinstance(value, Real) or isinstance(value, Integral):
        return f"{value}{unit}"
    if key is None:
        return f"{float(value):.6g}"
    return f"{round(float(value), digits) + 0.0:.{digits}f}{unit}".replace("-", "\N{MINUS SIGN}")  # never -0.0


def _unit(key: str) -> str:
    """The unit that a fact's name ends in, a key of `_UNITS`; "" if it has none, as the name of a label."""
    unit = "" if key.startswith(VOXELS) else key.rpartition("_")[2]
    return unit if unit in _UNITS and unit != key else ""


def _title(key: str) -> str:
    words = key.removeprefix(SECONDS).removesuffix(f"_{_unit(key)}").split("_")
    return _TITLES.get(key, " ".join(words))


def _summarise(scans: Sequence[ScanQuality]) -> dict[str, dict[str, Any]]:
    """Every numeric fact over the cohort as text, in order of appearance; each extreme with its scan's index."""
    values: dict[str, list[tuple[Any, int]]] = {}
    for number, scan in enumerate(scans):
        for key, value in scan.facts.items():
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
                values.setdefault(key, []).append((value if key.startswith(VOXELS) else float(value), number))
    return {
        key: {
            "title": _title(key),
            "median": _cell(median(value for value, _ in pairs), key),
            "extremes": [(_cell(value, key), number) for value, number in (min(pairs), max(pairs))],
            "scans": len(pairs),
        }
        for key, pairs in values.items()
    }
