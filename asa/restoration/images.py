"""2-D images and label maps on disk: PNG, NIfTI slices, DICOM.

Arrays are `C H W` with 1 (grey) or 3 (colour) channels in [0, 1], label maps `H W`.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.datasets.record import existing_folder
from asa.data.io.files import write_whole
from asa.data.io.nifti import read_slice
from asa.errors import require

ENDINGS = (".png", ".nii.gz", ".nii", ".dcm")
WINDOW = "asa-window"  # key of the PNG text with the intensities that 0 and the largest value represent
LARGEST = 178_956_970  # pixels; more are an error in Pillow too
DEFLATED = "1.2.840.10008.1.2.1.99"  # transfer syntax of a DICOM file that is compressed as a whole
DEPTHS = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


def list_pictures(folder: str | Path) -> dict[str, Path]:
    """The images in a folder, one or more: id (name without ending, which has to be unique) -> path, sorted."""
    folder = existing_folder(folder, "images (.png, .nii, .nii.gz or .dcm)")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((end for end in ENDINGS if path.name.lower().endswith(end)), None)
        if ending is None or path.name.startswith("."):
            continue
        name = path.name[: -len(ending)]
        if name in found:
            raise ValueError(f"{name}: both {found[name]} and {path} have this name; remove one of them")
        found[name] = path
    if not found:
        raise ValueError(f"{folder}: no images here ({', '.join(ENDINGS)})")
    return found


def read_picture(path: str | Path, window: Sequence[float] | None = None) -> np.ndarray:
    """Read an image and scale its values to [0, 1].

    Args:
        path: `.png` (grey or colour), `.nii`, `.nii.gz` (one slice) or `.dcm` (grey, in the units of the modality, like
            HU for CT); a ValueError for a damaged one.
        window: (low, high) in the units of the image, which become 0 and 1; other values are clipped. None: the whole
            range of an 8- or 16-bit PNG. A PNG written with a window has the units of that window.

    Returns:
        `(C, H, W)` float32.
    """
    return in_window(*read_values(path, window))


def read_restored(path: str | Path, window: Sequence[float] | None) -> np.ndarray:
    """Read a restored image like `read_picture`; the whole range of a PNG is the window, other files have its units."""
    return read_picture(path, None if _is_png(path) else window)


def read_values(path: str | Path, window: Sequence[float] | None = None) -> tuple[np.ndarray, tuple[float, float]]:
    """Read an image in its own units, `(C, H, W)` float32, and its window; otherwise like `read_picture`."""
    path = Path(path)
    values, stored = _read(path), stored_window(path)
    depth = DEPTHS.get(values.dtype)
    values = values.astype(np.float32)
    if depth is not None and stored is not None:
        values = stored[0] + (stored[1] - stored[0]) / depth * values
    if window is None:
        window = stored or (None if depth is None else (0, depth))
    if window is None:
        raise ValueError(
            f"{path}: give the values that become 0 and 1, like window=[-1000,1000] for CT in HU (asa-finetune: "
            "data.window=[-1000,1000])"
        )
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1)), checked_window(window)


def size_of(path: str | Path) -> tuple[int, int]:
    """Height and width of an image or a label map; of a PNG and a DICOM file only the header is read."""
    path = Path(path)
    if _is_png(path):
        with _opened(path) as opened:
            return opened.height, opened.width
    if path.name.lower().endswith(".dcm"):
        with _dicom_errors(path) as pydicom:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            return int(header.Rows), int(header.Columns)
    height, width = read_slice(path).shape
    return height, width


def in_window(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values scaled to [0, 1] by a window (low, high), and clipped."""
    low, high = window
    return ((values - low) / (high - low)).clip(0, 1)


def common_window(paths: Iterable[str | Path]) -> tuple[float, float] | None:
    """The window that all of these images store, None if none does; a ValueError if they store different ones."""
    found = {stored_window(path): path for path in paths}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        words = ["none" if window is None else f"{window[0]:g} to {window[1]:g}" for window in (one, other)]
        raise ValueError(
            f"{first} stores the window {words[0]}, and {second} {words[1]}: 0 and 1 mean different things in them; "
            "give the window of all, or images of one"
        )
    return next(iter(found), None)


def stored_window(path: str | Path) -> tuple[float, float] | None:
    """The window that `write_picture` stored in a PNG; None for other files."""
    if not _is_png(path):
        return None
    with _opened(Path(path)) as opened:
        try:
            return checked_window(json.loads(opened.info[WINDOW])) if WINDOW in opened.info else None
        except RecursionError:
            raise ValueError(f"{WINDOW} is not a window") from None


def checked_window(window: Sequence[float]) -> tuple[float, float]:
    """Both ends of a window as floats; a ValueError unless these are two finite, increasing numbers."""
    try:
        low, high = map(float, window)
    except (TypeError, ValueError):
        low = high = math.nan
    if isinstance(window, str) or not low < high or not math.isfinite(high - low):
        raise ValueError(f"window={window}: give two finite values, which become 0 and 1, like [-1000,1000]")
    return low, high


