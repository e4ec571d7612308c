"""Files that store no orientation, written as NIfTI with the orientation that the user states."""

import filecmp
import tempfile
from pathlib import Path

from asa.data.io.files import check_present, matching_files
from asa.data.io.nifti import IMAGE_ENDINGS, orientation_of, write_oriented
from asa.data.io.parallel import each_tried


def orient_files(source: Path, out: Path, axes: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Write each file under `source` to the same path under `out`, with the ending `.nii.gz`; see `write_oriented`.

    `source` is a file, or a folder that is searched with its subfolders. Both files of an Analyze pair are one image. A
    file in `out` that differs from what would be written is a failure.

    Returns:
        Files by their path inside the folder: written, kept because they store an orientation, and failed (-> reason).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: invalid axes, no image, two images with the same name, or an `out` inside the folder.
    """
    if not source.is_dir():
        check_present(source, " or folder")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={out} lies in {source}, whose files are read: choose a folder outside it")
    orientation_of(axes)  # checked before any file is read

    def orient(job: tuple[str, Path]) -> bool:
        name, path = job
        target = out / f"{name}.nii.gz"
        if not target.exists():
            return write_oriented(target, path, axes)
        with tempfile.TemporaryDirectory(prefix="asa-") as space:
            made = Path(space) / target.name
            written = write_oriented(made, path, axes)
            if written and not filecmp.cmp(made, target, shallow=False):
                raise ValueError(f"{target}: exists, with other content: move it away, or choose another out=")
            return written

    tried = list(each_tried(orient, sorted(_by_name(source).items()), title="orient", unit="file"))
    written = [name for (name, _), new, _ in tried if new]
    kept = [name for (name, _), new, _ in tried if new is False]
    return written, kept, {name: reason for (name, _), _, reason in tried if reason}


def _by_name(source: Path) -> dict[str, Path]:
    """The images of a folder, or one file, by their path inside it without the ending."""
    root = source if source.is_dir() else source.parent
    found: dict[str, Path] = {}
    for path in matching_files(source, "**/*") if source.is_dir() else [source]:
        ending = next((end for end in IMAGE_ENDINGS if path.name.endswith(end)), None)
        if ending is None or path.name.startswith("."):
            continue
        name = str(path.relative_to(root)).removesuffix(ending)
        first = found.setdefault(name, path)
        if first != path and {Path(one.name.removesuffix(".gz")).suffix for one in (first, path)} != {".hdr", ".img"}:
            raise ValueError(f"{first} and {path} would both become {name}.nii.gz: remove one")
    if not found:
        raise ValueError(f"{source}: no image ({', '.join(IMAGE_ENDINGS)}) found")
    return found
