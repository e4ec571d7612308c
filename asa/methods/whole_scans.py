"""Values of whole volumes: a class, by cross-entropy with a weight for each class, or a number, by the absolute error.

Letters: image `B C D H W`, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.methods.base import Batch
from asa.models.classifier import Classifier, Regressor


class Classification(nn.Module):
    """Supervised classification of whole volumes; `weights` are those of the classes, None: equal ones.

    Raises:
        ValueError: a model that is not a classifier, or weights that are not a number of 0 or more for each class.
    """

    task = "classification"

    def __init__(self, model: Classifier, *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not isinstance(model, Classifier):
            raise ValueError(f"method=classify needs model=..._classifier_..., got {type(model).__name__}")
        classes = model.head.out_features
        if weights is not None and len(weights) != classes:
            raise ValueError(f"method.weights has {len(weights)} numbers for {classes} classes")
        if weights is not None and not (all(0 <= one < float("inf") for one in weights) and any(weights)):
            raise ValueError(f"method.weights={list(weights)}: must be 0 or more, and not all 0")
        self.model = model
        self.register_buffer("weights", torch.tensor(weights or [1.0] * classes), persistent=False)
        self.weights: Tensor

    @property
    def mirrored(self) -> bool:
        """Whether batches have the mirror image."""
        return self.model.mirrored

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image", class indices "target" `(B,)`, and "mirror" if the network takes it.

        The loss is a mean over samples, weighted by their class, so that a batch computed in parts has the same loss.
        """
        logits, target = self.model(batch["image"], batch.get("mirror")).float(), batch["target"]
        loss = (F.cross_entropy(logits, target, reduction="none") * self.weights[target]).mean()
        return {"loss": loss, "accuracy": (logits.detach().argmax(dim=1) == target).float().mean()}


class Regression(nn.Module):
    """Supervised regression of whole volumes, with the L1 loss, which a few wrong ages in a table move little.

    A ValueError for a model that is not a regressor.
    """

    task = "regression"

    def __init__(self, model: Regressor) -> None:
        super().__init__()
        if not isinstance(model, Regressor):
            raise ValueError(f"method=regress needs model=..._regressor_..., got {type(model).__name__}")
        self.model = model

    @property
    def mirrored(self) -> bool:
        """Whether batches have the mirror image."""
        return self.model.mirrored

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image", numbers "target" `(B,)` in their units, and "mirror" if the network takes it.

        The loss is the mean absolute error in SDs of the training scans, "mae" the same in the target's units.
        """
        predicted = self.model(batch["image"], batch.get("mirror"))
        error = (predicted - batch["target"].float()).abs().mean()
        return {"loss": error / self.model.sd, "mae": error.detach()}
