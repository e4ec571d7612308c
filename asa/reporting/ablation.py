"""Trials of an ablation, arms x labelled subjects x seeds, as tables and one figure.

OUT/ablation.csv   a row for each arm, number of labelled subjects, metric and region
OUT/ablation.md    the same for reading; first a table with a column for each metric and region
OUT/ablation.tex   this first table for LaTeX
OUT/ablation.png   the first metric against the labelled subjects (needs the `report` extra)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import write_whole
from asa.data.io.tables import csv_text
from asa.evaluation.comparison import Run, common_subjects, mean_text, verdict
from asa.evaluation.policies import CLASSIFICATION, MetricInfo, PolicyInfo, get_policy
from asa.evaluation.statistics import means_by_subject
from asa.evaluation.summary import Statistic, describe, latex_tabular, markdown_lines, number_text, several_cases
from asa.reporting.plots import panels, plain, png_of

MEAN = "mean"  # of the regions of a case
PANELS = 4  # of the figure side by side
# Okabe and Ito's palette, in an order of high contrast on white.
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442")


@dataclass(frozen=True)
class Trial:
    """One trained network and its evaluation."""

    arm: str
    labelled: str  # how many subjects it was fine-tuned on
    seed: int  # of its split, first weights and crops
    run: Run


@dataclass(frozen=True)
class Row:
    """One arm with one number of labelled subjects, in one metric and region."""

    labelled: str
    arm: str
    metric: MetricInfo
    region: str
    values: Statistic  # over cases, each averaged over the seeds that tested it, or over subjects, averaged over both
    seeds: int  # number of trials
    seed_sd: float  # standard deviation of the trials' means with n - 1; NaN below two
    difference: Statistic | None  # from the first arm, where both were run with the same seeds; None for that arm
    unit: str  # "subject" if one has several cases, else "case"


def labelled_text(count: int | float | None) -> str:
    """A number of labelled subjects as files and tables call it: `3`, `10%` or `all`."""
    if count is None or (isinstance(count, float) and count == 1):
        return "all"
    return f"{100 * count:g}%" if isinstance(count, float) else str(count)


def trial_line(trial: Trial) -> str:
    """The first metric of a trial, its mean over the cases, or subjects, in each region."""
    metric, subjects = _policy([trial]).metrics[0], trial.run.subjects
    means = {region: _mean(trial, metric, region, subjects) for region in _regions([trial])}
    shown = [f"{region} {number_text(mean, metric.digits)}" for region, mean in means.items()]
    return f"{metric.title} {', '.join(shown)}"


def write_ablation(out: Path, trials: Sequence[Trial], arms: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Write the tables, with notes for their readers, and the figure; the first arm is the one to compare with."""
    rows = ablation_rows(trials, arms)
    write_whole(out / "ablation.csv", _csv(rows).encode())
    write_whole(out / "ablation.md", markdown(rows, trials, arms, notes).encode())
    write_whole(out / "ablation.tex", latex(rows, trials, notes).encode())
    write_whole(out / "ablation.png", _figure(rows, arms))


def ablation_rows(trials: Sequence[Trial], arms: Sequence[str]) -> list[Row]:
    """The numbers by metric, number of labelled subjects, arm, and region, with the mean of the regions last.

    A case that several seeds tested counts once, with the average of its values: the interval is over cases, and does
    not become narrower by testing a case again. The difference from the first arm is taken seed by seed and case by
    case, so that both were fine-tuned and tested on the same subjects. A ValueError for trials that were scored in
    different ways.
    """
    for trial in trials[1:]:
        if different := [key for key, value in trials[0].run.setting.items() if trial.run.setting[key] != value]:
            raise ValueError(f"{trial.run.name} was evaluated with another {different[0]} than {trials[0].run.name}")
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.labelled, trial.arm), []).append(trial)
    counts = dict.fromkeys(trial.labelled for trial in trials)
    subjects = common_subjects([trial.run for trial in trials])  # the files of some do not tell
    return [
        _row(groups[count, arm], None if arm == arms[0] else groups.get((count, arms[0]), []), metric, region, subjects)
        for metric, count, arm in product(_policy(trials).metrics, counts, arms)
        if (count, arm) in groups
        for region in _regions(trials)
    ]


