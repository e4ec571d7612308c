"""A linear probe: how well a linear map predicts labels from an encoder's tokens.

Letters: volume `B C D H W`, L tokens `B L E`, patch size s, K output channels.
"""

from typing import Any

from torch import Tensor, nn

from asa.models import sw_vit
from asa.models.sw_vit import SWViT
from asa.ops.patches import unpatchify
from asa.ops.symmetry import mirror_patches


class LinearProbe(nn.Module):
    """A linear map from each token to the logits of its patch's voxels, instead of a U-Net.

    With a frozen encoder it measures the quality of the encoder's features.

    Args:
        encoder: the token encoder.
        out_channels: classes K, background included, or regions.
    """

    mirrored = False

    def __init__(self, encoder: SWViT, out_channels: int) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, out_channels
        self.head = nn.Linear(encoder.embed_dim, out_channels * encoder.patch_size**3)
        nn.init.zeros_(self.head.bias)

    def forward(self, volume: Tensor, deep_supervision: bool = False) -> Tensor | list[Tensor]:
        """Segment a volume `(B, C, D, H, W)`.

        Returns:
            Logits `(B, K, D, H, W)`, with `deep_supervision` in a list of this one resolution.

        Raises:
            ValueError: a volume of another size than the encoder's.
        """
        logits = unpatchify(self.head(self.encoder(volume)), self.encoder.grid, self.encoder.patch_size)
        if self.encoder.mirror_patches:
            logits = mirror_patches(logits, self.encoder.patch_size)
        return [logits] if deep_supervision else logits


def probe_base(out_channels: int, **overrides: Any) -> LinearProbe:
    """The probe of `sw_vit_base`, which takes `overrides`."""
    return LinearProbe(sw_vit.sw_vit_base(**overrides), out_channels)


def probe_small(out_channels: int, **overrides: Any) -> LinearProbe:
    """The probe of `sw_vit_small`."""
    return LinearProbe(sw_vit.sw_vit_small(**overrides), out_channels)


def probe_tiny(out_channels: int, **overrides: Any) -> LinearProbe:
    """The probe of `sw_vit_tiny`."""
    return LinearProbe(sw_vit.sw_vit_tiny(**overrides), out_channels)
