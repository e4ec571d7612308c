"""Layers of convolutional networks that PyTorch's own are slow for, and precision on a CPU.

Layout: a U-Net step on a CPU is faster with channels last in memory, which PyTorch's instance norm and, with one
thread, its 1x1x1 convolution give up. `use_own_kernels` replaces both by layers that keep the layout. In an ONNX export
they are PyTorch's own, and so is the convolution on a GPU, where the norm of large maps is computed in parts: PyTorch's
gives one block of threads to each channel of each sample, and most of the GPU waits.

Precision: oneDNN's bfloat16 convolutions read memory that was never written, for some shapes of small feature maps:
random numbers, sometimes NaN (torch 2.13, AVX-512 and AMX). There the networks compute in float32, by `in_float32`.

Letters: features `B C D H W`, N = D*H*W voxels, rows `B N C`.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from asa.ops.patches import grid_size, patchify, token_map

PARTS = 64  # partial sums over the voxels: a single float32 sum over all of them loses digits
SMALL = 20480  # values of a map at one place of W, up to which PyTorch's convolution on a CPU is the plain one
LARGE = 1 << 16  # voxels of a map from which a GPU computes its norm in parts
JOINED = 8  # voxels per row of element-wise arithmetic: C values alone are too few for a CPU's inner loop


def in_float32(block: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Apply a block to feature maps `(B, C, D, H, W)`, on a CPU with autocast in float32."""
    if maps[0].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return block(*maps)
    with torch.autocast("cpu", enabled=False):
        return block(*(features.float() for features in maps))


