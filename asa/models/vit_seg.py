"""Segmentation from tokens alone: a light head on the encoder, in the manner of Primus (Wald et al., 2025), or a probe.

Letters: volume `B C D H W`, grid T x H x W of L tokens `B L E`, patch size s, K output channels.
"""

from typing import Any

from torch import Tensor, nn

from asa.models.sw_vit import SWViT, sw_vit_base, sw_vit_small, sw_vit_tiny
from asa.ops.patches import unpatchify
from asa.ops.symmetry import mirror_patches


class TokenSegmentation(nn.Module):
    """An encoder, and a head that maps its last tokens to logits. There is no path around the encoder."""

    mirrored = False
    head: nn.Linear

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels

    def forward(self, volume: Tensor, deep_supervision: bool = False) -> Tensor | list[Tensor]:
        """Segment a volume `(B, C, D, H, W)`.

        Returns:
            Logits `(B, K, D, H, W)`, with `deep_supervision` in a list of this one resolution.

        Raises:
            ValueError: a volume of another size than the encoder's.
        """
        logits = self.decode(self.encoder(volume))
        if self.encoder.mirror_patches:
            logits = mirror_patches(logits, self.encoder.patch_size)
        return [logits] if deep_supervision else logits

    def decode(self, tokens: Tensor) -> Tensor:
        """The last tokens `(B, L, E)` -> logits `(B, K, D, H, W)`."""
        raise NotImplementedError


class LinearProbe(TokenSegmentation):
    """A linear map from each token to the logits of its patch's voxels.

    With a frozen encoder it measures the quality of the encoder's features: how well a linear map predicts labels.

    Args:
        encoder: the token encoder.
        out_channels: classes K, background included, or regions.
    """

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__(encoder, out_channels)
        self.head = nn.Linear(encoder.embed_dim, out_channels * encoder.patch_size**3)
        nn.init.zeros_(self.head.bias)

    def decode(self, tokens: Tensor) -> Tensor:
        """The last tokens `(B, L, E)` -> logits `(B, K, D, H, W)`."""
        return unpatchify(self.head(tokens), self.encoder.grid, self.encoder.patch_size)


class SegmentationViT(TokenSegmentation):
    """A token encoder, and transposed convolutions from its last tokens to the logits of all voxels.

    Whatever the head knows of the image, it reads from the tokens. (The U-Net of `asa.models.unet` reads the image
    itself at its finest level.)

    Each transposed convolution halves the voxel size and the width; kernel and stride are 2, so it is a linear map of
    each token to its eight parts, and all of them are computed as matrix products.

    Args:
        encoder: the token encoder; its patch size is a power of two.
        out_channels: classes K, background included, or regions.

    Raises:
        ValueError: a patch size that is not a power of two, or a width that cannot be halved as often.
    """

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__(encoder, out_channels)
        steps = encoder.patch_size.bit_length() - 1
        if encoder.patch_size != 2**steps or steps < 1:
            raise ValueError(f"the head takes patches of 2, 4, 8, ... voxels, got {encoder.patch_size}")
        if encoder.embed_dim % 2 ** (steps - 1):
            raise ValueError(f"a token width of {encoder.embed_dim} cannot be halved {steps - 1} times")
        widths = [encoder.embed_dim // 2**k for k in range(steps)]
        self.ups = nn.ModuleList(nn.Linear(width, 8 * width // 2) for width in widths[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        self.head = nn.Linear(widths[-1], 8 * out_channels)
        for linear in (*self.ups, self.head):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def decode(self, tokens: Tensor) -> Tensor:
        """The last tokens `(B, L, E)` -> logits `(B, K, D, H, W)`."""
        grid = self.encoder.grid
        for up, norm in zip(self.ups, self.norms, strict=True):
            tokens, grid = split(up(tokens), grid)
            tokens = nn.functional.gelu(norm(tokens))
        return unpatchify(self.head(tokens), grid, 2)


def split(tokens: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Tokens of eight parts each `(B, L, 8*F)`, the parts innermost, to tokens of half the size `(B, 8*L, F)`."""
    t, h, w = grid
    parts = tokens.unflatten(2, (-1, 2, 2, 2)).unflatten(1, grid)  # B T H W F 2 2 2
    finer = parts.permute(0, 1, 5, 2, 6, 3, 7, 4)  # B T 2 H 2 W 2 F
    return finer.flatten(1, 6), (2 * t, 2 * h, 2 * w)


def vit_seg_base(out_channels: int, **overrides: Any) -> SegmentationViT:
    """The token head on `sw_vit_base`, which takes `overrides`."""
    return SegmentationViT(sw_vit_base(**overrides), out_channels)


def vit_seg_small(out_channels: int, **overrides: Any) -> SegmentationViT:
    """The token head on `sw_vit_small`."""
    return SegmentationViT(sw_vit_small(**overrides), out_channels)


def vit_seg_tiny(out_channels: int, **overrides: Any) -> SegmentationViT:
    """The token head on `sw_vit_tiny`."""
    return SegmentationViT(sw_vit_tiny(**overrides), out_channels)


def probe_base(out_channels: int, **overrides: Any) -> LinearProbe:
    """The probe of `sw_vit_base`, which takes `overrides`."""
    return LinearProbe(sw_vit_base(**overrides), out_channels)


def probe_small(out_channels: int, **overrides: Any) -> LinearProbe:
    """The probe of `sw_vit_small`."""
    return LinearProbe(sw_vit_small(**overrides), out_channels)


def probe_tiny(out_channels: int, **overrides: Any) -> LinearProbe:
    """The probe of `sw_vit_tiny`."""
    return LinearProbe(sw_vit_tiny(**overrides), out_channels)
