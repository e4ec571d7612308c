"""Rows of an evaluation, their statistics over the cases, and both as CSV, JSON and plain text."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from asa.evaluation.measures import Measure, Scoring, nullable
from asa.evaluation.policies import Policy, Regions, get_policy
from asa.evaluation.statistics import LEVEL, RESAMPLES, SEED, bootstrap_interval


@dataclass(frozen=True)
class Row:
    """One label of one case, or a whole image.

    Args:
        case_id: the case.
        label: name of the label or region.
        values: metric name -> value; NaN where it is undefined.
    """

    case_id: str
    label: str
    values: dict[str, float]


@dataclass(frozen=True)
class CaseRow(Row):
    """One label of one case, with its size.

    Args:
        case_id, label, values: see `Row`.
        voxels_predicted: size of the region in the prediction, None if there is no prediction.
        voxels_true: size of the region in the truth.
        ml_predicted: the same in ml, None if there is no prediction.
        ml_true: the same in ml.
    """

    voxels_predicted: int | None
    voxels_true: int
    ml_predicted: float | None
    ml_true: float

    @property
    def empty(self) -> str:
        """Which mask holds no voxel, in words; empty text if both hold some."""
        if self.voxels_predicted is None:
            return "no prediction"
        if self.voxels_predicted and self.voxels_true:
            return ""
        if self.voxels_true:
            return "prediction empty"
        return "truth empty" if self.voxels_predicted else "both empty"


@dataclass(frozen=True)
class Statistic:
    """One metric of one label over the cases; NaN where too few values are defined.

    Args:
        mean: mean of the defined values.
        sd: their standard deviation with n - 1, NaN below two values.
        median: their median.
        low: lower end of the bootstrap interval of the mean, NaN below two values.
        high: upper end.
        used: number of defined values, n used.
        total: number of cases, n total.
    """

    mean: float
    sd: float
    median: float
    low: float
    high: float
    used: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluation found.

    Args:
        policy: what the numbers mean.
        rows: every case and region, in order of case id.
        results: region -> metric name -> statistic over the cases.
        seed: of the bootstrap.
    """

    policy: Scoring
    rows: Sequence[Row]
    results: dict[str, dict[str, Statistic]]
    seed: int = SEED

    @property
    def case_ids(self) -> list[str]:
        """Ids of the cases in order, those without a prediction included."""
        return list(dict.fromkeys(row.case_id for row in self.rows))

    def as_json(self) -> dict[str, Any]:
        """The findings for a JSON file, without the rows; undefined numbers are null."""
        from asa import __version__

        return {
            "asa": __version__,
            "policy": self.policy.as_json(),
            "cases": len(self.case_ids),
            "interval": {
                "of": "mean",
                "kind": "bootstrap-t over cases",
                "level": LEVEL,
                "resamples": RESAMPLES,
                "seed": self.seed,
            },
            "results": {
                label: {name: nullable(asdict(statistic)) for name, statistic in found.items()}
                for label, found in self.results.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class Summary(Findings):
    """What an evaluation of label maps found.

    Args:
        policy, rows, results, seed: see `Findings`.
        labels: declared label value -> name.
        regions: name of each evaluated region -> label values whose union it is.
        missing: cases without a prediction; they count in n total, never in n used.
        unmatched: predictions without a truth; they count nowhere.
    """

    policy: Policy
    rows: tuple[CaseRow, ...]
    labels: dict[int, str]
    regions: Regions
    missing: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The summary for a JSON file, without its rows; undefined numbers are null."""
        return super().as_json() | {
            "labels": {str(value): name for value, name in self.labels.items()},
            "regions": {name: list(values) for name, values in self.regions.items()},
            "without_prediction": list(self.missing),
            "without_truth": list(self.unmatched),
        }


def summarise(
    rows: Iterable[CaseRow],
    labels: Mapping[int, str],
    policy: str | Policy = "ibsr",
    *,
    missing: Sequence[str] = (),
    unmatched: Sequence[str] = (),
    seed: int = SEED,
) -> Summary:
    """Statistics of each label and metric over the cases.

    The interval of the mean is `bootstrap_interval` over cases. Every label and metric draws from the same
    seed, so an interval does not depend on what else is evaluated.

    Args:
        rows: of all cases, as `evaluate_case` returns them.
        labels: declared label value -> name.
        policy: name of a policy, or one.
        missing: cases whose rows stand for a missing prediction.
        unmatched: predictions that have no truth.
        seed: of the bootstrap.

    Returns:
        The summary.

    Raises:
        ValueError: a bad declaration of labels, or an unknown policy.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    rows, regions = tuple(rows), policy.regions_of(labels)
    return Summary(
        policy=policy,
        rows=rows,
        results=statistics(rows, regions, policy.metrics, seed),
        seed=seed,
        labels=dict(labels),
        regions=regions,
        missing=tuple(missing),
        unmatched=tuple(unmatched),
    )


def statistics(
    rows: Sequence[Row], labels: Iterable[str], metrics: Sequence[Measure], seed: int = SEED
) -> dict[str, dict[str, Statistic]]:
    """Label -> metric name -> statistic over the cases."""
    return {
        label: {
            metric.name: statistic([row.values[metric.name] for row in rows if row.label == label], seed, metric.bounds)
            for metric in metrics
        }
        for label in labels
    }


def summary_table(summary: Summary) -> str:
    """The summary as plain text for a terminal, with the policy's truth table; no trailing newline."""
    policy = summary.policy
    lines = [f"policy {policy.name}: {policy.description}", *data_notes(summary), ""]
    for metric in policy.metrics:
        table = [[metric.heading, "mean", "95 % interval", "sd", "median", "n used"]]
        for label, found in summary.results.items():
            table.append([label, *statistic_cells(found[metric.name], metric.digits)])
        lines += [*aligned(table), ""]
    truth = [["empty masks count as", *(metric.title for metric in policy.metrics)]]
    lines += aligned(truth + [[case, *values] for case, values in policy.truth_table()])
    lines += [f"  but {exception}" for exception in policy.exceptions()]
    if summary.missing:
        lines += ["", f"no prediction (in n total, not in the means): {listed(summary.missing)}"]
    if summary.unmatched:
        lines += ["", f"no truth (left out): {listed(summary.unmatched)}"]
    return "\n".join(lines)


def data_notes(summary: Summary) -> list[str]:
    """What a reader has to know of the labels: which of them a region joins, which are ignored; may be empty."""
    notes = []
    if any(len(values) > 1 or name != summary.labels[values[0]] for name, values in summary.regions.items()):
        joined = (
            f"{name} = {' + '.join(summary.labels[value] for value in values)}"
            for name, values in summary.regions.items()
        )
        notes.append(f"regions: {'; '.join(joined)}")
    for value in summary.policy.ignored:
        notes.append(f"label {value} is ignored: its voxels in the truth count neither for nor against a prediction")
    return notes


def statistic_cells(found: Statistic, digits: int) -> list[str]:
    """Mean, interval, sd, median and `n used of n total` as text for a table."""
    mean, sd, median = (number_text(value, digits) for value in (found.mean, found.sd, found.median))
    interval = f"{number_text(found.low, digits)} to {number_text(found.high, digits)}"
    return [
        mean,
        "undefined" if math.isnan(found.low) else interval,
        sd,
        median,
        f"{found.used} of {found.total}",
    ]


def number_text(value: float, digits: int) -> str:
    """A number with so many digits after the point, or `undefined`."""
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def listed(ids: Sequence[str], limit: int = 20) -> str:
    """Ids in one line, the first `limit` of them by name."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def cases_csv(summary: Summary) -> str:
    """One line a case and label; an undefined value is `nan`, the size of a missing prediction is empty."""
    metrics = [metric.name for metric in summary.policy.metrics]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", *metrics, "voxels_predicted", "voxels_true", "ml_predicted", "ml_true"])
    for row in summary.rows:
        ml_predicted = "" if row.ml_predicted is None else f"{row.ml_predicted:.6f}"
        sizes = [row.voxels_predicted, row.voxels_true, ml_predicted, f"{row.ml_true:.6f}"]
        writer.writerow([row.case_id, row.label, *(f"{row.values[name]:.6f}" for name in metrics), *sizes])
    return text.getvalue()


def statistic(
    values: Sequence[float], seed: int = SEED, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Statistic:
    """Mean, spread and interval over cases; undefined values (NaN) count in n total only.

    An end of the interval beyond `bounds`, which no mean can leave, is put on them.
    """
    used = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not used.size:
        nan = math.nan
        return Statistic(nan, nan, nan, nan, nan, used=0, total=len(values))
    mean, median = float(used.mean()), float(np.median(used))
    low, high = np.clip(bootstrap_interval(used, seed), *bounds).tolist()
    sd = float(used.std(ddof=1)) if used.size > 1 else math.nan
    return Statistic(mean, sd, median, low, high, used=used.size, total=len(values))


def aligned(table: list[list[str]]) -> list[str]:
    """Rows of text as lines, with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
