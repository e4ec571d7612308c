"""Puzzles of the pieces of a volume: an SW-ViT encodes each piece by itself, a small head answers from all of them.

Letters: P pieces `B P C d h w` of a volume, L tokens of a piece, token width E, K answers, patch size s.
"""

from typing import Any

from torch import Tensor, nn

from asa.models import sw_vit
from asa.models.sw_vit import SWViT
from asa.ops.patches import patchify


class PuzzleNet(nn.Module):
    """Logits of two answers or more, from the mean token of each piece.

    The pieces are encoded independently of each other with the same weights (Taleb et al., NeurIPS 2020). The encoder's
    `img_size` is that of the whole volume; it has no mirrored patches.
    """

    def __init__(self, encoder: SWViT, pieces: int, answers: int) -> None:
        super().__init__()
        if encoder.mirror_patches:
            raise ValueError("a puzzle's pieces have no mirrored patches: leave model.mirror_patches out")
        if pieces < 1 or answers < 2:
            raise ValueError(f"a puzzle has a piece and two answers or more, got {pieces} and {answers}")
        self.encoder, self.pieces, self.answers = encoder, pieces, answers
        width = encoder.embed_dim
        self.head = nn.Sequential(nn.Linear(pieces * width, 4 * width), nn.GELU(), nn.Linear(4 * width, answers))
        for linear in (self.head[0], self.head[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, pieces: Tensor, indices: Tensor) -> Tensor:
        """Logits of the answers, `(B, K)`; a ValueError for another number of pieces.

        Args:
            pieces: `(B, P, C, d, h, w)`, sizes divisible by s.
            indices: int64 `(B, L)`, the tokens of the whole volume whose position encodings the tokens of each piece,
                in raster order, get; the same for all pieces of a sample.
        """
        if pieces.ndim != 6 or pieces.shape[1] != self.pieces:
            raise ValueError(f"this network takes {self.pieces} pieces of each volume, got {tuple(pieces.shape)}")
        patches = patchify(pieces.flatten(0, 1), self.encoder.patch_size)  # B*P L C*s^3
        indices = indices.repeat_interleave(self.pieces, dim=0)  # B*P L
        tokens = self.encoder.patch_embed(patches) + self.encoder.position[indices]
        tokens = self.encoder.run(tokens, self.encoder.sequences(indices))
        return self.head(tokens.mean(dim=1).unflatten(0, (-1, self.pieces)).flatten(1))


def puzzle_base(pieces: int, answers: int, **overrides: Any) -> PuzzleNet:
    """On ASA's encoder `sw_vit_base`, which takes `overrides`."""
    return PuzzleNet(sw_vit.sw_vit_base(**overrides), pieces, answers)


def puzzle_small(pieces: int, answers: int, **overrides: Any) -> PuzzleNet:
    """On `sw_vit_small`: for a single workstation GPU."""
    return PuzzleNet(sw_vit.sw_vit_small(**overrides), pieces, answers)


def puzzle_tiny(pieces: int, answers: int, **overrides: Any) -> PuzzleNet:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    return PuzzleNet(sw_vit.sw_vit_tiny(**overrides), pieces, answers)
