"""Volumes of image files, checked, written as NIfTI or FreeSurfer's, and reoriented; `asa.data.io.formats` opens them.

Arrays are (x, y, z) in the axes of the file, and brought to RAS+ and back without interpolation.
"""

import hashlib
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from asa.data.io.files import FREESURFER, gzipped, write_whole
from asa.data.io.formats import is_nifti, load, stores_orientation, three_d, voxels_of

GEOMETRY_TOLERANCE = 0.1  # mm between the corners of two volumes on the same grid
ITK_SHEAR = 2e-4  # cosine between two axes, above which ITK refuses a file (SimpleITK 2.5)
LARGEST_DISAGREEMENT = 1.0  # mm between the corners by qform and by sform, above which a warning is given
LARGEST_SULCI = 0.02  # of a head, which is on five sides of them; 0.004 to 0.009 of brains, with a hole of 2 cm 0.025
NEARLY_WHOLE = 0.02  # a label map stored with a slope of many digits is off by this much


@dataclass(frozen=True)
class Volume:
    """A volume as it is stored in its file."""

    data: np.ndarray  # (x, y, z) in the axes of the file; float32 for images, an integer type for labels
    affine: np.ndarray  # (4, 4) float64, voxel index to mm in RAS+
    header: Any  # of nibabel, opaque to callers; `write_label` copies it


def read_image(path: str | Path, *, nan: str = "refuse") -> Volume:
    """Read an image, (x, y, z) float32, with the header's intensity scaling applied.

    Args:
        path: `.nii`, `.nii.gz`, either file of an Analyze or NIfTI pair (`.hdr`/`.img`, also gzipped), `.mgz` or `.mgh`
            of FreeSurfer, or `.nrrd` or `.mha` with its voxels in the same file.
        nan: "refuse", or "zero" for a background of NaN, which reaches the border of the volume: it becomes 0, with a
            warning. NaN anywhere else, also where it reaches from the border into the head, and inf, are refused.

    Raises:
        FileNotFoundError: the file, or the other file of its pair, is missing.
        ValueError: empty, damaged, not an image, NaN or inf, not 3-D, or without a valid affine.
        ImportError: a `.nrrd` or `.mha` without SimpleITK.
    """
    image = load(path)
    return Volume(three_d(_intensities(image, path, nan), path), _affine(image, path), image.header)


def read_slice(path: str | Path) -> np.ndarray:
    """Read a single slice, `(H, W)` float32; the first axis of the file is W; raises as `read_image`."""
    data = _intensities(load(path), path)
    sizes = [n for n in data.shape if n > 1]
    if len(sizes) != 2:
        raise ValueError(f"{path}: shape {data.shape} is not one slice; split the volume into slices, one per file")
    return np.ascontiguousarray(data.reshape(sizes).T)


def check_same_slice(low: str | Path, high: str | Path) -> None:
    """Raise a ValueError for two slices whose headers put their corners more than a voxel of the first one apart.

    The numbers of voxels may differ. Slices of different sizes with one affine are not compared: it cannot be right.
    """
    (affine, shape), (other, size) = ((image.affine, (*image.shape, 1)[:3]) for image in (load(low), load(high)))
    if shape != size and np.array_equal(affine, other):
        return
    ends = np.array([(*corner, 1) for corner in itertools.product((0, 1), repeat=3)])  # in parts of the sides
    corners = [(ends * (*sides, 1) - (0.5, 0.5, 0.5, 0)) @ grid.T for grid, sides in ((affine, shape), (other, size))]
    apart = float(np.linalg.norm((corners[0] - corners[1])[:, :3], axis=1).max())
    if apart > spacing_of(affine).max():
        raise ValueError(
            f"{high}: its header puts a corner {apart:.1f} mm from that of {low}, more than a voxel: resample one onto "
            "the other, or copy the correct header"
        )


