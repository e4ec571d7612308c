"""Plots of evaluations and comparisons, and the page of a probe, drawn with matplotlib (the `report` extra)."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.evaluation.comparison import Comparison, paired_differences
from asa.evaluation.policies import MetricInfo
from asa.evaluation.summary import Summary
from asa.reporting.pages import data_uri, require_for_page, write_page

COLUMNS = 3  # metrics side by side
POINT, LINE, INTERVAL, MEDIAN, ZERO = "#0284c7", "#374151", "#111827", "#b45309", "#4b5563"
NARROW, PER_SITE = 3.6, 0.35  # inches: height of the figure of a probe, and at least that of each site


def box_plots(summary: Summary) -> bytes:
    """Box plots of each metric, labels from top to bottom, with one point per case; PNG."""
    metrics, labels = summary.policy.metrics, list(summary.results)
    height = 1.0 + len(labels) * (0.55 if len(labels) <= 12 else 0.26)
    figure, axes = _panels(metrics, labels, height)
    line = {"color": LINE, "linewidth": 1.1}
    for axis, metric in zip(axes, metrics, strict=True):
        found = [(row.label, row.values[metric.name]) for row in summary.rows]
        groups = [[value for own, value in found if own == label and not math.isnan(value)] for label in labels]
        axis.boxplot(
            groups,
            positions=np.arange(len(labels)),
            orientation="horizontal",
            widths=0.55,
            manage_ticks=False,
            showfliers=False,
            showmeans=True,
            boxprops=line,
            whiskerprops=line,
            capprops=line,
            medianprops={"color": MEDIAN, "linewidth": 1.8},
            meanprops={"marker": "D", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": LINE},
        )
        generator = np.random.default_rng(0)  # the same numbers give the same page
        for index, values in enumerate(groups):
            scatter(axis, values, index, generator, s=22, alpha=0.75, zorder=4)
        axis.set_xlabel(metric.heading)
        low, high = axis.get_xlim()
        margin = max(50 * 10.0**-metric.digits - (high - low), 0.0) / 2  # do not magnify a negligible difference
        axis.set_xlim(low - margin, high + margin)
        axis.ticklabel_format(axis="x", useOffset=False)
    return png_of(figure)


def difference_plots(comparison: Comparison) -> bytes:
    """For each metric the differences of every case, with mean and interval, by region and run; PNG."""
    others = comparison.runs[1:]
    rows = [(region, run) for region in comparison.regions for run in others]
    names = [region if len(others) == 1 else f"{region}: {run.name}" for region, run in rows]
    figure, axes = _panels(comparison.metrics, names, 1.1 + 0.42 * len(rows))
    generator = np.random.default_rng(0)  # the same numbers give the same page
    for axis, metric in zip(axes, comparison.metrics, strict=True):
        for index, (region, run) in enumerate(rows):
            values = paired_differences(comparison, metric, region, run)
            scatter(axis, values[~np.isnan(values)], index, generator, s=16, alpha=0.6)
            difference = comparison.differences[metric.name, region, run.name]
            if not math.isnan(difference.low):
                ends = [difference.low, difference.high]
                axis.plot(ends, [index, index], color=INTERVAL, linewidth=2.2, solid_capstyle="butt")
            if not math.isnan(difference.mean):
                axis.plot(difference.mean, index, "D", color=INTERVAL, markersize=5.5, markeredgecolor="white")
        axis.axvline(0.0, color=ZERO, linewidth=1.0, zorder=0)
        side = "right" if metric.higher_is_better else "left"
        axis.set_xlabel(f"difference in {metric.heading}; better to the {side}")
    return png_of(figure)


def plain(axis: Any, values: str) -> None:
    """Draw axes without a frame, with a grid below the values, which are along "x" or "y"."""
    axis.grid(axis=values, color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def png_of(figure: Any) -> bytes:
    """A matplotlib figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def panels(count: int, most: int) -> tuple[Any, list[Any], tuple[int, int]]:
    """A figure, its panels with one scale, at most so many side by side, and its number of lines and columns."""
    from matplotlib.figure import Figure

    lines = math.ceil(count / most)
    columns = math.ceil(count / lines)
    figure = Figure(dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count], (lines, columns)


