"""The masked autoencoder of ASA (MICCAI 2022): an SW-ViT encoder on the visible patches, an SW-ViT decoder on all.

Letters: volume `B C D H W`, L tokens in raster order of which M are masked and V visible, token width E, patch size s.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asa.models import sw_vit
from asa.models.sw_vit import SWViT, run_block, window_blocks
from asa.ops.patches import split_indices, tokens_at


class MaskedAutoencoder(nn.Module):
    """Predicts the masked patches of a volume from the visible ones.

    The encoder takes the visible patches only. The decoder takes all tokens in raster order, with their position
    encoding: the projected outputs of the encoder, and one learnable mask token at each masked index. Its head predicts
    the masked patches.

    With `position="mirror"` this is ASA's network, with `"sincos"` a plain MAE with the same attention windows.

    Args:
        img_size, patch_size, in_channels, embed_dim, num_heads, mlp_ratio, window, position, checkpointing: of encoder
            and decoder, see `asa.models.sw_vit.SWViT`.
        depth, decoder_depth: blocks of the encoder and of the decoder.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 128,
        patch_size: int = 8,
        in_channels: int = 1,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        window: int = 32,
        decoder_depth: int = 8,
        position: str = "mirror",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = SWViT(
            img_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio, window, position, checkpointing
        )
        self.checkpointing = checkpointing
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder = window_blocks(decoder_depth, embed_dim, num_heads, mlp_ratio, window)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, in_channels * patch_size**3)
        for linear in (self.projection, self.head):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms."""
        return {"mask_token"}

    def forward(self, volume: Tensor, mask: Tensor) -> Tensor:
        """Predict the masked patches.

        Args:
            volume: `(B, C, D, H, W)`.
            mask: bool `(B, L)`, True = masked, the same count M in every sample. For a CPU tensor the count is read
                without synchronising with the GPU.

        Returns:
            `(B, M, C*s^3)`, the masked patches in raster order.

        Raises:
            ValueError: a volume or mask of another size, or different counts per sample.
        """
        self.encoder.check_mask(volume, mask)
        visible, masked = (index.to(volume.device, non_blocking=True) for index in split_indices(mask))
        encoded = self.projection(self.encoder.encode(volume, visible))  # B V E
        b, _, e = encoded.shape
        tokens = self.mask_token.to(encoded.dtype).expand(b, mask.shape[1], e)  # B L E
        tokens = tokens.scatter(1, visible[:, :, None].expand(-1, -1, e), encoded)
        tokens = tokens + self.encoder.position
        for block in self.decoder:
            tokens = run_block(block, tokens, checkpointing=self.checkpointing)
        return self.head(self.norm(tokens_at(tokens, masked)))


def asa_base(**overrides: Any) -> MaskedAutoencoder:
    """The paper's autoencoder: 12 + 8 blocks of width 384, 36 M parameters."""
    return MaskedAutoencoder(**{**sw_vit.BASE, "decoder_depth": 8, **overrides})


def asa_small(**overrides: Any) -> MaskedAutoencoder:
    """8 + 4 blocks of width 192: for a single workstation GPU."""
    return MaskedAutoencoder(**{**sw_vit.SMALL, "decoder_depth": 4, **overrides})


def asa_tiny(**overrides: Any) -> MaskedAutoencoder:
    """4 + 2 blocks of width 96: for tests and demonstrations on a CPU."""
    return MaskedAutoencoder(**{**sw_vit.TINY, "decoder_depth": 2, **overrides})
