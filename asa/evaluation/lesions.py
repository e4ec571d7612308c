"""Scores of single lesions: what the WMH challenge of 2017 and BraTS of 2023 count.

A lesion is a connected component; voxels that share a face, an edge or a corner are connected.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.ndimage import binary_dilation, find_objects, generate_binary_structure, label

from asa.evaluation.metrics import Spacing, check_masks, check_spacing, dice
from asa.evaluation.surface_distance import hd95_by_area

TOUCHING = generate_binary_structure(3, 3)

# BraTS 2023, adult glioma: true lesions that meet when dilated so often are one, and a prediction that touches the
# dilated lesion belongs to it; what is not larger than the volume is not scored; the distance of what has no partner.
DILATIONS = 3
DILATION = generate_binary_structure(3, 2)  # across faces and edges
SMALLEST_MM3 = 50.0
UNMATCHED_MM = 374.0


# ---- WMH 2017 ----


def lesion_recall(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true lesions that the prediction touches; 1 if there are none.

    Args:
        prediction: bool `(x, y, z)`.
        truth: bool `(x, y, z)`.

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape.
    """
    check_masks(prediction, truth)
    lesions, count = label(truth, TOUCHING)
    return len(np.unique(lesions[prediction & truth])) / count if count else 1.0


def lesion_f1(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of the lesion recall and of the share of predicted lesions that touch a true one.

    Each share is 1 if there are no such lesions. Arguments and errors are those of `lesion_recall`.
    """
    recall, precision = lesion_recall(prediction, truth), lesion_recall(truth, prediction)
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


# ---- BraTS 2023 ----


def lesionwise_dice(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    """Mean over lesions of the Dice coefficient of a true lesion and the predicted ones that belong to it.

    True lesions without a prediction and predicted lesions without a truth count as 0. True lesions of at most
    50 mm3 are left out. If there is nothing to score it is 1.

    Args:
        prediction: bool `(x, y, z)`.
        truth: bool `(x, y, z)`.
        spacing: voxel size in mm along the three array axes.

    Raises:
        ValueError: masks that are not bool, not 3-D or not of one shape.
    """
    scores = _lesion_scores(prediction, truth, spacing, dice, worst=0.0)
    return float(np.mean(scores)) if scores else 1.0


def lesionwise_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    """As `lesionwise_dice`, of HD95 by area in mm: 374 mm where there is no partner, 0 if there is nothing to score."""
    hd95 = partial(hd95_by_area, spacing=spacing)
    scores = _lesion_scores(prediction, truth, spacing, hd95, worst=UNMATCHED_MM)
    return float(np.mean(scores)) if scores else 0.0


def _lesion_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Spacing,
    score: Callable[[np.ndarray, np.ndarray], float],
    worst: float,
) -> list[float]:
    """The score of each true lesion that is large enough, and the worst for each predicted lesion without a truth."""
    check_masks(prediction, truth)
    lesions, _ = label(binary_dilation(truth, DILATION, DILATIONS), TOUCHING)
    lesions[~truth] = 0
    found, count = label(prediction, TOUCHING)
    voxel = float(np.prod(check_spacing(spacing)))
    unmatched, scores = set(range(1, count + 1)), []
    boxes = find_objects(found)
    for number, own in enumerate(find_objects(lesions), start=1):
        around = tuple(slice(max(side.start - DILATIONS, 0), side.stop + DILATIONS) for side in own)
        near = binary_dilation(lesions[around] == number, DILATION, DILATIONS)
        matched = np.setdiff1d(found[around][near], [0])
        unmatched -= set(matched.tolist())
        if np.count_nonzero(lesions[own] == number) * voxel > SMALLEST_MM3:
            box = _joint([own, *(boxes[k - 1] for k in matched)])
            pair = np.isin(found[box], matched), lesions[box] == number
            scores.append(score(*pair) if len(matched) else worst)
    return scores + [worst] * len(unmatched)


def _joint(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box around several."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )
