"""Symmetry-aware cross-attention (SACA; SA-Swin, MICCAI 2024): tokens cross-attend to those of the mirror image.

Letters: volume `B C D H W`, tokens f and f~ `B L E` of a volume and its mirror image, M attention heads of d = E / M.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.ops.position import sincos_position_encoding

NORMS = ("pre", "post")


class SymmetryAwareCrossAttention(nn.Module):
    """SACA(f, f~) = softmax(Q K~^T / sqrt(d)) V~ per head, Q from f, K~ and V~ from f~, then a linear map of all heads.

    The equation is that of the paper's abstract; heads and the last map are as in its released code. SACA(f, f) is
    self-attention. It has no position encoding: permuting f~ changes nothing, permuting f permutes the output.

    Args:
        dim: token width E.
        num_heads: heads M; M divides E.

    Raises:
        ValueError: a width that is not divisible by the heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a token width of {dim} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mirrored: Tensor) -> Tensor:
        """Attend from f `(B, L, E)` to f~ `(B, any number, E)`: `(B, L, E)`."""
        query = self._heads(self.query(tokens))
        key, value = (self._heads(part) for part in self.key_value(mirrored).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        """`(B, L, E)` -> `(B, M, L, d)`."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SymmetryAwareBlock(nn.Module):
    """Self-attention of f, cross-attention from f to f~ and an MLP, each with a residual connection.

    One layer of the released code.

    Args:
        dim: token width E.
        num_heads: attention heads M.
        norm: `"pre"` normalises the input of each part, `"post"` the sum of its input and output.
        self_attention: False leaves out the first part.
        position: add a plain sin-cos position encoding to f and f~. Without it, as released, the block cannot know
            which token is the counterpart of which.

    Raises:
        ValueError: another norm, or a width that is not divisible by the heads.
    """

    def __init__(
        self, dim: int, num_heads: int, norm: str = "pre", self_attention: bool = True, position: bool = False
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"the norm of the symmetry-aware block must be {' or '.join(NORMS)}, got {norm!r}")
        self.pre, self.position = norm == "pre", position
        self.attention = SymmetryAwareCrossAttention(dim, num_heads) if self_attention else None
        self.norm1 = nn.LayerNorm(dim) if self_attention else None
        self.cross = SymmetryAwareCrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mirrored: Tensor, grid: Sequence[int] = ()) -> Tensor:
        """Update f from itself and from f~, both `(B, L, E)` in raster order: `(B, L, E)`.

        The tokens along each axis, `grid`, are needed with `position` only.
        """
        if self.position:
            encoding = sincos_position_encoding(grid, tokens.shape[2], device=tokens.device)  # L E
            tokens, mirrored = tokens + encoding, mirrored + encoding
        if self.attention is not None and self.norm1 is not None:
            inside = self.norm1(tokens) if self.pre else tokens
            tokens = tokens + self.attention(inside, inside)
            tokens = tokens if self.pre else self.norm1(tokens)
        if self.pre:
            tokens = tokens + self.cross(self.norm2(tokens), self.norm2(mirrored))
            return tokens + self.mlp(self.norm3(tokens))
        tokens = self.norm2(tokens + self.cross(tokens, mirrored))
        return self.norm3(tokens + self.mlp(tokens))


def with_mirror(volume: Tensor, mirrored: Tensor | None) -> Tensor:
    """Volumes and their mirror images in one batch for a shared encoder: `(B, C, D, H, W)` twice -> `(2 B, ...)`.

    A ValueError if the mirror images are missing.
    """
    if mirrored is None:
        raise ValueError("this network compares a volume with its mirror image: pass both")
    return torch.cat([volume, mirrored])
