"""BIDS datasets and derivatives: one image per channel of each session, or run, of a subject."""

import itertools
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, make_record, sorted_records
from asa.data.io.files import NOT_HERE, is_utf8, matching_files
from asa.data.io.tables import EMPTY, match_names, read_header, read_rows

CHANNELS = {"t1": "T1w"}
OTHERS = {"t2": "T2w", "flair": "FLAIR", "pd": "PDw"}  # told of where only the T1w are read
FOLDERS = ("anat", "t1_linear")  # of BIDS, and of Clinica's t1-linear pipeline
NAMING = ("sub-", "ses-", "run-")  # entities that tell scans apart
_ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)")


def records(
    root: str | Path,
    *,
    channels: Mapping[str, str] | None = None,
    label: str | None = None,
    label_root: str | Path | None = None,
    session: str | None = None,
    run: str | None = None,
    acq: str | None = None,
    desc: str | None = None,
    space: str | None = None,
    entities: Mapping[str, str | None] | None = None,
) -> list[Record]:
    """Records of `sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz]`, also under `subjects/` as in Clinica.

    With one channel each run is a scan with the id sub-XX[_ses-YY][_run-ZZ]. With several channels each session is a
    scan, and a channel that it lacks is None. The subject is sub-XX, so that all its sessions are in one part of a
    split. The site is read from a column `site` of participants.tsv. A missing label map has the path expected from the
    entities of the image. A scan with several files for one channel has a `problem` that names the entities in which
    they differ. Warnings say which subjects have no such file, which scans the required values leave out, where
    `channels` would have more than the T1w, and which derivatives have the label maps if `label_root` has none.

    Args:
        root: of the dataset, or of one derivative.
        channels: channel name in the store -> suffix of its files, like `{"t1": "T1w", "flair": "FLAIR"}`; None: the
            T1w as t1.
        label: suffix of the label maps, like dseg, or desc-aseg_dseg with entities; None for an unlabelled cohort.
        label_root: root of the label maps, if it is another folder.
        session, run, acq, desc, space: required values of these entities, for images and label maps; None accepts any.
            A file without a run, or a label map without desc, matches any value, if there is none with the value.
        entities: required values of any entity by its short name, like `{"rec": "norm"}`; None for files without it.

    Raises:
        ValueError: an entity whose value is given twice.
    """
    root = existing_folder(root, "sub-XX, sub-YY, ... (of a BIDS dataset or of one derivative)").absolute()
    channels = channels or CHANNELS
    wanted = {"ses": session, "run": run, "acq": acq, "desc": desc, "space": space}
    chosen: dict[str, str | None] = {entity: str(value) for entity, value in wanted.items() if value is not None}
    for entity, value in (entities or {}).items():
        if entity in chosen:
            raise ValueError(f"data.entities: {entity} has a value of its own, {chosen[entity]}: give one of the two")
        chosen[entity] = None if value is None else str(value)
    of_runs = len(channels) == 1
    # Where a run is required, a file without one may stand for it: the best of a session is chosen.
    keys = ("sub", "ses", "run") if of_runs and chosen.get("run") is None else ("sub", "ses")
    problems: dict[str, str] = {}
    files = {channel: _files(root, suffix, keys, problems) for channel, suffix in channels.items()}
    found = {channel: _choose(pairs, chosen, problems) for channel, pairs in files.items()}
    labels, labels_root = {}, root
    if label is not None:
        labels_root = existing_folder(label_root or root, "the label maps").absolute()
        others = {key: value for key, value in chosen.items() if key not in dict(_ENTITY.findall(label))}
        label_maps = _files(labels_root, label, keys, problems)
        labels = _choose(label_maps, others, problems, labels=True)
        derivatives = [] if label_maps else sorted(root.glob("derivatives/*/"))
        if roots := [path for path in derivatives if _files(path, label, keys, {})]:
            hint = " or ".join(f"data.label_root={path}" for path in roots)
            warnings.warn(f"{labels_root}: no label map *_{label}.nii.gz here: give {hint}", stacklevel=2)
    scans = set[str]().union(*found.values())
    everything = {scan for pairs in files.values() for scan, _ in pairs}
    _warn_of_others(root, " or ".join(channels.values()), everything, scans, chosen)
    if channels == CHANNELS:
        _warn_of_channels(root, keys, scans)
    if lone := sorted(labels.keys() - scans):
        warnings.warn(f"{labels_root}: {len(lone)} label maps belong to no scan, like that of {lone[0]}", stacklevel=2)
    sites = _sites(root, {scan.split("_")[0] for scan in scans})
    result: list[Record] = []
    for scan in scans:
        paths = {channel: by_scan.get(scan) for channel, by_scan in found.items()}
        subject, truth, id = scan.split("_")[0], labels.get(scan), scan
        image = next(path for path in paths.values() if path)
        if label is not None and truth is None:
            truth = labels_root / image.relative_to(root).with_name(f"{_stem(image)}_{label}.nii.gz")
        if of_runs and "run" not in keys and (number := _placed(image).get("run")):
            id = f"{scan}_run-{number}"
        record = make_record(id, subject, paths, site=sites.get(subject, ""), label=truth)
        if scan in problems:
            record["problem"] = problems[scan]
        result.append(record)
    names, entities_text = "|".join(channels.values()), f" with {_text(chosen)}" if chosen else ""
    pipelines = sorted(f"derivatives/{path.name}" for path in root.glob("derivatives/*/"))
    hint = f" (to read a derivative, give its folder as data.root: {' or '.join(pipelines)})" if pipelines else ""
    source = f"sub-*/[ses-*/]anat/*_{names}.nii[.gz]{entities_text} below {root}{hint}"
    return sorted_records(result, source=source)