def _panels(metrics: Sequence[MetricInfo], names: Sequence[str], height: float) -> tuple[Any, list[Any]]:
    """A figure with a panel per metric, in lines of this height in inches, and the names from top to bottom."""
    figure, axes, (lines, _) = panels(len(metrics), COLUMNS)
    figure.set_size_inches(11.6, lines * height)
    for axis in axes:
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        plain(axis, "x")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure, axes


def scatter(axis: Any, values: Any, index: int, generator: np.random.Generator, **style: Any) -> None:
    """A point per value in row `index`, displaced at random so that equal values can be seen."""
    rows = index + generator.uniform(-0.16, 0.16, len(values))
    axis.scatter(values, rows, color=POINT, edgecolors="white", linewidths=0.4, **style)


def write_probe(
    path: Path,
    column: str,
    lines: Sequence[str],
    truth: Sequence[str],
    predicted: np.ndarray,
    sites: tuple[str, Sequence[str]] | None,
) -> None:
    """Write the page of a probe: scores, predicted against true, and for numbers the residuals by site.

    `lines` are what the command prints, `truth` the N values of the column as text, `predicted` numbers `(N,)` or names
    of classes, `sites` the name of a column and its values; None: all scans are drawn as one.
    """
    require_for_page(path)
    numeric = predicted.dtype.kind == "f"
    plot = data_uri(png_of(_probe_figure(column, np.array(truth, float), predicted, sites))) if numeric else None
    classes = [] if numeric else sorted({*truth, *predicted.tolist()})
    pairs = list(zip(truth, predicted.tolist(), strict=True))
    counts = [(true, [pairs.count((true, found)) for found in classes]) for true in classes]
    by = None if sites is None else sites[0]
    write_page(path, "probe.html.j2", column=column, lines=lines, plot=plot, by=by, classes=classes, counts=counts)


def _probe_figure(
    column: str, truth: np.ndarray, predicted: np.ndarray, sites: tuple[str, Sequence[str]] | None
) -> Any:
    """Predicted against true with the line where they agree, and boxes of predicted - true by site."""
    from matplotlib.figure import Figure

    name, values = ("", ["all scans"] * len(truth)) if sites is None else sites
    names, of = np.unique(values, return_inverse=True)
    height = max(NARROW, 1 + PER_SITE * len(names))
    figure = Figure(figsize=(10.4, height), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    both = np.concatenate([truth, predicted])
    ends = [both.min(), both.max()]
    left.plot(ends, ends, color=ZERO, linewidth=1.0, label="predicted = true")
    left.scatter(truth, predicted, s=16, alpha=0.7, color=POINT, edgecolors="white", linewidths=0.4, label="one scan")
    left.set(xlabel=f"{column}, true", ylabel=f"{column}, predicted")
    left.legend(frameon=False)
    residuals = predicted - truth
    groups = [residuals[of == k] for k in range(len(names))]
    right.boxplot(groups, orientation="horizontal", widths=0.5, showfliers=False, medianprops={"color": MEDIAN})
    for k, group in enumerate(groups, start=1):
        scatter(right, group, k, np.random.default_rng(0), s=16, alpha=0.6)  # the same numbers give the same page
    counted = [f"{one} ({len(group)})" for one, group in zip(names, groups, strict=True)]
    right.set_yticks(range(1, len(names) + 1), counted)
    right.invert_yaxis()
    right.axvline(0.0, color=ZERO, linewidth=1.0, zorder=0)
    right.set(xlabel=f"{column}, predicted - true", ylabel=name)
    plain(left, "both")
    plain(right, "x")
    return figure
