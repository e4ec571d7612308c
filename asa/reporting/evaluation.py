"""The pages of an evaluation of label maps and of a comparison.

Both have tables and plots; the one the worst and best cases in three planes, the other the cases that differ most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import sha256_of
from asa.data.io.nifti import check_same_geometry, read_image, read_label, spacing_of, to_ras
from asa.evaluation.comparison import Comparison, Run, comparison_rows, notes, paired_differences, verdicts
from asa.evaluation.metrics import bounding_box
from asa.evaluation.policies import MetricInfo
from asa.evaluation.statistics import LEVEL, RESAMPLES, SEED, interval_kind
from asa.evaluation.summary import (
    CaseRow,
    Row,
    SegmentationSummary,
    Summary,
    label_notes,
    number_text,
    statistic_cells,
    subjects_note,
)
from asa.reporting.figures import Lengths, central_slices, encode_png, hex_colour, label_colours, overlay_panel
from asa.reporting.pages import data_uri, require_for_page, write_page
from asa.reporting.plots import box_plots, difference_plots

SHOWN = 2  # worst cases with a figure, and as many best ones
PANEL_WIDTH = 1160  # pixels
MAX_OPEN_ROWS = 60  # a longer table of cases is collapsed at first
WORST_ROWS = 10  # labels listed above a case's figure, the worst first
MARGIN = 4  # voxels around the head in a figure
EXTREMES = 5  # largest losses listed on the page of a comparison, and as many of the largest gains
OVERLAYS = 2  # cases drawn of each

# The half of Okabe and Ito's palette that labels do not use first.
DIFFERENCES = {
    "missed (truth only)": (213, 94, 0),
    "added (prediction only)": (0, 114, 178),
    "another label": (204, 121, 167),
}


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case; None for a missing prediction or image."""

    case_id: str
    prediction: Path | None
    truth: Path
    image: Path | None = None