def read_label(path: str | Path) -> Volume:
    """Read a label map, (x, y, z), as integers; values that are all within 0.02 of one are rounded, with a warning.

    The type is the smallest that `write_label` would use.

    Raises:
        FileNotFoundError, ValueError: as in `read_image`, or a value is not a whole number.
    """
    image = load(path)
    data = voxels_of(image, path)
    if data.dtype.kind == "f":
        whole = np.rint(data)
        wrong = ~np.isclose(data, whole, rtol=0, atol=NEARLY_WHOLE)  # NaN and inf are never close
        if wrong.any():
            value = data[wrong].flat[0]
            raise ValueError(
                f"{path}: {int(wrong.sum())} label values are not whole numbers (one is {value:g}); "
                "give a label map that was resampled with nearest neighbour"
            )
        if (off := np.abs(data - whole).max()) > 1e-4:
            warnings.warn(f"{path}: label values are up to {off:.3f} from whole numbers, and are rounded", stacklevel=2)
        data = whole
    data = data.astype(_label_dtype(data, path), order="F")
    return Volume(three_d(data, path), _affine(image, path), image.header)


def write_label(path: str | Path, data_xyz: np.ndarray, like: Volume, *, make_folder: bool = True) -> None:
    """Write a label map on the grid of another volume, with the header of that volume.

    qform, sform, their codes and the units are those of `like`, of which `.mgz` and `.mgh` have the affine only; the
    type is uint8, or int16 or int32 where the values need it, with slope 1. Equal input gives equal bytes.

    Args:
        data_xyz: integers or bool, of the shape of `like`, in the axes of its file.
        make_folder: as for `asa.data.io.files.whole_file`.

    Raises:
        ValueError: another shape, not integers, or another file ending than `write_image` takes.
    """
    if data_xyz.shape != like.data.shape:
        raise ValueError(f"{path}: label of shape {data_xyz.shape} does not fit its image of shape {like.data.shape}")
    if data_xyz.dtype.kind not in "biu":
        raise ValueError(f"{path}: labels must be integers, not {data_xyz.dtype}; take the argmax first")
    dtype = _label_dtype(data_xyz, path)
    # nibabel keeps qform, sform and codes if the affine equals the header's best affine
    image = nib.Nifti1Image(data_xyz.astype(dtype), like.affine, like.header if is_nifti(like.header) else None)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the display window of the image
    _write(path, image, dtype, make_folder)


def write_image(
    path: str | Path,
    data_xyz: np.ndarray,
    affine: np.ndarray,
    *,
    dtype: np.dtype | type = np.float32,
    make_folder: bool = True,
) -> None:
    """Write an image (x, y, z) atomically, in units of mm, as `.nii`, `.nii.gz`, `.mgz` or `.mgh`.

    Args:
        affine: (4, 4), voxel index to mm in RAS+; written as both sform and qform, code 1 (scanner).
        dtype: type on disk; values are rounded for integer types.
        make_folder: as for `asa.data.io.files.whole_file`.

    Raises:
        ValueError: another file ending, or values outside `dtype`.
    """
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        data_xyz = np.rint(data_xyz)
        limits = np.iinfo(dtype)
        if data_xyz.min() < limits.min or data_xyz.max() > limits.max:
            raise ValueError(f"{path}: values {data_xyz.min():g} to {data_xyz.max():g} do not fit {dtype}")
    image = nib.Nifti1Image(data_xyz.astype(dtype), affine, dtype=dtype)  # of int64 nibabel asks for it
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    _write(path, image, dtype, make_folder)


def identity_of(volume: Volume) -> str:
    """Half of the SHA-256 of a scan's shape and values in RAS+ axes as float32, 32 hexadecimal digits.

    File name, compression, data type, header and the order of the axes do not change it; resampling, cropping and
    rescaling do.
    """
    data = to_ras(volume.data, volume.affine)[0]
    digest = hashlib.sha256(f"{data.shape}".encode())
    digest.update(np.ascontiguousarray(data + 0.0, dtype="<f4").tobytes())  # -0.0 is 0
    return digest.hexdigest()[:32]


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size along the array's axes in mm, (3,) float64."""
    return np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)


