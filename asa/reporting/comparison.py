"""The page of a comparison: table, plots of the paired differences, cases that differ most, and their overlays."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from asa.data.io.files import sha256_of
from asa.evaluation.comparison import Comparison, Run, comparison_rows, notes, paired_differences, verdicts
from asa.evaluation.summary import number_text
from asa.reporting.evaluation import label_panel
from asa.reporting.pages import data_uri, require_for_page, write_page
from asa.reporting.plots import difference_plots

EXTREMES = 5  # largest losses listed, and as many of the largest gains
OVERLAYS = 2  # cases drawn of each


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison; an ImportError if the `report` extra is not installed."""
    require_for_page(path)
    extremes, rows = _extremes(comparison), list(comparison_rows(comparison))
    overlays = [figure for row in _shown(extremes) if (figure := _overlay(comparison, row)) is not None]
    write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        policy=comparison.policy,
        first=comparison.runs[0].name,
        notes=notes(comparison),
        verdicts=verdicts(comparison),
        headings=comparison.headings[1:],
        table=[(metric, [row[1:] for row in rows if row[0] == metric.heading]) for metric in comparison.metrics],
        plots=data_uri(difference_plots(comparison)),
        significant={key for key, difference in comparison.differences.items() if difference.p_holm < 0.05},
        extremes=extremes,
        overlays=overlays,
    )


def _extremes(comparison: Comparison) -> list[dict[str, str]]:
    """The cases with the largest losses in the first metric, the largest first, then those with the largest gains."""
    metric, first = comparison.metrics[0], comparison.runs[0]
    entries = []
    for run, region in product(comparison.runs[1:], comparison.regions):
        differences = paired_differences(comparison, metric, region, run)
        gained = (differences if metric.higher_is_better else -differences).tolist()
        pairs = zip(gained, comparison.case_ids, strict=True)
        entries += [(gain, case_id, region, run) for gain, case_id in pairs if abs(gain) > 0]  # neither NaN nor 0
    entries.sort(key=lambda entry: entry[:3])
    losses, gains = ([entry for entry in entries if entry[0] * sign > 0] for sign in (-1, 1))
    return [
        {
            "case": case_id,
            "region": region,
            "run": run.name,
            "first": _score(comparison, first, case_id, region),
            "value": _score(comparison, run, case_id, region),
            "kind": "better" if gain > 0 else "worse",
        }
        for gain, case_id, region, run in losses[:EXTREMES] + gains[::-1][:EXTREMES]
    ]


def _score(comparison: Comparison, run: Run, case_id: str, region: str) -> str:
    """The first metric of a case in a run."""
    metric = comparison.metrics[0]
    return number_text(run.values[case_id, region][metric.name], metric.digits)


# ---- overlays of label maps ----


def _shown(extremes: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows whose cases are drawn: the largest losses and gains, each case once."""
    rows: dict[str, dict[str, str]] = {}
    for kind in ("worse", "better"):
        found: dict[str, dict[str, str]] = {}
        for row in extremes:
            if row["kind"] == kind and row["case"] not in rows:
                found.setdefault(row["case"], row)
        rows |= dict(list(found.items())[:OVERLAYS])
    return list(rows.values())


def _overlay(comparison: Comparison, row: dict[str, str]) -> dict[str, Any] | None:
    """Truth and every run's label map of a case on the same slices; None if a file is unknown, gone, or another now."""
    case_id, region, metric = row["case"], row["region"], comparison.metrics[0]
    files = {run.name: run.files.get(case_id, {}) for run in comparison.runs}
    first, setting = files[comparison.runs[0].name], comparison.runs[0].setting
    truth, image = _unchanged(first, "truth"), _unchanged(first, "image")
    predictions = {name: path for name, each in files.items() if (path := _unchanged(each, "prediction")) is not None}
    if truth is None or len(predictions) < len(files) or (image is None and first.get("image") is not None):
        return None
    panel = label_panel(
        case_id,
        [("Truth", truth), *predictions.items()],
        image,
        labels={int(value): name for value, name in setting["labels"].items()},
        ignored=setting["ignored labels"],
        region=setting["regions"][region],
    )
    scores = [f"{run.name} {_score(comparison, run, case_id, region)}" for run in comparison.runs]
    return panel | {"title": f"{case_id}, {region}: {metric.title} {', '.join(scores)}"}


def _unchanged(files: Mapping[str, str | None], kind: str) -> Path | None:
    """A file of a case; None if it is unknown, gone, or written again since it was scored."""
    path, digest = files.get(kind), files.get(f"{kind}_sha256")
    if path is None or not Path(path).is_file() or digest not in (None, sha256_of(Path(path))):
        return None
    return Path(path)
