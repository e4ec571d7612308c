"""Predicted tables against a table of the truth: class probabilities, numbers, and how unusual scans are.

OUT/summary.json   the scores, with intervals over resampled subjects
OUT/scans.csv      of a classification: each scan's class and its shares in AUC and balanced accuracy
OUT/digests.json   SHA-256 of both, which asa-ablate compares
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from asa.data.datasets.record import subject_of
from asa.data.io.files import write_digests, write_json, write_whole
from asa.data.io.tables import (
    EMPTY,
    ENDINGS,
    PREDICTED,
    RESERVED,
    SESSION,
    TRAINING_MEAN,
    as_number,
    check_health,
    check_own,
    csv_text,
    notes_of,
    read_column,
    read_rows,
)
from asa.errors import counted
from asa.evaluation.scans import ClassScores, NumberScores, auc, scan_scores, score_classes, score_numbers
from asa.evaluation.statistics import nullable, resample_subjects
from asa.evaluation.summary import check_summary

SCANS = "scans.csv"
MEASURES = ("score", "mean", "top", "peak")  # of how unusual a scan is; only its asymmetry has the first


def table_in(path: Path, name: str) -> Path:
    """The table that `predictions=` or `out=` means: itself, or the one of this name in a folder."""
    return path if path.suffix in ENDINGS else path / name


def evaluate_classes(table: Path, truth: Path, out: Path) -> tuple[ClassScores, list[str], list[str]]:
    """Score the class probabilities that asa-predict wrote to a table.

    Returns:
        The scores, the names of the classes, and lines for the reader.

    Args:
        truth: table (CSV) with the columns subject (or id) and class. Scans not in it are left out.
        out: folder for summary.json and scans.csv.

    Raises:
        FileNotFoundError, ValueError: no such table, one that does not fit, a class that the network does not know, or
            files of something else.
    """
    check_own(out / SCANS, "asa-evaluate", {"id", "class", "auc", "balanced_accuracy"}, "")
    check_summary(out, "classes", "confusion")
    rows, known, subjects = matched(table, truth, "class")
    names = [column.removeprefix("p_") for column in rows[0] if column.startswith("p_")]
    if unknown := sorted(set(known) - set(names)):
        raise ValueError(f"{truth}: the class {unknown[0]!r} is none of the network's: {', '.join(names)}")
    probabilities = np.array([numbers(table, row, [f"p_{name}" for name in names]) for row in rows])
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"{table}: probabilities have to be from 0 to 1: predict again")
    indices = np.array([names.index(name) for name in known])
    scores = score_classes(probabilities, indices, subjects)
    shares = scan_scores(probabilities, indices)
    scans = [[row["id"], *cells] for row, *cells in zip(rows, known, *shares.values(), strict=True)]
    left_out, notes = without_prediction(truth, "class", rows, subjects), notes_of(rows)
    write_json(out / "summary.json", scores.as_json(names) | {"without_prediction": left_out, "notes": notes})
    write_whole(out / SCANS, csv_text(["id", "class", *shares], scans).encode())
    write_digests(out, (SCANS, "summary.json"))
    return scores, names, [*unpredicted(left_out), *notes]


def evaluate_numbers(
    table: Path, truth: Path, out: Path, column: str | None = None
) -> tuple[NumberScores, str, list[str]]:
    """Score the numbers that asa-predict wrote to a table.

    Returns:
        The scores, the name of the number, and lines for the reader.

    Args:
        truth: table (CSV) with the columns subject (or id) and the number's. Scans not in it are left out.
        out: folder for summary.json.
        column: of the truth; None: called as in the training table.

    Raises:
        FileNotFoundError, ValueError: no such table, one that does not fit, or a number that is none.
    """
    check_summary(out, "column", "bias_slope")
    own = [name for name in predicted_rows(table)[0] if name not in RESERVED]
    if len(own) != 1:
        raise ValueError(f"{table}: not the table of a regression: choose another policy=, or predict again")
    column = column or own[0]
    rows, known, subjects = matched(table, truth, column)
    found = np.array([numbers(table, row, (PREDICTED, TRAINING_MEAN)) for row in rows])
    true = np.array([as_number(truth, row["id"], column, text) for row, text in zip(rows, known, strict=True)])
    scores = score_numbers(found[:, 0], true, found[:, 1], subjects)
    left_out, notes = without_prediction(truth, column, rows, subjects), notes_of(rows)
    write_json(out / "summary.json", scores.as_json(column) | {"without_prediction": left_out, "notes": notes})
    return scores, column, [*unpredicted(left_out), *notes]


def evaluate_asymmetry(
    table: Path, truth: Path, out: Path
) -> tuple[dict[str, dict[str, float]], dict[str, int], list[str]]:
    """How well each measure of asymmetry, or of anomaly, in a table separates patients from healthy subjects.

    Args:
        truth: table (CSV) with the columns subject (or id) and health, 1 or 0. Scans not in it are left out.
        out: folder for summary.json.

    Returns:
        By measure: auc, auc_low, auc_high (the 95 % interval over resampled subjects; NaN if undefined).
        Numbers of scans: patients, healthy, without_health; and of rows of the truth without_prediction.
        Lines for the reader.

    Raises:
        FileNotFoundError, ValueError: no such table, one that does not fit, another health, or scans of one kind only.
    """
    check_summary(out, "patients", "healthy")
    rows, health, subjects = matched(table, truth, "health")
    check_health(truth, health)
    patient = np.array(health) == "0"
    if patient.all() or not patient.any():
        raise ValueError(f"{truth}: all {len(rows)} scans are of health {health[0]}: an AUC needs both")
    results, notes = separation(table, rows, patient, subjects), notes_of(rows)
    counts = {
        "patients": int(patient.sum()),
        "healthy": int((~patient).sum()),
        "without_health": len(predicted_rows(table)) - len(rows),
        "without_prediction": without_prediction(truth, "health", rows, subjects),
    }
    written = {measure: nullable(found) for measure, found in results.items()}
    write_json(out / "summary.json", {**counts, "results": written, "notes": notes})
    return results, counts, notes


def separation(
    table: Path, rows: Sequence[Mapping[str, str]], patient: np.ndarray, subjects: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The AUC of each measure in the rows of a table, with its interval; see `evaluate_asymmetry`."""
    measures = [name for name in MEASURES if name in rows[0] or name != "score"]
    measured = np.array([numbers(table, row, measures) for row in rows]).T

    def aucs(scans: np.ndarray) -> dict[str, float]:
        return {name: auc(values[scans], patient[scans]) for name, values in zip(measures, measured, strict=True)}

    found, ends = aucs(np.arange(len(rows))), resample_subjects(aucs, subjects)
    return {name: {"auc": found[name], "auc_low": ends[name][0], "auc_high": ends[name][1]} for name in measures}


