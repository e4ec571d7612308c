"""How much each patch has to tell, from its gradients: the weights of the attentive reconstruction loss.

Letters: volume `B C D H W`; x, y, z are the axes W, H, D; patch size s; L patches in raster order; b bins an angle.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from asa.ops.patches import grid_size, patchify

KINDS = ("orientation", "magnitude")


def gradient_importance(volume: Tensor, patch_size: int = 8, bins: int = 9, kind: str = "orientation") -> Tensor:
    """Score the patches of a volume by their image gradients (Eq. (1), ASA, MICCAI 2022).

    The gradient g is the difference of the two neighbours along each axis (the mask [-1, 0, 1]; the border voxel
    stands in for the neighbour that is missing). Its direction falls into one of bins x bins classes of theta =
    arccos(gz / |g|) and phi = |atan2(gy, gx)|, both in [0, pi], and adds |g| to its class.

    `"orientation"`, the paper's: the histogram of a patch is divided by its L2 norm, and its mean is the score. It
    measures how spread the directions are, not how strong the edges, and is blind to the intensity scale.
    `"magnitude"`: the mean of |g| in the patch.

    Computed in float32 on the volume's own device, without gradient. With several channels the scores are averaged.

    Args:
        volume: `(B, C, D, H, W)`, finite.
        patch_size: edge s of a patch in voxels.
        bins: classes b of each angle.
        kind: `"orientation"` or `"magnitude"`.

    Returns:
        `(B, L)` float32, at least 0 and 0 where a patch is flat. Not normalised.

    Raises:
        ValueError: sizes that s does not divide, no bins or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"importance is one of {', '.join(KINDS)}, not {kind!r}")
    if bins < 1:
        raise ValueError(f"a histogram has at least one bin, got {bins}")
    grid_size(volume.shape[2:], patch_size)
    score = _orientation_score if kind == "orientation" else _magnitude_score
    b, c = volume.shape[:2]
    # On a CPU, pieces that stay in the cache: fresh pages for whole volumes would cost more than the arithmetic.
    budget = 2**18 if volume.device.type == "cpu" else 2**26
    with torch.no_grad():
        scores = [
            torch.cat([score(slab, patch_size, bins) for slab in slabs], dim=1)
            for slabs in _slabs(volume.detach().flatten(0, 1).float(), patch_size, budget)
        ]
        return torch.cat(scores).reshape(b, c, -1).mean(dim=1)


def _slabs(volumes: Tensor, patch_size: int, budget: int) -> Iterator[Iterator[Tensor]]:
    """Cut `(N, D, H, W)` into groups of volumes, each into slabs of whole patches of about `budget` voxels.

    A slab carries a border of one voxel: its neighbours', or a copy where there is none.
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


def _gradients(padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbour differences along x, y and z of `(N, D+2, H+2, W+2)`, each `(N, D, H, W)`."""
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
    in_plane.sqrt_()
    # Where gx = gy = 0, phi is atan2(0, 0) = 0, the first class: +1 lies above every edge.
    gx.masked_fill_(in_plane == 0, 1.0)
    place = _angle_class(gz, magnitude, bins).mul_(bins).add_(_angle_class(gx, in_plane, bins))
    weight = patchify(magnitude[:, None], patch_size)  # N L s^3
    histogram = weight.new_zeros(*weight.shape[:2], bins * bins)
    histogram.scatter_add_(2, patchify(place[:, None], patch_size).long(), weight)
    norm = histogram.norm(dim=2)
    return torch.where(norm > 0, histogram.mean(dim=2) / norm, 0.0)


def _angle_class(cosine_side: Tensor, length: Tensor, bins: int) -> Tensor:
    """floor(angle / (pi / bins)) with the angle's cosine = cosine_side / length, and pi itself in the last class.

    Counts the inner edges k*pi/bins at or below the angle: no arccos or atan2, whose float32 rounding moves values
    across edges.
    """
    count = torch.zeros_like(length, dtype=torch.uint8 if bins <= 15 else torch.int32)  # bins^2 classes
    for k in range(1, bins):
        count += cosine_side <= length * math.cos(k * math.pi / bins)
    return count
