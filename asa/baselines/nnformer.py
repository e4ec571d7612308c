"""nnFormer: window attention on the way down, and from the way up to it (Zhou et al., IEEE TIP 2023, arXiv 2109.03201).

Where the paper leaves a detail open, it is that of the released code. Its queries are not projected in skip attention.

Letters: volume `B C D H W`; at level l features of width E_l = 2^l E on a grid G0 x G1 x G2, 1/(4*2^l) of the volume's
sizes; windows `N S E_l` of S tokens, heads M, head width d, K output channels.
"""

from collections.abc import Sequence
from typing import Any

from monai.networks.layers.drop_path import DropPath
from monai.networks.nets.swin_unetr import (
    SwinTransformerBlock,
    WindowAttention,
    compute_mask,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from asa.baselines.base import Comparator, Window, conv3
from asa.models.kernels import ChannelNorm
from asa.ops.patches import grid_size, triple

STRIDE = 4  # of the embedding
WINDOWS = (4, 4, 8, 4)  # edge of the windows at each level, in tokens
DROP_PATH = 0.2  # of the last block of encoder and decoder; it grows linearly from 0


class Level(nn.Module):
    """Two transformer blocks of MONAI, the second with shifted windows, with a drop probability each.

    Along an axis that is shorter than `window` there is one window. If `crossed`, the first block is a `SkipBlock`.
    """

    def __init__(
        self, grid: Sequence[int], width: int, heads: int, window: int, drops: Sequence[float], crossed: bool = False
    ) -> None:
        super().__init__()
        self.window = tuple(min(window, n) for n in grid)
        self.shift = tuple(window // 2 if n > window else 0 for n in grid)
        padded = [-(-n // w) * w for n, w in zip(grid, self.window, strict=True)]  # as the blocks do
        mask = compute_mask(padded, self.window, self.shift, None) if any(self.shift) else None
        self.register_buffer("mask", mask, persistent=False)
        first = SkipBlock if crossed else SwinTransformerBlock
        self.blocks = nn.ModuleList([first(width, heads, self.window, (0, 0, 0), drop_path=drops[0])])
        self.blocks.append(SwinTransformerBlock(width, heads, self.window, self.shift, drop_path=drops[1]))

    def forward(self, features: Tensor, skip: Tensor | None = None) -> Tensor:
        """`(B, E, G0, G1, G2)` -> the same; with `skip` of this shape, the first block attends to that."""
        out = features.movedim(1, -1)
        out = self.blocks[0](out, None) if skip is None else self.blocks[0](out, skip.movedim(1, -1))
        return self.blocks[1](out, self.mask).movedim(-1, 1)


class SkipAttention(WindowAttention):
    """Attention from the decoder's tokens to the encoder's; the decoder's are the queries as they are."""

    def __init__(self, dim: int, num_heads: int, window_size: Sequence[int]) -> None:
        super().__init__(dim, num_heads, window_size)
        self.qkv = nn.Linear(dim, 2 * dim)  # keys and values

    def forward(self, tokens: Tensor, skip: Tensor) -> Tensor:
        """Windows `(N, S, E)` of both -> the same."""
        size = tokens.shape[1]
        k, v = self.qkv(skip).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # N M S d
        q = tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        index: Any = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].view(size, size, -1).permute(2, 0, 1)  # M S S
        out = nn.functional.scaled_dot_product_attention(q, k, v, bias[None].to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))


class SkipBlock(nn.Module):
    """A transformer block whose windows attend to the same windows of the encoder's features (skip attention)."""

    def __init__(
        self, dim: int, num_heads: int, window_size: Sequence[int], shift_size: Sequence[int], drop_path: float
    ) -> None:
        super().__init__()
        self.window = tuple(window_size)
        self.norm1, self.attn = nn.LayerNorm(dim), SkipAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = DropPath(drop_path)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Features of the level below, and the encoder's: `(B, G0, G1, G2, E)` -> the same."""
        grid = features.shape[1:4]
        pad = [n for w, size in zip(self.window[::-1], grid[::-1], strict=True) for n in (0, -size % w)]
        both = [nn.functional.pad(self.norm1(maps), (0, 0, *pad)) for maps in (features, skip)]
        dims = both[0].shape[:4]
        out = self.attn(*(window_partition(maps, self.window) for maps in both))
        out = window_reverse(out.unflatten(1, self.window), self.window, list(dims))
        features = features + skip + self.drop(out[:, : grid[0], : grid[1], : grid[2]])
        return features + self.drop(self.mlp(self.norm2(features)))


class NNFormer(nn.Module):
    """Convolutional embedding, levels of window attention with strided convolutions, and the same way back."""

    def __init__(
        self,
        img_size: Sequence[int],
        in_channels: int,
        out_channels: int,
        width: int = 192,
        heads: Sequence[int] = (6, 12, 24, 48),
    ) -> None:
        super().__init__()
        count = len(heads)
        grid_size(img_size, STRIDE * 2 ** (count - 1))  # checks the size
        widths = [width * 2**level for level in range(count)]
        grids = [grid_size(img_size, STRIDE * 2**level) for level in range(count)]
        half = width // 2
        self.embed = nn.Sequential(
            conv3(in_channels, half, 2), nn.GELU(), ChannelNorm(half), conv3(half, half), nn.GELU(), ChannelNorm(half),
            conv3(half, width, 2), nn.GELU(), ChannelNorm(width), conv3(width, width), ChannelNorm(width),
        )  # fmt: skip
        down, up = _drops(count), _drops(count - 1)
        self.encoder = nn.ModuleList(Level(grids[n], widths[n], heads[n], WINDOWS[n], down[n]) for n in range(count))
        self.norms = nn.ModuleList(ChannelNorm(size) for size in widths)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.GELU(), ChannelNorm(size), conv3(size, 2 * size, 2)) for size in widths[:-1]
        )
        self.ups = nn.ModuleList(
            nn.Sequential(ChannelNorm(2 * size), nn.ConvTranspose3d(2 * size, size, 2, 2)) for size in widths[:-1]
        )
        self.decoder = nn.ModuleList(
            Level(grids[n], widths[n], heads[n], WINDOWS[n], up[count - 2 - n], crossed=True) for n in range(count - 1)
        )
        self.heads = nn.ModuleList(nn.ConvTranspose3d(size, out_channels, STRIDE, STRIDE) for size in widths[:-1])

    def forward(self, volume: Tensor) -> list[Tensor]:
        """`(B, C, D, H, W)` -> logits `(B, K, D/2^l, H/2^l, W/2^l)` of three resolutions, from the finest."""
        features, skips = self.embed(volume), []
        for level, (stage, norm) in enumerate(zip(self.encoder, self.norms, strict=True)):
            features = stage(features)
            skips.append(norm(features))
            features = self.downs[level](features) if level < len(self.downs) else skips[-1]
        logits = []
        for level in reversed(range(len(self.decoder))):
            features = self.decoder[level](self.ups[level](features), skips[level])
            logits.append(self.heads[level](features))
        return logits[::-1]


def _drops(levels: int) -> list[tuple[float, float]]:
    """The drop probabilities of the two blocks of each level, in the order of computation."""
    last = 2 * levels - 1
    return [(DROP_PATH * 2 * n / last, DROP_PATH * (2 * n + 1) / last) for n in range(levels)]


def nnformer_base(
    out_channels: int, img_size: int | Sequence[int] = 128, in_channels: int = 1, **sizes: Any
) -> Comparator:
    """nnFormer with its published sizes: widths from 192 to 1536, 6 to 48 heads, two blocks a level.

    150.66 million parameters for one channel, 14 classes and 128^3 voxels. Papers that compare with it print 150.5
    (ratio 1.001) or 149.3 (1.009).
    """
    size = triple(img_size)
    return Comparator(NNFormer(size, in_channels, out_channels, **sizes), Window(size, in_channels), out_channels)


def nnformer_tiny(out_channels: int, **overrides: Any) -> Comparator:
    """nnFormer with narrow layers: for tests and demonstrations on a CPU."""
    return nnformer_base(out_channels, **{**dict(img_size=64, width=24, heads=(2, 4, 8, 16)), **overrides})
