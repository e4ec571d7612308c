"""The page of a comparison: table, plots of the paired differences, cases that differ most, and their overlays."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import sha256_of
from asa.evaluation.comparison import Comparison, difference_cells, mean_text, notes, paired_differences
from asa.evaluation.policies import MetricInfo
from asa.evaluation.summary import number_text
from asa.reporting.evaluation import case_volumes, colour_indices
from asa.reporting.figures import central_slices, encode_png, hex_colour, label_colours, overlay_panel
from asa.reporting.pages import data_uri, require_for_page, write_page
from asa.reporting.plots import difference_plots

EXTREMES = 5  # largest losses listed, and as many of the largest gains
OVERLAYS = 2  # cases drawn of each
PANEL_WIDTH = 1160  # pixels


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison.

    Raises:
        ImportError: the `report` extra is not installed.
    """
    require_for_page(path)
    extremes = _extremes(comparison)
    overlays = [figure for row in _shown(extremes) if (figure := _overlay(comparison, row)) is not None]
    write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        policy=comparison.policy,
        first=comparison.runs[0].name,
        notes=notes(comparison),
        table=[(metric, _table(comparison, metric)) for metric in comparison.metrics],
        plots=data_uri(difference_plots(comparison)),
        extremes=extremes,
        overlays=overlays,
        labels=_legend(comparison),
    )


def _table(comparison: Comparison, metric: MetricInfo) -> list[dict[str, Any]]:
    """A row for each region and run."""
    rows = []
    for region, run in product(comparison.regions, comparison.runs):
        key = (metric.name, region, run.name)
        difference = comparison.differences.get(key)
        row: dict[str, Any] = {"region": region if run is comparison.runs[0] else "", "run": run.name}
        row |= {"mean": mean_text(comparison.results[key], metric.digits)}
        row |= {"cells": difference_cells(difference, metric.digits)}
        row |= {"significant": difference is not None and difference.p_holm < 0.05}
        rows.append(row)
    return rows


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
            "first": number_text(first.values[case_id, region][metric.name], metric.digits),
            "value": number_text(run.values[case_id, region][metric.name], metric.digits),
            "kind": "better" if gain > 0 else "worse",
        }
        for gain, case_id, region, run in losses[:EXTREMES] + gains[::-1][:EXTREMES]
    ]


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


def _names(comparison: Comparison) -> dict[int, str]:
    """Label value -> name of what is drawn; none for images."""
    setting = comparison.runs[0].setting
    names = {int(value): name for value, name in setting.get("labels", {}).items()}
    return names | {value: f"ignored ({value})" for value in setting.get("ignored labels", []) if value not in names}


def _legend(comparison: Comparison) -> list[tuple[str, str]]:
    names = list(_names(comparison).values())
    return [(name, hex_colour(colour)) for name, colour in zip(names, label_colours(len(names)), strict=True)]


def _overlay(comparison: Comparison, row: dict[str, str]) -> dict[str, Any] | None:
    """Truth and every run's label map of a case on the same slices; None if a file is unknown, gone, or another now."""
    case_id, region, first = row["case"], row["region"], comparison.runs[0]
    files = [run.files.get(case_id, {}) for run in comparison.runs]
    needed = [files[0].get("truth"), *(paths.get("prediction") for paths in files)]
    image = files[0].get("image")
    paths = [Path(path) for path in (*needed, image) if path is not None]
    if None in needed or not all(path.is_file() for path in paths):
        return None
    recorded = [files[0].get("truth_sha256"), *(each.get("prediction_sha256") for each in files)]
    if any(digest not in (None, sha256_of(path)) for path, digest in zip(paths, recorded, strict=False)):
        return None  # predicted again since it was scored
    truth, predictions, volume, spacing = case_volumes(
        case_id, paths[0], paths[1 : len(needed)], None if image is None else Path(image)
    )
    inside = np.isin(truth, first.setting["regions"][region])
    for prediction in () if inside.any() else predictions:
        inside |= np.isin(prediction, first.setting["regions"][region])
    values = list(_names(comparison))
    maps = [colour_indices(labels, values) for labels in (truth, *predictions)]
    columns = ["Truth", *(run.name for run in comparison.runs)]
    columns = columns if volume is None else ["Image", *columns]
    metric = comparison.metrics[0]
    scores = [
        f"{run.name} {number_text(run.values[case_id, region][metric.name], metric.digits)}" for run in comparison.runs
    ]
    panel = overlay_panel(
        volume,
        maps,
        colours=[label_colours(len(values))] * len(maps),
        at=central_slices(inside) if inside.any() else None,
        spacing=spacing,
        tile_width=PANEL_WIDTH // len(columns),
    )
    return {
        "id": case_id,
        "title": f"{case_id}, {region}: {metric.title} {', '.join(scores)}",
        "columns": columns,
        "panel": data_uri(encode_png(panel)),
        "width": panel.shape[1],
    }
