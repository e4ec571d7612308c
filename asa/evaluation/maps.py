"""Maps of what is unusual against lesions that were drawn, voxel by voxel.

OUT/scans.csv      a row for each scan with a lesion: see `voxel_scores`
OUT/summary.json   their means, with intervals over resampled subjects; and how scans with and without are separated
"""

from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import write_json, write_whole
from asa.data.io.nifti import read_image
from asa.data.io.tables import check_own, csv_text
from asa.data.preprocessing.pipeline import to_native
from asa.data.store import Store
from asa.evaluation.scans import auc
from asa.evaluation.statistics import nullable, resample_subjects
from asa.evaluation.tables import SCANS, predicted_rows, separation
from asa.ops.labels import IGNORED

VOXEL_SCORES = ("auc", "average_precision", "by_chance", "best_dice", "peak_in_lesion")


def voxel_scores(values: np.ndarray, lesion: np.ndarray) -> dict[str, float]:
    """How well a map finds a lesion, of the map's values `(N,)` in the head and bool `(N,)`, some True and some False.

    Returns:
        "auc" of the voxels; "average_precision", of precision over recall in steps, equal values in one (as by
        scikit-learn), and what it is "by_chance", the lesion's fraction of the head; "best_dice" at the threshold
        that suits this scan best, which nobody knows before; "peak_in_lesion", 1 if the highest value is in it.
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


def evaluate_maps(table: Path, store: Store, out: Path, *, sides: bool) -> dict[str, Any]:
    """Score the maps beside a table of asa-predict against the label maps of a store that holds the same scans.

    A lesion is every label. Voxels without a label, and outside the head, do not count.

    Args:
        sides: the maps compare the sides: then the lesion's mirror image is right, too, and of the head.

    Returns:
        What summary.json holds: "scans" of each kind; "voxels" by score of `voxel_scores`, and "results" by measure of
        the table if there are scans without a lesion, too. An undefined end of an interval is None.

    Raises:
        FileNotFoundError, ValueError: no such table or map, or none of its scans has a lesion in the store.
    """
    check_own(out / SCANS, "asa-evaluate", {"id", *VOXEL_SCORES}, "")
    rows, patient, subjects, scored = [], [], [], []
    records = {record["id"]: record for record in store.records}
    for row in predicted_rows(table):
        record = records.get(row["id"], {})
        if (label := store.label(row["id"]) if record else None) is None:
            continue
        rows.append(row)
        subjects.append(record["subject"])
        marked = (np.array(label) > 0) & (np.array(label) != IGNORED)
        patient.append(bool(marked.any()))
        if patient[-1]:
            head = (np.array(store.image(row["id"])) != 0).any(axis=0, keepdims=True)
            known = np.array(label) != IGNORED
            if sides:
                marked, head, known = marked | marked[..., ::-1], head | head[..., ::-1], known & known[..., ::-1]
            masks = np.concatenate([marked, head & (known | marked)]).astype(np.uint8)
            lesion, inside = to_native(masks, record["chain"], order=0).astype(bool)
            values = read_image(path := table.with_name(f"{row['id']}.nii.gz")).data
            if values.shape != inside.shape:
                raise ValueError(f"{path}: not on the grid of the scan in {store.path}: predict input={store.path}")
            scored.append(voxel_scores(values[inside], lesion[inside]))
    if not scored:
        raise ValueError(f"{store.path}: no scan of {table} has a label there: predict input={store.path}")
    ill = [subject for subject, one in zip(subjects, patient, strict=True) if one]
    values = np.array([[one[name] for name in VOXEL_SCORES] for one in scored])

    def means(chosen: np.ndarray) -> dict[str, float]:
        return dict(zip(VOXEL_SCORES, values[chosen].mean(axis=0).tolist(), strict=True))

    ends = resample_subjects(means, ill)
    voxels = {
        name: nullable({"mean": mean, "low": ends[name][0], "high": ends[name][1]})
        for name, mean in means(np.arange(len(values))).items()
    }
    results = {} if all(patient) else separation(table, rows, np.array(patient), subjects)
    summary = {
        "scans": {"with_lesion": len(scored), "without": len(rows) - len(scored)},
        "voxels": voxels,
        "results": {measure: nullable(found) for measure, found in results.items()},
    }
    ids = [row["id"] for row, one in zip(rows, patient, strict=True) if one]
    cells = [[id, *(f"{value:.6g}" for value in row)] for id, row in zip(ids, values.tolist(), strict=True)]
    write_whole(out / SCANS, csv_text(["id", *VOXEL_SCORES], cells).encode())
    write_json(out / "summary.json", summary)
    return summary
