"""Deeply supervised segmentation losses.

Letters: logits `B K D H W` for K classes, or `B R D H W` for R regions, label `B 1 D H W`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from asa.ops.labels import IGNORED
from asa.ops.nested import region_masks

SLAB = 1 << 24  # logits that are compared at a time: with 145 labels, those of a crop take gigabytes
SMOOTH = 1e-5  # added to both parts of Dice, as MONAI does


class DeeplySupervised(nn.Module):
    """The weighted mean of a loss over resolutions, the weight halved at each coarser one.

    Voxels of the class index `IGNORED` are in no term. All terms are means over samples, so that a batch computed in
    parts has the same loss; a sample with only ignored voxels adds 0. Only the `scales` finest resolutions have a
    weight, all if that is None; a ValueError for fewer than 1.
    """

    def __init__(self, scales: int | None) -> None:
        super().__init__()
        if scales is not None and scales < 1:
            raise ValueError(f"method.scales={scales}: give 1 or more resolutions, or null for all")
        self.scales = scales

    def forward(self, logits: Sequence[Tensor], label: Tensor) -> Tensor:
        """The loss, a scalar in float32, of logits from the finest `(B, K or R, D, H, W)` to the coarsest.

        `label` has class indices `(B, 1, D, H, W)`; it is resampled by nearest neighbour, without a shift.
        """
        target = label.float()
        weights = [0.5**level if self.scales is None or level < self.scales else 0.0 for level in range(len(logits))]
        total = target.new_zeros(())
        for weight, out in zip(weights, logits, strict=True):
            resampled = F.interpolate(target, out.shape[2:], mode="nearest-exact")
            total = total + weight * self.at_one_scale(out, resampled, resampled != IGNORED)
        return total / sum(weights)

    def at_one_scale(self, logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """The loss in float32 of one resolution's logits, label `(B, 1, D, H, W)` and mask of voxels that count."""
        raise NotImplementedError


class DeeplySupervisedDiceCE(DeeplySupervised):
    """Dice without the background, plus cross-entropy, at several resolutions.

    Logits are compared slab by slab, and again in the backward pass, so that beside them and their gradient only one
    slab is in memory.

    Args:
        background_weight: of a background voxel in the cross-entropy, where that of a labelled one is 1: small where
            the labels take little of the volume. A network may else predict background everywhere, where the gradient
            of Dice is small, and stay there.

    Raises:
        ValueError: a weight outside (0, 1], or fewer than 1 of `scales`, see `DeeplySupervised`.
    """

    def __init__(self, *, background_weight: float = 1.0, scales: int | None = None) -> None:
        super().__init__(scales)
        if not 0 < background_weight <= 1:
            raise ValueError(f"method.background_weight={background_weight}: must be in (0, 1]")
        self.background_weight = background_weight

    def at_one_scale(self, logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        if logits.shape[1] < 2:
            raise ValueError("a network of classes needs two or more outputs, the background first; one is a region's")
        slabs = math.ceil(logits.numel() / SLAB)
        parts = list(zip(*(volume.chunk(slabs, dim=2) for volume in (logits, target, counted)), strict=True))
        again = len(parts) > 1 and torch.is_grad_enabled()
        sums = [
            checkpoint(self._sums, *part, use_reentrant=False, preserve_rng_state=False) if again else self._sums(*part)
            for part in parts
        ]
        sizes, common, voxels, weights = (torch.stack(terms).sum(dim=0) for terms in zip(*sums, strict=True))
        dice = 1 - (2 * common + SMOOTH) / (sizes + SMOOTH)
        return dice.mean() + (voxels / weights.masked_fill(weights == 0, 1)).mean()

    def _sums(self, logits: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Over the voxels of a slab: true and predicted sizes of each class and what they share, each `(B, K - 1)`; the
        weighted cross-entropy and the weights, each `(B,)`.
        """
        scores = logits.float().log_softmax(dim=1)
        classes, kept = target.long().masked_fill(~counted, 0), counted.flatten(2).float()  # B 1 D H W, B 1 V
        own, index = scores.gather(1, classes).flatten(1), classes.flatten(1)
        true, common = (
            kept.new_zeros(scores.shape[:2]).scatter_add(1, index, x * kept[:, 0]) for x in (kept[:, 0], own.exp())
        )
        # No matrix product: autocast would add up in 16 bits, and in float16 65,520 voxels are infinitely many.
        predicted = (scores.exp().flatten(2) * kept).sum(dim=2)
        weights = kept[:, 0] * torch.where(index == 0, self.background_weight, 1.0)
        return (true + predicted)[:, 1:], common[:, 1:], -(weights * own).sum(dim=1), weights.sum(dim=1)


class DeeplySupervisedRegionLoss(DeeplySupervised):
    """Dice plus binary cross-entropy of regions that may be nested, at several resolutions.

    Each region, given by its class indices, has its own channel with a sigmoid, as nnU-Net trains on BraTS (Isensee et
    al., BrainLes 2020). For `scales` and errors see `DeeplySupervised`.
    """

    def __init__(self, regions: Sequence[Sequence[int]], *, scales: int | None = None) -> None:
        from monai.losses import DiceLoss  # takes longer than PyTorch to import

        super().__init__(scales)
        self.regions = [list(values) for values in regions]
        self.dice = DiceLoss()

    def at_one_scale(self, logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        logits, inside = logits.float(), region_masks(target, self.regions).float()
        # Ignored voxels are background with probability 0: they change no sum of Dice.
        dice = self.dice(logits.sigmoid() * counted, inside * counted)
        voxels = F.binary_cross_entropy_with_logits(logits, inside, reduction="none").mean(dim=1)  # B D H W
        total, found = (values.flatten(1).sum(dim=1) for values in (counted, voxels * counted[:, 0]))
        return dice + (found / total.masked_fill(total == 0, 1)).mean()
