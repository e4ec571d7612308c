"""One self-contained page on a comparison: the table, the paired differences drawn, the cases that differ most."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import write_whole
from asa.evaluation.comparison import Comparison, difference_cells, mean_text, notes, paired_differences
from asa.evaluation.measures import Measure
from asa.evaluation.summary import number_text
from asa.reporting.evaluation import data_uri, plain_axis, plot_grid, png_of, render, require_extra

EXTREME = 5  # cases listed as the largest losses, and as many gains
POINT, INTERVAL = "#0284c7", "#111827"


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page: one HTML file without links or scripts.

    Args:
        path: the file, made whole or not at all.
        comparison: what was found.

    Raises:
        ImportError: the `report` extra is not installed.
    """
    require_extra(path)
    page = render(
        "comparison.html.j2",
        comparison=comparison,
        policy=comparison.policy,
        first=comparison.runs[0].name,
        notes=notes(comparison),
        table=[(metric, _table(comparison, metric)) for metric in comparison.metrics],
        plots=data_uri(_plots(comparison)),
        extremes=_extremes(comparison),
    )
    write_whole(path, page.encode())


def _table(comparison: Comparison, metric: Measure) -> list[dict[str, Any]]:
    """A row for each region and run."""
    rows = []
    for region in comparison.regions:
        for run in comparison.runs:
            key = (metric.name, region, run.name)
            difference = comparison.differences.get(key)
            rows.append(
                {
                    "region": region if run is comparison.runs[0] else "",
                    "run": run.name,
                    "mean": mean_text(comparison.results[key], metric.digits),
                    "cells": difference_cells(difference, metric.digits),
                    "clear": difference is not None and difference.p_holm < 0.05,
                }
            )
    return rows


def _extremes(comparison: Comparison) -> list[dict[str, str]]:
    """The largest losses of single cases in the first metric, the largest first, then the largest gains."""
    metric, first = comparison.metrics[0], comparison.runs[0]
    found = []
    for run in comparison.runs[1:]:
        for region in comparison.regions:
            differences = paired_differences(comparison, metric, region, run)
            for case_id, difference in zip(comparison.case_ids, differences.tolist(), strict=True):
                if difference and not math.isnan(difference):
                    gain = difference if metric.higher_is_better else -difference
                    found.append((gain, case_id, region, run))
    found.sort(key=lambda entry: entry[:3])
    losses, gains = ([entry for entry in found if entry[0] * sign > 0] for sign in (-1, 1))
    return [
        {
            "case": case_id,
            "region": region,
            "run": run.name,
            "first": number_text(first.values[case_id, region][metric.name], metric.digits),
            "value": number_text(run.values[case_id, region][metric.name], metric.digits),
            "kind": "better" if gain > 0 else "worse",
        }
        for gain, case_id, region, run in losses[:EXTREME] + gains[::-1][:EXTREME]
    ]


def _plots(comparison: Comparison) -> bytes:
    """For each metric the differences of every case, their mean and its interval, by region and run; PNG."""
    from matplotlib.figure import Figure

    others = comparison.runs[1:]
    rows = [(region, run) for region in comparison.regions for run in others]
    lines, columns = plot_grid(len(comparison.metrics))
    figure = Figure(figsize=(11.6, lines * (1.1 + 0.42 * len(rows))), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for spare in axes[len(comparison.metrics) :]:
        spare.set_axis_off()
    generator = np.random.default_rng(0)  # the same page for the same numbers
    for axis, metric in zip(axes, comparison.metrics, strict=False):
        for place, (region, run) in enumerate(rows):
            differences = paired_differences(comparison, metric, region, run)
            differences = differences[~np.isnan(differences)]
            spread = place + generator.uniform(-0.16, 0.16, len(differences))
            axis.scatter(differences, spread, s=16, color=POINT, alpha=0.6, edgecolors="white", linewidths=0.4)
            found = comparison.differences[metric.name, region, run.name]
            if not math.isnan(found.low):
                axis.plot([found.low, found.high], [place, place], color=INTERVAL, linewidth=2.2, solid_capstyle="butt")
            if not math.isnan(found.mean):
                axis.plot(found.mean, place, "D", color=INTERVAL, markersize=5.5, markeredgecolor="white")
        axis.axvline(0.0, color="#4b5563", linewidth=1.0, zorder=0)
        names = [region if len(others) == 1 else f"{region}: {run.name}" for region, run in rows]
        axis.set_yticks(range(len(rows)), names)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        side = "right" if metric.higher_is_better else "left"
        axis.set_xlabel(f"difference in {metric.heading}; better to the {side}")
        plain_axis(axis)
    return png_of(figure)
