"""What a classification is worth: AUC with an interval, balanced accuracy, calibration, confusion.

Letters: N scans, K classes; shares are probabilities `(N, K)`, truth class indices `(N,)`.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.inference.preprocessing import Intake
from asa.inference.segmentation import PredictSettings
from asa.models.classifier import Classifier
from asa.training.checkpoint import read_model
from asa.training.device import on_device, pick_device
from asa.training.distributed import spread

RESAMPLES = 2000
LEVEL = 0.95
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Scores of a set of scans.

    Args:
        scans, subjects: how many.
        auc: area under the ROC curve; of several classes the mean over those that occur, each against the rest.
        auc_low, auc_high: its 95 % interval over resampled subjects; NaN with less than two.
        balanced_accuracy: mean over the classes that occur of the share that is found.
        ece: expected calibration error: |accuracy - confidence| in 15 bins of the confidence, weighed by their scans.
        confusion: scans of class (row) that were given a class (column).
    """

    scans: int
    subjects: int
    auc: float
    auc_low: float
    auc_high: float
    balanced_accuracy: float
    ece: float
    confusion: list[list[int]]


def predict_classes(model: nn.Module, dataset: CropDataset) -> np.ndarray:
    """Probabilities `(N, K)` of all records, crops without augmentation. Several processes share the records.

    Args:
        model: a `Classifier` in evaluation mode.
        dataset: with "mirror" where the network looks at it.
    """
    device = next(model.parameters()).device

    def shares(index: int) -> list[float]:
        batch = on_device(collate([dataset[index, 0]]), device)
        return model(batch["image"], batch.get("mirror")).float().softmax(dim=1)[0].tolist()

    with torch.inference_mode():
        return np.array(spread(range(len(dataset)), shares))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scan scores higher than a negative one, ties counted half.

    Args:
        scores: `(N,)`.
        positive: bool `(N,)`.

    Returns:
        0 to 1; NaN where one of the two kinds is missing.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return math.nan
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def mean_auc(shares: np.ndarray, truth: np.ndarray) -> float:
    """AUC of the second of two classes, or the mean of each class that occurs against the rest."""
    if shares.shape[1] == 2:
        return auc(shares[:, 1], truth == 1)
    found = [auc(shares[:, k], truth == k) for k in range(shares.shape[1])]
    known = [value for value in found if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def auc_interval(shares: np.ndarray, truth: np.ndarray, subjects: Sequence[str]) -> tuple[float, float]:
    """Percentile interval of `mean_auc` over resampled subjects; resamples without both kinds are drawn again."""
    names = np.array(subjects)
    rows = [np.flatnonzero(names == name) for name in np.unique(names)]
    if len(rows) < 2 or math.isnan(mean_auc(shares, truth)):
        return math.nan, math.nan
    generator, values = np.random.default_rng(0), list[float]()
    while len(values) < RESAMPLES:
        chosen = np.concatenate([rows[k] for k in generator.integers(len(rows), size=len(rows))])
        value = mean_auc(shares[chosen], truth[chosen])
        if not math.isnan(value):
            values.append(value)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def calibration_error(shares: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the most likely class (Guo et al., ICML 2017, Eq. (3))."""
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def score_classes(shares: np.ndarray, truth: np.ndarray, subjects: Sequence[str]) -> ClassScores:
    """All scores of a set of scans.

    Args:
        shares: `(N, K)`, rows summing to 1.
        truth: `(N,)`.
        subjects: of each scan.
    """
    classes, found = shares.shape[1], shares.argmax(axis=1)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, found), 1)
    there = confusion.sum(axis=1) > 0
    recall = confusion.diagonal()[there] / confusion.sum(axis=1)[there]
    low, high = auc_interval(shares, truth, subjects)
    return ClassScores(
        scans=len(truth),
        subjects=len(set(subjects)),
        auc=mean_auc(shares, truth),
        auc_low=low,
        auc_high=high,
        balanced_accuracy=float(recall.mean()),
        ece=calibration_error(shares, truth),
        confusion=confusion.tolist(),
    )


class OneScan:
    """A prepared volume as a source of crops."""

    def __init__(self, image: np.ndarray) -> None:
        self.array = image

    def image(self, record_id: str) -> np.ndarray:
        """The volume `(C, D, H, W)`, under any id."""
        return self.array

    def label(self, record_id: str) -> None:
        """None: it has no label map."""


class ClassPredictor:
    """A trained classifier for new scans.

    Args:
        checkpoint: run folder, checkpoint folder or file of `asa-finetune method=classify`.
        settings: the device; a scan is one window.
        strip: how raw scans are skull-stripped, as in `PrepareSettings`; None: as the training scans were.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or of something else.
    """

    def __init__(self, checkpoint: str | Path, settings: PredictSettings, *, strip: str | None = None) -> None:
        model, description = read_model(checkpoint)
        if not isinstance(model, Classifier):
            raise ValueError(f"{checkpoint}: not a run of asa-finetune method=classify")
        self.model = model.to(pick_device(settings.device))
        self.classes: list[str] = description["data"]["classes"]
        self.intake = Intake(str(checkpoint), description["data"], strip)

    def shares(self, image: np.ndarray) -> np.ndarray:
        """Probabilities `(K,)` of a prepared volume `(C, D, H, W)`."""
        size, mirrored = self.model.encoder.img_size, self.model.mirrored
        return predict_classes(self.model, CropDataset(OneScan(image), [{"id": ""}], size, mirrored=mirrored))[0]


def class_table(names: Sequence[str], rows: Sequence[tuple[str, str, str]], shares: np.ndarray) -> str:
    """A table (CSV) of each scan's most likely class and the probability of each.

    Args:
        names: of the classes.
        rows: id, subject and class of each scan; "" for what nobody says.
        shares: `(N, K)`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "subject", "class", "predicted", *(f"p_{name}" for name in names)])
    for row, share in zip(rows, shares, strict=True):
        writer.writerow([*row, names[int(share.argmax())], *(f"{value:.6f}" for value in share)])
    return text.getvalue()
