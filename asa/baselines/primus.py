"""Primus-M: a plain ViT that segments from its tokens (Wald et al., "Primus", 2025, arXiv 2503.01835).

Letters: volume `B C D H W`, grid T x H x W of L patches of 8^3 voxels, tokens `B L E`, heads M, head width d = E/M,
K output channels.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.networks.layers.drop_path import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from asa.baselines.base import Comparator
from asa.models.kernels import ChannelNorm
from asa.models.transfer import other_channels
from asa.ops.patches import grid_size, triple

PATCH = 8  # voxels
DROP_PATH = 0.2  # of the last block; it grows linearly from 0 at the first
SCALE = 0.1  # what each branch starts with (LayerScale)


class Attention(nn.Module):
    """Self-attention of all tokens with rotary positions; its output is normalised before the last projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, angles: Tensor) -> Tensor:
        """`(B, L, E)` -> the same; `angles` `(L, d/2)` are those of `rotary_angles`."""
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B M L d
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v)
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))


class GatedMLP(nn.Module):
    """SwiGLU with a norm (EVA-02): the hidden features are gated by those of a second projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, L, E)` -> the same."""
        return self.fc2(self.norm(F.silu(self.fc1_g(tokens)) * self.fc1_x(tokens)))


class Block(nn.Module):
    """A transformer block of EVA-02 (Fang et al., 2023) with LayerScale and stochastic depth."""

    def __init__(self, width: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), GatedMLP(width, int(width * 8 / 3))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), SCALE)) for _ in range(2))
        self.drop = DropPath(drop)

    def forward(self, tokens: Tensor, angles: Tensor) -> Tensor:
        """`(B, L, E)` -> the same."""
        tokens = tokens + self.drop(self.gamma_1 * self.attn(self.norm1(tokens), angles))
        return tokens + self.drop(self.gamma_2 * self.mlp(self.norm2(tokens)))


class PrimusEncoder(nn.Module):
    """Patches to tokens, learnt and rotary positions, and `depth` transformer blocks."""

    def __init__(self, img_size: int | Sequence[int], in_channels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        assert width % (6 * heads) == 0  # a third of a head's width is rotated by each coordinate, in pairs
        self.img_size, self.in_channels = triple(img_size), in_channels
        self.grid = grid_size(self.img_size, PATCH)
        self.head_width = width // heads
        self.patch_embed = nn.Conv3d(in_channels, width, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.empty(width, *self.grid))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, DROP_PATH * n / max(1, depth - 1)) for n in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, volume: Tensor) -> Tensor:
        """The last tokens in their places: `(B, C, D, H, W)` -> `(B, E, T, H, W)`."""
        tokens = (self.patch_embed(volume) + self.pos_embed).flatten(2).transpose(1, 2)  # B L E
        angles = rotary_angles(self.grid, self.head_width, volume.device)
        for block in self.blocks:
            tokens = block(tokens, angles)
        return self.norm(tokens).transpose(1, 2).unflatten(2, self.grid)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms."""
        return {"pos_embed"}

    def layers_above(self, name: str) -> int:
        """Layers between a parameter and the encoder's output: 0 for the final norm, 1 for the last block, ..."""
        if name.startswith("blocks."):
            return len(self.blocks) - int(name.split(".")[1])
        return 0 if name.startswith("norm.") else len(self.blocks) + 1

    def adapted(self, name: str, tensor: Tensor, patch_size: int | None) -> tuple[Tensor, str]:
        """A checkpoint's tensor for these channels (see `other_channels`) and this grid, and what was changed."""
        if name == "patch_embed.weight":
            return other_channels(tensor, self.in_channels)
        if name == "pos_embed" and tensor.ndim == 4 and tensor.is_floating_point() and tensor.shape[1:] != self.grid:
            grids = " to ".join("x".join(map(str, grid)) for grid in (tensor.shape[1:], self.grid))
            return F.interpolate(tensor[None], self.grid, mode="trilinear")[0], f"positions of {grids} tokens"
        return tensor, ""


class PatchDecoder(nn.Module):
    """Transposed convolutions that double the size, each but the last with a norm over channels and GELU."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        steps = int(math.log2(PATCH))
        # The widths fall geometrically to twice the classes, in multiples of 8.
        ratio = (width / (2 * out_channels)) ** (1 / steps)
        widths = [width, *(max(8, round(width / ratio**step / 8) * 8) for step in range(1, steps))]
        self.ups = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, 2) for a, b in pairwise([*widths, out_channels]))
        self.norms = nn.ModuleList(ChannelNorm(width, eps=1e-6) for width in widths[1:])

    def forward(self, features: Tensor) -> Tensor:
        """`(B, E, T, H, W)` -> logits `(B, K, D, H, W)`."""
        for up, norm in zip(self.ups, self.norms, strict=False):
            features = F.gelu(norm(up(features)))
        return self.ups[-1](features)


def rotary_angles(grid: Sequence[int], head_width: int, device: torch.device | None = None) -> Tensor:
    """The angles by which pairs of features are rotated at each token, `(L, d/2)` (RoPE, along three axes).

    A sixth of the pairs' features has the same frequencies on each axis: position times 10000^(-n/N), n < N = d/6.
    """
    count = head_width // 6
    frequencies = 10000 ** (-torch.arange(count, device=device) / count)
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    return torch.cat([axis.reshape(-1, 1) * frequencies for axis in axes], dim=1)


def rotated(features: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs of neighbouring features `(B, M, L, d)` by angles `(L, d/2)`."""
    one, other = features.unflatten(-1, (-1, 2)).unbind(-1)
    sin, cos = angles.sin().to(features.dtype), angles.cos().to(features.dtype)
    return torch.stack((one * cos - other * sin, other * cos + one * sin), dim=-1).flatten(-2)


def primus_m(
    out_channels: int,
    img_size: int | Sequence[int] = 160,
    in_channels: int = 1,
    width: int = 864,
    depth: int = 16,
    heads: int = 12,
) -> Comparator:
    """Primus-M with its published sizes: 16 blocks of width 864 with 12 heads.

    147.66 million parameters for one channel, 14 classes and 96^3 voxels, 153.08 for 160^3, whose positions are more;
    as many as of the package dynamic-network-architectures.
    """
    encoder = PrimusEncoder(img_size, in_channels, width, depth, heads)
    model = Comparator(PatchDecoder(width, out_channels), encoder, out_channels)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=0.01)
        if isinstance(module, nn.Linear | nn.Conv3d | nn.ConvTranspose3d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for number, block in enumerate(encoder.blocks, start=1):  # as in BEiT
        assert isinstance(block, Block)
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.data.div_(math.sqrt(2 * number))
    return model


def primus_tiny(out_channels: int, **overrides: Any) -> Comparator:
    """Primus with four narrow blocks: for tests and demonstrations on a CPU."""
    return primus_m(out_channels, **{**dict(img_size=64, width=144, depth=4, heads=4), **overrides})
