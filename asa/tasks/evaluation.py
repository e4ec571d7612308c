"""Label maps against truth under a named policy, and evaluations of the same cases compared with the first of them.

OUT/cases.csv         one row a case and label
OUT/summary.json      statistics of each label and metric, with the policy and its truth table
OUT/digests.json      SHA-256 of both, which a comparison compares
OUT/report.html       both for reading, with figures (needs the `report` extra)

OUT/comparison.json   every mean and paired difference with its interval and p
OUT/comparison.md     the same as a Markdown table
OUT/comparison.tex    the same as a LaTeX table (booktabs)
OUT/comparison.html   both for reading, with a figure (needs the `report` extra)
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from asa.data.datasets.folder import files_by_id, has_wildcard, matching_globs
from asa.data.datasets.record import is_label_map
from asa.data.io.files import check_present, sha256_of, write_digests, write_json, write_whole
from asa.data.io.nifti import Volume, check_same_geometry, read_label, spacing_of
from asa.data.io.parallel import KILLED, in_processes
from asa.data.io.tables import NETWORK, check_own, notes_of, read_rows
from asa.data.preprocessing.resampling import bounding_box
from asa.data.store import MANIFEST
from asa.errors import listed
from asa.evaluation.comparison import Comparison, compare_runs, latex_table, markdown_table, read_run
from asa.evaluation.policies import Policy, get_policy
from asa.evaluation.summary import CaseRow, SegmentationSummary, cases_csv, check_summary, summarise
from asa.evaluation.tables import table_in
from asa.inference.layout import VOLUMES, label_maps_of
from asa.ops.labels import side_of
from asa.reporting.comparison import write_comparison
from asa.reporting.evaluation import CaseFiles, write_report
from asa.reporting.pages import check_page
from asa.settings import Config

ENDING = ".nii.gz"
DEPTH = 4  # folders above a label map in a BIDS derivative: anat, ses-*, sub-*, and that of its table


def evaluate_case(
    prediction: Volume, truth: Volume, labels: Mapping[int, str], policy: str | Policy = "ibsr", *, case_id: str
) -> list[CaseRow]:
    """Compare one label map with the truth: a row for each region of the policy, in the order of the declaration.

    Args:
        prediction, truth: label maps on one grid, values as declared; in the truth also those ignored by the policy.
        labels: declared label value -> name; 0 is background and not declared.
        policy, case_id: name of a policy, or one; and what the case is called in rows and errors.

    Raises:
        ValueError: another grid, an undeclared label value, a bad declaration, an unknown policy.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    regions = policy.regions_of(labels)
    check_same_geometry(prediction, truth, f"case {case_id}: prediction and truth")
    _check_values(prediction.data, labels, f"case {case_id}: the prediction")
    _check_values(truth.data, labels, f"case {case_id}: the truth", policy.ignored)
    spacing = spacing_of(truth.affine)
    ml = float(abs(np.linalg.det(truth.affine[:3, :3]))) / 1000.0
    filled = (truth.data != 0) | (prediction.data != 0)
    box = bounding_box(filled) if filled.any() else ...  # most of a head's image is background
    predicted_map, true_map = prediction.data[box], truth.data[box]
    counted = ~np.isin(true_map, policy.ignored)
    left, right = ([value for value, name in labels.items() if side_of(name) == side] for side in "lr")
    true_side, side = (np.isin(one, right).astype(np.int8) - np.isin(one, left) for one in (true_map, predicted_map))
    sided, wrong = (true_side != 0) & (side != 0), true_side * side < 0
    rows = []
    for label, values in regions.items():
        predicted = np.isin(predicted_map, values) & counted
        true = np.isin(true_map, values) & counted
        n, m = int(np.count_nonzero(predicted)), int(np.count_nonzero(true))
        numbers = {metric.name: metric(predicted, true, spacing) for metric in policy.metrics}
        both = true & sided
        wrong_side = float(wrong[both].mean()) if both.any() else math.nan
        rows.append(CaseRow(case_id, label, numbers, n, m, n * ml, m * ml, wrong_side))
    return rows


