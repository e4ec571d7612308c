"""BIDS datasets and derivatives: one image per channel of each session, or run, of a subject."""

import re
from collections.abc import Mapping
from pathlib import Path

from asa.data.datasets.record import Record, existing_folder, make_record, sorted_records
from asa.data.io.tables import read_rows

CHANNELS = {"t1": "T1w"}
FOLDERS = ("anat", "t1_linear")  # of BIDS, and of Clinica's t1-linear pipeline
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
) -> list[Record]:
    """Records of `sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz]`, also under `subjects/` as in Clinica.

    With one channel each run is a scan with the id sub-XX[_ses-YY][_run-ZZ]. With several channels each session is a
    scan, and a channel that it lacks is None. The subject is sub-XX, so that all its sessions are in one part of a
    split. The site is read from a column `site` of participants.tsv.

    Args:
        root: of the dataset, or of one derivative.
        channels: channel name in the store -> suffix of its files, like `{"t1": "T1w", "flair": "FLAIR"}`; None: the
            T1w as t1.
        label: suffix of the label maps, like dseg; None for an unlabelled cohort.
        label_root: root of the label maps, if it is another folder.
        session, run, acq, desc, space: required values of these entities, for images and label maps; None accepts any.
            A file without a run, or a label map without desc, matches any value.

    Returns:
        Records sorted by id; a missing label map has the path expected from the entities of the image.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing found, or several files for one channel of a scan; the message names the entities that
            distinguish them.
    """
    root = existing_folder(root, "sub-XX, sub-YY, ... (of a BIDS dataset or of one derivative)").absolute()
    channels = channels or CHANNELS
    wanted = {"ses": session, "run": run, "acq": acq, "desc": desc, "space": space}
    chosen = {entity: str(value) for entity, value in wanted.items() if value is not None}
    keys = ("sub", "ses", "run") if len(channels) == 1 else ("sub", "ses")
    found = {channel: _find(root, suffix, chosen, keys) for channel, suffix in channels.items()}
    labels, labels_root = {}, root
    if label is not None:
        labels_root = existing_folder(label_root or root, "the label maps").absolute()
        labels = _find(labels_root, label, chosen, keys, optional=("run", "desc"))
    sites = _sites(root)
    result: list[Record] = []
    for scan in {scan for files in found.values() for scan in files}:
        paths = {channel: files.get(scan) for channel, files in found.items()}
        subject, truth = scan.split("_")[0], labels.get(scan)
        if label is not None and truth is None:
            image = next(path for path in paths.values() if path)
            truth = labels_root / image.relative_to(root).with_name(f"{_stem(image)}_{label}.nii.gz")
        result.append(make_record(scan, subject, paths, site=sites.get(subject, ""), label=truth))
    return sorted_records(result, source=_source(root, channels, chosen))


def _find(
    root: Path, suffix: str, chosen: Mapping[str, str], keys: tuple[str, ...], optional: tuple[str, ...] = ("run",)
) -> dict[str, Path]:
    """Scan, named by its entities `keys`, -> the file with the chosen values, which may lack the `optional` ones."""
    found: dict[str, Path] = {}
    for path in _files(root, suffix):
        entities = entities_of(path)
        if any(entities.get(key, value if key in optional else None) != value for key, value in chosen.items()):
            continue
        scan = "_".join(f"{key}-{entities[key]}" for key in keys if key in entities)
        if scan in found:
            raise ValueError(_ambiguous(scan, found[scan], path))
        found[scan] = path
    return found


def _files(root: Path, suffix: str) -> list[Path]:
    patterns = [
        f"{above}sub-*/{session}{folder}/sub-*_{suffix}.nii{gz}"
        for above in ("", "subjects/")
        for session in ("", "ses-*/")
        for folder in FOLDERS
        for gz in ("", ".gz")
    ]
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def entities_of(path: Path) -> dict[str, str]:
    """Entity -> value of a file name, like `{"sub": "01", "ses": "1"}`, without the suffix."""
    return dict(_ENTITY.findall(_stem(path)))


def _stem(path: Path) -> str:
    """The name of a file without suffix and ending."""
    return path.name.rpartition("_")[0]


def _ambiguous(scan: str, one: Path, other: Path) -> str:
    first, second = entities_of(one), entities_of(other)
    differ = [key for key in ("run", "acq", "desc", "space") if first.get(key) != second.get(key)]
    remedy = f"choose one with {' or '.join(f'data.{key}=' for key in differ)}" if differ else "remove one of them"
    return f"{scan}: both {one.name} and {other.name} match; {remedy}"


def _sites(root: Path) -> dict[str, str]:
    """Subject -> site, from participants.tsv."""
    path = root / "participants.tsv"
    if not path.is_file():
        return {}
    sites = {row.get("participant_id", ""): row.get("site", "") for row in read_rows(path)}
    return {subject: site for subject, site in sites.items() if site not in ("", "n/a")}


def _source(root: Path, channels: Mapping[str, str], chosen: Mapping[str, str]) -> str:
    """The files that were searched for, for the message about an empty cohort."""
    names = "|".join(channels.values())
    entities = "".join(f" with {entity}-{value}" for entity, value in chosen.items())
    pipelines = sorted(f"derivatives/{path.name}" for path in root.glob("derivatives/*/"))
    hint = f" (to read a derivative, give its folder as data.root: {' or '.join(pipelines)})" if pipelines else ""
    return f"sub-*/[ses-*/]anat/*_{names}.nii[.gz]{entities} below {root}{hint}"