def in_safe_precision(block: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Apply a block, in float32 where a bfloat16 gradient is wrong: on a CPU, of 3x3x3 convolutions at a depth of 2."""
    training = torch.is_grad_enabled() and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if training and any(features.shape[2] == 2 for features in maps):
        return in_float32(block, *maps)
    return block(*maps)


def use_own_kernels(network: nn.Module) -> None:
    """Replace a network's instance norms and 1x1x1 convolutions by those of this file, with the same parameters."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.InstanceNorm3d and not child.affine and not child.track_running_stats:
                setattr(parent, name, InstanceNorm(child.num_features, child.eps))
            elif type(child) is nn.Conv3d and child.kernel_size == child.stride == (1, 1, 1):
                setattr(parent, name, PointwiseConv.sharing(child))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel or voxel."""

    def forward(self, features: Tensor) -> Tensor:
        """`(B, E, ...)` -> `(B, E, ...)`."""
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class SharingConv(nn.Conv3d):
    """A convolution that is computed in another way."""

    @classmethod
    def sharing(cls, given: nn.Conv3d) -> Self:
        """A layer with the parameters of a convolution with a stride of 1."""
        with torch.device("meta"):  # draws nothing from the random generator
            sizes: dict[str, Any] = dict(kernel_size=given.kernel_size, padding=given.padding)
            made = cls(given.in_channels, given.out_channels, bias=given.bias is not None, **sizes)
        made.weight, made.bias = given.weight, given.bias
        return made


class PointwiseConv(SharingConv):
    """1x1x1 convolution: on a CPU a matrix product, which keeps channels last also with one thread, as in torchrun."""

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> the same with other channels."""
        if features.device.type != "cpu" or torch.compiler.is_exporting():
            return super().forward(features)
        out = F.linear(features.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
        return out.permute(0, 4, 1, 2, 3)


class PatchConv(SharingConv):
    """3x3x3 convolution of a volume's patches of 2x2x2 voxels, of which each voxel is a channel.

    On a CPU small maps get a convolution of the voxels, of 6x6x6 with a stride of 2: five times faster than PyTorch's.
    """

    def forward(self, volume: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> `(B, E, D/2, H/2, W/2)`."""
        t, h, w = grid_size(volume.shape[2:], 2)
        small = len(volume) * self.in_channels * t * h <= SMALL
        if volume.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not small:
            return super().forward(token_map(patchify(volume, 2), (t, h, w)))
        taps = self.weight.unflatten(1, (-1, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # E C 3 2 3 2 3 2
        kernel = taps.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # E C 6 6 6
        return F.conv3d(volume, kernel, self.bias, stride=2, padding=2)


class InstanceNorm(nn.InstanceNorm3d):
    """Instance normalisation that keeps channels last in memory; PyTorch's own brings them to the front.

    On a CPU in float32 it also brings them last: PyTorch's convolution of one channel or a small map gives them first.
    """

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> the same."""
        wide = features.dtype in (torch.float32, torch.float64)
        # ONNX has an operator for PyTorch's own.
        if features.device.type == "cpu" and wide and not torch.compiler.is_exporting():
            last = features.contiguous(memory_format=torch.channels_last_3d)
            return InstanceNormalisation.apply(last, self.eps)
        if self._in_parts(features):
            return InstanceNormalisationInParts.apply(features, self.eps)
        if features.is_contiguous() or not features.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(features)
        return F.group_norm(features, self.num_features, eps=self.eps)

    def _in_parts(self, features: Tensor) -> bool:
        voxels = features[0, 0].numel()
        parted = features.is_cuda and features.is_contiguous() and voxels >= LARGE and voxels % PARTS == 0
        # A compiler makes kernels of its own, and those of parts take indices of 32 bits.
        return parted and features.numel() < 2**31 and not torch.compiler.is_compiling()


class InstanceNormalisation(torch.autograd.Function):
    """Zero mean and unit variance per sample and channel (Ulyanov et al. 2016), `(B, C, D, H, W)` -> the same.

    PyTorch's group norm would keep channels last, with statistics of three digits and a slower gradient.
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
        # rstd * (g - mean(g) - z * mean(g * z)) with z = rstd * (x - mean): its terms in x, in g, and without either.
        by_x = -(rstd**3) * (_mean_product(g, x) - g_mean * mean)
        constant = -rstd * g_mean - by_x * mean
        out = torch.addcmul(_repeated(constant, x), _joined(x), _repeated(by_x, x))
        out.addcmul_(_joined(g), _repeated(rstd, x))
        return out.view(*features.permute(0, 2, 3, 4, 1).shape).permute(0, 4, 1, 2, 3), None


class InstanceNormalisationInParts(torch.autograd.Function):
    """The same on a GPU, with channels first: the kernels of SyncBatchNorm take the parts of a map for channels."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, eps: float) -> Tensor:
        x = _parts(features)
        means, rstds = (values.view(-1, PARTS) for values in torch.batch_norm_stats(x, eps))
        # rstd^-2 = variance + eps
        variance = rstds.pow(-2).mean(dim=1, keepdim=True) + means.var(dim=1, correction=0, keepdim=True)
        mean, rstd = (_for_parts(values) for values in (means.mean(dim=1, keepdim=True), variance.rsqrt()))
        ctx.save_for_backward(features, mean, rstd)
        out = torch.empty_like(features)  # not a view, which the next layer could not change in place
        torch.batch_norm_elemt(x, None, None, mean, rstd, eps, out=_parts(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        features, mean, rstd = ctx.saved_tensors
        x, g = _parts(features), _parts(gradient.contiguous())
        sums = torch.batch_norm_backward_reduce(g, x, mean, rstd, None, True, False, False)[:2]
        own, product = (_for_parts(values.view(-1, PARTS).sum(dim=1, keepdim=True)) for values in sums)
        voxels = torch.full((1,), features[0, 0].numel(), dtype=torch.int32, device=x.device)
        out = torch.batch_norm_backward_elemt(g, x, mean, rstd, None, own, product, voxels)
        return out.view_as(features), None


def _parts(features: Tensor) -> Tensor:
    """`(B, C, D, H, W)` -> `(1, B*C*PARTS, N/PARTS)`, a view if the channels are first in memory."""
    return features.reshape(1, -1, features[0, 0].numel() // PARTS)


def _for_parts(values: Tensor) -> Tensor:
    """A value of each channel of each sample, `(B*C, 1)`, for its parts: `(B*C*PARTS,)`."""
    return values.expand(-1, PARTS).flatten()


def _rows(features: Tensor) -> Tensor:
    """`(B, C, D, H, W)` -> `(B, N, C)`, a view where the channels are last in memory."""
    return features.permute(0, 2, 3, 4, 1).contiguous().flatten(1, 3)


def _joined(rows: Tensor) -> Tensor:
    """`(B, N, C)` -> `(B, N/JOINED, JOINED*C)`, with fewer voxels per row where JOINED does not divide N."""
    b, n, c = rows.shape
    joined = math.gcd(n, JOINED)
    return rows.view(b, n // joined, joined * c)


def _repeated(values: Tensor, rows: Tensor) -> Tensor:
    """`(B, C)` -> `(B, 1, JOINED*C)`, to be broadcast against the joined rows."""
    return values[:, None].repeat(1, 1, math.gcd(rows.shape[1], JOINED))


def _mean(rows: Tensor) -> Tensor:
    """Mean over voxels, `(B, N, C)` -> `(B, C)`."""
    b, n, c = rows.shape
    sums = _joined(rows.view(b * math.gcd(n, PARTS), -1, c)).sum(dim=1)
    return sums.view(b, -1, c).sum(dim=1) / n


def _mean_product(one: Tensor, other: Tensor) -> Tensor:
    """Mean over voxels of a product, `(B, N, C)` twice -> `(B, C)`: the diagonal of a matrix product, for speed."""
    b, n, c = one.shape
    one, other = (rows.view(b * math.gcd(n, PARTS), -1, c) for rows in (one, other))
    return torch.bmm(one.transpose(1, 2), other).diagonal(dim1=1, dim2=2).reshape(b, -1, c).sum(dim=1) / n
