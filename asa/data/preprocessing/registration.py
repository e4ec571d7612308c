"""The ICBM 152 nonlinear 2009a symmetric template, and affine registration of a brain to it.

The template is that of nilearn: 1 mm, skull-stripped (Fonov et al., NeuroImage 47 (2009); NeuroImage 54 (2011)).

Arrays are (D, H, W) in RAS+ axes. Points of a scan are (d, h, w) in mm from its array's centre, along the array's axes;
points of the template are (d, h, w) in mm of its own space: z, y, x.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import ndimage

from asa.data.preprocessing.resampling import Lengths, bounding_box, grid_map, reversed_axes, sample_affine, translation
from asa.errors import require

NAME = "ICBM 152 nonlinear 2009a symmetric"
LOADERS = {"t1": "load_mni152_template", "gm": "load_mni152_gm_template", "wm": "load_mni152_wm_template"}  # of nilearn
# Field of view in the template's space, mm along D, H, W: the brain with a margin for larger brains, and below it for
# the brain stem, which the template's array cuts off. Symmetric about x = 0.
FIELD_OF_VIEW = ((-94.0, 98.0), (-128.0, 96.0), (-96.0, 96.0))
LEVELS = ((4, 2.0), (2, 1.0))  # shrink factor of the template, smoothing in mm
SAMPLED = 0.25  # fraction of the template's voxels, drawn with a fixed seed
BINS = 32
PADDING = 30.0  # mm of zeros around the brain, independent of the file: only points inside both arrays are compared


@lru_cache(maxsize=3)
def load_map(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A map of the template, (D, H, W) float32, read-only, and its affine (4, 4), voxel (x, y, z) to mm.

    The kind is "t1", 0 outside the brain, or "gm" or "wm", fractions from 0 to 1.
    """
    datasets = require("nilearn.datasets", "phantom", f'the template {NAME} (also part of "asa-mri[prepare]")')
    image = getattr(datasets, LOADERS[kind])(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)
    data.setflags(write=False)
    return data, np.asarray(image.affine, dtype=np.float64)


@lru_cache(maxsize=1)
def brain_centre() -> np.ndarray:
    """Centre of the bounding box of the template's brain, (x, y, z) in mm."""
    template, affine = load_map("t1")
    box = bounding_box(template > 0)
    voxel = [(side.start + side.stop - 1) / 2 for side in reversed(box)]
    return np.asarray(affine[:3, :3] @ voxel + affine[:3, 3])


def register_to_template(brain: np.ndarray, spacing: Lengths, rotation: np.ndarray) -> np.ndarray:
    """Find the affine map (4, 4) of template points to scan points: mutual information (Mattes), from coarse to fine.

    Args:
        brain: (D, H, W), 0 outside the brain and above 0 in it, any contrast.
        spacing: voxel size in mm along D, H, W.
        rotation: (3, 3), from the scanner's axes (d, h, w) to the array's, according to the header. The search starts
            aligned with the array or with the scanner, whichever fits better.

    Raises:
        ValueError: an empty image, or the search fails.
    """
    template, template_affine = load_map("t1")
    if not (brain > 0).any():
        raise ValueError("registration needs a brain, but the image is empty")
    half = (np.array(brain.shape) - 1) / 2 * np.asarray(spacing)
    bounded = np.clip(brain, 0, np.percentile(brain[brain > 0], 99.5))
    box = bounding_box(brain > 0)
    pad = [math.ceil(PADDING / side) for side in spacing]
    start = np.array([side.start for side in box]) - pad
    with simpleitk("registration to the template") as sitk:
        fixed = sitk_image(sitk, template, (1.0, 1.0, 1.0), template_affine[:3, 3][::-1])
        padded = np.pad(bounded[box], [(n, n) for n in pad])
        moving = sitk_image(sitk, padded, spacing, start * np.asarray(spacing) - half)
        starts = [_start(sitk, brain, spacing, turned) for turned in (np.eye(3), rotation)]
        found = _optimise(sitk, fixed, moving, starts)
        matrix, centre = np.array(found.GetMatrix()).reshape(3, 3), np.array(found.GetCenter())
    result = translation(centre + np.array(found.GetTranslation()) - matrix @ centre)
    result[:3, :3] = matrix
    return reversed_axes(result)  # SimpleITK's points are (x, y, z)


def _optimise(sitk: Any, fixed: Any, moving: Any, starts: Sequence[Any]) -> Any:
    """Optimise the best of the initial transforms in place, and return it."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLED, seed=1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.01, numberOfIterations=150, relaxationFactor=0.6, gradientMagnitudeTolerance=1e-5
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([factor for factor, _ in LEVELS])
    method.SetSmoothingSigmasPerLevel([sigma for _, sigma in LEVELS])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    fits = []
    for start in starts:
        method.SetInitialTransform(start, inPlace=False)
        fits.append(method.MetricEvaluate(fixed, moving))
    best = starts[int(np.argmin(fits))]
    method.SetInitialTransform(best, inPlace=True)
    method.Execute(fixed, moving)
    return best


def _start(sitk: Any, brain: np.ndarray, spacing: Lengths, rotation: np.ndarray) -> Any:
    """The initial transform with this rotation that matches the centres of mass and the brain volumes."""
    template, template_affine = load_map("t1")
    size = ((brain > 0).sum() * float(np.prod(spacing)) / (template > 0).sum()) ** (1 / 3)
    centre = np.array(ndimage.center_of_mass(template > 0)) + template_affine[:3, 3][::-1]
    middle = (np.array(brain.shape) - 1) / 2
    target = (np.array(ndimage.center_of_mass(brain > 0)) - middle) * np.asarray(spacing)
    start = sitk.AffineTransform(3)
    start.SetMatrix((size * rotation)[::-1, ::-1].ravel().tolist())
    start.SetCenter(centre[::-1].tolist())
    start.SetTranslation((target - centre)[::-1].tolist())
    return start


def template_overlap(inside: np.ndarray, pose: np.ndarray, spacing: Lengths) -> float:
    """Dice of a brain mask (D, H, W), registered by a pose (4, 4) from template to scan points, and the template's."""
    template, affine = load_map("t1")
    brain = template > 0
    centre = (np.array(template.shape) - 1) / 2 + affine[:3, 3][::-1]  # of the template's array, in its space
    matrix = grid_map(pose @ translation(centre), template.shape, (1.0, 1.0, 1.0), inside.shape, spacing)
    moved = sample_affine(inside.astype(np.float32), matrix, template.shape) >= 0.5
    return float(2 * (moved & brain).sum() / max(moved.sum() + brain.sum(), 1))


def sitk_image(sitk: Any, array: np.ndarray, spacing: Lengths, origin: Lengths = (0, 0, 0)) -> Any:
    """A SimpleITK image with the axes of the array, bool or float32: its points are our (x, y, z), not LPS."""
    dtype = np.uint8 if array.dtype == bool else np.float32
    image = sitk.GetImageFromArray(np.ascontiguousarray(array, dtype=dtype))
    image.SetSpacing([float(side) for side in spacing][::-1])
    image.SetOrigin(np.asarray(origin, dtype=np.float64)[::-1].tolist())
    return image


@contextmanager
def simpleitk(purpose: str) -> Iterator[Any]:
    """SimpleITK on one thread, as with more, sums would differ between runs; its errors as a ValueError."""
    sitk = require("SimpleITK", "prepare", purpose)
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield sitk
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1]
        raise ValueError(f"{purpose} fails ({reason}); check the image") from None
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