def _row(
    chosen: list[Trial], first: list[Trial] | None, metric: MetricInfo, region: str, subjects: Mapping[str, str]
) -> Row:
    values = _values(chosen, metric, region, subjects)
    means = [_mean(trial, metric, region, subjects) for trial in chosen]
    difference = None
    if first is not None:
        before = _values(first, metric, region, subjects)
        difference = describe(_means({key: values[key] - before[key] for key in values if key in before}))
    return Row(
        labelled=chosen[0].labelled,
        arm=chosen[0].arm,
        metric=metric,
        region=region,
        values=describe(_means(values), metric.bounds),
        seeds=len(chosen),
        seed_sd=float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        difference=difference,
        unit="subject" if several_cases(list({case for *_, case in values}), subjects) else "case",
    )


def _values(
    trials: Sequence[Trial], metric: MetricInfo, region: str, subjects: Mapping[str, str]
) -> dict[tuple[int, str, str], float]:
    """(seed, subject, case) -> value. The mean of the regions is undefined where one of them is."""
    found = {}
    for trial in trials:
        regions = trial.run.setting["regions"] if region == MEAN else [region]
        for case in trial.run.case_ids:
            numbers = [trial.run.values[case, name][metric.name] for name in regions]
            found[trial.seed, subjects.get(case, case), case] = float(np.mean(numbers))
    return found


def _means(values: dict[tuple[int, str, str], float]) -> list[float]:
    """The average of each subject over its cases and seeds."""
    return means_by_subject([*values.values()], [subject for _, subject, _ in values])


def _mean(trial: Trial, metric: MetricInfo, region: str, subjects: Mapping[str, str]) -> float:
    defined = [mean for mean in _means(_values([trial], metric, region, subjects)) if not math.isnan(mean)]
    return float(np.mean(defined)) if defined else math.nan


def _policy(trials: Sequence[Trial]) -> PolicyInfo:
    name = trials[0].run.setting["policy"]
    return CLASSIFICATION if name == CLASSIFICATION.name else get_policy(name)


def _regions(trials: Sequence[Trial]) -> list[str]:
    """The regions, and their mean if there are several."""
    regions = list(trials[0].run.setting["regions"])
    return [*regions, MEAN] if len(regions) > 1 else regions


def _csv(rows: Sequence[Row]) -> str:
    heads = ["metric", "labelled", "arm", "region", "mean", "low", "high", "seeds", "seed_sd", "cases_used"]
    heads += ["cases_total", "difference", "difference_low", "difference_high", "pairs"]
    table = []
    for row in rows:
        found, gap = row.values, row.difference
        numbers = [found.mean, found.low, found.high, row.seeds, row.seed_sd, found.used, found.total]
        numbers += [gap.mean, gap.low, gap.high, gap.used] if gap else []
        cells = [f"{value:.6f}" if isinstance(value, float) else value for value in numbers]
        table.append([row.metric.name, row.labelled, row.arm, row.region, *cells, *[""] * (0 if gap else 4)])
    return csv_text(heads, table)


def overview(rows: Sequence[Row]) -> list[list[str]]:
    """All metrics in one table, as papers print them: headings, then a line for each labelled subjects and arm."""
    shown = [row for row in rows if row.region != MEAN]
    columns = list(dict.fromkeys((row.metric, row.region) for row in shown))
    found = {(row.labelled, row.arm, row.metric, row.region): row for row in shown}
    lines = [["labelled", "arm", *(f"{metric.heading} {region}" for metric, region in columns)]]
    for labelled, arm in dict.fromkeys((row.labelled, row.arm) for row in shown):
        cells = [mean_text(found[labelled, arm, *column].values, column[0].digits) for column in columns]
        lines.append([labelled, arm, *cells])
    return lines


def latex(rows: Sequence[Row], trials: Sequence[Trial], notes: Sequence[str] = ()) -> str:
    """`overview` as a LaTeX tabular."""
    return latex_tabular(overview(rows), 2, [_explained(rows, trials), *notes])


def _explained(rows: Sequence[Row], trials: Sequence[Trial]) -> str:
    policy, unit = _policy(trials), _unit(rows)
    averaged = "its cases and the seeds" if unit == "subject" else "the seeds"
    return (
        f"Policy {policy.name}: {policy.description} Means over the {unit}s, each averaged over {averaged} that tested "
        f"it; in brackets the 95 % interval over {unit}s (docs/evaluation.md), without correction for several "
        "differences."
    )


