"""Pairs for restoration: degraded and clean volumes with the same names."""

from pathlib import Path

from asa.data.datasets.folder import find_files, has_wildcard, join_texts, name_subjects
from asa.data.datasets.record import NIFTI, Record, existing_folder, make_record, sorted_records


def records(root: str | Path, *, input: str, target: str, subject: str | None = None) -> list[Record]:
    """Records with the channels input (degraded) and target (clean).

    Args:
        root: folder that `input` and `target` start from.
        input, target: two folders of NIfTI files with the same names, which are the ids; or two globs whose wildcards
            match the same text, like `"*_low.nii.gz"` and `"*_full.nii.gz"`.
        subject: regular expression searched in the id, whose group 1 is the subject; None: each pair is one subject.

    Returns:
        Records, in which the missing partner of an image is None.

    Raises:
        ValueError: no image that has a partner.
    """
    root = existing_folder(root, "the degraded and the clean images")
    found = {"input": _images(root, input), "target": _images(root, target)}
    names = sorted(found["input"].keys() | found["target"].keys())
    if names and not found["input"].keys() & found["target"].keys():
        raise ValueError(
            f"{root}: no image of {input!r} has the name of one of {target!r}; rename them, or give globs like "
            "data.input='*_low.nii.gz' data.target='*_full.nii.gz'"
        )
    result = [make_record(name, name, {channel: files.get(name) for channel, files in found.items()}) for name in names]
    name_subjects(result, subject)
    return sorted_records(result, source=f"{input!r} and {target!r} below {root}")


def _images(root: Path, where: str) -> dict[str, Path]:
    """Id -> path, of a folder or a glob."""
    if has_wildcard(where):
        named = [(join_texts(texts), path) for texts, path in find_files(root, where).items()]
    else:
        folder = existing_folder(root / where, "images, or a glob with a *")
        named = [(path.name.removesuffix(ending), path) for ending in NIFTI for path in folder.glob(f"[!.]*{ending}")]
    files: dict[str, Path] = {}
    for name, path in named:
        if name in files:
            raise ValueError(f"{name}: both {files[name]} and {path} have this name; remove one of them")
        files[name] = path.absolute()
    return files
