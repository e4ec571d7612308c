"""The page of a probe: its scores, predicted against true, and for numbers the residuals by site."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.reporting.pages import data_uri, require_for_page, write_page
from asa.reporting.plots import POINT, plain, png_of, scatter

NARROW, PER_SITE = 3.6, 0.35  # inches: height of the figure, and at least that of each site


def write_probe(
    path: Path,
    column: str,
    lines: Sequence[str],
    truth: Sequence[str],
    predicted: np.ndarray,
    sites: tuple[str, Sequence[str]] | None,
) -> None:
    """Write the page of a probe of a column; an ImportError if the `report` extra is not installed.

    Args:
        lines: what the command prints; the first is the score.
        truth: of each scan, N values as text.
        predicted: numbers `(N,)`, or names of classes.
        sites: name of a column, and its value for each scan; None: all are drawn as one.
    """
    require_for_page(path)
    numeric = predicted.dtype.kind == "f"
    plot = data_uri(png_of(_figure(column, np.array(truth, float), predicted, sites))) if numeric else None
    classes = [] if numeric else sorted({*truth, *predicted.tolist()})
    pairs = list(zip(truth, predicted.tolist(), strict=True))
    counts = [(true, [pairs.count((true, found)) for found in classes]) for true in classes]
    by = None if sites is None else sites[0]
    write_page(path, "probe.html.j2", column=column, lines=lines, plot=plot, by=by, classes=classes, counts=counts)


def _figure(column: str, truth: np.ndarray, predicted: np.ndarray, sites: tuple[str, Sequence[str]] | None) -> Any:
    """Predicted against true with the line where they agree, and boxes of predicted - true by site."""
    from matplotlib.figure import Figure

    name, values = ("", ["all scans"] * len(truth)) if sites is None else sites
    names, of = np.unique(values, return_inverse=True)
    height = max(NARROW, 1 + PER_SITE * len(names))
    figure = Figure(figsize=(10.4, height), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    both = np.concatenate([truth, predicted])
    ends = [both.min(), both.max()]
    left.plot(ends, ends, color="#4b5563", linewidth=1.0, label="predicted = true")
    left.scatter(truth, predicted, s=16, alpha=0.7, color=POINT, edgecolors="white", linewidths=0.4, label="one scan")
    left.set(xlabel=f"{column}, true", ylabel=f"{column}, predicted")
    left.legend(frameon=False)
    residuals = predicted - truth
    groups = [residuals[of == k] for k in range(len(names))]
    right.boxplot(groups, orientation="horizontal", widths=0.5, showfliers=False, medianprops={"color": "#b45309"})
    for k, group in enumerate(groups, start=1):
        scatter(right, group, k, np.random.default_rng(0), s=16, alpha=0.6)  # the same numbers give the same page
    counted = [f"{one} ({len(group)})" for one, group in zip(names, groups, strict=True)]
    right.set_yticks(range(1, len(names) + 1), counted)
    right.invert_yaxis()
    right.axvline(0.0, color="#4b5563", linewidth=1.0, zorder=0)
    right.set(xlabel=f"{column}, predicted - true", ylabel=name)
    plain(left, "both")
    plain(right, "x")
    return figure
