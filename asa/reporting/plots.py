"""Plots of evaluations and comparisons, drawn with matplotlib (the `report` extra)."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from asa.evaluation.comparison import Comparison, paired_differences
from asa.evaluation.policies import MetricInfo
from asa.evaluation.summary import Summary

COLUMNS = 3  # metrics side by side
POINT, LINE, INTERVAL, MEDIAN = "#0284c7", "#374151", "#111827", "#b45309"


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
        axis.axvline(0.0, color="#4b5563", linewidth=1.0, zorder=0)
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
