"""BIDS trees and derivatives: one image of a suffix for each subject, session and run."""

from __future__ import annotations

import re
from pathlib import Path

from asa.data.cohort import Record, check_records

FOLDERS = ("anat", "t1_linear")  # of the standard; of Clinica's t1-linear pipeline
_ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)")


def records(
    root: str | Path,
    *,
    suffix: str = "T1w",
    channel: str = "t1",
    session: str | None = None,
    run: str | None = None,
    acq: str | None = None,
    desc: str | None = None,
    space: str | None = None,
) -> list[Record]:
    """Records of `sub-*/[ses-*/]anat/*_SUFFIX.nii[.gz]`, also below `subjects/` as Clinica lays it out.

    The id is sub-XX[_ses-YY][_run-ZZ]; the subject is sub-XX, so that all sessions of a person stay in one
    split.

    Args:
        root: of the dataset or of the derivative.
        suffix: what the file names end in, like T1w, T2w, FLAIR.
        channel: name of this image in the store.
        session, run, acq, desc, space: values of these entities; None takes any.

    Returns:
        Records sorted by id.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing found, or several files for one subject, session and run: the message names the
            entities that tell them apart.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give the root of a BIDS dataset or derivative")
    wanted = {"ses": session, "run": run, "acq": acq, "desc": desc, "space": space}
    wanted = {entity: str(value) for entity, value in wanted.items() if value is not None}
    found: dict[str, tuple[Path, dict[str, str]]] = {}
    for path in _files(root, suffix):
        entities = dict(_ENTITY.findall(path.name.split(f"_{suffix}.")[0]))
        if any(entities.get(entity) != value for entity, value in wanted.items()):
            continue
        id = "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses", "run") if key in entities)
        if id in found:
            raise ValueError(_ambiguous(id, found[id][0], path, found[id][1], entities))
        found[id] = (path, entities)
    result: list[Record] = [
        {"id": id, "subject": f"sub-{entities['sub']}", "images": {channel: str(path.absolute())}}
        for id, (path, entities) in sorted(found.items())
    ]
    chosen = "".join(f" with {entity}-{value}" for entity, value in wanted.items())
    check_records(result, source=f"sub-*/[ses-*/]anat/*_{suffix}.nii[.gz]{chosen} below {root}")
    return result


def _files(root: Path, suffix: str) -> list[Path]:
    patterns = [
        f"{above}sub-*/{session}{folder}/sub-*_{suffix}.nii{gz}"
        for above in ("", "subjects/")
        for session in ("", "ses-*/")
        for folder in FOLDERS
        for gz in ("", ".gz")
    ]
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def _ambiguous(id: str, one: Path, other: Path, first: dict[str, str], second: dict[str, str]) -> str:
    differ = [key for key in ("acq", "desc", "space") if first.get(key) != second.get(key)]
    remedy = f"choose one with {' or '.join(f'{key}=' for key in differ)}" if differ else "leave one of them out"
    return f"{id}: both {one.name} and {other.name} fit; {remedy}"