def evaluate_folder(
    predictions: Path,
    truths: Mapping[str, Path],
    labels: Mapping[int, str],
    policy: str,
    out: Path,
    images: Mapping[str, Path] | None = None,
    progress: bool = True,
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    ignored: Sequence[int] = (),
    allow_missing: bool = False,
    workers: int = 1,
    subjects: Mapping[str, str] | None = None,
    unlabelled: Collection[str] = (),
    notes: Sequence[str] = (),
) -> SegmentationSummary:
    """Evaluate a folder of label maps and write cases.csv, summary.json and report.html.

    Nothing is written unless every case could be evaluated; each file is written whole or not at all.

    Args:
        predictions: folder of `ID.nii.gz`, a BIDS derivative of asa-predict, or a path with wildcards that stand for
            the id, like `maps/*_seg.nii.gz`.
        truths: case id -> label map.
        labels: declared label value -> name; 0 is background and not declared.
        policy, out: name of a policy; and the folder for the results, made if missing.
        images: case id -> image to draw below the labels in the report, for every case of `truths`; or None.
        regions: name -> declared label values whose union is scored, in place of the policy's regions.
        ignored: label values that the truth may hold beside the declared ones: their voxels count neither for nor
            against a prediction, which may not hold them.
        allow_missing: accept truths without a prediction (they count in n total, not in the means) and
            predictions without a truth (left out); both are listed in the results.
        subjects: case id -> subject, whose cases are averaged before statistics; None: a case is one.
        workers: processes; with more than one the caller's main module must be importable (spawn).
        unlabelled: ids that are known to have no truth: their predictions are left out, and listed in the results.
        notes: lines about the truths for the reader, to which those about the predictions are added.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: cases that do not match, a case that cannot be evaluated, a bad declaration, an unknown
            policy.
        ImportError: the `report` extra is not installed; cases.csv and summary.json are written all the same.
    """
    check_page(Path(out) / "report.html")
    check_own(Path(out) / "cases.csv", "asa-evaluate", {"id", "label", "voxels_true"})
    check_summary(Path(out), "labels", "regions")
    rules = get_policy(policy).of_cohort(regions or {}, ignored)
    rules.regions_of(labels)
    if both := sorted(set(labels) & set(rules.ignored)):
        raise ValueError(f"label {both[0]} is declared as {labels[both[0]]} and ignored: leave it in one of the two")
    cases, unmatched = _match(Path(predictions), truths, images, allow_missing, unlabelled)
    jobs, rows = [(case, dict(labels), rules) for case in cases], list[CaseRow]()
    for (case, *_), found in in_processes(
        _evaluate_files, jobs, workers, title="evaluate", unit="case", progress=progress, ordered=True
    ):
        if found is None:
            raise ValueError(f"case {case.case_id}: {KILLED}")
        rows += found
    missing = [case.case_id for case in cases if case.prediction is None]
    told = _rows_of({case.prediction for case in cases if case.prediction})
    networks = sorted({row[NETWORK] for row in told if row.get(NETWORK)})
    about = dict(missing=missing, unmatched=unmatched, notes=[*notes, *notes_of(told)], networks=networks)
    summary = summarise(rows, labels, rules, subjects=subjects, **about)

    report = Path(out) / "report.html"
    report.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_whole(report.with_name("cases.csv"), cases_csv(summary).encode())
    files = {case.case_id: _paths(case) for case in cases}
    write_json(report.with_name("summary.json"), summary.as_json() | {"files": files})
    write_digests(report.parent, ("cases.csv", "summary.json"))
    write_report(report, summary, cases)
    return summary


