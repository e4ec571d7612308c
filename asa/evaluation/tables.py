"""Predicted tables and anomaly maps against the truth: class probabilities, numbers, and how unusual scans are.

OUT/summary.json   the scores, with intervals over resampled subjects
OUT/scans.csv      of a classification: each scan's class and its shares in AUC and balanced accuracy; of maps against
                   lesions that were drawn: a row for each scan with a lesion, see `voxel_scores`
OUT/digests.json   of a classification: SHA-256 of both, which asa-ablate compares
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.datasets.record import subject_of
from asa.data.io.files import write_digests, write_json, write_whole
from asa.data.io.nifti import check_same_geometry, read_image, read_label
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
from asa.data.preprocessing.pipeline import to_native
from asa.data.store import Store
from asa.errors import counted
from asa.evaluation.scans import (
    SCANS,
    VOXEL_SCORES,
    ClassScores,
    NumberScores,
    auc,
    scan_scores,
    score_classes,
    score_numbers,
    voxel_scores,
)
from asa.evaluation.statistics import nullable, resample_subjects
from asa.evaluation.summary import check_summary
from asa.ops.labels import IGNORED

MEASURES = ("score", "mean", "top", "peak")  # of how unusual a scan is; only its asymmetry has the first


def table_in(path: Path, name: str) -> Path:
    """The table that `predictions=` or `out=` means: itself, or the one of this name in a folder."""
    return path if path.suffix in ENDINGS else path / name


def evaluate_classes(table: Path, truth: Path, out: Path) -> tuple[ClassScores, list[str], list[str]]:
    """Score the class probabilities that asa-predict wrote to a table: the scores, the classes, lines for the reader.

    `truth` is a table with the columns subject (or id) and class; scans not in it are left out. A FileNotFoundError or
    ValueError for no such table, one that does not fit, an unknown class, or files of something else in `out`.
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
    """Score the numbers that asa-predict wrote to a table: the scores, the number's name, lines for the reader.

    `truth` is a table with the columns subject (or id) and the number's `column` (None: as in the training table);
    scans not in it are left out. Raises as `evaluate_classes`.
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

    `truth` is a table with the columns subject (or id) and health, 1 or 0; scans not in it are left out. Raises as
    `evaluate_classes`, also for scans of one kind only. Returns by measure auc, auc_low and auc_high (the 95 % interval
    over resampled subjects; NaN if undefined); numbers of scans (patients, healthy, without_health), and of rows of the
    truth without_prediction; and lines for the reader.
    """
    check_summary(out, "patients", "healthy")
    rows, health, subjects = matched(table, truth, "health")
    check_health(truth, health)
    patient = np.array(health) == "0"
    if patient.all() or not patient.any():
        raise ValueError(f"{truth}: all {len(rows)} scans are of health {health[0]}: an AUC needs both")
    results, notes = _separation(table, rows, patient, subjects), notes_of(rows)
    counts = {
        "patients": int(patient.sum()),
        "healthy": int((~patient).sum()),
        "without_health": len(predicted_rows(table)) - len(rows),
        "without_prediction": without_prediction(truth, "health", rows, subjects),
    }
    written = {measure: nullable(found) for measure, found in results.items()}
    write_json(out / "summary.json", {**counts, "results": written, "notes": notes})
    return results, counts, notes


