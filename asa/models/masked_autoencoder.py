"""The masked autoencoder of ASA (MICCAI 2022): an SW-ViT encoder on the visible patches, an SW-ViT decoder on all.

Letters: volume `B C D H W`, N = B*R masks (R of each volume), L tokens in raster order of which V are visible and K
decoded, token width E of the encoder and F of the decoder, patch size s.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from asa.models import sw_vit
from asa.models.sw_vit import SWViT, initialise, position_encoding, run_block, window_blocks
from asa.ops.patches import Selection, split_indices, tokens_at


class MaskedAutoencoder(nn.Module):
    """Predicts the masked patches of a volume from the visible ones.

    The encoder takes the visible patches only. The decoder takes these and the patches to predict in raster order, with
    their position encoding: the projected outputs of the encoder, and one learnable mask token for each patch to
    predict. These are all masked patches, or a part of them, which is cheaper (as in CrossMAE, Fu et al., 2024, which
    has cross-attention in the decoder).

    With `position="mirror"` this is ASA's network, with `"sincos"` a plain MAE with the same attention windows.

    Args:
        depth, decoder_depth: blocks of the encoder and of the decoder.
        decoder_dim: token width F of the decoder, whose heads are as wide as the encoder's; None: E.

    All others are of both, see `asa.models.sw_vit.SWViT`.

    Raises:
        ValueError: a width of the decoder that is not a multiple of the width of a head.
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
        decoder_dim: int | None = None,
        mirror_patches: bool = False,
        order: str = "raster",
        bias: str = "sequence",
    ) -> None:
        super().__init__()
        self.encoder = SWViT(
            img_size, patch_size, in_channels, embed_dim, depth, num_heads, mlp_ratio, window, position, checkpointing,
            mirror_patches, order, bias,
        )  # fmt: skip
        self.checkpointing = checkpointing
        width, head = decoder_dim or embed_dim, embed_dim // num_heads
        if width % head:
            raise ValueError(f"decoder_dim={width} is not a multiple of {head}, the width of the encoder's heads")
        self.projection = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.mask_token, std=0.02)
        same = width == embed_dim
        encoding = self.encoder.position if same else position_encoding(self.encoder.grid, width, position)
        self.register_buffer("position", encoding, persistent=False)
        self.position: Tensor
        self.decoder = window_blocks(decoder_depth, width, width // head, mlp_ratio, window, bias)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, in_channels * patch_size**3)
        initialise([self.projection, self.head])

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms."""
        return {"mask_token"}

    def forward(
        self,
        volume: Tensor,
        mask: Tensor | None = None,
        *,
        visible: Selection | None = None,
        decoded: Selection | None = None,
    ) -> Tensor:
        """Predict masked patches: `(N, K, C*s^3)`, the decoded ones in raster order. Values of padding are arbitrary.

        Args:
            volume: `(B, C, D, H, W)`.
            mask: bool `(N, L)`, True = masked, the same count in every sample: the visible patches are all others, and
                all masked ones are decoded. For a CPU tensor the count is read without synchronising with the GPU.
            visible, decoded: instead of the mask, the patches to encode and those to predict, none in both, on the
                volume's device.

        Raises:
            ValueError: a volume or mask of another size, different counts per sample, or neither a mask nor selections.
        """
        if mask is not None:
            self.encoder.check_mask(volume, mask)
            visible, decoded = (Selection(index).to(volume.device) for index in split_indices(mask))
        if visible is None or decoded is None:
            raise ValueError("give a mask, or the visible and the decoded patches")
        encoded = self.projection(self.encoder.encode(volume, visible))  # N V F
        index, valid, places, wanted = merge(visible, decoded, len(self.position))
        n, length = index.shape
        tokens = self.mask_token.to(encoded.dtype).expand(n, length, -1)
        tokens = tokens.scatter(1, places[:, :, None].expand(-1, -1, encoded.shape[2]), encoded)
        tokens = tokens + self.position[index]
        for block, sequence in zip(self.decoder, cycle(self.encoder.sequences(index, valid)), strict=False):
            tokens = run_block(block, tokens, sequence, checkpointing=self.checkpointing)
        patches = self.head(self.norm(tokens_at(tokens, wanted)))
        if not self.encoder.mirror_patches:
            return patches
        width = self.encoder.grid[2]
        right = decoded.indices % width >= (width + 1) // 2
        mirrored = patches.unflatten(2, (-1, self.encoder.patch_size)).flip(3).flatten(2)
        return torch.where(right[:, :, None], mirrored, patches)


def merge(first: Selection, second: Selection, length: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Merge two selections of different tokens, `(N, V)` and `(N, K)` of L, into one in raster order, padding last.

    Returns:
        index `(N, V+K)` of the sequence's tokens, and which of them are valid (None: all); the places in the sequence
        of the first selection's tokens `(N, V)`, and of the second's `(N, K)`.
    """
    index = torch.cat([first.indices, second.indices], dim=1)
    valid, key = None, index
    if first.valid is not None or second.valid is not None:
        parts = [
            torch.ones_like(part.indices, dtype=torch.bool) if part.valid is None else part.valid
            for part in (first, second)
        ]
        valid = torch.cat(parts, dim=1)
        key = index.where(valid, length)
    order = key.argsort(dim=1, stable=True)
    own, others = order.argsort(dim=1).split([first.indices.shape[1], second.indices.shape[1]], dim=1)
    return index.gather(1, order), None if valid is None else valid.gather(1, order), own, others


def asa_base(**overrides: Any) -> MaskedAutoencoder:
    """The paper's autoencoder: 12 + 8 blocks of width 384, 36 M parameters."""
    return _sized(sw_vit.BASE, 8, overrides)


def asa_small(**overrides: Any) -> MaskedAutoencoder:
    """8 + 4 blocks of width 192: for a single workstation GPU."""
    return _sized(sw_vit.SMALL, 4, overrides)


def asa_tiny(**overrides: Any) -> MaskedAutoencoder:
    """4 + 2 blocks of width 96: for tests and demonstrations on a CPU."""
    return _sized(sw_vit.TINY, 2, overrides)


def _sized(size: dict[str, Any], decoder_depth: int, overrides: dict[str, Any]) -> MaskedAutoencoder:
    if overrides.get("decoder_depth") is None:
        overrides["decoder_depth"] = decoder_depth
    return MaskedAutoencoder(**{**size, **overrides})