def _unit(rows: Sequence[Row]) -> str:
    return "subject" if any(row.unit == "subject" for row in rows) else "case"


def markdown(rows: Sequence[Row], trials: Sequence[Trial], arms: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The tables for reading: `overview`, and a part for each metric with the differences from the first arm."""
    explained = f"{_explained(rows, trials)} The difference is from `{arms[0]}` with the same seeds and cases. "
    words = [f"- {line}" for line in verdicts(rows, arms[0])]
    lines = ["# Ablation", "", *words, *[""] * bool(words), f"{explained}Seed sd is the spread of the seeds' means."]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += ["", *markdown_lines(overview(rows), 2)]
    heads = ["labelled", "arm", *_regions(trials), f"difference from {arms[0]}", "seed sd", "seeds", f"{_unit(rows)}s"]
    for metric in dict.fromkeys(row.metric for row in rows):
        groups = groupby((row for row in rows if row.metric is metric), lambda row: (row.labelled, row.arm))
        table = [[*names, *_cells(list(found), metric.digits)] for names, found in groups]
        lines += ["", f"## {metric.heading}", "", *markdown_lines([heads, *table], 2)]
    return "\n".join(lines) + "\n"


def verdicts(rows: Sequence[Row], first: str) -> list[str]:
    """A sentence for each arm and number of labelled subjects: whether it is ahead of the first in the first metric."""
    regions = len({row.region for row in rows if row.region != MEAN})
    return [
        verdict(f"{row.arm} with {row.labelled} labelled", first, row.metric, regions, row.difference, row.unit)
        for row in rows
        if row.metric is rows[0].metric and row.region == rows[-1].region and row.difference and row.difference.used
    ]


def _cells(found: Sequence[Row], digits: int) -> list[str]:
    """The numbers of one arm in all regions; the last columns are those of the last region, the mean of several."""
    last = found[-1]
    gap = "" if last.difference is None else mean_text(last.difference, digits, "+")
    sd = "" if math.isnan(last.seed_sd) else f"{last.seed_sd:.{digits}f}"
    cases = f"{last.values.used} of {last.values.total}"
    return [*(mean_text(row.values, digits) for row in found), gap, sd, str(last.seeds), cases]


def _figure(rows: Sequence[Row], arms: Sequence[str]) -> bytes:
    """The first metric against the labelled subjects, a panel for each region on one scale, with intervals; PNG."""
    rows = [row for row in rows if row.metric is rows[0].metric]
    regions = list(dict.fromkeys(row.region for row in rows))
    counts = list(dict.fromkeys(row.labelled for row in rows))
    figure, axes, (lines, columns) = panels(len(regions), PANELS)
    figure.set_size_inches(2.6 * max(columns, 2), 2.6 * lines + 1)
    for axis, region in zip(axes, regions, strict=True):
        for k, arm in enumerate(arms):
            found = [row for row in rows if (row.arm, row.region) == (arm, region)]
            if found:
                _draw(axis, found, counts, (k - (len(arms) - 1) / 2) * 0.5 / len(arms), COLOURS[k % len(COLOURS)])
        axis.set_title(region)
        axis.set_xticks(range(len(counts)), counts)
        axis.set_xlim(-0.5, len(counts) - 0.5)
        plain(axis, "y")
    figure.supylabel(f"{rows[0].metric.heading}, 95 % interval over {_unit(rows)}s", fontsize="medium")
    figure.supxlabel("labelled subjects", fontsize="medium")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=PANELS, frameon=False)
    return png_of(figure)


def _draw(axis: Any, found: Sequence[Row], counts: Sequence[str], shift: float, colour: str) -> None:
    """One arm's line, shifted sideways so that the intervals of several arms do not overlap."""
    positions = [counts.index(row.labelled) + shift for row in found]
    means = [row.values.mean for row in found]
    sides = np.array([(row.values.mean - row.values.low, row.values.high - row.values.mean) for row in found]).T
    errors = np.nan_to_num(sides, nan=0.0).clip(min=0.0)
    axis.errorbar(positions, means, errors, label=found[0].arm, color=colour, marker="o", markersize=4, linewidth=1.2)
