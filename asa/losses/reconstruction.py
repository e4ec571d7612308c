"""The attentive reconstruction loss (ASA, MICCAI 2022, section 2.1): each patch's importance from its gradients.

Letters: volume `B C D H W`; x, y, z are the axes W, H, D; patch size s; L patches in raster order of which M are
masked; b bins per angle.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.ops.patches import Selection, grid_size, patchify, split_indices, tokens_at

TINY = 1e-12  # weight with which patches of weight 0 are drawn
ROUNDING = 1e-9


def gradient_importance(volume: Tensor, patch_size: int = 8, bins: int = 9, kind: str = "orientation") -> Tensor:
    """Score the patches of a volume by their image gradients (Eq. (1), ASA, MICCAI 2022).

    The gradient g is the difference of the two neighbours along each axis (the mask [-1, 0, 1]; at the border, the
    voxel itself replaces the missing neighbour). |g| is added to a histogram of bins x bins directions, theta =
    arccos(gz / |g|) and phi = |atan2(gy, gx)|, both in [0, pi].

    `"orientation"`, the paper's: the mean of a patch's histogram divided by its L2 norm. It measures the variety of
    directions, not the strength of edges, and does not depend on the intensity scale.
    `"magnitude"`: the mean of |g| in the patch.

    Computed in float32 on the volume's device, without gradient. The scores of several channels are averaged.

    Args:
        volume: `(B, C, D, H, W)`, finite.
        patch_size, bins: edge s of a patch in voxels, histogram bins b per angle.

    Returns:
        `(B, L)` float32, not normalised; 0 for a patch that is constant with the voxels beside it.

    Raises:
        ValueError: sizes that are not divisible by s, less than one bin, or an unknown kind.
    """
    if kind not in SCORES:
        raise ValueError(f"importance must be one of {', '.join(SCORES)}, got {kind!r}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    grid_size(volume.shape[2:], patch_size)
    b, c = volume.shape[:2]
    # On a CPU, in slabs that fit into the cache: allocating whole volumes would cost more than the arithmetic.
    budget = 2**18 if volume.device.type == "cpu" else 2**26
    with torch.no_grad():
        scores = [
            torch.cat([SCORES[kind](slab, patch_size, bins) for slab in slabs], dim=1)
            for slabs in _slabs(volume.detach().flatten(0, 1).float(), patch_size, budget)
        ]
        return torch.cat(scores).reshape(b, c, -1).mean(dim=1)


def _slabs(volumes: Tensor, patch_size: int, budget: int) -> Iterator[Iterator[Tensor]]:
    """Cut `(N, D, H, W)` into groups of volumes, each into slabs of whole patches of about `budget` voxels.

    Slabs have a border of one voxel: from the neighbouring slabs, or replicated at the volume's border.
    """
    depth, plane = volumes.shape[1], volumes.shape[2] * volumes.shape[3]
    step = max(budget // (plane * patch_size), 1) * patch_size

    def cut(group: Tensor) -> Iterator[Tensor]:
        for start in range(0, depth, step):
            stop = min(start + step, depth)
            first, last = start == 0, stop == depth
            slab = group[:, start - (not first) : stop + (not last)]
            yield F.pad(slab[:, None], (1, 1, 1, 1, int(first), int(last)), mode="replicate")[:, 0]

    for group in volumes.split(max(budget // (plane * min(step, depth)), 1)):
        yield cut(group)


def _gradients(padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # N D+2 H+2 W+2 -> along x, y, z
    inner = slice(1, -1)
    gx = padded[:, inner, inner, 2:] - padded[:, inner, inner, :-2]
    gy = padded[:, inner, 2:, inner] - padded[:, inner, :-2, inner]
    gz = padded[:, 2:, inner, inner] - padded[:, :-2, inner, inner]
    return gx, gy, gz


def _magnitude_score(padded: Tensor, patch_size: int, bins: int) -> Tensor:
    gx, gy, gz = _gradients(padded)
    magnitude = (gx.square_() + gy.square_() + gz.square_()).sqrt_()
    return patchify(magnitude[:, None], patch_size).mean(dim=2)


def _orientation_score(padded: Tensor, patch_size: int, bins: int) -> Tensor:
    gx, gy, gz = _gradients(padded)
    in_plane = gx.square().add_(gy.square_())
    magnitude = (in_plane + gz.square()).sqrt_()
    direction = _angle_bin(gz.div_(magnitude), bins).mul_(bins).add_(_angle_bin(gx.div_(in_plane.sqrt_()), bins))
    weight = patchify(magnitude[:, None], patch_size)  # N L s^3
    histogram = weight.new_zeros(*weight.shape[:2], bins * bins)
    histogram.scatter_add_(2, patchify(direction[:, None], patch_size).long(), weight)
    norm = histogram.norm(dim=2)
    return torch.where(norm > 0, histogram.mean(dim=2) / norm, 0.0)


def _angle_bin(cosine: Tensor, bins: int) -> Tensor:
    """floor(angle / (pi / bins)) of angles in [0, pi], at an edge the bin nearer to pi/2; 0 for NaN, as of atan2(0, 0).

    Counts the edges below pi/2 that are at or below the angle or, from pi/2, at or below its counterpart pi - angle:
    without arccos or atan2, whose rounding in float32 moves values across edges. Overwrites its input.
    """
    dtype = torch.int8 if bins <= 11 else torch.int32  # holds bins^2 directions
    obtuse = (cosine <= 0).to(dtype)
    cosine.abs_()
    count = torch.zeros_like(obtuse)
    for k in range(1, (bins + 1) // 2):
        count += cosine <= math.cos(k * math.pi / bins)
    return obtuse.mul_(bins - 1).sub_(count).abs_()  # bins - 1 - count where obtuse


SCORES = {"orientation": _orientation_score, "magnitude": _magnitude_score}


class AttentiveReconstructionLoss(nn.Module):
    """Squared error of the masked patches, weighted by their gradient importance (Eq. (1) and (2), ASA, MICCAI 2022).

    L = sum_i p_i * MSE_i over the masked patches i of a volume, with p_i = score_i / sum of the masked patches' scores,
    averaged over the batch. The weights are equal in a volume whose masked patches all score 0.

    Args:
        patch_size, bins: patch edge s in voxels, histogram bins per angle (whose number the paper does not print).
        importance: `"orientation"` (the paper's), `"magnitude"`, or None for equal weights: the plain loss of an MAE.

    Raises:
        ValueError: an unknown importance.
    """

    def __init__(self, patch_size: int = 8, bins: int = 9, importance: str | None = "orientation") -> None:
        super().__init__()
        if importance is not None and importance not in SCORES:
            raise ValueError(f"importance must be one of {', '.join(SCORES)} or null, got {importance!r}")
        self.patch_size, self.bins, self.importance = patch_size, bins, importance

    def weights(self, volume: Tensor, masked: Tensor, counted: Tensor | None = None) -> Tensor:
        """The weights p of masked patches, `(B*R, M)` float32. Each row sums to 1, to 0 if none of its patches counts.

        `masked` are their indices `(B*R, M)` with R >= 1 masks of each of B volumes; where `counted` is False, p is 0.
        """
        equal = torch.ones(masked.shape, device=volume.device) if counted is None else counted.float()
        plain = equal / equal.sum(dim=1, keepdim=True).clamp(min=1)
        if self.importance is None:
            return plain
        scores = gradient_importance(volume, self.patch_size, self.bins, self.importance)[:, :, None]
        scores = tokens_at(scores, masked)[:, :, 0] * equal
        total = scores.sum(dim=1, keepdim=True)
        return (scores / total).where(total > 0, plain)

    def forward(self, prediction: Tensor, volume: Tensor, mask: Tensor) -> Tensor:
        """The loss, a scalar in float32; a ValueError for inconsistent shapes.

        Args:
            prediction: `(B, M, C*s^3)`, the masked patches in raster order.
            volume: `(B, C, D, H, W)`, the target.
            mask: bool `(B, L)`, True = masked.
        """
        masked = split_indices(mask)[1].to(volume.device, non_blocking=True)
        errors = patch_errors(prediction, tokens_at(patchify(volume, self.patch_size), masked))
        return weighted_mean(errors, self.weights(volume, masked))


def draw_patches(masked: Selection, weights: Tensor, counts: Tensor, offsets: Tensor) -> tuple[Selection, Tensor]:
    """Draw some of the masked patches, so that their weighted errors estimate those of all without bias.

    Patch i is drawn with a probability q_i proportional to its weight p_i, or 1 where that would be more, and then
    weighs p_i / q_i: the expectation of the drawn errors' weighted sum is sum_i p_i e_i (Horvitz and Thompson, 1952).
    The drawing is systematic: patch i is drawn if one of the points u, u+1, u+2, ... lies in its part, of length q_i,
    of the line on which the parts follow each other. So exactly the wanted number is drawn, no patch twice.

    Args:
        masked, weights: `(N, M)`, and their p, 0 for padding.
        counts: patches to draw of each row, `(N,)` int64, at most as many as it has; on the CPU.
        offsets: u of each row, in [0, 1), `(N,)` float64.

    Returns:
        The drawn patches `(N, K)` with K the largest count, and their weights, 0 for padding.
    """
    index, valid = masked
    device, most, fewest = index.device, int(counts.max()), int(counts.min())
    count = counts.to(device, non_blocking=True)[:, None].double()
    # Patches without weight are drawn if there are not enough others.
    p = weights.double() + TINY * (1.0 if valid is None else valid.double())
    # The largest factor for which all probabilities below 1 are proportional to p and their sum is the count: with
    # the j largest set to 1, the others share count - j.
    ordered = p.sort(dim=1, descending=True).values
    rest = ordered.flip(1).cumsum(dim=1).flip(1).clamp(min=TINY)
    factor = (count - torch.arange(p.shape[1], device=device)) / rest
    fits = factor * ordered <= 1 + ROUNDING
    chances = (factor.gather(1, fits.int().argmax(dim=1, keepdim=True)) * p).clamp(max=1.0)
    ends = chances.cumsum(dim=1)
    points = torch.arange(most, device=device) + offsets.to(device, non_blocking=True)[:, None]
    drawn = torch.searchsorted(ends * (count / ends[:, -1:]), points, right=True).clamp(max=p.shape[1] - 1)
    kept = None if most == fewest else torch.arange(most, device=device) < count
    share = (weights.double() / chances.clamp(min=TINY)).gather(1, drawn)
    return Selection(index.gather(1, drawn), kept), (share if kept is None else share * kept).float()


def weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """The loss from the patches' errors and weights, both `(B, M)`."""
    return (weights * errors).sum(dim=1).mean()


def patch_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """MSE of each patch, both `(B, M, P)` -> `(B, M)` float32; a ValueError for different shapes."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction of the masked patches must be {tuple(target.shape)}, got {tuple(prediction.shape)}"
        )
    return (prediction.float() - target.float()).square().mean(dim=2)
