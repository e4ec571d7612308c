"""The rows as tables and JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.benchmark.plan import tokens

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

ABSOLUTE = ("checks", "steps", "scale")  # parts whose rows are not compared with the first
TITLES = {
    "checks": "Checks",
    "steps": "Training steps",
    "pretrain": "Pretraining step",
    "fast": "Pretraining step, asa_fast",
    "finetune": "Fine-tuning step",
    "importance": "Importance of a volume",
    "loader": "Loader, in crops, files in the page cache",
    "fed": "Pretraining step fed by the loader, files in the page cache",
    "window": "Sliding window over a whole volume",
    "growth": "Growth of the pretraining step",
    "scale": "Stores of many scans",
    "digests": "Reading from the store, files in the page cache",
    "regions": "Attention inside regions, and the restoration network",
}
NOTES = """\
s: seconds, median of n repeats, and the best. TFLOP: operations in matrix products and convolutions. Matrix TFLOP/s:
the rate of large matrix products, measured immediately before and after each repeat; fraction: of this rate. Relative
time: relative to the first row, corrected for the drift of that rate. Peak: memory of the row's process on a CPU
(including Python and libraries, without loader workers), of the tensors on a GPU. Per token: relative to the smallest
volume of the same network. Waiting: fraction of the time in which a step waits for its batch and the device is idle.
Extra: memory in addition to queries, keys, values and index; of a store, in addition to libraries. Difference: to the
written-out operation in float32, relative to its largest value. Fraction of the matrix rate in this precision: the
model FLOP utilisation (MFU)."""


def add_ratios(rows: list[Row]) -> None:
    """Add ratios: of each row to the first of its part, and of each volume size to the smallest of the same network."""
    first: dict[str, Row] = {}
    for row in rows:
        if row["status"] != "ok" or row["kind"] == "restore" or row["part"] in ABSOLUTE:
            continue
        key = f"growth of {row['network']}" if row["part"] == "growth" else row["part"]
        base = first.setdefault(key, row)
        row["relative_time"] = _cost(row) / _cost(base)
        if row["part"] != "growth":
            continue
        ratio = tokens(base["edge"]) / tokens(row["edge"])
        row["relative_time_per_token"] = row["relative_time"] * ratio
        row["relative_peak_per_token"] = row["peak_bytes"] / base["peak_bytes"] * ratio
        if row is not base:
            further = (tokens(row["edge"]) - tokens(base["edge"])) * row["batch"]
            row["bytes_per_further_token"] = (row["peak_bytes"] - base["peak_bytes"]) / further


def _cost(row: Row) -> float:
    return row.get("equivalent") or 1 / row["volumes_per_second"]


def _number(key: str, form: str, unit: float = 1) -> Callable[[Row], str]:
    return lambda row: format(row[key] / unit, form) if key in row else ""


COMMON: list[Column] = [
    ("", lambda row: row["name"]),
    ("s", _number("seconds", ".4g")),
    ("best", _number("seconds_best", ".4g")),
    ("n", _number("repeats", ".0f")),
    ("volumes/s", _number("volumes_per_second", ".3g")),
    ("waiting", _number("waiting", ".1%")),
    ("TFLOP", _number("operations", ".3f", 1e12)),
    ("matrix TFLOP/s", _number("matrix_rate", ".3f", 1e12)),
    ("fraction", _number("fraction", ".2f")),
    ("peak GiB", _number("peak_bytes", ".2f", 2**30)),
]
RELATIVE: list[Column] = [("relative time", _number("relative_time", ".3g"))]
REGIONS: list[Column] = [
    *RELATIVE,
    ("us per token", lambda row: f"{1e6 * row['seconds'] / row['tokens']:.2f}" if "tokens" in row else ""),
    ("extra MiB", _number("extra_bytes", ".0f", 2**20)),
]
GROWTH: list[Column] = [
    ("time per token", _number("relative_time_per_token", ".2f")),
    ("peak per token", _number("relative_peak_per_token", ".2f")),
    ("KiB per further token", _number("bytes_per_further_token", ".0f", 2**10)),
]
CHECKS: list[Column] = [
    ("written-out s", _number("written_seconds", ".4g")),
    ("difference", _number("error", ".1e")),
    ("of the gradient", _number("gradient_error", ".1e")),
    ("passed", _number("passed", ".0f")),
    ("skipped", _number("skipped", ".0f")),
    ("loss at first", _number("first_loss", ".3f")),
    ("at last", _number("loss", ".3f")),
    ("steps/s", _number("steps_per_second", ".2f")),
]
SCALE: list[Column] = [
    ("CPU s", _number("cpu_seconds", ".3g")),
    ("extra MiB", _number("extra_bytes", ".0f", 2**20)),
    ("manifest MB", _number("manifest_bytes", ".1f", 1e6)),
]
STEPS: list[Column] = [
    ("plan=only GiB", _number("planned_bytes", ".2f", 2**30)),
    ("peak / plan", _number("peak_to_plan", ".2f")),
]
OWN = {"growth": GROWTH, "regions": REGIONS, "checks": CHECKS, "scale": SCALE, "steps": STEPS}


def table(rows: list[Row], columns: list[Column]) -> str:
    """An aligned Markdown table without empty columns, followed by the reasons of failed rows."""
    good = [row for row in rows if row["status"] == "ok"]
    cells = [[form(row) for row in good] for _, form in columns]
    shown = [(title, column) for (title, _), column in zip(columns, cells, strict=True) if any(column)]
    lines = [[title for title, _ in shown], *map(list, zip(*(column for _, column in shown), strict=True))]
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| "
        + " | ".join(cell.rjust(n) if k else cell.ljust(n) for k, (cell, n) in enumerate(zip(line, width, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (n + 1) + (":" if k else "-") for k, n in enumerate(width)) + "|"
    failed = [f"- {row['name']}: {row['status'].upper()}: {row['reason']}" for row in rows if row["status"] != "ok"]
    return "\n".join([*([text[0], rule, *text[1:]] if good else []), *([""] if good and failed else []), *failed])


def write(out: Path, machine: dict[str, Any], rows: list[Row]) -> str:
    """Write bench.json and bench.md.

    Args:
        out: the folder.
        machine: the machine and the settings.
        rows: with "part", "name", "status" and the numbers.

    Returns:
        The text of bench.md.
    """
    add_ratios(rows)
    rates = ", ".join(f"{rate / 1e12:.3f} TFLOP/s {name}" for name, rate in machine["matrix_rates"].items())
    where = f"{machine.get('gpu', machine['processor'])}, {machine['threads']} threads of {machine['cores']} cores"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("asa", "torch", "monai", "python"))
    what = f"{machine['precision']}, size {machine['size']}, batch {machine['batch']}"
    text = [
        "# asa benchmark",
        f"{where}, {machine['system']}; {versions}\n{what}; {machine['matrix']}^3 products at the start: {rates}",
    ]
    for part, title in TITLES.items():
        mine = [row for row in rows if row["part"] == part]
        if mine:
            text.append(f"## {title}\n\n" + table(mine, COMMON + OWN.get(part, RELATIVE)))
    text.append(NOTES)
    page = "\n\n".join(text) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text(page)
    (out / "bench.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return page
