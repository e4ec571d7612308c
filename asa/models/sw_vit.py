"""SW-ViT: a vision transformer with attention inside linear windows (ASA, MICCAI 2022, section 2.2).

Letters: volume `B C D H W`, patch size s, L tokens `B L E` in raster order (W fastest), windows `B N S E` of S
consecutive tokens, M attention heads of d = E / M, A coordinates of a token (see `asa.ops.patches`). Masks are bool
and True means masked (removed).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from asa.models.transfer import other_patches, other_window
from asa.ops.patches import (
    Selection,
    TokenSequence,
    alternating_orders,
    grid_size,
    one_hot_coordinates,
    patchify,
    reorder,
    split_indices,
    token_sequences,
    tokens_at,
    triple,
)
from asa.ops.position import sincos_position_encoding, symmetric_position_encoding
from asa.ops.symmetry import mirror_patches

ORDERS, BIASES = ("raster", "alternating"), ("sequence", "grid")
FARTHEST = 16  # tokens along an axis; larger offsets on the grid share one bias


class LinearWindowAttention(nn.Module):
    """Self-attention inside windows of consecutive tokens: LW-MSA, and SLW-MSA when shifted.

    Cost and memory are linear in the number of tokens. Any sequence length works: windows at the ends may be shorter.

    Args:
        dim, num_heads: token width E and heads M; M divides E.
        window: tokens S in a window.
        shift: first window edge; 0 for LW-MSA, S // 2 for SLW-MSA.
        bias: what the bias of two tokens depends on, for each head: `"sequence"`, their offset in the sequence, as in
            the paper; `"grid"`, the sum over the three axes of a bias of their offset on the grid along that axis,
            which means the same whichever tokens the sequence has, in whichever order.

    A ValueError for a width that is not divisible by the heads, a shift outside 0..S-1, or another bias.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0, bias: str = "sequence") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a token width of {dim} is not divisible by {num_heads} attention heads")
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"the shift must be in 0..window-1, got window {window}, shift {shift}")
        if bias not in BIASES:
            raise ValueError(f"the bias must be {' or '.join(BIASES)}, got {bias!r}")
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.on_grid = bias == "grid"
        offsets = (3, 2 * FARTHEST + 1) if self.on_grid else (2 * window - 1,)
        self.relative_position_bias = nn.Parameter(torch.zeros(num_heads, *offsets))
        nn.init.trunc_normal_(self.relative_position_bias, std=0.02)
        index = torch.arange(window)
        offset = index[:, None] - index[None, :] + window - 1  # S S, in 0..2S-2
        self.register_buffer("offset", offset, persistent=False)
        self.offset: Tensor

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, besides biases and norms."""
        return {"relative_position_bias"}

    def forward(self, tokens: Tensor, sequence: TokenSequence | None = None) -> Tensor:
        """Attend inside windows of a sequence of the tokens: `(B, L, E)` -> `(B, L, E)`, in the order given.

        No token attends to padding. Without a sequence the tokens are one themselves. A bias on the grid needs
        coordinates, else a ValueError.
        """
        order, back, coordinates, valid = sequence or TokenSequence()
        qkv, table = self.qkv(reorder(tokens, order)), self._table(coordinates)
        out = []
        runs = window_runs(tokens.shape[1], self.window, self.shift)
        # The gradient of a split is one copy, that of several slices a sum.
        parts = qkv.split([n * size for _, n, size in runs], dim=1) if len(runs) > 1 else [qkv]
        for part, (start, n, size) in zip(parts, runs, strict=True):
            inside = slice(start, start + n * size)
            if coordinates is None or not self.on_grid:
                bias = table[:, :size, :size]  # a shorter window uses a corner of the table
            else:
                bias = grid_bias(coordinates[:, inside].unflatten(1, (n, size)).flatten(0, 1), table)
                bias = bias.repeat(len(part) // len(coordinates), 1, 1, 1)  # B*N M S S
            out.append(self._attend(part, bias, None if valid is None else valid[:, inside].reshape(-1, size)))
        return reorder(self.proj(torch.cat(out, dim=1) if len(out) > 1 else out[0]), back)

    def _table(self, coordinates: Tensor | None) -> Tensor:
        """The bias of two places of a window `(M, S, S)`, or of two coordinates along each axis `(3, A, M, A)`."""
        if not self.on_grid:
            return self.relative_position_bias[:, self.offset]
        if coordinates is None:
            raise ValueError("a bias on the grid needs the coordinates of the tokens")
        index = torch.arange(coordinates.shape[3], device=coordinates.device)
        offset = (index[:, None] - index).clamp(-FARTHEST, FARTHEST) + FARTHEST  # A A
        return self.relative_position_bias[:, :, offset].permute(1, 2, 0, 3)

    def _attend(self, qkv: Tensor, bias: Tensor, valid: Tensor | None) -> Tensor:
        """Windows of one size, `(B, N*S, 3*E)` -> `(B, N*S, E)`; `valid` is bool `(B*N, S)`."""
        b, length, _ = qkv.shape
        size = bias.shape[-1]
        windows = qkv.reshape(b * length // size, size, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 B*N M S d
        attend = fused_attention if qkv.is_cuda else written_attention
        bias = bias.to(qkv.dtype)
        if valid is not None:  # finite, as a window may hold nothing but padding
            excluded = torch.zeros_like(valid, dtype=qkv.dtype).masked_fill(~valid, torch.finfo(qkv.dtype).min / 2)
            bias = bias + excluded[:, None, None]  # N M S S
        out = attend(windows, bias)  # B*N M S d
        return out.transpose(1, 2).reshape(b, length, -1)


def window_runs(length: int, window: int, shift: int = 0) -> list[tuple[int, int, int]]:
    """Cut a sequence of L tokens into windows of S, as (start, count, size) of at most three runs of equal windows.

    The window edges are shift, shift + window, shift + 2*window, ... The tokens before the first edge and after the
    last one form shorter windows, so no window joins the two ends of the sequence and none contains padding.
    """
    head = min(shift, length)
    count, tail = divmod(length - head, window)
    runs = [(0, 1, head), (head, count, window), (length - tail, 1, tail)]
    return [(start, n, size) for start, n, size in runs if n and size]


def grid_bias(coordinates: Tensor, table: Tensor) -> Tensor:
    """Bias of every two tokens of a window, `(N, M, S, S)`: of the token at the third index for that at the fourth.

    It is the sum over the axes of the entries of `table` `(3, A, M, A)` at their one-hot coordinates `(N, S, 3, A)`, as
    products, since the gradient of a lookup would be added up entry by entry.
    """
    n, size, _, a = coordinates.shape
    heads = table.shape[2]
    rows = coordinates.permute(2, 0, 1, 3).reshape(3, n * size, a)
    own = torch.bmm(rows, table.reshape(3, a, heads * a)).reshape(3, n, size, heads, a)
    own = own.permute(1, 3, 2, 0, 4).reshape(n, heads * size, 3 * a)
    return torch.bmm(own, coordinates.reshape(n, size, 3 * a).transpose(1, 2)).unflatten(1, (heads, size))


def fused_attention(windows: Tensor, bias: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(d) + bias) v by PyTorch's fused kernels: faster on a GPU.

    From `(3, N, M, S, d)` to `(N, M, S, d)`; the bias of the logits is `(M, S, S)` or `(N, M, S, S)`.
    """
    q, k, v = windows.unbind()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], *bias.shape[-3:]))


