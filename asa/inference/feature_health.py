"""Whether pretraining learns features that a segmentation can use: their effective rank, and a linear probe.

Letters: V volumes `C D H W`, patch size s, L tokens in raster order, token width E, K classes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.data.loading.crops import CropDataset
from asa.data.store import Store
from asa.methods.base import Pretraining
from asa.models.sw_vit import SWViT
from asa.models.swin import SwinPatches
from asa.ops.labels import IGNORED
from asa.ops.patches import patchify
from asa.training.device import autocast

MOST_VOLUMES = 8
PLACES = 6  # crops of each labelled volume, where their placement is random
FLAT = 1e-5  # variance between volumes, of features that the final norm scales to a total variance of about 1
COLLAPSED = 0.05  # lowest effective rank, as a fraction of the width
NO_BETTER = 0.98  # of the trivial predictor's error
RIDGE = 1e-6
ROUNDING = 1e-13  # fraction of the mean square below which variance is the rounding of float32


@torch.no_grad()
def encode(encoder: nn.Module, crops: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Tokens of crops with nothing masked: `(V, L, E)` float32 on the CPU."""
    device = next(encoder.parameters()).device
    return torch.cat([encoder(crop["image"][None].to(device)).float().cpu() for crop in crops])


def first_crops(dataset: CropDataset, places: int = 1) -> Iterator[dict[str, Any]]:
    """Some crops of each of the first volumes, at most `MOST_VOLUMES`: always the same."""
    return (dataset[index, place] for index in range(min(len(dataset), MOST_VOLUMES)) for place in range(places))


def feature_health(features: Tensor) -> dict[str, float]:
    """Variance of the features `(V, L, E)` between volumes, and the number of directions in which they vary.

    The mean over volumes at each position is subtracted first: a collapsed encoder may still encode positions. Of a
    single volume the mean over positions is subtracted instead. "effective_rank" is the exponential of the entropy of
    the normalised singular values (RankMe, Garrido et al., ICML 2023; there without subtracting the mean): r for r
    directions of equal strength, 0 for constant features. "feature_variance" is the mean over the E dimensions.
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

    `width` is E of the encoder, or the largest possible rank if that is smaller: 0 for a single token. `error` are the
    names of the method's error and of a trivial predictor's, which count once the warm-up is over (`warm`).
    """
    lines, rank, variance = [], metrics["effective_rank"], metrics["feature_variance"]
    if width and (rank < COLLAPSED * width or variance < FLAT):
        lines.append(
            f"ALARM: the encoder's features have collapsed: effective rank {rank:.1f} of {width}, variance "
            f"{variance:.2g} (alarm below {COLLAPSED * width:.1f} or {FLAT:g}): lower optim.lr and check the data"
        )
    first = metrics.get("linear_dice_first", 0.0)
    if warm and first > metrics.get("linear_dice", first):
        lines.append(
            f"ALARM: linear_dice {metrics['linear_dice']:.3f} is below that of the first weights, {first:.3f}: "
            "train longer, on tens of thousands of crops, or raise optim.lr"
        )
    ratio = metrics[error[0]] / max(metrics[error[1]], 1e-12)
    if warm and ratio > NO_BETTER:
        lines.append(
            f"ALARM: no better than the {predictor_of(error[1])}: after the warm-up {error[0]} is {ratio:.2f} times "
            f"{error[1]}: raise or lower optim.lr, and check the volumes of the store"
        )
    return lines


def predictor_of(error: str) -> str:
    """The trivial predictor that an error's name begins with: `mean predictor` of "mean_predictor_loss"."""
    return error.rpartition("_")[0].replace("_", " ")


