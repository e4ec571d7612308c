"""Anomaly maps against lesions that were drawn, voxel by voxel.

OUT/scans.csv      a row for each scan with a lesion: see `voxel_scores`
OUT/summary.json   their means, with intervals over resampled subjects; and how scans with and without are separated
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import write_json, write_whole
from asa.data.io.nifti import check_same_geometry, read_image, read_label
from asa.data.io.tables import check_own, csv_text, notes_of
from asa.data.preprocessing.pipeline import to_native
from asa.data.store import Store
from asa.evaluation.scans import auc
from asa.evaluation.statistics import nullable, resample_subjects
from asa.evaluation.summary import check_summary
from asa.evaluation.tables import SCANS, predicted_rows, separation
from asa.ops.labels import IGNORED

VOXEL_SCORES = ("auc", "average_precision", "by_chance", "best_dice", "peak_in_lesion")


def voxel_scores(values: np.ndarray, lesion: np.ndarray) -> dict[str, float]:
    """How well a map finds a lesion, of the map's values `(N,)` in the head and bool `(N,)`, some True and some False.

    Returns:
        "auc" of the voxels; "average_precision", of precision over recall in steps, equal values in one (as by
        scikit-learn), and what it is "by_chance", the lesion's fraction of the head; "best_dice" at the threshold
        that is best for this scan, and so too good; "peak_in_lesion", 1 if the highest value is in it.
    """
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # the last voxel of each value
    hits, found, total = np.cumsum(lesion[order])[ends], ends + 1, lesion.sum()
    return {
        "auc": auc(values, lesion),
        "average_precision": float((np.diff(hits, prepend=0) / total * (hits / found)).sum()),
        "by_chance": float(lesion.mean()),
        "best_dice": float((2 * hits / (found + total)).max()),
        "peak_in_lesion": float(lesion[values.argmax()]),
    }


def evaluate_maps(table: Path, store: Store, out: Path, subjects: Collection[str] | None = None) -> dict[str, Any]:
    """Score the maps beside a table of asa-predict against the label files of a store of the same scans.

    A lesion is every label, and of maps that compare the sides, whose table has a score, its mirror image too. Ignored
    voxels, and what lies outside the head, do not count, unless a lesion is there.

    Args:
        subjects: whose scans are scored; None: all.

    Returns:
        What summary.json holds: "scans" of each kind; "voxels" by score of `voxel_scores`, and "results" by measure of
        the table if there are scans without a lesion, too; "notes" for the reader. An undefined end of an interval is
        None.

    Raises:
        FileNotFoundError, ValueError: no such table or map, a map on another grid, or none of its scans has a lesion.
    """
    check_own(out / SCANS, "asa-evaluate", {"id", *VOXEL_SCORES}, "")
    check_summary(out, "scans", "voxels")
    predicted = predicted_rows(table)
    sides = "score" in predicted[0]
    chosen = [record for record in store.records if subjects is None or record["subject"] in subjects]
    labelled = {record["id"]: record for record in chosen if "label" in record["sources"]}
    rows = [row for row in predicted if row["id"] in labelled]
    patient, scored = [], []
    for record in (labelled[row["id"]] for row in rows):
        label = read_label(record["sources"]["label"]["path"])
        lesion = np.isin(label.data, store.label_values)
        patient.append(bool(lesion.any()))
        if patient[-1]:
            path = table.with_name(f"{record['id']}.nii.gz")
            check_same_geometry(map := read_image(path), label, f"{path} and its label map in {store.path}")
            head, mirrored = _head_and_mirrored_lesion(store, record, sides)
            lesion |= mirrored
            inside = lesion | (head & ~np.isin(label.data, store.ignored))
            scored.append(voxel_scores(map.data[inside], lesion[inside]))
    of_subjects = [labelled[row["id"]]["subject"] for row in rows]
    if not scored:
        raise ValueError(f"{table}: none of its scans has a lesion in {store.path}: predict input={store.path}")
    ill = [subject for subject, one in zip(of_subjects, patient, strict=True) if one]
    values = np.array([[one[name] for name in VOXEL_SCORES] for one in scored])

    def means(chosen: np.ndarray) -> dict[str, float]:
        return dict(zip(VOXEL_SCORES, values[chosen].mean(axis=0).tolist(), strict=True))

    ends = resample_subjects(means, ill)
    voxels = {
        name: nullable({"mean": mean, "low": ends[name][0], "high": ends[name][1]})
        for name, mean in means(np.arange(len(values))).items()
    }
    results = {} if all(patient) else separation(table, rows, np.array(patient), of_subjects)
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
    ids = [row["id"] for row, one in zip(rows, patient, strict=True) if one]
    cells = [[id, *(f"{value:.6g}" for value in row)] for id, row in zip(ids, values.tolist(), strict=True)]
    write_whole(out / SCANS, csv_text(["id", *VOXEL_SCORES], cells).encode())
    write_json(out / "summary.json", summary)
    return summary


def _head_and_mirrored_lesion(store: Store, record: dict[str, Any], sides: bool) -> np.ndarray:
    """The head and the lesion's mirror image, bool `(2, x, y, z)` on the scan's grid; of maps that compare the `sides`.

    Of other maps the lesion has none; of those that do, the head has its mirror image, too.
    """
    label = np.array(store.label(record["id"]))
    head = (np.array(store.image(record["id"])) != 0).any(axis=0, keepdims=True)
    mirrored = ((label > 0) & (label != IGNORED))[..., ::-1] & sides
    masks = np.concatenate([head | (head[..., ::-1] & sides), mirrored]).astype(np.uint8)
    return to_native(masks, record["chain"]).astype(bool)
