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
from typing import Any

import numpy as np

from asa.data.datasets.folder import files_by_id, has_wildcard, matching_globs
from asa.data.datasets.folder import records as records_of
from asa.data.datasets.record import is_label_map, subject_of
from asa.data.io.files import VOLUME_ENDINGS, check_present, sha256_of, write_digests, write_json, write_whole
from asa.data.io.nifti import Volume, check_same_geometry, read_label, spacing_of
from asa.data.io.parallel import KILLED, in_processes
from asa.data.io.tables import NETWORK, check_own, notes_of, read_rows
from asa.data.preprocessing.resampling import bounding_box
from asa.data.splits import select
from asa.data.store import MANIFEST, Store
from asa.errors import listed
from asa.evaluation.comparison import Comparison, compare_runs, latex_table, markdown_table, read_run
from asa.evaluation.policies import Policy, get_policy
from asa.evaluation.summary import CaseRow, SegmentationSummary, cases_csv, check_summary, summarise, summary_table
from asa.evaluation.tables import table_in
from asa.inference.layout import VOLUMES, label_maps_of
from asa.ops.labels import side_of
from asa.reporting.evaluation import CaseFiles, write_comparison, write_report
from asa.reporting.pages import check_page
from asa.settings import Config
from asa.tasks.prediction import subjects_in

ENDING = ".nii.gz"
DEPTH = 4  # folders above a label map in a BIDS derivative: anat, ses-*, sub-*, and that of its table