def numbers(table: Path, row: Mapping[str, str], columns: Sequence[str]) -> list[float]:
    """The numbers of a scan in some columns; a ValueError names the table, the scan and the column without one."""
    for column in columns:
        try:
            known = math.isfinite(float(row[column]))
        except (KeyError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"{table}: {row['id']}: {column} is {row.get(column)!r} and not a number: predict again, or leave the "
                "scan out of the truth"
            )
    return [float(row[column]) for column in columns]


def matched(table: Path, truth: Path, column: str) -> tuple[list[dict[str, str]], list[str], list[str]]:
    """The rows of a predicted table that the truth lists, their values in its column, and their subjects.

    A scan is a subject of its own, unless the truth, or else the predicted table, has a column "subject" (a store's
    own), or the id tells it: see `subject_of`.
    """
    rows = predicted_rows(table)
    own = {row["id"]: row.get("subject") or subject_of(row["id"]) for row in rows}
    scans = [{"id": id, "subject": subject} for id, subject in own.items()]
    known, subjects = read_column(truth, column, scans), read_column(truth, "subject", scans, missing_ok=True)
    rows = [row for row in rows if row["id"] in known]
    return rows, [known[row["id"]] for row in rows], [subjects.get(row["id"], own[row["id"]]) for row in rows]


def without_prediction(truth: Path, column: str, rows: Sequence[Mapping[str, str]], subjects: Sequence[str]) -> int:
    """How many rows of the truth have a value in its column and no prediction; rows and subjects as of `matched`."""
    known = [row for row in read_rows(truth) if row[column] not in EMPTY]
    return len(known) - len(rows if {"id", SESSION} & known[0].keys() else set(subjects))


def unpredicted(rows: int) -> list[str]:
    """A line about so many rows of the truth without a prediction, if there are any."""
    return [f"{counted(rows, 'row')} of the truth without a prediction"] if rows else []


def predicted_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a predicted table, one for each scan."""
    if not table.is_file():
        raise FileNotFoundError(
            f"{table}: no such table; predictions= is the folder that asa-predict or asa-embed wrote"
        )
    rows = read_rows(table)
    if not rows or "id" not in rows[0]:
        raise ValueError(f"{table}: has no scans, or no column id")
    if twice := [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(f"{table}: {twice[0]} is in two rows: remove one")
    return rows
