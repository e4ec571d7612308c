"""Symmetry-aware cross-attention (SACA; SA-Swin, MICCAI 2024): tokens of a volume look at those of its mirror image.

Letters: tokens f and f~ `B L E`, M attention heads of d = E / M.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = ("pre", "post")


class SymmetryAwareCrossAttention(nn.Module):
    """SACA(f, f~) = softmax(Q K~^T / sqrt(d)) V~ with Q of f, K~ and V~ of f~, in each head, and a linear map of all.

    The equation of the paper's abstract; heads and the last map as in its released code. SACA(f, f) is self-attention.
    Nothing in it knows where a token stands: permuting f~ changes nothing, permuting f permutes the output.

    Args:
        dim: token width E.
        num_heads: heads M; M divides E.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mirrored: Tensor) -> Tensor:
        """Attend from f to f~.

        Args:
            tokens: f, `(B, L, E)`.
            mirrored: f~, `(B, any number, E)`.

        Returns:
            `(B, L, E)`.
        """
        query = self._heads(self.query(tokens))
        key, value = (self._heads(part) for part in self.key_value(mirrored).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        """`(B, L, E)` -> `(B, M, L, d)`."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SymmetryAwareBlock(nn.Module):
    """Self-attention of f, cross-attention from f to f~, an MLP: each with a residual. One layer of the released code.

    Args:
        dim: token width E.
        num_heads: attention heads M.
        mlp_ratio: hidden width of the MLP over E.
        norm: `"pre"` normalises what goes into each part, `"post"` what comes out of its sum.
        self_attention: False leaves the first part out.

    Raises:
        ValueError: another norm, or heads that do not divide the width.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, norm: str = "pre", self_attention: bool = True
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"the norm of the symmetry-aware block is {' or '.join(NORMS)}, not {norm!r}")
        self.pre = norm == "pre"
        self.attention = SymmetryAwareCrossAttention(dim, num_heads) if self_attention else None
        self.norm1 = nn.LayerNorm(dim) if self_attention else None
        self.cross = SymmetryAwareCrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mirrored: Tensor, position: Tensor | None = None) -> Tensor:
        """f and f~ to what f has seen of f~.

        Args:
            tokens, mirrored: f and f~, `(B, L, E)`.
            position: codes of the places, `(L, E)`, added to both: then the block can tell which token mirrors which.

        Returns:
            `(B, L, E)`.
        """
        if position is not None:
            tokens, mirrored = tokens + position, mirrored + position
        if self.attention is not None and self.norm1 is not None:
            inside = self.norm1(tokens) if self.pre else tokens
            tokens = tokens + self.attention(inside, inside)
            tokens = tokens if self.pre else self.norm1(tokens)
        if self.pre:
            tokens = tokens + self.cross(self.norm2(tokens), self.norm2(mirrored))
            return tokens + self.mlp(self.norm3(tokens))
        tokens = self.norm2(tokens + self.cross(tokens, mirrored))
        return self.norm3(tokens + self.mlp(tokens))


def look_across(
    encoder: nn.Module, saca: SymmetryAwareBlock, volume: Tensor, mirrored: Tensor, position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """f, f~ and SACA(f, f~), each `(B, L, E)`, by one batched call of a shared encoder.

    Args:
        encoder: volumes to tokens.
        saca: the block.
        volume, mirrored: `(B, C, D, H, W)`; voxel i of the one is the counterpart of voxel i of the other.
        position: codes of the places, see `SymmetryAwareBlock`.
    """
    f, counterpart = encoder(torch.cat([volume, mirrored])).chunk(2)
    return f, counterpart, saca(f, counterpart, position)
