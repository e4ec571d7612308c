"""Deeply supervised segmentation loss.

Letters: logits `B K D H W` with K classes, label `B 1 D H W`.
"""

from collections.abc import Sequence

from monai.losses import MaskedDiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = 255


class DeeplySupervisedDiceCE(nn.Module):
    """Dice plus cross-entropy at several resolutions, each coarser one with half the weight.

    The label is brought to a head's resolution by nearest neighbour, without shifting it. The weights sum to 1. Dice
    leaves the background out. Voxels that are ignored count in neither term. Both terms are means over samples, so a
    batch computed in parts gives the same loss; a sample of which nothing counts adds 0.

    Args:
        ignored: class index in the label of voxels that do not count, whatever is predicted there.
    """

    def __init__(self, *, ignored: int = IGNORED) -> None:
        super().__init__()
        self.ignored = ignored
        self.dice = MaskedDiceLoss(softmax=True, to_onehot_y=True, include_background=False)

    def forward(self, logits: Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss, a scalar in float32.

        Args:
            logits: from the finest `(B, K, D, H, W)` to the coarsest.
            label: class indices `(B, 1, D, H, W)`, any integer type.
        """
        target = label.float()
        weights = [0.5**level for level in range(len(logits))]
        total = target.new_zeros(())
        for weight, out in zip(weights, logits, strict=True):
            near = F.interpolate(target, out.shape[2:], mode="nearest-exact")
            total = total + weight * self._at_one_scale(out.float(), near)
        return total / sum(weights)

    def _at_one_scale(self, logits: Tensor, target: Tensor) -> Tensor:
        counted = target != self.ignored
        # The mask makes ignored voxels background of probability 0, and Dice leaves the background out.
        dice = self.dice(logits, target, counted)
        voxels = F.cross_entropy(logits, target[:, 0].long(), ignore_index=self.ignored, reduction="none")
        entropy = voxels.flatten(1).sum(dim=1) / counted.flatten(1).sum(dim=1).clamp(min=1)
        return dice + entropy.mean()