def check_same_geometry(a: Volume, b: Volume, what: str) -> None:
    """Raise a ValueError, which begins with `what`, for two volumes of other shapes, or corners over 0.1 mm apart."""
    if a.data.shape != b.data.shape:
        raise ValueError(f"{what}: shapes {a.data.shape} and {b.data.shape} differ; resample one onto the other first")
    apart = _corners_apart(a.affine, b.affine, a.data.shape)
    if apart > GEOMETRY_TOLERANCE:
        codes = axis_codes(a.affine), axis_codes(b.affine)
        advice = "resample one onto the other, or copy the correct header"
        if codes[0] != codes[1]:  # with the other's header one would be mirrored
            advice = f"the axes of one point to {codes[0]} and of the other to {codes[1]}: reorient one"
        raise ValueError(
            f"{what}: same shape, but their corners are {apart:.2f} mm apart (at most {GEOMETRY_TOLERANCE}); {advice}"
        )


def _corners_apart(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """The largest distance in mm between the corners of two grids of one shape."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in shape))])
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


def to_ras(data_xyz: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Permute and flip the axes of an array (x, y, z) of a file to the nearest RAS+ axes; no value changes.

    Returns:
        The array in RAS+ axes, its affine, and the orientation (3 rows: RAS axis, +1 or -1) for `from_ras`.
    """
    orientation = nib.orientations.io_orientation(affine)
    data = nib.orientations.apply_orientation(data_xyz, orientation)
    data_affine = affine @ nib.orientations.inv_ornt_aff(orientation, data_xyz.shape)
    return data, data_affine, [[int(axis), int(flip)] for axis, flip in orientation]


def from_ras(data_ras: np.ndarray, orientation: list[list[int]]) -> np.ndarray:
    """Undo `to_ras`: an array (x, y, z) in RAS+ axes, in the axes of the file."""
    ras = [[axis, 1] for axis in range(3)]
    back = nib.orientations.ornt_transform(np.array(ras), np.array(orientation))
    return nib.orientations.apply_orientation(data_ras, back)


def axis_codes(affine: np.ndarray) -> str:
    """Directions of an array's axes in three letters, like `LAS`."""
    return "".join(str(code) for code in nib.orientations.aff2axcodes(affine))


def _intensities(image: Any, path: str | Path, nan: str = "refuse") -> np.ndarray:
    """The voxels as float32, all of them finite."""
    data = voxels_of(image, path).astype(np.float32, order="F", copy=False)
    wrong = ~np.isfinite(data)
    if nan == "zero" and (background := _outside(np.isnan(data))).any():
        known = data[~wrong] if not wrong.all() else np.zeros(1)
        inside = _surrounded(background, data > (known.min() + known.mean(dtype=np.float64)) / 2)
        data = np.where(background, np.float32(0), data)
        wrong &= inside | ~background
        warnings.warn(f"{path}: {background.sum()} voxels of the background are NaN, and are set to 0", stacklevel=3)
    if count := np.count_nonzero(wrong):
        zero = ", or set prepare.nan=zero if they are its background (of asa-prepare, whose store can be predicted)"
        where, advice = (" inside the head", "") if nan == "zero" else ("", zero)
        raise ValueError(
            f"{path}: {count} voxels{where} are NaN or infinite; repair the image or leave the case out{advice}"
        )
    return data


def _outside(mask: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that reach the border of the volume, along an axis of more than one voxel."""
    border = mask.copy()
    border[tuple(slice(1, -1) if size > 1 else slice(None) for size in mask.shape)] = False
    return np.asarray(ndimage.binary_propagation(border, mask=mask))


def _surrounded(background: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The part of a background with a head on five or six of its sides, like a hole; none where that may be sulci."""
    sides = np.zeros(head.shape, np.uint8)
    for axis in range(head.ndim):
        sides += np.logical_or.accumulate(head, axis=axis)
        sides += np.flip(np.logical_or.accumulate(np.flip(head, axis), axis=axis), axis)
    inside = background & (sides >= 5)
    return inside & (inside.sum() > LARGEST_SULCI * head.sum())


def _affine(image: Any, path: str | Path) -> np.ndarray:
    header = image.header
    if isinstance(header, nib.AnalyzeImage.header_class) and not is_nifti(header):
        warnings.warn(
            f"{path}: Analyze stores no orientation; assumed to be {axis_codes(image.affine)}; check left and right, "
            "and state the orientation with asa-orient if this is wrong",
            stacklevel=3,
        )
    elif not stores_orientation(header):
        raise ValueError(
            f"{path}: no orientation{' (qform and sform codes are both 0)' if '.nii' in Path(path).name else ''}; find "
            "out the directions of its axes, left and right above all, and state them with asa-orient"
        )
    elif is_nifti(header) and header["qform_code"] and header["sform_code"]:
        _compare_codes(header, path)
    affine = np.asarray(image.affine, dtype=np.float64)
    spacing = spacing_of(affine)
    axes = affine[:3, :3] / np.maximum(spacing, 1e-3)
    if not np.isfinite(affine).all() or (spacing < 1e-3).any() or abs(np.linalg.det(axes)) < 1e-2:
        raise ValueError(f"{path}: the affine is singular or not finite; correct the header, or convert the file again")
    shear = np.abs(axes.T @ axes - np.eye(3)).max()  # cosine between two axes, 0 for right angles
    if shear > ITK_SHEAR and not (is_nifti(header) and header["qform_code"]):
        warnings.warn(
            f"{path}: its axes are not at right angles ({shear:.1%} shear), and it has no qform: tools with ITK "
            "(ITK-SNAP, Slicer, ANTs) refuse it, and label maps on its grid",
            stacklevel=3,
        )
    return affine


def _compare_codes(header: Any, path: str | Path) -> None:
    """Warn if qform and sform disagree, of which nibabel reads the sform and ITK the qform."""
    try:
        affines = header.get_qform(), header.get_sform()
        codes = [axis_codes(affine) for affine in affines]
        apart = _corners_apart(*affines, header.get_data_shape()[:3])
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return  # not a rotation, or singular, which is checked separately
    if codes[0] != codes[1]:
        warnings.warn(
            f"{path}: qform is {codes[0]}, but sform is {codes[1]} (used); check left and right", stacklevel=4
        )
    elif apart > LARGEST_DISAGREEMENT:
        axes = [affine[:3, :3] / spacing_of(affine) for affine in affines]
        turn = np.degrees(np.arccos(np.clip((np.trace(axes[0].T @ axes[1]) - 1) / 2, -1, 1)))
        warnings.warn(
            f"{path}: qform and sform (used) differ by {turn:.1f} degrees and up to {apart:.1f} mm: tools that read "
            "the qform, like those with ITK, show the head in another place; make both the same",
            stacklevel=4,
        )


def _label_dtype(data: np.ndarray, path: str | Path) -> np.dtype:
    low, high = int(data.min()), int(data.max())
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"{path}: label values {low} to {high} are too large; renumber them below 2147483648")


def _write(path: str | Path, image: Any, dtype: np.dtype, make_folder: bool) -> None:
    path = Path(path)
    if path.name.endswith(FREESURFER):
        image = nib.MGHImage(np.asarray(image.dataobj, dtype), image.affine)
    elif path.name.endswith((".nii", ".nii.gz")):
        image.header.set_data_dtype(dtype)
        image.header.set_slope_inter(1, 0)
    else:
        raise ValueError(f"{path}: images are written as .nii, .nii.gz, .mgz or .mgh; change the ending")
    payload = image.to_bytes()
    write_whole(path, gzipped(payload) if path.suffix in (".gz", ".mgz") else payload, make_folder=make_folder)
