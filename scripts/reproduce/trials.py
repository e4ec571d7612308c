"""Pretraining that was tried and is not part of the library: latent targets, and tokens along a Hilbert curve.

Arms of scripts/reproduce/recipe.py. Letters: N masks, L tokens in raster order of which V are visible and K are
decoded, token width E, windows of S tokens, M attention heads.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.losses.reconstruction import draw_patches, weighted_mean
from asa.methods.base import Batch
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import MaskedAutoencoder, asa_tiny
from asa.models.sw_vit import TINY, LinearWindowAttention, SWViT, window_runs, written_attention
from asa.ops.patches import Selection, patchify, select_tokens, tokens_at

BITS = 5  # of a coordinate: grids of up to 32 tokens along an axis
FARTHEST = 15  # offset in tokens along an axis, beyond which the bias is that of this offset


class LatentPretraining(MaskedPretraining):
    """Predict a teacher's tokens of the masked patches, instead of their voxels (data2vec; I-JEPA).

    The teacher is the exponential moving average of the encoder and reads the whole crop. The targets are the means of
    its blocks' outputs, each normalised. Patches are drawn and weighted as in `MaskedPretraining`. The teacher is not
    in a checkpoint: a run that is resumed starts with the encoder as its teacher.

    Args:
        momentum: of the average.
        blocks: the last blocks that are averaged.
        settings: of `MaskedPretraining`.
    """

    def __init__(self, *, momentum: float = 0.99, blocks: int = 3, **settings: Any) -> None:
        super().__init__(**settings)
        encoder = self.model.encoder
        self.model.head = nn.Linear(self.model.head.in_features, encoder.embed_dim)
        self.momentum, self.blocks = momentum, blocks
        self.teachers: list[SWViT] = []  # a list, so that it is no module of this one

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image, air = batch["image"], self._air(batch)
        mask, offsets = self._draw(batch["seed"], air)
        visible, masked = self._select(mask, air)
        counts = masked.counts()
        weights = self.loss.weights(image, masked.indices, self._counted(patchify(image, 8), masked))
        if self.decode < 1:
            counts = (self.decode * counts).round().long().clamp(min=1)
            masked, weights = draw_patches(masked, weights, counts, offsets)
        target = self._targets(image, air, masked)
        errors = (self.model(image, visible=visible, decoded=masked).float() - target).square().mean(dim=2)
        trivial = target.square().mean(dim=2)
        return {
            "loss": weighted_mean(errors, weights),
            "mean_predictor_loss": weighted_mean(trivial, weights),
            "masked_mse": errors.detach().mean(),
            "mean_predictor_mse": trivial.mean(),
        }

    @torch.no_grad()
    def _targets(self, image: Tensor, air: Tensor | None, masked: Selection) -> Tensor:
        """`(N, K, E)`: the teacher's tokens of the decoded patches."""
        encoder = self.model.encoder
        if not self.teachers:
            self.teachers.append(deepcopy(encoder).requires_grad_(False))
        (teacher,) = self.teachers
        if self.training:
            for mean, weight in zip(teacher.parameters(), encoder.parameters(), strict=True):
                mean.lerp_(weight, 1 - self.momentum)
        length = len(encoder.position)
        chosen = torch.ones(len(image), length, dtype=torch.bool) if air is None else ~air
        index, valid = select_tokens(chosen)
        tokens, states = teacher.embed(image, index), []
        for block in teacher.blocks:
            tokens = block(tokens, valid)
            states.append(F.layer_norm(tokens, tokens.shape[2:]))
        mean = F.layer_norm(torch.stack(states[-self.blocks :]).mean(dim=0), tokens.shape[2:])
        if valid is not None:
            mean = mean * valid[:, :, None]
        whole = mean.new_zeros(len(image), length, mean.shape[2])
        # Padding repeats a sample's other tokens: added with weight 0.
        whole.scatter_add_(1, index[:, :, None].expand_as(mean), mean)
        return tokens_at(whole, masked.indices)

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """None, as no voxels are predicted."""
        return {}


