"""Paired comparison of runs with the first of them, as JSON, plain text, Markdown and LaTeX."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from asa import __version__
from asa.data.io.files import check_digest, read_json
from asa.data.io.tables import read_rows
from asa.errors import counted, listed, reason_of
from asa.evaluation.policies import (
    ALL,
    CLASSIFICATION,
    RESTORATION,
    WHOLE,
    MetricInfo,
    PolicyInfo,
    get_policy,
    restoration_policy,
)
from asa.evaluation.scans import SCANS
from asa.evaluation.statistics import (
    ALPHA,
    LEVEL,
    POWER,
    RESAMPLES,
    detectable_difference,
    holm,
    in_interval,
    interval_as_json,
    interval_kind,
    means_by_subject,
    nullable,
    smallest_holm,
    wilcoxon_p,
)
from asa.evaluation.summary import (
    Statistic,
    aligned,
    describe,
    latex_tabular,
    markdown_lines,
    markdown_text,
    number_text,
    several_cases,
    subjects_note,
)

HEADINGS = ["metric", "region", "run", "mean (95 % interval)", "difference (95 % interval)", "detectable"]
HEADINGS += ["better / worse / equal", "pairs", "p", "p (Holm)"]
MIN_PAIRS = 6  # with fewer pairs, the p of a two-sided signed-rank test cannot be below 0.05


@dataclass(frozen=True)
class Run:
    """One evaluation, read from its files; `setting` and `truths` have to be equal in all that are compared."""

    name: str
    setting: dict[str, Any]  # policy, labels, regions and ignored labels, or the data range of images
    values: dict[tuple[str, str], dict[str, float]]  # (case id, region) -> metric name -> value, NaN if undefined
    truths: dict[tuple[str, str], str]  # (case id, region) -> what identifies the truth, like "500 voxels"
    # Case id -> paths of its "prediction", "truth" and "image", for figures; cases may be missing.
    files: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    subjects: Mapping[str, str] = field(default_factory=dict)  # case id -> subject, if one has several cases
    notes: Sequence[str] = ()  # what a reader of the scores has to know

    @property
    def case_ids(self) -> list[str]:
        """Ids of the cases in order."""
        return list(dict.fromkeys(case_id for case_id, _ in self.values))


@dataclass(frozen=True)
class Difference:
    """A run minus the first one, over the cases, or subjects, in which both are defined; NaN if there are too few."""

    mean: float
    low: float  # end of the bootstrap interval of the mean
    high: float
    detectable: float  # see `detectable_difference`; NaN below `MIN_PAIRS` pairs, which cannot show any
    better: int  # number of cases in which the run is better than the first
    worse: int
    p: float  # of Wilcoxon's signed-rank test, two-sided
    p_holm: float  # corrected for all tests of the comparison
    used: int  # number of pairs
    total: int  # and of cases


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison of runs with the first of them."""

    policy: PolicyInfo
    runs: tuple[Run, ...]
    case_ids: tuple[str, ...]  # the cases compared, in order
    left_out: tuple[str, ...]  # cases that are missing in some run; they are not counted
    regions: tuple[str, ...]
    results: dict[tuple[str, str, str], Statistic]  # (metric name, region, run name) -> statistic over the cases
    differences: dict[tuple[str, str, str], Difference]  # from the first run, without keys of its own
    subjects: Mapping[str, str]  # case id -> subject, if a run knows that one has several cases

    @property
    def metrics(self) -> list[MetricInfo]:
        """The policy's metrics that the evaluations contain."""
        return [metric for metric in self.policy.metrics if metric.name in self.runs[0].setting["metrics"]]

    @property
    def several(self) -> int:
        """Number of subjects, if some have several cases; else 0."""
        return several_cases(self.case_ids, self.subjects)

    @property
    def unit(self) -> str:
        """What means, tests and numbers are over."""
        return "subject" if self.several else "case"

    def over_subjects(self, values: Sequence[float]) -> np.ndarray:
        """Values of the cases, averaged by subject."""
        return np.array(means_by_subject(values, [self.subjects.get(case, case) for case in self.case_ids]))

    @property
    def smallest_p(self) -> float:
        """The smallest corrected p that so many cases and tests could give."""
        return smallest_holm([difference.used for difference in self.differences.values()])

    @property
    def headings(self) -> list[str]:
        """Of the tables: without p where none can be significant."""
        return HEADINGS if self.smallest_p < ALPHA else HEADINGS[:-2]

    def as_json(self) -> dict[str, Any]:
        return {
            "asa": __version__,
            "policy": self.policy.name,
            "runs": [run.name for run in self.runs],
            "compared_with": self.runs[0].name,
            "cases": len(self.case_ids),
            "left_out": list(self.left_out),
            **({"subjects": self.several} if self.several else {}),
            "interval": interval_as_json((one.used for one in self.differences.values()), self.unit),
            "test": "Wilcoxon signed rank, two-sided; Holm's correction over all tests of this file",
            "smallest_p_holm": self.smallest_p,
            "verdict": verdicts(self),
            "notes": {run.name: list(run.notes) for run in self.runs if run.notes},
            "results": [
                dict(zip(("metric", "region", "run"), key, strict=True))
                | nullable(asdict(result))
                | ({"difference": nullable(asdict(self.differences[key]))} if key in self.differences else {})
                for key, result in self.results.items()
            ],
        }


