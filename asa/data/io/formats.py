"""NIfTI, Analyze, FreeSurfer's, NRRD and MetaImage files as nibabel images, of which no header is trusted."""

import gzip
import io
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder

from asa.data.io.files import FREESURFER, IMAGE_ENDINGS, ITK, check_present
from asa.errors import one_line, reason_of, require

LONGEST_HEADER = 1 << 20  # bytes, with the extensions of a NIfTI file
LARGEST_OFFSET = 1 << 30  # of the voxels in their file, in bytes
PADDING = 1 << 16  # bytes after the voxels that are accepted
TAGS = 1 << 22  # the same in FreeSurfer's files, which keep a colour table and a history there


def load(path: str | Path) -> Any:
    """A nibabel image on bytes in memory.

    Raises:
        FileNotFoundError, ValueError, ImportError: as of `asa.data.io.nifti.read_image`.
    """
    path = Path(path)
    if not path.name.endswith(IMAGE_ENDINGS):
        raise ValueError(f"{path}: not an image that asa reads; give one of {', '.join(IMAGE_ENDINGS)}")
    if path.name.endswith(ITK):
        return _load_itk(path)
    freesurfer = path.name.endswith(FREESURFER)
    single = path.name.endswith((".nii", ".nii.gz")) or freesurfer
    files = [path] if single else _pair(path)
    beginning = _read(files[0], LONGEST_HEADER)
    kind: Any = nib.MGHImage if freesurfer else nib.Nifti1Image
    if not single:
        kind = nib.Nifti1Pair if beginning[344:347] == b"ni1" else nib.AnalyzeImage
    elif not freesurfer and 540 in (int.from_bytes(beginning[:4], order) for order in ("little", "big")):
        kind = nib.Nifti2Image  # by the size of the header
    with _named(path):
        header = kind.header_class.from_fileobj(io.BytesIO(beginning))
        announced = int(header.get_data_offset()), tuple(map(int, header.get_data_shape()))
        itemsize = header.get_data_dtype().itemsize
    pixels = _read_announced(files[-1], *announced, itemsize, TAGS if freesurfer else PADDING)
    with _named(path):
        parts = {"image": pixels} if single else {"header": beginning, "image": pixels}
        image = kind.from_file_map({name: FileHolder(fileobj=io.BytesIO(part)) for name, part in parts.items()})
        if freesurfer:  # nibabel replaces the orientation of a file that states none
            image.header["goodRASFlag"] = int.from_bytes(beginning[28:30], "big")
    for file in files:
        _warn_misnamed(file)
    return image


def voxels_of(image: Any, path: str | Path) -> np.ndarray:
    """The voxels of a nibabel image, scaled as its header says; a ValueError names the file of what are no numbers."""
    if image.get_data_dtype().kind not in "biuf":
        raise ValueError(f"{path}: voxels have type {image.get_data_dtype()}, not numbers; convert to a scalar image")
    try:
        return np.asanyarray(image.dataobj)
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: its voxels cannot be read ({one_line(error)}); copy or convert it again") from None


def three_d(data: np.ndarray, path: str | Path) -> np.ndarray:
    """An array without further axes of one voxel; a ValueError names the file of one that is no volume."""
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise ValueError(f"{path}: shape {data.shape} is not 3-D; give one volume (split a series first)")
    if min(data.shape) < 2:
        raise ValueError(f"{path}: shape {data.shape} is a single slice; asa needs a volume")
    return data


def is_nifti(header: Any) -> bool:
    return isinstance(header, nib.Nifti1Header)


def stores_orientation(header: Any) -> bool:
    if isinstance(header, nib.MGHImage.header_class):
        return int(header["goodRASFlag"]) == 1
    return is_nifti(header) and bool(int(header["qform_code"]) or int(header["sform_code"]))


def check_memory(voxels: float, what: str) -> None:
    """Raise a ValueError, which begins with `what`, if so many float32, with a copy, need over half of the memory."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not 8 * voxels <= memory / 2:
        raise ValueError(f"{what}: {voxels:.3g} voxels do not fit into the memory of this machine")


def _read(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file, decompressed; a file that ends earlier has the length and CRC of its gzip."""
    check_present(path)
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty; copy or download it again")
    try:
        with gzip.open(path) if _is_zipped(path) else path.open("rb") as file:
            return file.read(limit)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip ({error}); copy or download it again") from None