def linear_dice(encoder: SWViT | SwinPatches, dataset: CropDataset, names: Sequence[str]) -> dict[str, float]:
    """Soft Dice of a linear map from frozen tokens to labels, fitted on all volumes but the scored one, in turn.

    The map goes from a patch's token to the fraction of its voxels that each class takes. It is a ridge regression in
    closed form; the volumes' matrices are computed once. Soft Dice of fractions p (clamped to 0 and 1) and t is
    2 sum(p t) / sum(p^2 + t^2) (Milletari et al., 3DV 2016): 1 where they are equal.

    The dataset has labelled crops of at least two volumes, of which the first are taken. At random places there are
    `PLACES` crops of each: the place in the volume is then not known from the place in the crop. `names` are those of
    the classes 1, 2, ...: "linear_dice_NAME" is over all volumes together, and "linear_dice" the mean of the classes.
    """
    places = 1 if dataset.crop == "centre" else PLACES
    crops = list(first_crops(dataset, places))
    volumes = len(crops) // places
    features = encode(encoder, crops).unflatten(0, (volumes, -1)).flatten(1, 2)
    each = [class_fractions(crop["label"], encoder.patch_size, len(names)) for crop in crops]
    fractions = torch.stack(each).unflatten(0, (volumes, -1)).flatten(1, 2)
    with autocast(features.device, torch.float32):  # whatever the encoder computes in
        equations = [normal_equations(*pair) for pair in zip(features, fractions, strict=True)]
        gram, products = (sum(parts, torch.zeros(())) for parts in zip(*equations, strict=True))
        overlap, size = torch.zeros(2, len(names), dtype=torch.float64)
        for tokens, truth, (own_gram, own_products) in zip(features, fractions, equations, strict=True):
            found = predict_linear(solve_ridge(gram - own_gram, products - own_products), tokens).clamp(0, 1)
            overlap += (found * truth).sum(dim=0)
            size += (found.square() + truth.square()).sum(dim=0)
    present = fractions.amax(dim=(0, 1)) > 0
    dice = {name: float(2 * overlap[k] / size[k]) for k, name in enumerate(names) if present[k]}
    mean = sum(dice.values()) / len(dice) if dice else 0.0
    return {"linear_dice": mean, **{f"linear_dice_{name}": value for name, value in dice.items()}}


def class_fractions(label: Tensor, patch_size: int, classes: int) -> Tensor:
    """The fraction of each patch's voxels of class 1, 2, ..., K, ignored ones of none: `(1, D, H, W)` -> `(L, K)`."""
    patches = patchify(label[None], patch_size)[0].long()  # L s^3
    counts = torch.zeros(len(patches), IGNORED + 1).scatter_add_(1, patches, torch.ones(patches.shape))
    return counts[:, 1 : classes + 1] / patches.shape[1]


def normal_equations(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X and X^T Y of tokens with an intercept `(L, E)` and targets `(L, O)`: `(E+1, E+1)`, `(E+1, O)` float64."""
    x = F.pad(tokens, (0, 1), value=1.0).double()  # L E+1
    return x.T @ x, x.T @ targets.double()


def solve_ridge(gram: Tensor, products: Tensor) -> Tensor:
    """Ridge regression from `normal_equations`: `(E+1, O)` float32; the last row is the intercept."""
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, products).float()


def predict_linear(weights: Tensor, features: Tensor) -> Tensor:
    """`(E+1, O)` on `(L, E)` -> `(L, O)`."""
    return features @ weights[:-1] + weights[-1]


class FeatureHealth:
    """What a pretraining run measures of its encoder at each validation, beside the method's error.

    The method has its first weights, whose Dice by the linear probe is what pretraining has to exceed; the crops are
    not trained on. `labelled`: see `open_labelled`; or None. `warmup`: steps before the error counts.
    """

    def __init__(
        self, method: Pretraining, validation: CropDataset, labelled: tuple[CropDataset, list[str]] | None, warmup: int
    ) -> None:
        encoder: Any = method.model.encoder
        self.encoder, self.error = encoder, method.error
        self.validation, self.labelled, self.warmup = validation, labelled, warmup
        # The last tokens of a Swin stand for 32^3 voxels each, too many for one matrix.
        self.token_encoder: Any = SwinPatches(encoder) if hasattr(encoder, "levels") else encoder
        self.first: dict[str, float] = {}
        if labelled is not None:
            encoder.eval()
            self.first = {"linear_dice_first": linear_dice(self.token_encoder, *labelled)["linear_dice"]}

    def measure(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Feature statistics and `linear_dice`, to log beside the metrics of a validation, and alarms to print."""
        features = encode(self.encoder, first_crops(self.validation))
        found = feature_health(features)
        if self.labelled is not None:
            found |= linear_dice(self.token_encoder, *self.labelled) | self.first
        width = min(features.shape[2], freedom(features))
        return found, alarms({**metrics, **found}, width, self.error, warm=step > self.warmup)


def open_labelled(
    path: str, channels: Sequence[str], size: Sequence[int], placement: str
) -> tuple[CropDataset, list[str]]:
    """Labelled crops of a store for the linear probe, of the training's size and placement; the names of their classes.

    A ValueError for no store, other channels than the network is trained on, or less than two volumes with labels.
    """
    store = Store(path)
    labelled = [record for record in store.records if "label" in record["arrays"]]
    if store.channels != list(channels):
        raise ValueError(
            f"data.labelled_store={path}: has the channels {store.channels}, the training store {list(channels)}"
        )
    if len(labelled) < 2 or not store.labels:
        raise ValueError(f"data.labelled_store={path}: needs two or more volumes with labels, found {len(labelled)}")
    names = [store.labels[value] for value in store.label_values]
    return CropDataset(store, labelled[:MOST_VOLUMES], size, crop=placement, labelled=True), names