def _is_png(path: str | Path) -> bool:
    return str(path).lower().endswith(".png")


def _read(path: Path) -> np.ndarray:
    """Values `(H, W)`, or `(H, W, 3)` of a colour PNG."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if _is_png(path):
        with _opened(path) as opened:
            if opened.mode != "I;16" and any("16" in str(tile[3]) for tile in opened.tile):  # modes in the file
                raise ValueError("16 bits in colour or with transparency, of which Pillow reads 8")
            if opened.mode not in ("L", "RGB", "I;16"):  # palette, transparency, black and white
                return np.asarray(opened.convert("L" if opened.mode in ("1", "LA") else "RGB"))
            return np.asarray(opened)
    return _read_dicom(path) if path.name.lower().endswith(".dcm") else read_slice(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open PNG; errors while it is read name the file."""
    image = require("PIL.Image", "restore", "PNG")
    try:
        with image.open(path) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a usable PNG ({error}); write or copy it again") from None


@contextmanager
def _dicom_errors(path: Path) -> Iterator[Any]:
    """pydicom, whose errors name the file; it raises many types for damaged or compressed ones."""
    pydicom = require("pydicom", "restore", "DICOM")
    try:
        yield pydicom
    except Exception as error:
        raise ValueError(f"{path}: pydicom cannot read this DICOM image ({error})") from None


def _read_dicom(path: Path) -> np.ndarray:
    with _dicom_errors(path) as pydicom:  # a file is not unpacked to more than Pillow's limit for a PNG
        if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
            raise ValueError("it is deflated, and its size is not known before it is unpacked: decompress it")
        header = pydicom.dcmread(path, stop_before_pixels=True)
        voxels = int(header.get("Rows", 0)) * int(header.get("Columns", 0)) * int(header.get("NumberOfFrames") or 1)
        if voxels > LARGEST:
            raise ValueError(f"{voxels:.3g} pixels, more than {LARGEST}")
        found = pydicom.dcmread(path)
        values = np.asarray(pydicom.pixels.apply_modality_lut(found.pixel_array, found), dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"{path}: shape {values.shape}: give grey slices, one per file")
    return values


def write_picture(
    path: Path, image: np.ndarray, window: Sequence[float] | None = None, *, make_folder: bool = True
) -> None:
    """Write `(C, H, W)` in [0, 1] as a PNG, grey with 16 bits or colour with 8, atomically.

    The window, the values (low, high) that 0 and 1 represent, is stored in the file for `read_picture`. `make_folder`
    is as for `asa.data.io.files.whole_file`. A ValueError for values that are not finite.
    """
    if not np.isfinite(image).all():
        raise ValueError(f"{path}: values that are not finite cannot be written")
    grey = len(image) == 1
    depth, dtype = (65535, np.uint16) if grey else (255, np.uint8)
    values = np.rint(np.clip(image, 0, 1) * depth).astype(dtype)
    _write_png(path, values[0] if grey else values.transpose(1, 2, 0), window, make_folder)


def write_regions(path: Path, labels: np.ndarray) -> None:
    """Write a label map `(H, W)` as a 16-bit PNG; a ValueError for labels outside 0 to 65535."""
    if labels.min() < 0 or labels.max() > 65535:
        raise ValueError(f"{path}: labels {labels.min()} to {labels.max()}: a stored label map holds 0 to 65535")
    _write_png(path, labels.astype(np.uint16))


def _write_png(path: Path, values: np.ndarray, window: Sequence[float] | None = None, make_folder: bool = True) -> None:
    """Write a PNG that says who wrote it; a file of somebody else, which has its name, is not replaced."""
    pillow = require("PIL.Image", "restore", "PNG")
    if path.exists() and not path.is_symlink():  # a link is replaced, its file is kept
        writer = None
        with suppress(OSError), pillow.open(path) as image:  # it may be no image
            writer = image.info.get("Software")
        if writer != "asa":
            raise ValueError(f"{path}: exists and is no image that asa wrote: move it away, or choose another out=")
    buffer, notes = io.BytesIO(), require("PIL.PngImagePlugin", "restore", "PNG").PngInfo()
    notes.add_text("Software", "asa")
    if window is not None:
        notes.add_text(WINDOW, json.dumps([float(end) for end in window]))
    pillow.fromarray(np.ascontiguousarray(values)).save(buffer, format="png", pnginfo=notes)
    write_whole(path, buffer.getvalue(), make_folder=make_folder)


def read_regions(path: str | Path) -> np.ndarray:
    """Read a label map, a grey PNG or a NIfTI slice: `(H, W)` int64; a ValueError if it is none."""
    path = Path(path)
    values = _read(path)
    if values.ndim != 2 or (values.dtype.kind == "f" and (values != np.rint(values)).any()):
        raise ValueError(f"{path}: a label map has one whole number per pixel, in a grey PNG or a NIfTI slice")
    if not values.size:
        raise ValueError(f"{path}: the label map is empty")
    return values.astype(np.int64)
