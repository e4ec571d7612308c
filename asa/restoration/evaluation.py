"""A folder of restored images against the clean ones: files matched, scored, and written down.

OUT/cases.csv      a row an image
OUT/summary.json   statistics over the images, and the data range
OUT/digests.json   SHA-256 of both, which a comparison compares
OUT/report.html    both for reading, with pictures of the worst and of the middle image (needs the `report` extra)
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from asa.data.datasets.record import subject_of
from asa.data.io.files import write_digests, write_json, write_whole
from asa.data.io.tables import check_own
from asa.errors import listed
from asa.evaluation.policies import WHOLE, restoration_policy
from asa.evaluation.summary import Row, check_summary, describe_regions
from asa.reporting.pages import check_page
from asa.restoration.images import checked_window, common_window, list_pictures, read_picture, read_restored
from asa.restoration.measures import RestorationSummary, restoration_table, score_image, scores_csv
from asa.restoration.report import ImageFiles, write_restoration_report


def evaluate_pictures(
    predictions: str | Path,
    truth: str | Path,
    out: str | Path,
    *,
    inputs: str | Path | None = None,
    window: Sequence[float] | None = None,
    allow_missing: bool = False,
    subject: str | None = None,
) -> str:
    """Score restored images against clean ones; write cases.csv, summary.json and report.html.

    Args:
        predictions: folder of restored images; of PNG, as `asa-predict` writes them, the whole range is the window.
        truth: folder of clean images with the same names.
        inputs: folder of the degraded images with the same names, to show beside.
        window: of the clean and degraded images, see `asa.restoration.images.read_picture`; None: that of the
            predictions, which `asa-predict` writes into them.
        allow_missing: leave out clean images that were not restored.
        subject: regular expression searched in the id, whose group 1 is the subject; None: see `subject_of`.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError, ValueError: images of different cases or sizes.
        ImportError: the `report` extra is not installed; cases.csv and summary.json are written all the same.
    """
    page = Path(out) / "report.html"
    check_page(page)
    check_own(page.with_name("cases.csv"), "asa-evaluate", {"id", "truth"})
    check_summary(page.parent, "data_range")
    cases, left_out = _match(predictions, truth, inputs, allow_missing)
    ends = _data_range(cases, window)
    width = 1.0 if ends is None else ends[1] - ends[0]
    rows, truths = [], {}
    for case in cases:
        prediction, target = read_restored(case.prediction, ends), read_picture(case.truth, ends)
        try:
            found = score_image(torch.from_numpy(prediction), torch.from_numpy(target), width)
        except ValueError as error:
            raise ValueError(f"{case.case_id}: {error}") from None
        rows.append(Row(case.case_id, WHOLE, found))
        truths[case.case_id] = hashlib.sha256(target.tobytes()).hexdigest()[:12]
    policy = restoration_policy(ends)
    subjects = {row.case_id: subject_of(row.case_id, subject) for row in rows}
    results = describe_regions(rows, [WHOLE], policy.metrics, subjects)
    quality = RestorationSummary(
        policy=policy, rows=rows, results=results, subjects=subjects, window=ends, truths=truths, left_out=left_out
    )
    page.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_whole(page.with_name("cases.csv"), scores_csv(quality).encode())
    write_json(page.with_name("summary.json"), quality.as_json())
    write_digests(page.parent, ("cases.csv", "summary.json"))
    write_restoration_report(page, quality, cases)
    return restoration_table(quality)


def _data_range(cases: Sequence[ImageFiles], given: Sequence[float] | None) -> tuple[float, float] | None:
    """The window that 0 and 1 stand for in the predictions: the one they store, the one given, or that of the truth."""
    stored = common_window(case.prediction for case in cases)
    if given is None:
        return common_window(case.truth for case in cases) if stored is None else stored
    chosen = checked_window(given)
    if stored is not None and stored != chosen:
        raise ValueError(
            f"{cases[0].prediction}: 0 and 1 are {stored[0]:g} and {stored[1]:g} in it, and not {list(chosen)}: give "
            "this window or none"
        )
    return chosen


def _match(
    predictions: str | Path, truth: str | Path, inputs: str | Path | None, allow_missing: bool
) -> tuple[list[ImageFiles], int]:
    """Files of each restored image, and the number of clean images that were not restored."""
    restored, clean = list_pictures(predictions), list_pictures(truth)
    degraded = {} if inputs is None else list_pictures(inputs)
    for folder, found in ((truth, clean), *([] if inputs is None else [(inputs, degraded)])):
        if unknown := sorted(restored.keys() - found.keys()):
            raise ValueError(f"{folder}: no image {unknown[0]}, of which there is a prediction")
    if (missing := sorted(clean.keys() - restored.keys())) and not allow_missing:
        raise ValueError(f"{predictions}: no prediction of {listed(missing, 1)}: predict them, or allow_missing=true")
    return [ImageFiles(id, restored[id], clean[id], degraded.get(id)) for id in restored], len(missing)
