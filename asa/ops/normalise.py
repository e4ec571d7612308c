"""Instance normalisation of features whose channels are last in memory, on a CPU.

Letters: features `B C D H W`, N = D*H*W voxels, rows `B N C`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = 64  # of the voxels, each with a sum of its own: one sum in float32 over all of them loses digits
JOINED = 8  # voxels in one row of element-wise arithmetic: C values alone are too few for a CPU's inner loop


class InstanceNormalisation(torch.autograd.Function):
    """Mean 0 and variance 1 in each sample and channel (Ulyanov et al. 2016), `(B, C, D, H, W)` -> the same.

    For this layout PyTorch has group norm with a channel a group. Its statistics of 128^3 voxels have three digits in
    float32, and its gradient is slower.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(features, memory_format=torch.channels_last_3d)
        x, z = _rows(features), _rows(out)
        mean = _mean(x)
        torch.sub(_joined(x), _repeated(mean, x), out=_joined(z))
        rstd = (_mean_product(z, z) + eps).rsqrt()
        _joined(z).mul_(_repeated(rstd, x))
        ctx.save_for_backward(features, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        features, mean, rstd = ctx.saved_tensors
        x, g = _rows(features), _rows(gradient)
        g_mean = _mean(g)
        # rstd * (g - mean(g) - z * mean(g * z)) with z = rstd * (x - mean), ordered by x, g and neither.
        by_x = -(rstd**3) * (_mean_product(g, x) - g_mean * mean)
        neither = -rstd * g_mean - by_x * mean
        out = torch.addcmul(_repeated(neither, x), _joined(x), _repeated(by_x, x))
        out.addcmul_(_joined(g), _repeated(rstd, x))
        return out.view(*features.permute(0, 2, 3, 4, 1).shape).permute(0, 4, 1, 2, 3), None


def _rows(features: Tensor) -> Tensor:
    """`(B, C, D, H, W)` -> `(B, N, C)`, a view where the channels are last in memory."""
    return features.permute(0, 2, 3, 4, 1).contiguous().flatten(1, 3)


def _joined(rows: Tensor) -> Tensor:
    """`(B, N, C)` -> `(B, N/JOINED, JOINED*C)`, for fewer voxels at a time where JOINED does not divide N."""
    b, n, c = rows.shape
    joined = math.gcd(n, JOINED)
    return rows.view(b, n // joined, joined * c)


def _repeated(values: Tensor, rows: Tensor) -> Tensor:
    """`(B, C)` as it meets the joined rows, `(B, 1, JOINED*C)`."""
    return values[:, None].repeat(1, 1, math.gcd(rows.shape[1], JOINED))


def _mean(rows: Tensor) -> Tensor:
    """Mean over voxels, `(B, N, C)` -> `(B, C)`."""
    b, n, c = rows.shape
    sums = _joined(rows.view(b * math.gcd(n, PARTS), -1, c)).sum(dim=1)
    return sums.view(b, -1, c).sum(dim=1) / n


def _mean_product(one: Tensor, other: Tensor) -> Tensor:
    """Mean over voxels of a product, `(B, N, C)` twice -> `(B, C)`.

    The diagonal of all pairs of channels: a matrix product is faster than the element-wise one and its sum.
    """
    b, n, c = one.shape
    one, other = (rows.view(b * math.gcd(n, PARTS), -1, c) for rows in (one, other))
    return torch.bmm(one.transpose(1, 2), other).diagonal(dim1=1, dim2=2).reshape(b, -1, c).sum(dim=1) / n