def _check_values(data: np.ndarray, labels: Mapping[int, str], what: str, ignored: Sequence[int] = ()) -> None:
    values, counts = np.unique(data, return_counts=True)
    allowed = {0, *labels, *ignored}
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    if undeclared := [f"{int(value)} ({count} voxels)" for value, count in pairs if int(value) not in allowed]:
        found = listed(undeclared, limit=10)
        declared = ", ".join(f"{value} {name}" for value, name in labels.items())
        raise ValueError(
            f"{what} holds undeclared label values: {found}; declared are {declared}: declare these too (where the "
            "labels are: of a store in asa-prepare), or relabel them"
        )


def _match(
    predictions: Path,
    truths: Mapping[str, Path],
    images: Mapping[str, Path] | None,
    allow_missing: bool,
    unlabelled: Collection[str],
) -> tuple[list[CaseFiles], list[str]]:
    """Pair files by case id, and refuse what does not match before any work is done."""
    if not truths:
        raise ValueError("no truth to evaluate against: give at least one case")
    if predictions.is_dir():
        found = label_maps_of(predictions)
    elif has_wildcard(str(predictions)):
        found = files_by_id(predictions)
    else:
        raise FileNotFoundError(f"{predictions}: no such folder; give the one that asa-predict wrote")
    missing, unmatched = sorted(set(truths) - set(found)), sorted(set(found) - set(truths))
    if missing and (not allow_missing or len(missing) == len(truths)):
        if len(missing) < len(truths):
            advice = "predict them first, or set allow_missing=true"
        elif found:
            advice = f"the folder holds {listed(sorted(found))}: ids have to be the same in both{_globs(found, truths)}"
        else:
            advice = "predict them first"
        raise ValueError(
            f"{predictions}: no ID{ENDING} for {len(missing)} of {len(truths)} cases: {listed(missing)}; {advice}"
        )
    if (unknown := sorted({*unmatched} - {*unlabelled})) and not allow_missing:
        raise ValueError(
            f"{predictions}: {len(unknown)} predictions without a truth: {listed(unknown)}; "
            "give their truth, predict only the part to be scored (part=test), or set allow_missing=true"
        )
    if imageless := [] if images is None else sorted(set(truths) - set(images)):
        raise ValueError(f"no image for {listed(imageless)}: give one for every case, or none at all")
    cases = []
    for case_id in sorted(truths):
        image = None if images is None else Path(images[case_id])
        case = CaseFiles(case_id, found.get(case_id), Path(truths[case_id]), image)
        for what, path in (("truth", case.truth), ("image", image)):
            if path is not None:
                check_present(path, f"; correct the path of the {what} of {case_id}")
        cases.append(case)
    return cases, unmatched


def _globs(found: Mapping[str, Path], truths: Mapping[str, Path]) -> str:
    """Advice about the patterns by which the files of two folders match."""
    if any(len({path.parent for path in paths.values()}) > 1 for paths in (found, truths)):
        return "; with files in several folders, give both predictions= and pattern= with ** for these"
    if any(map(is_label_map, (path.name for path in truths.values()))):  # what else is there are images
        truths = {id: path for id, path in truths.items() if is_label_map(path.name)}
    names = [path.name for path in found.values()]
    as_ids = matching_globs(names, [f"{id}{ENDING}" for id in truths])
    own = next(iter(found.values())).parent
    if as_ids and as_ids[1] == f"*{ENDING}":
        return f"; predictions='{own}/{as_ids[0]}' would match {as_ids[2]} of them"
    if (globs := matching_globs(names, [path.name for path in truths.values()])) is None:
        return "; that of a true label map is what the * of pattern= matches"
    mine = "" if globs[0] == f"*{ENDING}" else f"predictions='{own}/{globs[0]}' "
    return f"; with a folder of true label maps, {mine}pattern='{globs[1]}' would match {globs[2]} of them"