def _files(root: Path, suffix: str, keys: Sequence[str], problems: dict[str, str]) -> list[tuple[str, Path]]:
    """Scan, named by its entities `keys`, and path of each file; of one with a name that is not of BIDS the problem."""
    parts = itertools.product(("", "subjects/"), ("", "ses-*/"), FOLDERS, ("", ".gz"))
    patterns = [f"{above}sub-*/{session}{folder}/sub-*_{suffix}.nii{gz}" for above, session, folder, gz in parts]
    found = []
    for path in matching_files(root, *patterns):
        entities, stem = _placed(path), _stem(path)
        if "sub" not in entities:
            continue
        scan = scan_of(entities, keys)
        wrong = [part for part in stem.split("_") if part[:4] in NAMING and not _ENTITY.fullmatch(part)]
        if wrong and is_utf8(path.name):
            scan, what = stem, f"{path.name}: {wrong[0]} is no entity of BIDS"
            problems[scan] = f"{what}, whose values have only letters and digits: rename it"
        found.append((scan, path))
    return found


def _choose(
    files: list[tuple[str, Path]], chosen: Mapping[str, str | None], problems: dict[str, str], labels: bool = False
) -> dict[str, Path]:
    """Scan -> the file with the chosen values, if possible with a run, and of label maps a desc, which may lack."""
    optional = ("run", "desc") if labels else ("run",)

    def lacking(path: Path) -> int:
        return len(chosen.keys() - _placed(path).keys())

    found: dict[str, Path] = {}
    for scan, path in sorted(files, key=lambda pair: lacking(pair[1])):
        entities = _placed(path)
        if any(entities.get(key, value if key in optional else None) != value for key, value in chosen.items()):
            continue
        first = found.setdefault(scan, path)
        if first != path and lacking(first) == lacking(path):
            problems.setdefault(scan, _ambiguous(scan, first, path, labels))
    return found


def _warn_of_others(
    root: Path, names: str, everything: set[str], scans: set[str], chosen: Mapping[str, str | None]
) -> None:
    """Warn of scans that the chosen values leave out, and of subjects without any."""
    if scans and (left := sorted(everything - scans)):
        told = f"{_text(chosen)} leaves out {len(left)} of {len(everything)} scans, like {left[0]}"
        warnings.warn(f"{root}: {told}", stacklevel=3)
    having = {scan.split("_")[0] for scan in everything}
    folders = {path.name for above in ("", "subjects/") for path in root.glob(f"{above}sub-*/")}
    if having and (without := sorted(folders - having)):
        told = f"{len(without)} of {len(folders)} subjects have no {names} in anat, like {without[0]}"
        warnings.warn(f"{root}: {told}", stacklevel=3)


