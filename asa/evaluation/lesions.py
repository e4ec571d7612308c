"""Lesion-wise metrics of the WMH challenge of 2017 and of BraTS 2023.

A lesion is a connected component with 26-connectivity (across faces, edges and corners).
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.ndimage import binary_dilation, find_objects, generate_binary_structure, label

from asa.evaluation.metrics import Spacing, check_masks, check_spacing, dice, hd95_by_area

CONNECTIVITY = generate_binary_structure(3, 3)

# BraTS 2023, adult glioma. True lesions that meet after dilation are one lesion, and a predicted lesion that overlaps
# the dilated lesion belongs to it.
DILATIONS = 3
DILATION = generate_binary_structure(3, 2)  # across faces and edges
MIN_VOLUME_MM3 = 50.0  # true lesions of at most this volume are not scored
UNMATCHED_MM = 374.0  # HD95 of a lesion without a partner


# ---- WMH 2017 ----


def lesion_recall(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Fraction of the true lesions that the prediction overlaps; 1 if there are none.

    Arguments and errors as of `dice`.
    """
    check_masks(prediction, truth)
    lesions, count = label(truth, CONNECTIVITY)
    return len(np.unique(lesions[prediction & truth])) / count if count else 1.0


def lesion_f1(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of lesion recall and lesion precision, the fraction of predicted lesions that overlap a true one.

    Recall is 1 without true lesions, precision is 1 without predicted ones. Arguments and errors: see `dice`.
    """
    recall, precision = lesion_recall(prediction, truth), lesion_recall(truth, prediction)
    return 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0


# ---- BraTS 2023 ----


def lesionwise_dice(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    """Mean over lesions of the Dice coefficient of a true lesion and the predicted lesions that belong to it.

    True lesions without a prediction and predicted lesions without a truth count as 0. True lesions of at most
    50 mm3 are excluded. If no lesion is left, the mean is 1. Arguments and errors: see `asa.evaluation.metrics.hd95`.
    """
    return float(np.mean(_lesion_scores(prediction, truth, spacing, dice, worst=0.0) or 1.0))


def lesionwise_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> float:
    """As `lesionwise_dice`, for HD95 by area in mm: 374 mm for a lesion without a partner, 0 if no lesion is left."""
    hd95 = partial(hd95_by_area, spacing=spacing)
    return float(np.mean(_lesion_scores(prediction, truth, spacing, hd95, worst=UNMATCHED_MM) or 0.0))


def _lesion_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Spacing,
    score: Callable[[np.ndarray, np.ndarray], float],
    worst: float,
) -> list[float]:
    """The score of each true lesion above the minimum volume, and the worst score for each unmatched predicted one."""
    check_masks(prediction, truth)
    lesions, _ = label(binary_dilation(truth, DILATION, DILATIONS), CONNECTIVITY)
    lesions[~truth] = 0
    predicted, count = label(prediction, CONNECTIVITY)
    voxel = float(np.prod(check_spacing(spacing)))
    unmatched, scores = set(range(1, count + 1)), []
    boxes = find_objects(predicted)
    for number, own in enumerate(find_objects(lesions), start=1):
        around = tuple(slice(max(side.start - DILATIONS, 0), side.stop + DILATIONS) for side in own)
        near = binary_dilation(lesions[around] == number, DILATION, DILATIONS)
        matched = np.setdiff1d(predicted[around][near], [0])
        unmatched -= set(matched.tolist())
        if np.count_nonzero(lesions[own] == number) * voxel > MIN_VOLUME_MM3:
            sides = zip(own, *(boxes[k - 1] for k in matched), strict=True)  # of the smallest box around all of them
            box = tuple(slice(min(part.start for part in side), max(part.stop for part in side)) for side in sides)
            pair = np.isin(predicted[box], matched), lesions[box] == number
            scores.append(score(*pair) if len(matched) else worst)
    return scores + [worst] * len(unmatched)