def _is_zipped(path: Path) -> bool:
    """Whether a file is compressed by gzip: by its first bytes, which in an `.img` are voxels of any value."""
    with path.open("rb") as file:
        return path.suffix != ".img" and file.read(2) == b"\x1f\x8b"


def _warn_misnamed(path: Path) -> None:
    zipped = _is_zipped(path)
    if zipped == (path.suffix in (".gz", ".mgz")):
        return
    right = f"{path.name}.gz" if zipped else path.stem
    if path.suffix in FREESURFER:
        right = path.with_suffix(".mgz" if zipped else ".mgh").name
    warnings.warn(
        f"{path}: is {'' if zipped else 'not '}compressed by gzip, though its name says otherwise; it is read as "
        f"it is, but other programs refuse it: rename it to {right}",
        stacklevel=4,
    )


def _read_announced(path: Path, start: int, shape: Sequence[int], itemsize: int, padding: int) -> bytes:
    """The file with the voxels, if it holds what its header announces and at most `padding` bytes more.

    A gzip file of a few bytes may hold any number of them, and a header may announce any number of voxels.
    """
    voxels = math.prod(shape)
    if not 0 <= start <= LARGEST_OFFSET or not shape or min(shape) < 1:
        raise ValueError(f"{path}: its header announces shape {tuple(shape)} from byte {start} on; convert it again")
    check_memory(voxels, f"{path}: shape {tuple(shape)}")
    size = start + voxels * itemsize
    payload = _read(path, size + padding + 1)
    if len(payload) < size:
        raise ValueError(f"{path}: truncated: {len(payload)} of {size} bytes; copy or download it again")
    if len(payload) > size + padding:
        raise ValueError(f"{path}: holds more than the {size} bytes that its header announces; convert it again")
    return payload


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of nibabel about a header as a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # of many types, for the many ways in which a header can be wrong
        raise ValueError(f"{path}: not a NIfTI or Analyze image ({reason_of(error)}); convert it again") from None


def _pair(path: Path) -> list[Path]:
    """Header and image of a pair of files, of which one is given."""
    stem = path.name.removesuffix(".gz")
    is_header = stem.endswith(".hdr")
    other = stem[:-4] + (".img" if is_header else ".hdr")
    for found in (path.with_name(other), path.with_name(other + ".gz")):
        if os.path.lexists(found):
            return [path, found] if is_header else [found, path]
    raise FileNotFoundError(f"{path}: the other file of the pair, {other}, is missing; keep both in one folder")


def _load_itk(path: Path) -> Any:
    """A NRRD or MetaImage file as a nibabel image, with the grid that the file states."""
    sitk = require("SimpleITK", "prepare", f"{path.suffix} files")
    nrrd, beginning = path.suffix == ".nrrd", _read(path, LONGEST_HEADER)
    text = beginning.split(b"\n\n" if nrrd else b"ElementDataFile", 1)[0].decode("latin-1").lower()
    local = nrrd or re.search(rb"ElementDataFile\s*=\s*LOCAL", beginning)
    if re.search(r"^data ?file:", text, re.MULTILINE) or not local:
        raise ValueError(f"{path}: its voxels lie in another file; write both as one, or as NIfTI")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        check_memory(math.prod(reader.GetSize()), f"{path}: shape {reader.GetSize()}")
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        problem = f"not a {path.suffix} image, or damaged ({reason}); copy or convert it again"
        raise ValueError(f"{path}: {problem}") from None
    dimension = image.GetDimension()
    affine = np.eye(4)
    if dimension == 3:
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        affine = np.diag([-1.0, -1, 1, 1]) @ affine  # ITK's axes are LPS
    data = sitk.GetArrayFromImage(image)
    vector = image.GetNumberOfComponentsPerPixel() > 1  # its components are the last axis
    data = data.transpose([*reversed(range(dimension)), *([dimension] if vector else [])])
    states = r"^(transformmatrix|rotation|orientation)\s*="
    if nrrd:
        states = r"^space: *(left-posterior|right-anterior|left-anterior|lp|ra|la)-?s"
    found = nib.Nifti1Image(data, affine, dtype=data.dtype)  # int64, too, which is read and not written
    found.header.set_sform(affine, code=1 if re.search(states, text, re.MULTILINE) else 0)
    return found