def written_attention(windows: Tensor, bias: Tensor) -> Tensor:
    """The same, written out: faster on a CPU for small windows."""
    n, m = windows.shape[1:3]
    q, k, v = windows.flatten(1, 2).unbind()  # N*M S d, one copy for all three
    bias = bias.repeat(n, 1, 1) if bias.ndim == 3 else bias.flatten(0, 1)
    logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(logits.softmax(dim=-1), v).unflatten(0, (n, m))


class Block(nn.Module):
    """Pre-norm transformer block: linear-window attention, then an MLP, each with a residual connection."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, window: int, shift: int, bias: str = "sequence"
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = LinearWindowAttention(dim, num_heads, window, shift, bias)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        initialise(self.modules())

    def forward(self, tokens: Tensor, sequence: TokenSequence | None = None) -> Tensor:
        """`(B, L, E)` -> `(B, L, E)`, see `LinearWindowAttention.forward`."""
        tokens = tokens + self.attention(self.norm1(tokens), sequence)
        return tokens + self.mlp(self.norm2(tokens))


def initialise(modules: Iterable[nn.Module]) -> None:
    """Xavier weights, and biases of 0, for the linear maps among some modules."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def window_blocks(
    depth: int, dim: int, num_heads: int, mlp_ratio: float, window: int, bias: str = "sequence"
) -> nn.ModuleList:
    """A stack of blocks of which every second one shifts its windows by half a window."""
    return nn.ModuleList(
        Block(dim, num_heads, mlp_ratio, window, shift=(i % 2) * (window // 2), bias=bias) for i in range(depth)
    )


def run_block(block: nn.Module, *inputs: Any, checkpointing: bool) -> Tensor:
    """A block's output; with `checkpointing` it is recomputed in the backward pass: the same, as no block is random."""
    if checkpointing and torch.is_grad_enabled():
        out: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return out
    return block(*inputs)


SYMMETRIC = ("mirror", "paper", "mirror_sincos")  # position encodings that mirrored tokens share


def position_encoding(grid: Sequence[int], dim: int, position: str) -> Tensor:
    """The position encoding of a token grid `(L, dim)`, of a kind that `SWViT` names; a ValueError for another one."""
    if position in ("sincos", "mirror_sincos"):
        return sincos_position_encoding(grid, dim, symmetric=position == "mirror_sincos")
    if position not in ("mirror", "paper", "raster"):
        raise ValueError(f'position must be "mirror", "paper", "raster", "sincos" or "mirror_sincos", got {position!r}')
    return symmetric_position_encoding(grid, dim, convention=position)


class SWViT(nn.Module):
    """Linear-window vision transformer on the patches of a volume.

    Args:
        img_size: volume size in voxels, one number or (D, H, W).
        patch_size, in_channels: patch edge s in voxels, channels C of the volume.
        embed_dim, num_heads: token width E, attention heads M.
        depth: blocks; every second one is shifted.
        mlp_ratio: hidden width of the MLP over E.
        window: tokens S in a window.
        position: position encoding: `"mirror"` (SPE), `"paper"` (SPE as printed), `"raster"` (SPE's code without its
            symmetry), `"sincos"` (of the three axes) or `"mirror_sincos"` (the same with the symmetry).
        checkpointing: recompute what is inside the blocks in the backward pass: less memory, one more forward pass.
        mirror_patches: read the patches of the right half mirrored, see `asa.ops.symmetry.mirror_patches`.
        order: of the tokens in the sequence that a block's windows cut: `"raster"`, as in the paper, or
            `"alternating"`, with another axis fastest in every block (`asa.ops.patches.alternating_orders`).
        bias: relative position bias, see `LinearWindowAttention`.

    Raises:
        ValueError: a volume size that is not divisible by the patch size, a width that is not by the heads, or an
            unknown encoding, order or bias.
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
        position: str = "mirror",
        checkpointing: bool = False,
        mirror_patches: bool = False,
        order: str = "raster",
        bias: str = "sequence",
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"the order of the tokens must be {' or '.join(ORDERS)}, got {order!r}")
        self.mirror_patches, self.symmetric = mirror_patches, position in SYMMETRIC
        self.img_size, self.patch_size, self.in_channels = triple(img_size), patch_size, in_channels
        self.embed_dim, self.num_heads, self.checkpointing = embed_dim, num_heads, checkpointing
        self.grid = grid_size(self.img_size, patch_size)
        self.patch_embed = nn.Linear(in_channels * patch_size**3, embed_dim)
        initialise([self.patch_embed])
        # Computed, not stored in checkpoints: weights transfer to other grids unchanged.
        self.register_buffer("position", position_encoding(self.grid, embed_dim, position), persistent=False)
        self.position: Tensor
        orders = alternating_orders(self.grid) if order == "alternating" else None
        coordinates = one_hot_coordinates(self.grid) if bias == "grid" else None
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.orders: Tensor | None
        self.coordinates: Tensor | None
        self.blocks = window_blocks(depth, embed_dim, num_heads, mlp_ratio, window, bias)
        self.norm = nn.LayerNorm(embed_dim)

    def layers_above(self, name: str) -> int:
        """Layers between a parameter and the output, 0 for the final norm: for layer-wise decay, as in BEiT and MAE."""
        if name.startswith("blocks."):
            return len(self.blocks) - int(name.split(".")[1])
        return 0 if name.startswith("norm.") else len(self.blocks) + 1

    def adapted(self, name: str, tensor: Tensor, patch_size: int | None) -> tuple[Tensor, str]:
        """A checkpoint's tensor for these channels, patches and windows: see `asa.models.transfer.Encoder`."""
        own = self.get_parameter(name)
        if tensor.ndim != 2 or len(tensor) != len(own):
            return tensor, ""
        if name == "patch_embed.weight" and tensor.shape[1] % (s := patch_size or self.patch_size) ** 3 == 0:
            return other_patches(tensor, s, self.patch_size, self.in_channels)
        if name.endswith("relative_position_bias") and tensor.shape[1] % 2:
            return other_window(tensor, (own.shape[1] + 1) // 2)
        return tensor, ""

    def token_grid(self, volume: Tensor) -> tuple[int, int, int]:
        """Tokens along each axis, the same for all volumes that the network takes."""
        return self.grid

    def embed(self, volume: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed patches with their position encoding: `(B, C, D, H, W)` -> `(B, L, E)`.

        With R >= 1 rows of indices for each volume, `visible` `(B*R, V)`, only those: `(B*R, V, E)`.
        """
        self.check(volume)
        if self.mirror_patches:
            volume = mirror_patches(volume, self.patch_size)
        patches = patchify(volume, self.patch_size)  # B L C*s^3
        if visible is None:
            return self.patch_embed(patches) + self.position
        return self.patch_embed(tokens_at(patches, visible)) + self.position[visible]

    def sequences(self, index: Tensor | None = None, valid: Tensor | None = None) -> list[TokenSequence]:
        """The sequences that the blocks take in turn, of all tokens or those at `index` `(B, V)` that are `valid`."""
        if index is None and (self.orders is not None or self.coordinates is not None):
            index = torch.arange(len(self.position), device=self.position.device)[None]
        if index is None:
            return [TokenSequence(valid=valid)]
        return token_sequences(index, valid, self.orders, self.coordinates)

    def hidden_states(self, volume: Tensor) -> list[Tensor]:
        """Tokens after each block, `depth` times `(B, L, E)`; the last ones after the final norm."""
        tokens, states = self.embed(volume), []
        for block, sequence in zip(self.blocks, cycle(self.sequences()), strict=False):
            tokens = run_block(block, tokens, sequence, checkpointing=self.checkpointing)
            states.append(tokens)
        return [*states[:-1], self.norm(tokens)]

    def forward(self, volume: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode volumes `(B, C, D, H, W)`: `(B, L, E)`, or with a mask the V visible tokens, in raster order.

        Args:
            mask: bool `(B*R, L)`, True = masked: R >= 1 masks of each volume, the same count in every one.

        Raises:
            ValueError: a volume or mask of another size.
        """
        visible = None
        if mask is not None:
            self.check_mask(volume, mask)
            visible = Selection(split_indices(mask)[0].to(volume.device))
        return self.encode(volume, visible)

    def encode(self, volume: Tensor, visible: Selection | None) -> Tensor:
        """Encode some patches `(B*R, V)`, R >= 1 selections of each volume, or all: `(B*R, V, E)` or `(B, L, E)`."""
        index, valid = visible or (None, None)
        return self.run(self.embed(volume, index), self.sequences(index, valid))

    def run(self, tokens: Tensor, sequences: list[TokenSequence]) -> Tensor:
        """The blocks, which take `sequences` in turn, and the final norm: `(B, L, E)` -> `(B, L, E)`."""
        for block, sequence in zip(self.blocks, cycle(sequences), strict=False):
            tokens = run_block(block, tokens, sequence, checkpointing=self.checkpointing)
        return self.norm(tokens)

    def check(self, volume: Tensor) -> None:
        """Raise a ValueError for a volume of another size or number of channels than the network's."""
        expected = (self.in_channels, *self.img_size)
        if volume.ndim != 5 or tuple(volume.shape[1:]) != expected:
            raise ValueError(
                f"this network takes volumes of shape (batch, {', '.join(map(str, expected))}), got "
                f"{tuple(volume.shape)}: crop the volume or build the network with that img_size and in_channels"
            )

    def check_mask(self, volume: Tensor, mask: Tensor) -> None:
        """Raise a ValueError for masks that do not have one entry per token, or are not R >= 1 for each volume."""
        expected = (volume.shape[0], math.prod(self.grid))
        if mask.ndim != 2 or mask.shape[1] != expected[1] or mask.shape[0] % expected[0] or not len(mask):
            raise ValueError(f"the mask must be of shape (batch, tokens) = {expected}, got {tuple(mask.shape)}")


BASE: dict[str, Any] = dict(embed_dim=384, depth=12, num_heads=12, window=32)
SMALL: dict[str, Any] = dict(embed_dim=192, depth=8, num_heads=6, window=32)
TINY: dict[str, Any] = dict(embed_dim=96, depth=4, num_heads=3, window=16)


def sw_vit_base(**overrides: Any) -> SWViT:
    """The paper's encoder: 12 blocks of width 384."""
    return SWViT(**{**BASE, **overrides})


def sw_vit_small(**overrides: Any) -> SWViT:
    """8 blocks of width 192: for a single workstation GPU."""
    return SWViT(**{**SMALL, **overrides})


def sw_vit_tiny(**overrides: Any) -> SWViT:
    """4 blocks of width 96: for tests and demonstrations on a CPU."""
    return SWViT(**{**TINY, **overrides})
