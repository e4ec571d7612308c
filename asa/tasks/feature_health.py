"""Whether pretraining learns features that a segmentation can use: their effective rank, and a linear probe.

Letters: V volumes `C D H W`, patch size s, L tokens in raster order, token width E, K classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from asa.data.loading.crops import CropDataset
from asa.data.store import Store
from asa.methods.base import Pretraining
from asa.models.sw_vit import SWViT
from asa.models.swin import SwinPatches
from asa.ops.labels import IGNORED
from asa.ops.patches import patchify
from asa.training.device import autocast
from asa.training.loop import Validation

VOLUMES = 8  # at most
FLAT = 1e-5  # variance between volumes, of features that the final norm scales to a total variance of about 1
COLLAPSED = 0.05  # lowest effective rank, as a fraction of the width
NO_BETTER = 0.98  # of the mean predictor's error
RIDGE = 1e-6
ROUNDING = 1e-13  # fraction of the mean square below which variance is the rounding of float32


@torch.no_grad()
def encode(encoder: nn.Module, dataset: CropDataset, count: int) -> Tensor:
    """Tokens of the first crops with nothing masked: `(V, L, E)` float32 on the CPU."""
    device = next(encoder.parameters()).device
    images = (dataset[index, 0]["image"][None] for index in range(min(len(dataset), count)))
    return torch.cat([encoder(image.to(device)).float().cpu() for image in images])


def feature_health(features: Tensor) -> dict[str, float]:
    """Variance of the features between volumes, and the number of directions in which they vary.

    The mean over volumes at each position is subtracted first: a collapsed encoder may still encode positions.

    Args:
        features: `(V, L, E)`. Of a single volume the mean over positions is subtracted instead.

    Returns:
        "effective_rank", the exponential of the entropy of the normalised singular values (RankMe, Garrido et al.,
        ICML 2023; there without subtracting the mean): r for r directions of equal strength, 0 for constant features.
        "feature_variance", the mean over the E dimensions.
    """
    exact = features.double()
    left = (exact - exact.mean(dim=0 if len(features) > 1 else 1, keepdim=True)).flatten(0, 1)
    covariance = left.T @ left / max(freedom(features), 1)  # a single token has no variance
    values = torch.linalg.eigvalsh(covariance)
    strength = values[values > ROUNDING * exact.square().mean()].sqrt()
    p = strength / strength.sum()
    rank = float((-p * p.log()).sum().exp()) if len(p) else 0.0
    return {"effective_rank": rank, "feature_variance": float(covariance.diagonal().mean())}


def freedom(features: Tensor) -> int:
    """Largest rank that features `(V, L, E)` can have after their mean is subtracted, if they are wide enough."""
    volumes, length = features.shape[:2]
    return (volumes - 1) * length if volumes > 1 else length - 1


def alarms(metrics: Mapping[str, float], width: int, error: Sequence[str], *, warm: bool) -> list[str]:
    """Signs in the metrics of a validation that pretraining has failed, a line each.

    Args:
        metrics: "effective_rank", "feature_variance", and the two errors.
        width: E of the encoder, or the largest possible rank if that is smaller.
        error: names of the method's error and of the mean predictor's.
        warm: the warm-up is over; before that the error may be any.
    """
    lines, rank, variance = [], metrics["effective_rank"], metrics["feature_variance"]
    if rank < COLLAPSED * width or variance < FLAT:
        lines.append(
            f"ALARM: the encoder's features have collapsed: effective rank {rank:.1f} of {width}, variance "
            f"{variance:.2g} (alarm below {COLLAPSED * width:.1f} or {FLAT:g}): lower optim.lr and check the data"
        )
    ratio = metrics[error[0]] / max(metrics[error[1]], 1e-12)
    if warm and ratio > NO_BETTER:
        lines.append(
            f"ALARM: no better than the mean: {error[0]} is {ratio:.2f} of predicting the mean's after the "
            "warm-up: raise or lower optim.lr, and check the volumes of the store"
        )
    return lines


def probe_dice(encoder: SWViT | SwinPatches, dataset: CropDataset, names: Sequence[str]) -> dict[str, float]:
    """Dice of a linear map from frozen tokens to labels, fitted on half of the volumes and scored on the others.

    The map goes from a patch's token to the classes of its voxels. It is a ridge regression in closed form.

    Args:
        encoder: its tokens are the features.
        dataset: labelled centre crops of at least two volumes; the first ones are taken.
        names: of the classes 1, 2, ...

    Returns:
        "probe_dice_NAME" of each class over the scored volumes together, and "probe_dice", their mean.
    """
    features, classes = encode(encoder, dataset, VOLUMES), len(names) + 1
    labels = [patchify(dataset[index, 0]["label"][None], encoder.patch_size)[0] for index in range(len(features))]
    overlap, size = torch.zeros(2, classes, dtype=torch.float64)
    with autocast(features.device, torch.float32):  # whatever the encoder computes in
        # `(L, s^3)` -> `(L, s^3, K)`; an ignored voxel has no class
        one_hot = (torch.stack([label == k for k in range(classes)], dim=2) for label in labels[::2])
        weights = fit_linear(features[::2], one_hot)
        for tokens, label in zip(features[1::2], labels[1::2], strict=True):
            found = predict_linear(weights, tokens).reshape(*label.shape, classes).argmax(dim=2)
            for k in range(1, classes):
                guess, truth = (found == k) & (label != IGNORED), label == k
                overlap[k] += (guess & truth).sum()
                size[k] += guess.sum() + truth.sum()
    dice = (2 * overlap / size.clamp(min=1))[1:].tolist()
    own = {f"probe_dice_{name}": value for name, value in zip(names, dice, strict=True)}
    return {"probe_dice": sum(dice) / len(dice), **own}


def fit_linear(features: Tensor, targets: Iterable[Tensor]) -> Tensor:
    """Ridge regression in closed form, `(V, L, E)` and `(L, ...)` of each volume -> `(E + 1, O)` float32.

    O is the number of values per token; the last row is the intercept.
    """
    gram, products = torch.zeros((), dtype=torch.float64), torch.zeros(())
    for tokens, target in zip(features, targets, strict=True):
        x = F.pad(tokens, (0, 1), value=1.0)  # L E+1
        gram, products = gram + x.double().T @ x.double(), products + x.T @ target.flatten(1).float()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, products.double()).float()


def predict_linear(weights: Tensor, features: Tensor) -> Tensor:
    """`(E + 1, O)` on `(L, E)` -> `(L, O)`."""
    return features @ weights[:-1] + weights[-1]


class FeatureHealth:
    """What a pretraining run measures of its encoder at each validation, beside the method's error.

    Args:
        method: whose encoder is measured.
        validation: crops that it is not trained on, without augmentation.
        probe: labelled crops for the linear probe, or None.
        names: of the probe's classes 1, 2, ...
        warmup: steps before the method's error has to be lower than the mean predictor's.
    """

    def __init__(
        self, method: Pretraining, validation: CropDataset, probe: CropDataset | None, names: Sequence[str], warmup: int
    ) -> None:
        encoder: Any = method.model.encoder
        self.encoder = encoder
        self.error, self.validation, self.probe = method.error, validation, probe
        self.names, self.warmup = names, warmup
        # The last tokens of a Swin stand for 32^3 voxels each, too many for one matrix.
        self.probed: Any = SwinPatches(encoder) if hasattr(encoder, "levels") else encoder

    def add(self, step: int, metrics: dict[str, float], panels: dict[str, np.ndarray]) -> Validation:
        """Add feature statistics and the probe's Dice to the metrics of a validation, and print alarms."""
        found, lines = self.measure(step, metrics)
        for line in lines:
            tqdm.write(line)  # does not break the progress bar
        return {**metrics, **found}, panels

    def measure(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Statistics to log, and alarms to print. See `add`."""
        features = encode(self.encoder, self.validation, VOLUMES)
        found = feature_health(features)
        if self.probe is not None:
            found |= probe_dice(self.probed, self.probe, self.names)
        width = min(features.shape[2], freedom(features))
        return found, alarms({**metrics, **found}, width, self.error, warm=step > self.warmup)


def open_probe(path: str, channels: Sequence[str], size: Sequence[int]) -> tuple[CropDataset, list[str]]:
    """Labelled centre crops for the linear probe, and the names of their classes.

    Args:
        path: a store with labels.
        channels: that the network is trained on.
        size: crop (D, H, W).

    Raises:
        ValueError: no store, other channels, or less than two volumes with labels.
    """
    store = Store(path)
    labelled = [record for record in store.records if "label" in record["arrays"]]
    if store.channels != list(channels):
        raise ValueError(f"data.probe={path}: has the channels {store.channels}, the training store {list(channels)}")
    if len(labelled) < 2 or not store.labels:
        raise ValueError(f"data.probe={path}: the probe takes two or more volumes with labels, found {len(labelled)}")
    names = [store.labels[value] for value in store.label_values]
    return CropDataset(store, labelled[:VOLUMES], size, labelled=True), names