def _warn_of_channels(root: Path, keys: Sequence[str], scans: set[str]) -> None:
    """Warn of images of other contrasts beside the T1w, which would be channels of the same scans."""
    images = _files(root, "*", keys, {})  # once, as a large dataset takes long
    more, counts = dict(CHANNELS), []
    for name, suffix in OTHERS.items():
        if having := {scan for scan, path in images if path.name.partition(".")[0].endswith(f"_{suffix}")} & scans:
            more[name] = suffix
            counts.append(f"{suffix} ({len(having)})")
    if counts:
        channels = ", ".join(f"{name}: {suffix}" for name, suffix in more.items())
        told = f"only the T1w are read; of {len(scans)} scans some also have {', '.join(counts)}"
        warnings.warn(f"{root}: {told}: for these too, give 'data.channels={{{channels}}}'", stacklevel=3)


def _text(chosen: Mapping[str, str | None]) -> str:
    return ", ".join(f"{key}-{value}" if value is not None else f"no {key}" for key, value in chosen.items())


def entities_of(path: Path) -> dict[str, str]:
    """Entity -> value of a file name, like `{"sub": "01", "ses": "1"}`, without the suffix."""
    return dict(_ENTITY.findall(_stem(path)))


def id_of(path: Path, root: Path) -> str | None:
    """The id that `records` gives to an image of a dataset; None for a file that has no place or name of BIDS in it."""
    entities, folders = _placed(path), path.absolute().relative_to(root.absolute()).parts[:-1]
    placed = tuple(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)
    if "sub" not in entities or folders[:-1] not in (placed, ("subjects", *placed)) or folders[-1] not in FOLDERS:
        return None
    return scan_of(entities)


def scan_of(entities: Mapping[str, str], keys: Sequence[str] = ("sub", "ses", "run")) -> str:
    """A scan, named by those of its entities that tell scans apart."""
    return "_".join(f"{key}-{entities[key]}" for key in keys if key in entities)


def _placed(path: Path) -> dict[str, str]:
    """The entities of a file, with a session that only the folders name."""
    found, session = entities_of(path), path.parent.parent.name
    return {**found, "ses": session[4:]} if "ses" not in found and session.startswith("ses-") else found


def _stem(path: Path) -> str:
    return path.name.rpartition("_")[0]


def _ambiguous(scan: str, one: Path, other: Path, labels: bool) -> str:
    first, second = _placed(one), _placed(other)
    differ = [key for key in first | second if first.get(key) != second.get(key)]
    choices = " or ".join(_choice(path, key, labels) for key in differ for path in (one, other))
    remedy = f"for all scans choose {choices}, or remove one of them" if differ else "remove one of them"
    return f"{scan}: both {one.name} and {other.name} match; {remedy}"


def _choice(path: Path, key: str, labels: bool) -> str:
    """A setting that takes a file by an entity; of a label map by its suffix, as images have no seg- or desc-aseg."""
    value = _placed(path).get(key)
    if labels and value is not None:
        return f"data.label={path.name[path.name.index(f'_{key}-') + 1 :].partition('.')[0]}"
    return f"'data.entities={{{key}: {value or 'null'}}}'"


def _sites(root: Path, subjects: Collection[str]) -> dict[str, str]:
    """Subject -> site, from participants.tsv."""
    path = root / "participants.tsv"
    if not path.is_file():
        if path.is_symlink():
            warnings.warn(f"{path}: no site is read: {NOT_HERE}", stacklevel=3)
        return {}
    columns = {name.casefold(): name for name in read_header(path)}
    if "participant_id" not in columns:
        found = ", ".join(columns.values())
        warnings.warn(f"{path}: no site is read: its columns, by tabs, are {found}, not participant_id", stacklevel=3)
    if not {"participant_id", "site"} <= columns.keys():
        return {}
    sites, several = dict[str, str](), list[str]()
    for row in read_rows(path):
        subject, site = row[columns["participant_id"]], row[columns["site"]]
        if site not in EMPTY and sites.setdefault(subject, site) != site:
            several.append(f"{subject} ({sites[subject]}, {site})")
    if several:
        told = f"{len(several)} rows give a subject another site, like {several[0]}: the first is taken"
        warnings.warn(f"{path}: {told}", stacklevel=3)
    return {subject: sites[name] for subject, name in match_names(path, sites, subjects).items()}
