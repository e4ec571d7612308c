"""Rows of an evaluation and their statistics over the cases, as CSV, JSON and plain text."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asa import __version__
from asa.data.io.files import read_json
from asa.data.io.tables import csv_text
from asa.errors import listed
from asa.evaluation.policies import MetricInfo, Policy, PolicyInfo, Regions, get_policy
from asa.evaluation.statistics import bootstrap_interval, interval_as_json, means_by_subject, nullable
from asa.ops.labels import side_of

STATISTICS = ["mean", "95 % interval", "sd", "median", "n used"]  # headings of `statistic_cells`


@dataclass(frozen=True)
class Row:
    """The values of one label or region of a case, or of a whole image: metric name -> value, NaN if undefined."""

    case_id: str
    label: str
    values: dict[str, float]


@dataclass(frozen=True)
class CaseRow(Row):
    """The values of one label or region of a case, with its size in both masks; None without a prediction."""

    voxels_predicted: int | None
    voxels_true: int
    ml_predicted: float | None
    ml_true: float
    # Of its true voxels that have a left or right label in both maps, the fraction with the label of the other side.
    wrong_side: float = math.nan

    @property
    def empty(self) -> str:
        """Which mask is empty, in words; "" if neither is."""
        if self.voxels_predicted is None:
            return "no prediction"
        if self.voxels_predicted and self.voxels_true:
            return ""
        if self.voxels_true:
            return "prediction empty"
        return "truth empty" if self.voxels_predicted else "both empty"


@dataclass(frozen=True)
class Statistic:
    """Statistics of one metric and label over the cases; NaN if too few values are defined."""

    mean: float
    sd: float  # with n - 1, NaN below two values
    median: float
    low: float  # end of the bootstrap interval of the mean, NaN below two values
    high: float
    used: int  # number of defined values
    total: int  # and of cases


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of an evaluation."""

    policy: PolicyInfo
    rows: Sequence[Row]  # every case and region, in order of case id
    # Region -> metric name -> statistic over the cases, or over the means of subjects with several.
    results: dict[str, dict[str, Statistic]]
    subjects: Mapping[str, str]  # case id -> subject; a case that is not in it is a subject of its own

    @property
    def several(self) -> int:
        """Number of subjects, if some have several cases; else 0."""
        return several_cases(self.case_ids, self.subjects)

    @property
    def unit(self) -> str:
        """What statistics and intervals are over."""
        return "subject" if self.several else "case"

    @property
    def case_ids(self) -> list[str]:
        """Ids of the cases in order, including those without a prediction."""
        return list(dict.fromkeys(row.case_id for row in self.rows))

    @property
    def counts(self) -> list[int]:
        """Number of defined values of each mean."""
        return [statistic.used for by_metric in self.results.values() for statistic in by_metric.values()]

    def as_json(self) -> dict[str, Any]:
        return {
            "asa": __version__,
            "policy": self.policy.as_json(),
            "cases": len(self.case_ids),
            **({"subjects": self.several} if self.several else {}),
            "interval": {"of": "mean", **interval_as_json(self.counts, self.unit)},
            "results": {
                label: {name: nullable(asdict(statistic)) for name, statistic in by_metric.items()}
                for label, by_metric in self.results.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class SegmentationSummary(Summary):
    """Results of an evaluation of label maps."""

    policy: Policy
    rows: tuple[CaseRow, ...]
    labels: dict[int, str]  # declared value -> name
    regions: Regions  # name of each evaluated region -> label values that it joins
    missing: tuple[str, ...] = ()  # cases without a prediction; they count in n total, not in n used
    unmatched: tuple[str, ...] = ()  # predictions without a truth; they are not counted
    notes: tuple[str, ...] = ()  # how the scores are to be read
    networks: tuple[str, ...] = ()  # that made the predictions, as tables of asa-predict call them

    @property
    def wrong_side(self) -> dict[str, Statistic]:
        """Statistics of `CaseRow.wrong_side` for the regions of labels with a side; {} if no label has one."""
        sided = {value for value, name in self.labels.items() if side_of(name)}
        return {
            region: _over_subjects(
                {row.case_id: row.wrong_side for row in self.rows if row.label == region}, self.subjects, (0.0, 1.0)
            )
            for region, values in self.regions.items()
            if sided.intersection(values)
        }

    def as_json(self) -> dict[str, Any]:
        sided = self.wrong_side
        return super().as_json() | {
            "labels": {str(value): name for value, name in self.labels.items()},
            "regions": {name: list(values) for name, values in self.regions.items()},
            "without_prediction": list(self.missing),
            "without_truth": list(self.unmatched),
            **({"notes": list(self.notes)} if self.notes else {}),
            **({"networks": list(self.networks)} if self.networks else {}),
            **({"wrong_side": {name: nullable(asdict(one)) for name, one in sided.items()}} if sided else {}),
        }


def check_summary(out: Path, *keys: str) -> None:
    """Raise a ValueError for an OUT/summary.json without these keys, which no such evaluation wrote."""
    file = out / "summary.json"
    found = read_json(file) if file.exists() else dict.fromkeys(keys)
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise ValueError(f"{file}: exists and is not of such an evaluation: choose another out=")


def summarise(
    rows: Iterable[CaseRow],
    labels: Mapping[int, str],
    policy: str | Policy = "ibsr",
    *,
    subjects: Mapping[str, str] | None = None,
    **about: Sequence[str],
) -> SegmentationSummary:
    """Summarise the rows of label maps, as `evaluate_case` returns them, over the cases.

    Every label and metric draws from the same seed, so that an interval does not depend on which others are evaluated.
    `about`: missing, unmatched, notes and networks of `SegmentationSummary`. A ValueError for invalid labels, or an
    unknown policy.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    rows, regions, subjects = tuple(rows), policy.regions_of(labels), subjects or {}
    return SegmentationSummary(
        policy=policy,
        rows=rows,
        results=describe_regions(rows, regions, policy.metrics, subjects),
        subjects=subjects,
        labels=dict(labels),
        regions=regions,
        **{key: tuple(values) for key, values in about.items()},
    )


def describe_regions(
    rows: Sequence[Row], labels: Iterable[str], metrics: Sequence[MetricInfo], subjects: Mapping[str, str]
) -> dict[str, dict[str, Statistic]]:
    """Label -> metric name -> statistic over the cases, or over the means of subjects (case id -> subject)."""
    return {
        label: {
            metric.name: _over_subjects(
                {row.case_id: row.values[metric.name] for row in rows if row.label == label}, subjects, metric.bounds
            )
            for metric in metrics
        }
        for label in labels
    }


def _over_subjects(values: Mapping[str, float], subjects: Mapping[str, str], bounds: tuple[float, float]) -> Statistic:
    """The statistic of the values of cases, averaged by subject first."""
    return describe(means_by_subject([*values.values()], [subjects.get(case, case) for case in values]), bounds)


def several_cases(case_ids: Sequence[str], subjects: Mapping[str, str]) -> int:
    """Number of subjects of these cases, if some have several; else 0."""
    count = len({subjects.get(case, case) for case in case_ids})
    return count if count < len(case_ids) else 0


def subjects_note(cases: int, subjects: int) -> str:
    """What a table says where subjects have several cases."""
    return f"The {cases} cases are of {subjects} subjects: means, intervals and numbers (n) are over subjects' means."


def summary_table(summary: SegmentationSummary) -> str:
    """The summary as plain text for a terminal, with the policy's truth table; no trailing newline."""
    policy = summary.policy
    lines = [f"policy {policy.name}: {policy.description}", *label_notes(summary), ""]
    for metric in policy.metrics:
        found = {label: by_metric[metric.name] for label, by_metric in summary.results.items()}
        rows = [[label, *statistic_cells(statistic, metric.digits)] for label, statistic in found.items()]
        lines += [*aligned([[metric.heading, *STATISTICS], *rows]), ""]
    if sided := summary.wrong_side:
        rows = [[label, *statistic_cells(statistic, 4)] for label, statistic in sided.items()]
        lines += [*aligned([["wrong side", *STATISTICS], *rows]), ""]
    truth = [["empty masks count as", *(metric.title for metric in policy.metrics)]]
    lines += aligned(truth + [[case, *values] for case, values in policy.truth_table()])
    lines += [f"  but {exception}" for exception in policy.exceptions()]
    if summary.several:
        lines += ["", subjects_note(len(summary.case_ids), summary.several)]
    if summary.missing:
        lines += ["", f"no prediction (in n total, not in the means): {listed(summary.missing)}"]
    if summary.unmatched:
        lines += ["", f"no truth (left out): {listed(summary.unmatched)}"]
    return "\n".join(lines)


def label_notes(summary: SegmentationSummary) -> list[str]:
    """Notes for the reader: which labels the regions join, and which labels are ignored; may be empty."""
    notes = [
        f"label {value} is ignored: its voxels in the truth count neither for nor against a prediction"
        for value in summary.policy.ignored
    ]
    joined = {name: [summary.labels[value] for value in values] for name, values in summary.regions.items()}
    if any(names != [name] for name, names in joined.items()):
        notes.insert(0, "regions: " + "; ".join(f"{name} = {' + '.join(names)}" for name, names in joined.items()))
    return notes


def statistic_cells(statistic: Statistic, digits: int) -> list[str]:
    """Mean, interval, sd, median and `n used of n total` as text for a table."""
    mean, low, high, sd, median = (
        number_text(getattr(statistic, key), digits) for key in ("mean", "low", "high", "sd", "median")
    )
    interval = "undefined" if low == "undefined" else f"{low} to {high}"
    return [mean, interval, sd, median, f"{statistic.used} of {statistic.total}"]


def number_text(value: float, digits: int) -> str:
    """A number with this many decimals, or `undefined` for NaN."""
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def cases_csv(summary: SegmentationSummary) -> str:
    """A CSV row per case and label; undefined values are `nan`, the sizes of a missing prediction are empty.

    The last columns are `wrong_side`, if a label has a side, and `subject`, if one has several cases.
    """
    metrics, sided = [metric.name for metric in summary.policy.metrics], summary.wrong_side
    rows = []
    for row in summary.rows:
        values = [f"{row.values[name]:.6f}" for name in metrics]
        volumes = ["" if ml is None else f"{ml:.6f}" for ml in (row.ml_predicted, row.ml_true)]
        wrong = [f"{row.wrong_side:.6f}"] if sided else []
        wrong += [summary.subjects.get(row.case_id, row.case_id)] if summary.several else []
        rows.append([row.case_id, row.label, *values, row.voxels_predicted, row.voxels_true, *volumes, *wrong])
    sizes = ["voxels_predicted", "voxels_true", "ml_predicted", "ml_true"]
    last = [name for name, given in (("wrong_side", sided), ("subject", summary.several)) if given]
    return csv_text(["id", "label", *metrics, *sizes, *last], rows)


def describe(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Statistic:
    """Mean, SD and interval, clipped to the possible values, over cases; undefined ones (NaN) count in n total only."""
    used = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not used.size:
        return Statistic(math.nan, math.nan, math.nan, math.nan, math.nan, used=0, total=len(values))
    mean, median = float(used.mean()), float(np.median(used))
    low, high = np.clip(bootstrap_interval(used), *bounds).tolist()
    sd = float(used.std(ddof=1)) if used.size > 1 else math.nan
    return Statistic(mean, sd, median, low, high, used=used.size, total=len(values))


def aligned(table: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def markdown_lines(rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Rows as the lines of a Markdown table; for the arguments see `latex_tabular`."""
    escaped = [[markdown_text(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    lines.insert(1, "|" + "---|" * words + "---:|" * (len(rows[0]) - words))
    return lines


def latex_tabular(rows: Sequence[Sequence[str]], words: int, notes: Sequence[str]) -> str:
    r"""Rows as a LaTeX tabular, which needs \usepackage{booktabs}; notes before it are comments.

    The headings are the first row. There is a rule where the first cell changes. The first `words` columns are of
    words, the others of numbers.
    """
    lines = [f"% {_one_line(note)}" for note in ("Needs \\usepackage{booktabs}.", *notes)]
    lines += [f"\\begin{{tabular}}{{{'l' * words}{'r' * (len(rows[0]) - words)}}}", "\\toprule"]
    first = ""
    for row in rows:
        if row is not rows[0] and row[0] != first:
            lines.append("\\midrule")
            first = row[0]
        lines.append(" & ".join(_latex(cell) for cell in row) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _one_line(text: str) -> str:
    """Names come from tables of others: a line break in one would end a comment or a row."""
    return " ".join(text.split())


def markdown_text(text: str) -> str:
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", _one_line(text))  # what begins a tag; p stays <0.001


def _latex(text: str) -> str:
    text = _one_line(text)
    for character in "\\&%$#_{}":  # the backslash first
        text = text.replace(character, "\\textbackslash " if character == "\\" else f"\\{character}")
    text = re.sub(r"(?<!\w)-(?=\d)", "$-$", text)
    return text.replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}").replace("<", "$<$")
