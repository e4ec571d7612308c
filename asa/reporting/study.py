"""The page of a study: what was run, what came out, and where its pages are."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asa.data.io.files import read_json
from asa.reporting.pages import write_page


def write_study(path: Path, done: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> None:
    """Write the page into the study's folder, where this is called; `missing` names the stages that are not done.

    `done` has `name`, `typed`, `out`, `seconds` and `finished` of each stage.
    """
    rows = [(row, list(_verdicts(Path(row["out"]))), _pages(row["out"])) for row in done]
    write_page(path, "study.html.j2", rows=rows, missing=missing)


def _verdicts(out: Path) -> Iterator[str]:
    """What a stage found: the verdict of a comparison, the mean Dice of an evaluation and how it is to be read."""
    if (file := out / "comparison.json").exists():
        yield from read_json(file)["verdict"]
    for file in (out / "summary.json", out / "evaluation" / "summary.json"):
        summary = read_json(file) if file.exists() else {}
        results = summary.get("results", {}).values()
        if means := [found["dice"]["mean"] for found in results if found.get("dice", {}).get("mean") is not None]:
            yield f"Dice {sum(means) / len(means):.3f}, mean of {len(means)} labels and regions"
        yield from summary.get("notes", ())


def _pages(out: str) -> list[str]:
    """Pages and tables of a stage, and of the quality control of its store."""
    return [
        path.as_posix()
        for folder in (out, f"{out}_check")
        for pattern in ("*.html", "volumes.csv", "evaluation/*.html")
        for path in sorted(Path(folder).glob(pattern))
    ]