def hilbert_rank(grid: tuple[int, int, int]) -> Tensor:
    """The number of each token `(L,)` along a Hilbert curve through the cube around the grid (Skilling, 2004)."""
    x = list(torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1))
    for q in (1 << bit for bit in range(BITS - 1, 0, -1)):
        for i in range(3):
            on, exchanged = (x[i] & q) > 0, (x[0] ^ x[i]) & (q - 1)
            x[0] = torch.where(on, x[0] ^ (q - 1), x[0] ^ exchanged)
            x[i] = torch.where(on, x[i], x[i] ^ exchanged)
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    gray = torch.zeros_like(x[0])
    for q in (1 << bit for bit in range(BITS - 1, 0, -1)):
        gray = torch.where((x[2] & q) > 0, gray ^ (q - 1), gray)
    number = torch.zeros_like(gray)
    for bit in range(BITS - 1, -1, -1):
        for axis in x:
            number = number << 1 | ((axis ^ gray) >> bit & 1)
    return number.argsort().argsort()


class OffsetAttention(LinearWindowAttention):
    """Attention inside windows of consecutive tokens, with a bias by the offset along each of the three axes."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0) -> None:
        super().__init__(dim, num_heads, window, shift)
        del self.relative_position_bias
        self.bias = nn.Parameter(0.02 * torch.randn(3, 2 * FARTHEST + 1, num_heads))

    def no_weight_decay(self) -> set[str]:
        """The bias."""
        return {"bias"}

    def forward(self, tokens: Tensor, coordinates: Tensor, valid: Tensor | None = None) -> Tensor:
        """`(N, L, E)` -> `(N, L, E)`; `coordinates` of the tokens, int64 `(N, L, 3)`."""
        qkv, out = self.qkv(tokens), []
        for start, n, size in window_runs(tokens.shape[1], self.window, self.shift):
            part = slice(start, start + n * size)
            own = coordinates[:, part].reshape(-1, size, 3)
            offset = (own[:, :, None] - own[:, None]).clamp(-FARTHEST, FARTHEST) + FARTHEST  # N*n S S 3
            bias = sum(self.bias[axis][offset[..., axis]] for axis in range(3)).permute(0, 3, 1, 2)  # N*n M S S
            if valid is not None:
                keys = valid[:, part].reshape(-1, 1, 1, size)
                bias = bias.masked_fill(~keys, torch.finfo(bias.dtype).min / 2)
            windows = qkv[:, part].reshape(len(own), size, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            out.append(written_attention(windows, bias).transpose(1, 2).reshape(len(tokens), n * size, -1))
        return self.proj(torch.cat(out, dim=1))


class HilbertViT(SWViT):
    """An SW-ViT whose windows are runs along a Hilbert curve: compact blocks instead of rows from left to right.

    Tokens come and go in raster order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            old: Any = block.attention
            block.attention = OffsetAttention(old.proj.in_features, old.num_heads, old.window, old.shift)
            block.attention.qkv, block.attention.proj = old.qkv, old.proj  # initialised
        self.register_buffer("rank", hilbert_rank(self.grid), persistent=False)
        axes = torch.meshgrid(*(torch.arange(n) for n in self.grid), indexing="ij")
        self.register_buffer("coordinates", torch.stack(axes, dim=-1).flatten(0, 2), persistent=False)
        self.rank: Tensor
        self.coordinates: Tensor

    def encode(self, volume: Tensor, visible: Selection | None) -> Tensor:
        index, valid = visible or (None, None)
        tokens = self.embed(volume, index)
        if index is None:
            index = torch.arange(len(self.position)).expand(len(tokens), -1)
        rank = self.rank[index]
        order = (rank if valid is None else rank.where(valid, len(self.rank))).argsort(dim=1)  # padding last
        wide = order[:, :, None].expand_as(tokens)
        tokens, coordinates = tokens.gather(1, wide), self.coordinates[index.gather(1, order)]
        valid = None if valid is None else valid.gather(1, order)
        for block in self.blocks:
            tokens = tokens + block.attention(block.norm1(tokens), coordinates, valid)
            tokens = tokens + block.mlp(block.norm2(tokens))
        return self.norm(torch.empty_like(tokens).scatter(1, wide, tokens))


def asa_tiny_hilbert(**overrides: Any) -> MaskedAutoencoder:
    """`asa_tiny` with the encoder's tokens along a Hilbert curve; those of the decoder stay in raster order."""
    model = asa_tiny(**overrides)
    encoder = {name: value for name, value in overrides.items() if not name.startswith("decoder_")}
    model.encoder = HilbertViT(**{**TINY, **encoder})
    return model
