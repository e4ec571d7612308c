"""Fixed position encodings of a token grid.

Letters: grid T x H x W (W left to right), L = T*H*W tokens in raster order, encoding width D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from asa.ops.patches import triple


def symmetric_position_encoding(
    grid: int | Sequence[int], dim: int, *, convention: str = "mirror", temperature: float = 10000.0
) -> Tensor:
    """Symmetric position encoding (SPE): mirrored tokens have the same encoding (Eq. (3), ASA, MICCAI 2022).

    Each token (t, h, w) has one position, encoded by interleaved sines and cosines: `(L, dim)` float32.

    `"mirror"` (the default) is the position t*H*W + h*W + min(w, W-1-w): columns w and W-1-w have the same encoding to
    the bit, all others different ones, on any grid. `"paper"` is Eq. (3) as printed, t*T^2 + h*H - |W/2 - w| + W/2: it
    pairs w with W - w, so that the outermost columns differ, and rows can collide on a grid that is not a cube.
    `"raster"` is the number of the token, t*H*W + h*W + w, without symmetry: the baseline that differs in nothing else.
    The frequencies 10000^(-2i/D) begin at i = 0 in all of them; the paper counts i from 1.

    Args:
        grid: tokens along each axis, (T, H, W) or one number for a cube.
        dim: width D of the encoding, even.
        temperature: base of the wavelengths.

    Raises:
        ValueError: an odd `dim`, an empty grid or an unknown convention.
    """
    t_size, h_size, w_size = sizes = triple(grid)
    t, h, w = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sizes)).unbind(dim=1)
    if convention == "mirror":
        position = t * h_size * w_size + h * w_size + torch.minimum(w, w_size - 1 - w)
    elif convention == "paper":
        position = t * t_size**2 + h * h_size - (w_size / 2 - w).abs() + w_size / 2
    elif convention == "raster":
        position = t * h_size * w_size + h * w_size + w
    else:
        raise ValueError(f'convention must be "mirror", "paper" or "raster", got {convention!r}')
    return _sines_and_cosines(position, dim, temperature).float()


def sincos_position_encoding(
    grid: int | Sequence[int], dim: int, *, symmetric: bool = False, device: torch.device | None = None
) -> Tensor:
    """Sin-cos encoding of a 3-D grid `(L, dim)` float32: a third of the width for each axis.

    The encoding of masked autoencoders (He et al., CVPR 2022) with a third axis. Without symmetry each token has its
    own encoding. `symmetric` applies the law of SPE to it: columns w and W-1-w have the same encoding, all others
    different ones. Unlike in SPE, which encodes one number, neighbours along every axis have similar encodings.

    Args:
        grid: tokens along each axis, (T, H, W) or one number for a cube.
        dim: width D of the encoding, at least 6. It is padded with zeros from the largest multiple of 6.
        symmetric: encode min(w, W-1-w) instead of w.

    Raises:
        ValueError: a `dim` below 6 or an empty grid.
    """
    if dim < 6:
        raise ValueError(f"a 3-D sin-cos encoding needs dim >= 6, got {dim}")
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in triple(grid)]
    if symmetric:
        axes[2] = torch.minimum(axes[2], axes[2].flip(0))
    width = 2 * (dim // 6)
    parts = [_sines_and_cosines(axis.reshape(-1), width) for axis in torch.meshgrid(*axes, indexing="ij")]
    encoding = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(encoding, (0, dim - 3 * width)).float()


def _sines_and_cosines(position: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Positions `(L,)` in float64 -> `(L, dim)`, sines at the even indices and cosines at the odd ones."""
    if dim < 2 or dim % 2:
        raise ValueError(f"a sin-cos encoding needs an even dim, got {dim}")
    frequency = temperature ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim)
    angle = position[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # L dim/2 2 -> L dim