def evaluate_case(
    prediction: Volume, truth: Volume, labels: Mapping[int, str], policy: str | Policy = "ibsr", *, case_id: str
) -> list[CaseRow]:
    """Compare one label map with the truth: a row for each region of the policy, in the order of the declaration.

    Args:
        prediction, truth: label maps on one grid, values as declared; in the truth also those ignored by the policy.
        labels: declared label value -> name; 0 is background and not declared.
        policy, case_id: a policy or its name; and what the case is called in rows and errors.

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
    """Evaluate a folder of label maps and write cases.csv, summary.json and report.html, if every case can be.

    Args:
        predictions: folder of `ID.nii.gz`, a BIDS derivative of asa-predict, or a path with wildcards that stand for
            the id, like `maps/*_seg.nii.gz`.
        truths, images: case id -> label map, and image to draw below the labels in the report (of every case, or None).
        labels: declared label value -> name; 0 is background and not declared.
        regions: name -> declared label values whose union is scored, in place of the policy's regions.
        ignored: label values that only the truth may hold beside the declared ones: their voxels do not count.
        allow_missing: accept truths without a prediction (they count in n total, not in the means) and
            predictions without a truth (left out); both are listed in the results.
        workers: processes; with more than one the caller's main module must be importable (spawn).
        subjects: case id -> subject, whose cases are averaged before statistics; None: a case is one.
        unlabelled: ids that are known to have no truth: their predictions are left out, and listed in the results.
        notes: lines about the truths for the reader, to which those about the predictions are added.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: cases that do not match or cannot be evaluated, a bad declaration, an unknown policy.
        ImportError: the `report` extra is not installed; cases.csv and summary.json are written all the same.
    """
    out, report = Path(out), Path(out) / "report.html"
    check_page(report)
    check_own(out / "cases.csv", "asa-evaluate", {"id", "label", "voxels_true"})
    check_summary(out, "labels", "regions")
    rules = get_policy(policy).of_cohort(regions or {}, ignored)
    rules.regions_of(labels)
    if both := sorted(set(labels) & set(rules.ignored)):
        raise ValueError(f"label {both[0]} is declared as {labels[both[0]]} and ignored: leave it in one of the two")
    cases, unmatched = _match(Path(predictions), truths, images, allow_missing, unlabelled)
    jobs, scored = [(case, dict(labels), rules) for case in cases], dict[str, list[CaseRow]]()
    done = in_processes(_evaluate_files, jobs, workers, title="evaluate", unit="case", progress=progress)
    for (case, *_), found in done:
        if found is None:
            raise ValueError(f"case {case.case_id}: {KILLED}")
        scored[case.case_id] = found
    rows = [row for case in cases for row in scored[case.case_id]]
    missing = [case.case_id for case in cases if case.prediction is None]
    told = _rows_of({case.prediction for case in cases if case.prediction})
    networks = sorted({row[NETWORK] for row in told if row.get(NETWORK)})
    about = dict(missing=missing, unmatched=unmatched, notes=[*notes, *notes_of(told)], networks=networks)
    summary = summarise(rows, labels, rules, subjects=subjects, **about)

    report.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_whole(out / "cases.csv", cases_csv(summary).encode())
    write_json(out / "summary.json", summary.as_json() | {"files": {case.case_id: _paths(case) for case in cases}})
    write_digests(out, ("cases.csv", "summary.json"))
    write_report(report, summary, cases)
    return summary


def _check_values(data: np.ndarray, labels: Mapping[int, str], what: str, ignored: Sequence[int] = ()) -> None:
    values, counts = np.unique(data, return_counts=True)
    allowed = {0, *labels, *ignored}
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    if undeclared := [f"{int(value)} ({count} voxels)" for value, count in pairs if int(value) not in allowed]:
        declared = ", ".join(f"{value} {name}" for value, name in labels.items())
        advice = "declare these too (where the labels are: of a store in asa-prepare), or relabel them"
        found = f"undeclared label values: {listed(undeclared, limit=10)}; declared are {declared}"
        raise ValueError(f"{what} holds {found}: {advice}")


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
    if not predictions.is_dir() and not has_wildcard(str(predictions)):
        raise FileNotFoundError(f"{predictions}: no such folder; give the one that asa-predict wrote")
    found = label_maps_of(predictions) if predictions.is_dir() else files_by_id(predictions)
    missing, unmatched = sorted(set(truths) - set(found)), sorted(set(found) - set(truths))
    if missing and (not allow_missing or len(missing) == len(truths)):
        advice = "predict them first"
        if len(missing) < len(truths):
            advice += ", or set allow_missing=true"
        elif found:
            advice = f"the folder holds {listed(sorted(found))}: ids have to be the same in both{_globs(found, truths)}"
        absent = f"{len(missing)} of {len(truths)} cases: {listed(missing)}"
        raise ValueError(f"{predictions}: no ID{ENDING} for {absent}; {advice}")
    if (unknown := sorted({*unmatched} - {*unlabelled})) and not allow_missing:
        advice = "give their truth, predict only the part to be scored (part=test), or set allow_missing=true"
        raise ValueError(f"{predictions}: {len(unknown)} predictions without a truth: {listed(unknown)}; {advice}")
    if imageless := [] if images is None else sorted(set(truths) - set(images)):
        raise ValueError(f"no image for {listed(imageless)}: give one for every case, or none at all")
    cases = []
    for id in sorted(truths):
        image = None if images is None else Path(images[id])
        cases.append(CaseFiles(id, found.get(id), Path(truths[id]), image))
        for what, path in (("truth", Path(truths[id])), ("image", image)):
            if path is not None:
                check_present(path, f"; correct the path of the {what} of {id}")
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


def evaluate_label_maps(config: Config) -> None:
    """What asa-evaluate does with label maps: print the table, write the results."""
    if config["predictions"] is None or config["truth"] is None:
        raise ValueError("predictions= and truth= have to be given, or compare=[RUN_A, RUN_B]")
    if not isinstance(config["regions"], dict | None):
        raise ValueError(f"regions= joins label values, like regions={{core: [1, 4]}}, got {config['regions']!r}")
    truth, out = Path(str(config["truth"])), Path(str(config["out"]))
    cohort = _truth_of_store(truth, config) if (truth / MANIFEST).exists() else _truth_of_folder(truth, config)
    if config["regions"] is not None:
        cohort["regions"] = config["regions"]
    own = {key: config[key] for key in ("policy", "allow_missing", "workers")}
    summary = evaluate_folder(Path(str(config["predictions"])), out=out, **own, **cohort)
    print(summary_table(summary), *summary.notes, sep="\n")
    print(f"wrote cases.csv, summary.json and report.html to {out}")


def _truth_of_store(path: Path, config: Config) -> dict[str, Any]:
    """Label files and images of a store's scans, as keywords of `evaluate_folder`."""
    if given := [key for key in ("labels", "ignored", "images", "subject") if config[key]]:
        raise ValueError(f"{given[0]}= is for a folder of label maps, and {path} is a store with its own: leave it out")
    store = Store(path)
    records: Sequence[Mapping[str, Any]] = store.records
    if config["split_file"] is None and config["part"] != "test":
        raise ValueError(f"part={config['part']}: give split_file=RUN/split.json, of which that is a part")
    if config["split_file"] is not None:
        records = select(store.records, subjects_in(config["split_file"], config["part"]))
    labelled = [record for record in records if "label" in record["sources"]]
    if not labelled:
        raise ValueError(f"{path}: none of the scans has a label map to compare with")
    truths = {record["id"]: Path(record["sources"]["label"]["path"]) for record in labelled}
    images = {record["id"]: store.first_source(record) for record in labelled}
    subjects = {record["id"]: record["subject"] for record in labelled}
    own = dict(labels=store.labels, regions=store.regions, ignored=store.ignored)
    notes = store.notes_on_labels(labelled)
    unlabelled = [record["id"] for record in records if "label" not in record["sources"]]
    return dict(truths=truths, images=images, subjects=subjects, unlabelled=unlabelled, notes=notes, **own)