def _separation(
    table: Path, rows: Sequence[Mapping[str, str]], patient: np.ndarray, subjects: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The AUC of each measure in the rows of a table, with its interval; see `evaluate_asymmetry`."""
    measures = [name for name in MEASURES if name in rows[0] or name != "score"]
    measured = np.array([numbers(table, row, measures) for row in rows]).T

    def aucs(scans: np.ndarray) -> dict[str, float]:
        return {name: auc(values[scans], patient[scans]) for name, values in zip(measures, measured, strict=True)}

    found, ends = aucs(np.arange(len(rows))), resample_subjects(aucs, subjects)
    return {name: {"auc": found[name], "auc_low": ends[name][0], "auc_high": ends[name][1]} for name in measures}


def evaluate_maps(table: Path, store: Store, out: Path, subjects: Collection[str] | None = None) -> dict[str, Any]:
    """Score the maps beside a table of asa-predict against the label files of a store of the same scans.

    A lesion is every label, and of maps that compare the sides, whose table has a score, its mirror image too. Ignored
    voxels, and what lies outside the head, do not count, unless a lesion is there. `subjects`: whose scans; None: all.
    A FileNotFoundError or ValueError for no such table or map, a map on another grid, or no scan with a lesion.

    Returns what summary.json holds: "scans" of each kind; "voxels" by score of `voxel_scores`, and "results" by measure
    of the table if there are scans without a lesion, too; "notes". An undefined end of an interval is None.
    """
    check_own(out / SCANS, "asa-evaluate", {"id", *VOXEL_SCORES}, "")
    check_summary(out, "scans", "voxels")
    predicted = predicted_rows(table)
    sides = "score" in predicted[0]
    chosen = [record for record in store.records if subjects is None or record["subject"] in subjects]
    labelled = {record["id"]: record for record in chosen if "label" in record["sources"]}
    rows = [row for row in predicted if row["id"] in labelled]
    scored: dict[str, list[float]] = {}  # of the scans with a lesion, by id
    for id, record in ((row["id"], labelled[row["id"]]) for row in rows):
        label = read_label(record["sources"]["label"]["path"])
        lesion = np.isin(label.data, store.label_values)
        if lesion.any():
            path = table.with_name(f"{id}.nii.gz")
            check_same_geometry(map := read_image(path), label, f"{path} and its label map in {store.path}")
            head, mirrored = _head_and_mirrored_lesion(store, record, sides)
            lesion |= mirrored
            inside = lesion | (head & ~np.isin(label.data, store.ignored))
            found = voxel_scores(map.data[inside], lesion[inside])
            scored[id] = [found[name] for name in VOXEL_SCORES]
    if not scored:
        raise ValueError(f"{table}: none of its scans has a lesion in {store.path}: predict input={store.path}")
    values, patient = np.array(list(scored.values())), np.array([row["id"] in scored for row in rows])

    def means(chosen: np.ndarray) -> dict[str, float]:
        return dict(zip(VOXEL_SCORES, values[chosen].mean(axis=0).tolist(), strict=True))

    ends = resample_subjects(means, [labelled[id]["subject"] for id in scored])
    voxels = {
        name: nullable({"mean": mean, "low": ends[name][0], "high": ends[name][1]})
        for name, mean in means(np.arange(len(values))).items()
    }
    of_subjects = [labelled[row["id"]]["subject"] for row in rows]
    results = {} if patient.all() else _separation(table, rows, patient, of_subjects)
    notes = [*store.notes_on_labels(labelled[row["id"]] for row in rows), *notes_of(rows)]
    summary = {
        "scans": {
            "with_lesion": len(scored),
            "without": len(rows) - len(scored),
            "left_out": len(predicted) - len(rows),  # without a label
            "without_prediction": len(labelled) - len(rows),
        },
        "voxels": voxels,
        "results": {measure: nullable(found) for measure, found in results.items()},
        "notes": notes,
    }
    cells = [[id, *(f"{value:.6g}" for value in row)] for id, row in scored.items()]
    write_whole(out / SCANS, csv_text(["id", *VOXEL_SCORES], cells).encode())
    write_json(out / "summary.json", summary)
    return summary


def _head_and_mirrored_lesion(store: Store, record: dict[str, Any], sides: bool) -> np.ndarray:
    """Bool `(2, x, y, z)` on the scan's grid: the head, and the lesion's mirror image.

    If `sides` are compared, the head has its mirror image, too; else the lesion has none.
    """
    label = np.array(store.label(record["id"]))
    head = (np.array(store.image(record["id"])) != 0).any(axis=0, keepdims=True)
    mirrored = ((label > 0) & (label != IGNORED))[..., ::-1] & sides
    masks = np.concatenate([head | (head[..., ::-1] & sides), mirrored]).astype(np.uint8)
    return to_native(masks, record["chain"]).astype(bool)


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
