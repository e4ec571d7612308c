"""The attentive reconstruction loss (ASA, MICCAI 2022, section 2.1).

Letters: volume `B C D H W`, L tokens in raster order of which M are masked, patch size s.
"""

from torch import Tensor, nn

from asa.ops.gradients import KINDS, gradient_importance
from asa.ops.masking import split_indices, tokens_at
from asa.ops.patches import patchify


class AttentiveReconstructionLoss(nn.Module):
    """Squared error of the masked patches, weighted by their gradient importance (Eq. (1) and (2), ASA, MICCAI 2022).

    L = sum_i p_i * MSE_i over the masked patches i of a volume, with p_i = score_i / sum of the masked patches' scores,
    averaged over the batch. The weights are equal in a volume whose masked patches all score 0.

    Args:
        patch_size: patch edge s in voxels.
        bins: histogram bins per angle (the paper does not print their number).
        importance: `"orientation"` (the paper's), `"magnitude"`, or None for equal weights: the plain loss of an MAE.

    Raises:
        ValueError: an unknown importance.
    """

    def __init__(self, patch_size: int = 8, bins: int = 9, importance: str | None = "orientation") -> None:
        super().__init__()
        if importance is not None and importance not in KINDS:
            raise ValueError(f"importance must be one of {', '.join(KINDS)} or null, got {importance!r}")
        self.patch_size, self.bins, self.importance = patch_size, bins, importance

    def weights(self, volume: Tensor, masked: Tensor) -> Tensor:
        """p of the patches `masked` `(B, M)` of volumes `(B, C, D, H, W)`: `(B, M)` float32, each row summing to 1."""
        if self.importance is None:
            return volume.new_full(masked.shape, 1 / masked.shape[1], dtype=masked.new_empty(0).float().dtype)
        scores = gradient_importance(volume, self.patch_size, self.bins, self.importance).gather(1, masked)
        total = scores.sum(dim=1, keepdim=True)
        return (scores / total).where(total > 0, 1 / masked.shape[1])

    def forward(self, prediction: Tensor, volume: Tensor, mask: Tensor) -> Tensor:
        """The loss, a scalar in float32.

        Args:
            prediction: `(B, M, C*s^3)`, the masked patches in raster order.
            volume: `(B, C, D, H, W)`, the target.
            mask: bool `(B, L)`, True = masked.

        Raises:
            ValueError: inconsistent shapes.
        """
        masked = split_indices(mask)[1].to(volume.device, non_blocking=True)
        errors = patch_errors(prediction, tokens_at(patchify(volume, self.patch_size), masked))
        return weighted_mean(errors, self.weights(volume, masked))


def weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """The loss from the patches' errors and weights, both `(B, M)`."""
    return (weights * errors).sum(dim=1).mean()


def patch_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """MSE of each patch, both `(B, M, P)` -> `(B, M)` float32.

    Raises:
        ValueError: different shapes.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction of the masked patches must be {tuple(target.shape)}, got {tuple(prediction.shape)}"
        )
    return (prediction.float() - target.float()).square().mean(dim=2)