def write_report(path: Path, summary: SegmentationSummary, cases: Sequence[CaseFiles]) -> None:
    """Write the page of an evaluation of label maps; the files of the worst and best cases are read again."""
    require_for_page(path)
    files = {case.case_id: case for case in cases}
    order = list(case_scores(summary))
    worst = order[: min(SHOWN, (len(order) + 1) // 2)]
    best = order[len(worst) :][::-1][:SHOWN]
    titles = case_titles(summary, {"Worst case": worst, "Best case": best})
    write_page(
        path,
        "evaluation.html.j2",
        **summary_values(summary),
        notes=label_notes(summary),
        shown=[_case_figure(title, files[case_id], summary) for case_id, title in titles.items()],
        differences=[(name, hex_colour(colour)) for name, colour in DIFFERENCES.items()],
        cases=[
            (case_id, [(row, value_cells(row, summary), _size_cells(row)) for row in rows])
            for case_id, rows in groupby(summary.rows, lambda row: row.case_id)
        ],
    )


# ---- for the pages of all evaluations ----


def summary_values(summary: Summary) -> dict[str, Any]:
    """Template values of the results, how they were computed, and the box plots."""
    results = list(summary.results.items())
    return {
        "summary": summary,
        "policy": summary.policy,
        "results": [
            (metric, [(label, statistic_cells(found[metric.name], metric.digits)) for label, found in results])
            for metric in summary.policy.metrics
        ],
        "level": f"{100 * LEVEL:g} %",
        "resamples": f"{RESAMPLES:,}",
        "seed": SEED,
        "interval": interval_kind(summary.counts),
        "subjects": subjects_note(len(summary.case_ids), summary.several) if summary.several else "",
        "plots": data_uri(box_plots(summary)),
        "collapsed": len(summary.rows) > MAX_OPEN_ROWS,
    }


def case_scores(summary: Summary) -> dict[str, float]:
    """Mean of the policy's first metric over the regions of each case where it is defined; the worst case first."""
    metric = summary.policy.metrics[0]
    values: dict[str, list[float]] = {}
    for row in summary.rows:
        if not math.isnan(row.values[metric.name]):
            values.setdefault(row.case_id, []).append(row.values[metric.name])
    means = {case_id: float(np.mean(found)) for case_id, found in values.items()}
    return dict(sorted(means.items(), key=lambda item: (_badness(metric, item[1]), item[0]), reverse=True))


def case_titles(summary: Summary, ranked: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Case id -> title, with rank and score, of each case that is shown; `ranked` is title -> case ids by rank."""
    metric, scores = summary.policy.metrics[0], case_scores(summary)
    ranked = ranked if len(scores) > 1 else {"The case": list(scores)}
    mean = "mean " if len(summary.results) > 1 else ""
    titles = {}
    for title, case_ids in ranked.items():
        for rank, case_id in enumerate(case_ids, start=1):
            number = "" if rank == 1 else f", number {rank}"
            score = number_text(scores[case_id], metric.digits)
            titles[case_id] = f"{title}{number}: {case_id} ({mean}{metric.title} {score})"
    return titles


def value_cells(row: Row, summary: Summary) -> list[str]:
    """The values of a row as text for a table."""
    return [number_text(row.values[metric.name], metric.digits) for metric in summary.policy.metrics]


def _badness(metric: MetricInfo, value: float) -> float:
    """Sort key: larger is worse, undefined values are last."""
    return -math.inf if math.isnan(value) else -value if metric.higher_is_better else value


# ---- cases of label maps ----


def _size_cells(row: CaseRow) -> list[str]:
    """Volume in ml and voxels, each predicted and true, as text for a table."""
    ml = ["none" if volume is None else f"{volume:,.2f}" for volume in (row.ml_predicted, row.ml_true)]
    return ml + ["none" if count is None else f"{count:,}" for count in (row.voxels_predicted, row.voxels_true)]


def _case_figure(title: str, files: CaseFiles, summary: SegmentationSummary) -> dict[str, Any]:
    """Template values of one case: its numbers, its panel and the legend."""
    metric = summary.policy.metrics[0]
    rows = [row for row in summary.rows if row.case_id == files.case_id]
    rows.sort(key=lambda row: _badness(metric, row.values[metric.name]), reverse=True)
    assert files.prediction is not None, "a case without a prediction has no score and no figure"
    panel = label_panel(
        files.case_id,
        [("Truth", files.truth), ("Prediction", files.prediction)],
        files.image,
        labels=summary.labels,
        ignored=summary.policy.ignored,
        region=summary.regions[rows[0].label],
        differences=True,
    )
    return panel | {
        "title": title,
        "focus": rows[0].label,
        "rows": [(row.label, value_cells(row, summary), row.empty) for row in rows[:WORST_ROWS]],
        "hidden": max(len(rows) - WORST_ROWS, 0),
    }


# ---- panels of label maps, for the pages of evaluations and comparisons ----


def label_panel(
    case_id: str,
    paths: Sequence[tuple[str, Path]],
    image: Path | None,
    *,
    labels: Mapping[int, str],
    ignored: Sequence[int],
    region: Sequence[int],
    differences: bool = False,
) -> dict[str, Any]:
    """Template values of a panel: a case's image and label maps on the slices through the middle of a region.

    `paths` are title and file of the truth, and of one prediction or more, `labels` label value -> name, `ignored` the
    values of the truth that a policy ignores. The region is searched for in the truth, else in the predictions;
    `differences` are those between the truth and the first prediction.
    """
    volumes, grey, spacing = _read_volumes(case_id, [path for _, path in paths], image)
    inside = [np.isin(values, region) for values in volumes]
    focus = inside[0] if inside[0].any() else np.logical_or.reduce(inside)
    at = central_slices(focus if focus.any() else volumes[0] != 0)
    names = {**labels, **{value: f"ignored ({value})" for value in ignored if value not in labels}}
    colours = label_colours(len(names))
    maps = [_colour_indices(values, list(names)) for values in volumes]
    drawn = {int(k) for values in maps for axis in range(3) for k in np.unique(values.take(at[axis], axis))}
    columns, tables = [*["Image"] * (grey is not None), *(title for title, _ in paths)], [colours] * len(maps)
    if differences:
        columns.append("Differences")
        maps.append(differences_of(volumes[0], volumes[1], ignored))
        tables.append(np.array(list(DIFFERENCES.values()), dtype=np.uint8))
    width = PANEL_WIDTH // len(columns)
    panel = overlay_panel(grey, maps, colours=tables, at=at, spacing=spacing, tile_width=width)
    legend = [(name, hex_colour(colour)) for name, colour in zip(names.values(), colours, strict=True)]
    return {
        "id": case_id,
        "columns": columns,
        "panel": data_uri(encode_png(panel)),
        "width": panel.shape[1],
        "labels": [legend[k - 1] for k in sorted(drawn - {0})],
    }


def _read_volumes(
    case_id: str, paths: Sequence[Path], image: Path | None
) -> tuple[list[np.ndarray], np.ndarray | None, Lengths]:
    """A case's label maps and image in RAS `(D, H, W)`, cropped to the head, and their voxel size in mm."""
    reference = read_label(paths[0])
    native = [reference.data, *(read_label(path).data for path in paths[1:])]
    foreground = np.logical_or.reduce([labels != 0 for labels in native])
    if image is not None:
        scan = read_image(image, nan="zero")
        check_same_geometry(scan, reference, f"case {case_id}: image and truth")
        native.append(scan.data)
        foreground |= scan.data > scan.data.min()
    head = bounding_box(foreground) if foreground.any() else ()
    box = tuple(slice(max(side.start - MARGIN, 0), side.stop + MARGIN) for side in head)
    volumes = [to_ras(data[box], reference.affine)[0].transpose(2, 1, 0) for data in native]
    width, height, depth = spacing_of(to_ras(reference.data, reference.affine)[1]).tolist()
    return volumes[: len(paths)], None if image is None else volumes[-1], (depth, height, width)


def _colour_indices(data: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Label values as their position in `labels`, from 1; background stays 0."""
    values = np.array([0, *labels])
    order = np.argsort(values)
    return order[np.searchsorted(values[order], data)]


def differences_of(truth: np.ndarray, prediction: np.ndarray, ignored: Sequence[int]) -> np.ndarray:
    """Where two label maps differ: 1 missed, 2 added, 3 another label, as in `DIFFERENCES`."""
    same = (truth == prediction) | np.isin(truth, ignored)
    return np.select([same, prediction == 0, truth == 0], [0, 1, 2], default=3)


# ---- the page of a comparison: cases that differ most, and their overlays ----


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison; an ImportError if the `report` extra is not installed."""
    require_for_page(path)
    extremes, rows = _extremes(comparison), list(comparison_rows(comparison))
    overlays = [figure for row in _shown(extremes) if (figure := _overlay(comparison, row))]
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
    metric = comparison.metrics[0]
    return number_text(run.values[case_id, region][metric.name], metric.digits)


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
    if path is None or not Path(path).is_file() or digest not in (None, sha256_of(path)):
        return None
    return Path(path)
