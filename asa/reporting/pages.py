"""HTML pages from the templates in `templates/`.

jinja2 and matplotlib (the `report` extra) are imported when a page is written, so that the numbers need neither.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asa.data.io.files import read_json, write_whole
from asa.errors import require

OWN = re.compile(rb"\basa \d|asa-prepare")  # in each page; the second in that of an unfinished quality control


def require_report_extra(purpose: str) -> None:
    """Raise an ImportError if the `report` extra, which `purpose` needs, is not installed."""
    for module in ("jinja2", "matplotlib.figure"):
        require(module, "report", purpose)


def require_for_page(path: Path) -> None:
    """`require_report_extra` for the page of an evaluation, whose numbers have been written before."""
    require_report_extra(f"{path} (the other files do not need the extra and are complete)")


def check_page(path: Path) -> None:
    """Raise a ValueError for a file that exists and is no page of asa: these name asa with its version."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if not any(OWN.search(line) for line in file):
            raise ValueError(f"{path}: exists and is no page of asa: move it away, or choose another out=")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of `templates/`, with values escaped for HTML, and write the page, whole or not at all."""
    import jinja2

    from asa import __version__

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asa.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(version=__version__, **values)
    # An id may come from a file name that is not valid Unicode.
    write_whole(path, page.encode("utf-8", errors="backslashreplace"))


def data_uri(png: bytes) -> str:
    """A PNG as text that is embedded in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def write_study(path: Path, done: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> None:
    """Write the page of a study, in its folder: what was run, what came out, and where its pages are.

    `done` has name, typed, out, seconds and finished of each stage; `missing` names the others.
    """
    rows = [(row, list(_verdicts(Path(row["out"]))), _pages_of(row["out"])) for row in done]
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


def _pages_of(out: str) -> list[str]:
    """Pages and tables of a stage, and of the quality control of its store."""
    return [
        path.as_posix()
        for folder in (out, f"{out}_check")
        for pattern in ("*.html", "volumes.csv", "evaluation/*.html")
        for path in sorted(Path(folder).glob(pattern))
    ]
