"""Files that store no orientation, written as NIfTI with the orientation that the user states."""

import filecmp
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from asa.data.io.files import IMAGE_ENDINGS, check_present, matching_files
from asa.data.io.formats import load, stores_orientation, three_d, voxels_of
from asa.data.io.nifti import write_image
from asa.data.io.parallel import each_tried


def orient_files(source: Path, out: Path, axes: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Write each file under `source`, a file or folder, to the same path under `out`, with the ending `.nii.gz`.

    Voxels keep their order and values, and integers their type; floats and scaled intensities become float32. The
    origin is the centre of the volume. Both files of an Analyze pair are one image. A file in `out` that differs from
    what would be written is a failure.

    Args:
        axes: directions of the array's axes in three letters, like `ASL`.

    Returns:
        Files by their path inside the folder: written, kept because they store an orientation, and failed (-> reason).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: invalid axes, no image, two images with the same name, or an `out` inside the folder.
    """
    if not source.is_dir():
        check_present(source, " or folder")
    elif out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={out} lies in {source}, whose files are read: choose a folder outside it")
    orientation = _orientation_of(axes)

    def orient(job: tuple[str, Path]) -> bool:
        name, path = job
        target = out / f"{name}.nii.gz"
        if not target.exists():
            return _write_oriented(target, path, orientation)
        with tempfile.TemporaryDirectory(prefix="asa-") as space:
            made = Path(space) / target.name
            written = _write_oriented(made, path, orientation)
            if written and not filecmp.cmp(made, target, shallow=False):
                raise ValueError(f"{target}: exists, with other content: move it away, or choose another out=")
            return written

    tried = list(each_tried(orient, sorted(_by_name(source).items()), title="orient", unit="file"))
    written = [name for (name, _), new, _ in tried if new]
    kept = [name for (name, _), new, _ in tried if new is False]
    return written, kept, {name: reason for (name, _), _, reason in tried if reason}


def _orientation_of(axes: str) -> np.ndarray:
    """Three letters as nibabel's orientation: 3 rows (RAS axis, +1 or -1)."""
    try:
        found = nib.orientations.axcodes2ornt(tuple(axes.upper()))
    except ValueError:
        found = np.full((3, 2), np.nan)
    if sorted(found[:, 0].tolist()) != [0, 1, 2]:
        raise ValueError(
            f"axes={axes}: give three letters, the directions of the array's axes: R or L, A or P, S or I, like LAS"
        )
    return found


def _by_name(source: Path) -> dict[str, Path]:
    """The images of a folder, or one file, by their path inside it without the ending."""
    root, files = (source, matching_files(source, "**/*")) if source.is_dir() else (source.parent, [source])
    found: dict[str, Path] = {}
    for path in files:
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


def _write_oriented(path: Path, source: Path, orientation: np.ndarray) -> bool:
    """Write a file with this orientation of its axes; False for a source that stores one."""
    image = load(source)
    if stores_orientation(image.header):
        return False
    data = three_d(voxels_of(image, source), source)
    data = data.astype(np.float32) if data.dtype.kind == "f" else data.astype(data.dtype.newbyteorder("="))
    size = image.header.get_zooms()
    affine = np.diag([0.0, 0, 0, 1])
    for index, (axis, sign) in enumerate(orientation):
        affine[int(axis), index] = sign * size[index]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(data.shape) - 1) / 2
    write_image(path, data, affine, dtype=data.dtype)
    return True