def _truth_of_folder(path: Path, config: Config) -> dict[str, Any]:
    """Label files of a folder by the text that the pattern's * stands for, as keywords of `evaluate_folder`."""
    check_no_split(config)
    if path.is_file():
        raise ValueError(f"truth={path} is a file: give the folder of the label maps, and pattern= if they are not all")
    if not isinstance(config["labels"], dict):
        raise ValueError("labels has to be given with a folder of label maps, like labels={1: csf, 2: gm, 3: wm}")
    if not all(str(value).isdecimal() and isinstance(name, str) for value, name in config["labels"].items()):
        raise ValueError(f"labels= are values and their names, like labels={{1: csf, 2: gm}}, got {config['labels']}")
    if not isinstance(config["ignored"], list) or not all(isinstance(value, int) for value in config["ignored"]):
        raise ValueError(f"ignored= is a list of label values, like ignored=[2], got {config['ignored']}")
    pattern = config["pattern"] or next((f"*{end}" for end in VOLUME_ENDINGS if any(path.glob(f"*{end}"))), "*.nii.gz")
    found = records_of(path, images={"label": pattern})
    truths = {record["id"]: Path(str(record["images"]["label"])) for record in found}
    images = None
    if config["images"] is not None:
        images = {id: image for id, image in files_by_id(str(config["images"])).items() if id in truths}
    subjects = {id: subject_of(id, config["subject"]) for id in truths}
    labels = {int(value): name for value, name in config["labels"].items()}
    own = dict(labels=labels, regions={}, ignored=config["ignored"])
    return dict(truths=truths, images=images, subjects=subjects, **own)


def compare_folders(folders: Mapping[str, Path], out: Path, *, allow_missing: bool = False) -> Comparison:
    """Compare evaluations, folders by name, with the first of them, and write tables and page; see `asa.compare`.

    A FileNotFoundError for a folder without an evaluation, a ValueError for evaluations of another policy, or of other
    regions, cases or truths; an ImportError without the extra `report`, when only the page is missing.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two evaluations or more, got {len(folders)}: compare=[RUN_A, RUN_B]")
    page = Path(out) / "comparison.html"
    check_page(page)
    comparison = compare_runs([read_run(name, Path(folder)) for name, folder in folders.items()], allow_missing)
    page.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_json(page.with_suffix(".json"), comparison.as_json())
    write_whole(page.with_suffix(".md"), markdown_table(comparison).encode())
    write_whole(page.with_suffix(".tex"), latex_table(comparison).encode())
    write_comparison(page, comparison)
    return comparison


def check_no_split(config: Config) -> None:
    """Raise a ValueError for a choice of scans, which only a store has, with another truth."""
    if config["split_file"] is not None and not (Path(str(config["truth"])) / MANIFEST).exists():
        given = f"split_file={config['split_file']} chooses scans of a store, and truth={config['truth']} is none"
        raise ValueError(f"{given}: leave it out, and predict the part to be scored alone (asa-predict part=test)")


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
