"""Regression of one number per volume, like the age: mean absolute error.

Letters: image `B C D H W`.
"""

from torch import Tensor, nn

from asa.methods.base import Batch
from asa.models.classifier import Regressor


class Regression(nn.Module):
    """Supervised regression of whole volumes, with the L1 loss, which a few wrong ages in a table move little.

    Args:
        model: the network.

    Raises:
        ValueError: another model.
    """

    task = "regression"

    def __init__(self, *, model: Regressor) -> None:
        super().__init__()
        if not isinstance(model, Regressor):
            raise ValueError(f"method=regress needs model=..._regressor_..., got {type(model).__name__}")
        self.model, self.mirrored = model, model.mirrored

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image", numbers "target" `(B,)` in their units, and "mirror" if the network takes it.

        The loss is the mean absolute error in SDs of the training scans, "mae" the same in the target's units.
        """
        predicted = self.model(batch["image"], batch.get("mirror"))
        error = (predicted - batch["target"].float()).abs().mean()
        return {"loss": error / self.model.sd, "mae": error.detach()}
