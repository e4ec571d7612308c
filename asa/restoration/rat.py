"""RAT: region attention transformer for the restoration of images (MICCAI 2024, arXiv 2407.09268).

Letters: image `B C H W`, label map `B H W`, features `B E h w` at a quarter of the resolution, their tokens `B L E` in
raster order, M attention heads, upscaling factor s.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.models.kernels import ChannelNorm
from asa.restoration.regions import RegionIndex, check_labels, coarse_labels, region_attention, region_index

REDUCTION = 4  # attention is at 1/4 of the image's resolution
BLOCKS = 2  # NAF blocks per stage


class NAFBlock(nn.Module):
    """Convolution block without activation functions (NAFNet, ECCV 2022): gates multiply two halves of the channels.

    y = x + b * C1(SCA(SG(DW3(C1(LN x))))), out = y + g * C1(SG(C1(LN y))); b and g start at 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.expand = nn.Conv2d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.channels = nn.Conv2d(dim, dim, 1)  # SCA: channel weights from their means over the image
        self.project = nn.Conv2d(dim, dim, 1)
        self.mix = nn.Conv2d(dim, 2 * dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)
        self.scale1, self.scale2 = (nn.Parameter(torch.zeros(dim, 1, 1)) for _ in range(2))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms."""
        return {"scale1", "scale2"}

    def forward(self, x: Tensor) -> Tensor:
        """`(B, E, h, w)` -> `(B, E, h, w)`."""
        y = _gate(self.depthwise(self.expand(self.norm1(x))))
        y = x + self.scale1 * self.project(y * self.channels(y.mean(dim=(2, 3), keepdim=True)))
        return y + self.scale2 * self.out(_gate(self.mix(self.norm2(y))))


def _gate(x: Tensor) -> Tensor:
    u, v = x.chunk(2, dim=1)
    return u * v


class _Heads(nn.Module):
    """The projections of self-attention with M heads, which divide the token width E."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a token width of {dim} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class RegionAttention(_Heads):
    """Multi-head self-attention inside the regions of a label map: R-MSA.

    Scaled by 1 / sqrt(head dimension); the released code divides by the square root of the number of heads. For
    `backend` see `asa.restoration.regions.region_attention`.
    """

    def __init__(self, dim: int, num_heads: int, backend: str = "auto") -> None:
        super().__init__(dim, num_heads)
        self.backend = backend

    def forward(self, tokens: Tensor, regions: RegionIndex | Tensor) -> Tensor:
        """`(B, L, E)`, and labels `(B, L)` or their `region_index`, which several layers can share -> `(B, L, E)`."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each B M L d
        out = region_attention(q, k, v, regions, self.backend)
        return self.proj(out.transpose(1, 2).flatten(2))


class WindowAttention(_Heads):
    """Multi-head self-attention inside square windows that tile the image: W-MSA.

    Assumed: no position encoding inside a window; the convolutions around it distinguish positions.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__(dim, num_heads)
        self.window = window

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """`(B, L, E)` in raster order of the grid (h, w), divisible by the window -> `(B, L, E)`."""
        (h, w), s = grid, self.window
        b = len(tokens)
        qkv = self.qkv(tokens).view(b, h // s, s, w // s, s, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # 3 B h/s w/s M s s d
        q, k, v = qkv.reshape(3, b * h * w // s**2, self.num_heads, s * s, -1)
        out = F.scaled_dot_product_attention(q, k, v)  # N M s*s d
        out = out.view(b, h // s, w // s, self.num_heads, s, s, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(out.reshape(b, h * w, -1))


class RegionLayer(nn.Module):
    """x += a_r * R-MSA(LN x); x += MLP(LN x); x += a_w * W-MSA(LN x); x += MLP(LN x). a_r and a_w start at 0."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, window: int, backend: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.regions = RegionAttention(dim, num_heads, backend)
        self.windows = WindowAttention(dim, num_heads, window)
        hidden = int(dim * mlp_ratio)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) for _ in range(2)
        )
        self.region_scale, self.window_scale = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, tokens: Tensor, index: RegionIndex, grid: tuple[int, int]) -> Tensor:
        """`(B, L, E)` -> `(B, L, E)`."""
        tokens = tokens + self.region_scale * self.regions(self.norms[0](tokens), index)
        tokens = tokens + self.mlps[0](self.norms[1](tokens))
        tokens = tokens + self.window_scale * self.windows(self.norms[2](tokens), grid)
        return tokens + self.mlps[1](self.norms[3](tokens))


class RegionGroup(nn.Module):
    """Layers and a 3x3 convolution, with one residual connection over both."""

    def __init__(self, depth: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RegionLayer(**layer) for _ in range(depth))
        self.conv = nn.Conv2d(layer["dim"], layer["dim"], 3, padding=1)

    def forward(self, features: Tensor, index: RegionIndex) -> Tensor:
        """`(B, E, h, w)` -> `(B, E, h, w)`."""
        h, w = features.shape[2:]
        tokens = features.flatten(2).transpose(1, 2)  # B L E
        for layer in self.layers:
            tokens = layer(tokens, index, (h, w))
        return features + self.conv(tokens.transpose(1, 2).unflatten(2, (h, w)))


class RestorationNetwork(nn.Module):
    """What restoration networks share: a residual is added to the image, which is upscaled bilinearly before.

    Args:
        in_channels: channels C of the image and of the result.
        upscale: factor s of super-resolution, 1 (none), 2 or 4.
        multiple, smallest: the image is padded to sizes that are divisible by the one, and not below the other.
    """

    regional: bool  # whether label maps have an effect

    def __init__(self, in_channels: int, upscale: int, multiple: int, smallest: int = 0) -> None:
        super().__init__()
        if upscale not in (1, 2, 4):
            raise ValueError(f"upscale must be 1, 2 or 4, got {upscale}")
        self.in_channels, self.upscale, self.multiple, self.smallest = in_channels, upscale, multiple, smallest

    def forward(self, image: Tensor, regions: Tensor) -> Tensor:
        """Restore images of any height and width: `(B, C, H, W)` -> `(B, C, s*H, s*W)`; a ValueError as of `check`.

        `regions` is the label map `(B, H, W)` of the input image, any integers, on the image's device or on the host:
        its values are read, which waits for a GPU.
        """
        self.check(image, regions)
        if self.upscale > 1:
            image = F.interpolate(image, scale_factor=self.upscale, mode="bilinear")
        h, w = image.shape[2:]
        bottom, right = (max(-n % self.multiple, self.smallest - n) for n in (h, w))
        padded = F.pad(image, (0, right, 0, bottom), mode="replicate")
        return image + self.residual(padded, regions)[:, :, :h, :w]

    def residual(self, image: Tensor, regions: Tensor) -> Tensor:
        """The residual of an upscaled, padded image `(B, C, H, W)`, with the label map of the input image."""
        raise NotImplementedError

    def check(self, image: Tensor, regions: Tensor) -> None:
        """Raise a ValueError for images of other channels, or label maps of another shape than the images."""
        channels = self.in_channels
        if image.ndim != 4 or image.shape[1] != channels:
            kind = {1: "grey", 3: "colour"}.get(channels, "")
            raise ValueError(
                f"this network takes {kind} images of shape (batch, {channels}, H, W), got {tuple(image.shape)}: "
                "convert the image, or build the network with that in_channels"
            )
        check_labels(regions)
        if regions.shape != (expected := (len(image), *image.shape[2:])):
            raise ValueError(
                f"the label map has shape {tuple(regions.shape)}, the images {tuple(image.shape)}: it must be "
                f"{expected}; compute it from this image"
            )


class RegionAttentionTransformer(RestorationNetwork):
    """U-shaped restoration network with region and window attention at a quarter of the resolution.

    Args:
        in_channels, upscale: see `RestorationNetwork`.
        dim: features at full resolution; twice as many at 1/2 and four times as many, E, at 1/4.
        groups, depth: groups of layers, and layers per group.
        num_heads, window: heads M of both attentions, and the edge of the windows in features.
        mlp_ratio: hidden width of the MLPs over E.
        majority: a feature's region is the most frequent one of its 4 x 4 pixels; False, as released: that of the
            pixel at its corner.
        backend: of the region attention, see `asa.restoration.regions.region_attention`.
    """

    regional = True

    def __init__(
        self,
        in_channels: int = 1,
        upscale: int = 1,
        dim: int = 64,
        groups: int = 4,
        depth: int = 3,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        window: int = 4,
        majority: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(in_channels, upscale, REDUCTION * window)
        self.majority = majority
        layer = dict(dim=4 * dim, num_heads=num_heads, mlp_ratio=mlp_ratio, window=window, backend=backend)
        self.stem = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.encoders = nn.ModuleList(_naf_stage(width) for width in (dim, 2 * dim))
        self.downs = nn.ModuleList(nn.Conv2d(width, 2 * width, 2, stride=2) for width in (dim, 2 * dim))
        self.groups = nn.ModuleList(RegionGroup(depth, **layer) for _ in range(groups))
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.PixelShuffle(2)) for width in (4 * dim, 2 * dim)
        )
        self.decoders = nn.ModuleList(_naf_stage(width) for width in (2 * dim, dim))
        self.head = nn.Conv2d(dim, in_channels, 3, padding=1)

    def residual(self, image: Tensor, regions: Tensor) -> Tensor:
        """See `RestorationNetwork.residual`."""
        labels = coarse_labels(regions.long(), REDUCTION // self.upscale, majority=self.majority)
        bottom, right = (n // REDUCTION - m for n, m in zip(image.shape[2:], labels.shape[1:], strict=True))
        # Padding is a region of its own: pixels of the image attend to it only in the windows at the border.
        labels = F.pad(labels, (0, right, 0, bottom), value=int(regions.max()) + 1)  # B h w
        index = region_index(labels.flatten(1)).to(image.device)
        features, skips = self.stem(image), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(features))
            features = down(skips[-1])
        middle = features
        for group in self.groups:
            middle = group(middle, index)
        features = features + middle
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            features = decoder(up(features) + skips.pop())
        return self.head(features)


def _naf_stage(dim: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(dim) for _ in range(BLOCKS)))


def rat_base(**overrides: Any) -> RegionAttentionTransformer:
    """The released network: 15.9 M parameters."""
    return RegionAttentionTransformer(**overrides)


def rat_small(**overrides: Any) -> RegionAttentionTransformer:
    """2.1 M parameters: for a single workstation GPU."""
    return RegionAttentionTransformer(**{**dict(dim=32, groups=2, depth=3, num_heads=8), **overrides})


def rat_tiny(**overrides: Any) -> RegionAttentionTransformer:
    """0.2 M parameters: for tests and demonstrations on a CPU."""
    return RegionAttentionTransformer(**{**dict(dim=12, groups=2, depth=2, num_heads=4), **overrides})
