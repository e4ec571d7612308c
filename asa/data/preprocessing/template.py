"""The ICBM 152 nonlinear 2009a symmetric template from the package nilearn: 1 mm, skull-stripped.

Fonov et al., NeuroImage 54 (2011); Fonov et al., NeuroImage 47 (2009).
"""

from functools import lru_cache

import numpy as np
from scipy import ndimage

from asa.errors import require

NAME = "ICBM 152 nonlinear 2009a symmetric"
LOADERS = {"t1": "load_mni152_template", "gm": "load_mni152_gm_template", "wm": "load_mni152_wm_template"}


@lru_cache(maxsize=3)
def load_map(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """One map of the template.

    Args:
        kind: "t1", 0 outside the brain; "gm" or "wm", fractions from 0 to 1.

    Returns:
        The map (D, H, W) float32 in RAS+ axes, read-only, and its affine (4, 4), voxel (x, y, z) to mm.

    Raises:
        ImportError: nilearn is not installed.
    """
    datasets = require("nilearn.datasets", "phantom", f'the template {NAME} (also part of "asa-mri[prepare]")')
    image = getattr(datasets, LOADERS[kind])(resolution=1)
    data = np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)
    data.setflags(write=False)
    return data, np.asarray(image.affine, dtype=np.float64)


@lru_cache(maxsize=1)
def brain_centre() -> np.ndarray:
    """Centre of the bounding box of the template's brain, (x, y, z) in mm; raises as `load_map`."""
    template, affine = load_map("t1")
    box = ndimage.find_objects((template > 0).astype(np.uint8))[0]
    voxel = [(side.start + side.stop - 1) / 2 for side in reversed(box)]
    return np.asarray(affine[:3, :3] @ voxel + affine[:3, 3])
