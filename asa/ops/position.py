"""Fixed position codes of a token grid.

Letters: grid T x H x W (W left to right), L = T*H*W tokens in raster order, D the width of a code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from asa.ops.patches import triple


def symmetric_position_encoding(
    grid: int | Sequence[int], dim: int, *, convention: str = "mirror", temperature: float = 10000.0
) -> Tensor:
    """Symmetric position encoding: tokens at mirrored places share one code (Eq. (3), ASA, MICCAI 2022).

    Each token (t, h, w) gets one position number, coded by interleaved sines and cosines.

    `"mirror"` (the default) numbers it t*H*W + h*W + min(w, W-1-w): columns w and W-1-w share a code to the bit, and
    no others do, on any grid. `"paper"` is Eq. (3) as printed, t*T^2 + h*H - |W/2 - w| + W/2: it pairs w with W - w,
    so the outermost columns differ, and rows can collide when the grid is not a cube.

    Args:
        grid: tokens along each axis, (T, H, W) or one number for a cube.
        dim: width of a code, even.
        convention: `"mirror"` or `"paper"`.
        temperature: base of the wavelengths.

    Returns:
        `(L, dim)` float32.

    Raises:
        ValueError: an odd `dim`, an empty grid or an unknown convention.
    """
    t_size, h_size, w_size = triple(grid)
    t, h, w = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (t_size, h_size, w_size)), indexing="ij")
    if convention == "mirror":
        position = t * h_size * w_size + h * w_size + torch.minimum(w, w_size - 1 - w)
    elif convention == "paper":
        position = t * t_size**2 + h * h_size - (w_size / 2 - w).abs() + w_size / 2
    else:
        raise ValueError(f'convention is "mirror" or "paper", not {convention!r}')
    return _sines_and_cosines(position.reshape(-1), dim, temperature).float()


def sincos_position_encoding(grid: int | Sequence[int], dim: int, *, temperature: float = 10000.0) -> Tensor:
    """Plain sin-cos encoding of a 3-D grid: a third of the code for each axis, every place its own code.

    The encoding of masked autoencoders (He et al., CVPR 2022) with a third axis; what SPE is compared with.

    Args:
        grid: tokens along each axis, (T, H, W) or one number for a cube.
        dim: width of a code, at least 6. What is left of `dim` over six is filled with zeros.
        temperature: base of the wavelengths.

    Returns:
        `(L, dim)` float32.

    Raises:
        ValueError: `dim` under 6 or an empty grid.
    """
    if dim < 6:
        raise ValueError(f"a 3-D sin-cos code needs dim >= 6, got {dim}")
    axes = [torch.arange(n, dtype=torch.float64) for n in triple(grid)]
    width = 2 * (dim // 6)
    codes = [_sines_and_cosines(axis.reshape(-1), width, temperature) for axis in torch.meshgrid(*axes, indexing="ij")]
    code = torch.cat(codes, dim=1)
    return torch.nn.functional.pad(code, (0, dim - 3 * width)).float()


def _sines_and_cosines(position: Tensor, dim: int, temperature: float) -> Tensor:
    """Positions `(L,)` in float64 -> `(L, dim)`, sin at the even places and cos at the odd ones."""
    if dim < 2 or dim % 2:
        raise ValueError(f"a sin-cos code needs an even dim, got {dim}")
    frequency = temperature ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # L dim/2 2 -> L dim