def _rows_of(files: Collection[Path]) -> list[dict[str, str]]:
    """The rows of label maps in the tables of asa-predict above them; those of other software have none."""
    rows = []
    folders = {above for file in files for above in file.parents[:DEPTH]}
    for folder in sorted(one for one in folders if (one / VOLUMES).is_file()):
        with suppress(ValueError):
            maps = label_maps_of(folder)
            rows += [row for row in read_rows(folder / VOLUMES) if maps.get(row.get("id", "")) in files]
    return rows


def _paths(case: CaseFiles) -> dict[str, str | None]:
    """Absolute paths of a case's files, with which a comparison draws them again, and the SHA-256 of the label maps."""
    paths = {"prediction": case.prediction, "truth": case.truth, "image": case.image}
    digests = {f"{kind}_sha256": sha256_of(path) for kind, path in paths.items() if path and kind != "image"}
    return {kind: None if path is None else str(path.absolute()) for kind, path in paths.items()} | digests


def _evaluate_files(job: tuple[CaseFiles, dict[int, str], Policy]) -> list[CaseRow]:
    case, labels, policy = job
    truth = read_label(case.truth)
    if case.prediction is not None:
        return evaluate_case(read_label(case.prediction), truth, labels, policy, case_id=case.case_id)
    nothing = replace(truth, data=np.zeros_like(truth.data))
    rows = evaluate_case(nothing, truth, labels, policy, case_id=case.case_id)
    undefined = {metric.name: math.nan for metric in policy.metrics}
    return [replace(row, values=undefined, voxels_predicted=None, ml_predicted=None) for row in rows]


def compare_folders(folders: Mapping[str, Path], out: Path, *, allow_missing: bool = False) -> Comparison:
    """Compare evaluations with the first of them and write the tables and the page.

    Args:
        folders: name -> folder that `evaluate_folder` or `evaluate_pictures` wrote, two or more.
        out, allow_missing: see `asa.compare`.

    Raises:
        FileNotFoundError: a folder that holds no evaluation.
        ValueError: evaluations that cannot be compared: another policy, other regions, cases or truths.
        ImportError: the `report` extra is not installed; all but the page is written all the same.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two evaluations or more, got {len(folders)}: compare=[RUN_A, RUN_B]")
    check_page(Path(out) / "comparison.html")
    comparison = compare_runs([read_run(name, Path(folder)) for name, folder in folders.items()], allow_missing)
    page = Path(out) / "comparison.html"
    page.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_json(page.with_suffix(".json"), comparison.as_json())
    write_whole(page.with_suffix(".md"), markdown_table(comparison).encode())
    write_whole(page.with_suffix(".tex"), latex_table(comparison).encode())
    write_comparison(page, comparison)
    return comparison


def check_no_split(config: Config) -> None:
    """Raise a ValueError for a choice of scans, which only a store has, with another truth."""
    if config["split_file"] is not None and not (Path(str(config["truth"])) / MANIFEST).exists():
        raise ValueError(
            f"split_file={config['split_file']} chooses scans of a store, and truth={config['truth']} is none: leave "
            "it out, and predict the part to be scored alone (asa-predict part=test)"
        )


def tables_of(config: Config, *names: str) -> tuple[Path, Path, Path]:
    """The predicted table, which has one of these names in its folder, the truth, and the folder for results."""
    for key in ("predictions", "truth"):
        if config[key] is None:
            raise ValueError(f"{key}= has to be given: predictions=FOLDER of asa-predict, and truth=TABLE.csv")
    if config["subject"] is not None:
        raise ValueError("subject= is for images and folders of label maps: give the truth a column subject")
    check_no_split(config)
    folder = Path(str(config["predictions"]))
    found = [table_in(folder, name) for name in names]
    if not (there := [table for table in found if table.exists()]) and len(names) > 1:
        tables = " or ".join(map(str, found))
        raise FileNotFoundError(f"{tables}: no such table; predictions= is the folder that asa-predict wrote")
    return (there or found)[0], Path(str(config["truth"])), Path(str(config["out"]))
