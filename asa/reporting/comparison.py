"""The page of a comparison: table, plots of the paired differences, cases that differ most."""

from itertools import product
from pathlib import Path
from typing import Any

from asa.evaluation.comparison import Comparison, difference_cells, mean_text, notes, paired_differences
from asa.evaluation.policies import MetricInfo
from asa.evaluation.summary import number_text
from asa.reporting.pages import data_uri, require_for_page, write_page
from asa.reporting.plots import difference_plots

EXTREMES = 5  # largest losses listed, and as many of the largest gains


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison.

    Raises:
        ImportError: the `report` extra is not installed.
    """
    require_for_page(path)
    write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        policy=comparison.policy,
        first=comparison.runs[0].name,
        notes=notes(comparison),
        table=[(metric, _table(comparison, metric)) for metric in comparison.metrics],
        plots=data_uri(difference_plots(comparison)),
        extremes=_extremes(comparison),
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