def read_run(name: str, folder: Path) -> Run:
    """An evaluation of label maps or images from its folder.

    A FileNotFoundError or ValueError for files that are missing, have changed since, or do not belong together.
    """
    for file in ("summary.json", "cases.csv"):
        _check_file(folder / file, "give folders of asa-evaluate, of label maps or of restored images")
    summary, rows = read_json(folder / "summary.json"), read_rows(folder / "cases.csv")
    try:
        return _run(name, folder, summary, rows)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: not an evaluation ({reason_of(error)}): evaluate again") from None


def read_class_run(name: str, folder: Path) -> Run:
    """An evaluation of classes from its folder, scan by scan; errors as of `read_run`."""
    file = folder / SCANS
    _check_file(file, "evaluate with policy=classification")
    metrics, rows = [metric.name for metric in CLASSIFICATION.metrics], read_rows(file)
    try:
        values = {(row["id"], ALL): {metric: float(row[metric]) for metric in metrics} for row in rows}
        truths = {(row["id"], ALL): row["class"] for row in rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not of an evaluation ({reason_of(error)}): evaluate again") from None
    return Run(name, {"policy": CLASSIFICATION.name, "metrics": metrics, "regions": [ALL]}, values, truths)


def _check_file(file: Path, advice: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {advice}")
    try:
        check_digest(file)
    except ValueError as error:  # or its evaluation was killed between the two
        raise ValueError(f"{error}; or evaluate again") from None


def _run(name: str, folder: Path, summary: Any, rows: list[dict[str, str]]) -> Run:
    policy, images = summary["policy"], summary["policy"]["name"] == RESTORATION
    metrics = [metric["name"] for metric in policy["metrics"]]
    setting = {"policy": policy["name"], "metrics": metrics}
    if images:
        setting |= {"data range": summary["data_range"], "regions": [WHOLE]}
    else:
        setting |= {key: summary[key] for key in ("labels", "regions")} | {"ignored labels": policy["ignored"]}
    truth, unit = ("truth", "") if images else ("voxels_true", " voxels")
    regions = {row.setdefault("label", WHOLE) for row in rows}
    if regions != set(setting["regions"]) or not {*metrics, truth} <= set(rows[0]):
        raise ValueError(f"{folder}: cases.csv is not of the evaluation in summary.json: evaluate again")
    values = {(row["id"], row["label"]): {metric: float(row[metric]) for metric in metrics} for row in rows}
    truths = {(row["id"], row["label"]): f"{row[truth]}{unit}" for row in rows}
    files = summary.get("files", {})
    if any(not isinstance(path, str | None) for paths in files.values() for path in paths.values()):
        raise ValueError(f"{folder}: files in summary.json are not paths: evaluate again")
    subjects = {row["id"]: row["subject"] for row in rows} if "subject" in rows[0] else {}
    return Run(name, setting, values, truths, files, subjects, [str(note) for note in summary.get("notes", [])])


def compare_runs(runs: Sequence[Run], allow_missing: bool = False) -> Comparison:
    """Compare two or more runs with the first of them, case by case; with `allow_missing` in the cases that all have.

    A ValueError for runs with different settings, cases or truths.
    """
    case_ids, left_out = _common_cases(runs, allow_missing)
    setting = runs[0].setting
    name, regions = setting["policy"], tuple(setting["regions"])
    policy = restoration_policy(setting["data range"]) if name == RESTORATION else get_policy(name)
    found = Comparison(policy, tuple(runs), case_ids, left_out, regions, {}, {}, common_subjects(runs))
    for metric, region, run in product(found.metrics, regions, runs):
        values = found.over_subjects([run.values[case, region][metric.name] for case in case_ids])
        found.results[metric.name, region, run.name] = describe(values.tolist(), metric.bounds)
    keys = list(product(found.metrics, regions, runs[1:]))
    paired = [_by_subject(found, paired_differences(found, *key)) for key in keys]
    p = [wilcoxon_p(d[~np.isnan(d)]) if not np.isnan(d).all() else math.nan for d in paired]
    for (metric, region, run), own, own_p, p_holm in zip(keys, paired, p, holm(p), strict=True):
        found.differences[metric.name, region, run.name] = _difference(metric, own, own_p, p_holm)
    return found


def paired_differences(comparison: Comparison, metric: MetricInfo, region: str, run: Run) -> np.ndarray:
    """The run minus the first one in each case `(n,)`, NaN where one of them is undefined."""
    own, first = (
        np.array([each.values[case_id, region][metric.name] for case_id in comparison.case_ids])
        for each in (run, comparison.runs[0])
    )
    return _without_noise(own - first, [own, first])


def _by_subject(comparison: Comparison, differences: np.ndarray) -> np.ndarray:
    """The differences of the cases, averaged by subject; those that cancel are 0."""
    return _without_noise(comparison.over_subjects(differences.tolist()), differences)


def _without_noise(differences: np.ndarray, values: Any) -> np.ndarray:
    """Differences of values, rounded so that 0.3 - 0.2 ties with 0.2 - 0.1."""
    largest = np.nanmax(np.abs(values), initial=0)
    return np.round(differences, 9 - math.ceil(math.log10(largest or 1.0)))


def _difference(metric: MetricInfo, differences: np.ndarray, p: float, p_holm: float) -> Difference:
    found, used = describe(differences.tolist()), differences[~np.isnan(differences)]
    up, down = int(np.count_nonzero(used > 0)), int(np.count_nonzero(used < 0))
    better, worse = (up, down) if metric.higher_is_better else (down, up)
    detectable = detectable_difference(used) if found.used >= MIN_PAIRS else math.nan
    return Difference(found.mean, found.low, found.high, detectable, better, worse, p, p_holm, found.used, found.total)


def common_subjects(runs: Sequence[Run]) -> dict[str, str]:
    """The subjects of the cases; some runs may know none."""
    subjects: dict[str, str] = {}
    for run in runs:
        for case, subject in run.subjects.items():
            if subjects.setdefault(case, subject) != subject:
                raise ValueError(f"case {case} is of {subjects[case]} and, in {run.name}, of {subject}: evaluate again")
    return subjects


def _common_cases(runs: Sequence[Run], allow_missing: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The cases that all runs have, and those missing in some; checks that the runs can be compared."""
    first = runs[0]
    for run in runs[1:]:
        for key, value in first.setting.items():
            if run.setting[key] != value:
                raise ValueError(
                    f"{first.name} and {run.name} were evaluated with different {key}, {value} and {run.setting[key]}: "
                    "evaluate both with the same settings"
                )
    everywhere = set(first.case_ids).intersection(*(run.case_ids for run in runs))
    somewhere = {case_id for run in runs for case_id in run.case_ids}
    left_out = tuple(sorted(somewhere - everywhere))
    if left_out and not (allow_missing and everywhere):
        raise ValueError(
            f"{len(left_out)} cases are not in every run: {listed(left_out)}; evaluate the same cases"
            + (", or give allow_missing=true to compare the common ones" if everywhere else "")
        )
    for run in runs[1:]:
        for (case_id, region), truth in first.truths.items():
            if case_id in everywhere and (other := run.truths[case_id, region]) != truth:
                raise ValueError(
                    f"the truth of case {case_id} differs between {first.name} and {run.name} ({region}: "
                    f"{truth} and {other}): evaluate both against the same files"
                )
    return tuple(case_id for case_id in first.case_ids if case_id in everywhere), left_out


# ---- tables ----


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each run: whether it is ahead of the first in the first metric, the mean over the regions."""
    metric, first, regions = comparison.metrics[0], comparison.runs[0].name, comparison.regions
    found = []
    for run in comparison.runs[1:]:
        paired = np.mean([paired_differences(comparison, metric, region, run) for region in regions], axis=0)
        averaged = describe(_by_subject(comparison, paired).tolist())
        found.append(verdict(run.name, first, metric, len(regions), averaged, comparison.unit))
    return found


def verdict(name: str, first: str, metric: MetricInfo, regions: int, difference: Statistic, unit: str = "case") -> str:
    """One of the `verdicts`, by the interval of the difference."""
    gain = (difference.low, difference.high) if metric.higher_is_better else (-difference.high, -difference.low)
    if math.isnan(gain[0]):
        words = f"{name} and {first}: too few {unit}s to tell"
    elif gain[0] > 0 or gain[1] < 0:
        words = f"{name} is {'ahead of' if gain[0] > 0 else 'behind'} {first}"
    else:
        words = f"{name} and {first}: no difference is shown"
    mean = f", mean of {regions} regions" if regions > 1 else ""
    numbers = mean_text(difference, metric.digits, "+").replace("(", f"({LEVEL * 100:g} % interval ")
    return f"{words}: {metric.heading} {numbers}{mean}, on {counted(difference.used, unit)}."


def notes(comparison: Comparison) -> list[str]:
    """Notes for the reader of the tables, one or two sentences each."""
    first, tests, units = comparison.runs[0].name, len(comparison.differences), f"{comparison.unit}s"
    kind = interval_kind(difference.used for difference in comparison.differences.values())
    text = [
        f"Policy {comparison.policy.name}. Differences are a run less {first}, case by case over the "
        f"{len(comparison.case_ids)} cases; pairs are the cases in which both are defined.",
        f"Intervals: {LEVEL * 100:g} % {kind} over {units}, {RESAMPLES:,} resamples. p: Wilcoxon's signed-rank test, "
        f"two-sided; Holm's correction is for the {counted(tests, 'test')} of this table.",
        f"Detectable: the smallest mean difference that so many {units}, as variable as these, show in {POWER:.0%} of "
        f"repeats with p below {ALPHA:g}, before correction. Smaller ones may exist where none is significant.",
        "The first lines go by the interval of the first metric's difference, without correction for several.",
        f"All of them say what to expect of other {units} like these from these same runs, not of other training runs.",
    ]
    if comparison.several:
        text.append(subjects_note(len(comparison.case_ids), comparison.several))
    if comparison.smallest_p >= ALPHA:
        text.append(
            f"p is not listed: with {counted(comparison.several or len(comparison.case_ids), comparison.unit)} and "
            f"{counted(tests, 'test')} it cannot be below "
            f"{comparison.smallest_p:.3g} after correction, however large the differences."
        )
    if any(difference.used < MIN_PAIRS for difference in comparison.differences.values()):
        text.append(f"With fewer than {MIN_PAIRS} pairs none is detectable: no p can be below {ALPHA:g}, uncorrected.")
    if comparison.left_out:
        text.append(f"Not in every run, and left out: {listed(comparison.left_out)}.")
    return text + [f"{run.name}: {note}" for run in comparison.runs for note in run.notes]


def comparison_table(comparison: Comparison) -> str:
    """The comparison as plain text for a terminal; no trailing newline."""
    table = aligned([comparison.headings, *comparison_rows(comparison)])
    return "\n".join([*verdicts(comparison), "", *table, "", *notes(comparison)])


def markdown_table(comparison: Comparison) -> str:
    """The comparison as a Markdown table with its notes; names in it cannot be HTML."""
    lines = markdown_lines([comparison.headings, *comparison_rows(comparison)], 3)
    words = [map(markdown_text, text) for text in (verdicts(comparison), notes(comparison))]
    return "\n".join([*words[0], "", *lines, "", *words[1]]) + "\n"


def latex_table(comparison: Comparison) -> str:
    """The comparison as a LaTeX tabular with its notes."""
    rows = [comparison.headings, *comparison_rows(comparison)]
    return latex_tabular(rows, 3, [*verdicts(comparison), *notes(comparison)])


def comparison_rows(comparison: Comparison) -> Iterator[list[str]]:
    """The rows of every table of a comparison, of text, under `HEADINGS`."""
    metrics = {metric.name: metric for metric in comparison.policy.metrics}
    for (name, region, run), result in comparison.results.items():
        digits, cells = metrics[name].digits, [""] * (len(HEADINGS) - 4)  # empty for the first run
        if (gap := comparison.differences.get((name, region, run))) is not None:
            cells = [
                mean_text(gap, digits, sign="+"),
                "none" if math.isnan(gap.detectable) else f"{gap.detectable:.{digits}f}",
                f"{gap.better} / {gap.worse} / {gap.used - gap.better - gap.worse}",
                f"{gap.used} of {gap.total}",
                p_text(gap.p),
                p_text(gap.p_holm),
            ]
        yield [metrics[name].heading, region, run, mean_text(result, digits), *cells][: len(comparison.headings)]


def p_text(p: float) -> str:
    """A p-value in three digits."""
    return "<0.001" if p < 0.001 else number_text(p, 3)


def mean_text(statistic: Statistic | Difference, digits: int, sign: str = "") -> str:
    """A mean with its interval as text for a table."""
    return in_interval(statistic.mean, statistic.low, statistic.high, f"{sign}.{digits}f")
