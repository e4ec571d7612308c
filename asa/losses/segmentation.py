"""Deeply supervised segmentation loss.

Letters: logits `B K D H W` with K classes, label `B 1 D H W`.
"""

from collections.abc import Sequence

from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional as F


class DeeplySupervisedDiceCE(nn.Module):
    """Dice plus cross-entropy at several resolutions, each coarser one with half the weight.

    The label is brought to a head's resolution by nearest neighbour, without shifting it. The weights sum to 1. Dice
    leaves the background out and is averaged over samples, so a batch computed in parts gives the same loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)

    def forward(self, logits: Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss, a scalar in float32.

        Args:
            logits: from the finest `(B, K, D, H, W)` to the coarsest.
            label: class indices `(B, 1, D, H, W)`, any integer type.
        """
        target = label.float()
        weights = [0.5**level for level in range(len(logits))]
        total = sum(
            weight * self.loss(out.float(), F.interpolate(target, out.shape[2:], mode="nearest-exact"))
            for weight, out in zip(weights, logits, strict=True)
        )
        return total / sum(weights)
