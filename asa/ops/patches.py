"""Patches of volumes as tokens, back to volumes, random masks of them (True means masked), and their sequences.

Letters: volume `B C D H W` (W left to right), patch size s, grid T x H x W = the volume's sizes over s,
L = T*H*W tokens in raster order (W fastest), a token holds C*s^3 values in the order (C, depth, height, width).
Linear windows are runs of consecutive tokens of a sequence: V tokens, A = max(T, H, W) coordinates along an axis.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

BOX_EDGES = (0.05, 0.25)  # smallest and largest edge of a random box, as a fraction of the volume's size


class Selection(NamedTuple):
    """Some tokens of each sample, in raster order; samples with fewer than N are padded with other tokens of theirs."""

    indices: Tensor  # int64 (B, N)
    valid: Tensor | None = None  # bool (B, N), False for padding; None where every sample has N tokens

    def to(self, device: torch.device) -> "Selection":
        """On another device, without waiting for it."""
        valid = None if self.valid is None else self.valid.to(device, non_blocking=True)
        return Selection(self.indices.to(device, non_blocking=True), valid)

    def counts(self) -> Tensor:
        """Tokens of each sample, `(B,)` int64."""
        rows, most = self.indices.shape
        return torch.full((rows,), most) if self.valid is None else self.valid.sum(dim=1)


class TokenSequence(NamedTuple):
    """The order in which windows run over given tokens; `(1, V, ...)` for all samples alike."""

    order: Tensor | None = None  # int64 (B, V): which of the tokens is at each place; None: they are in order
    back: Tensor | None = None  # the inverse: the place of each token
    coordinates: Tensor | None = None  # (B, V, 3, A) of the token at each place, see one_hot_coordinates
    valid: Tensor | None = None  # bool (B, V), False for padding, which is at the end; None: there is none


def triple(size: int | Sequence[int]) -> tuple[int, int, int]:
    """A size along three axes from one number for all axes, or from three; a ValueError if they are not positive."""
    sizes = (size,) * 3 if isinstance(size, int) else tuple(int(n) for n in size)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"a size must be one or three positive integers (D, H, W), got {size}")
    return sizes


def grid_size(spatial: Sequence[int], patch_size: int, *, several: bool = False) -> tuple[int, int, int]:
    """Patches along each axis of a volume (D, H, W).

    Raises:
        ValueError: a size that is not divisible by the patch size, or, with `several`, a volume of one patch only.
    """
    sizes = triple(spatial)
    low, high = (tuple((n + more) // patch_size * patch_size for n in sizes) for more in (0, patch_size - 1))
    if low != high:
        smaller = "" if math.prod(low) <= several * patch_size**3 else f"crop it to {low}, or "
        raise ValueError(
            f"a volume of {sizes} voxels is not a whole number of patches of {patch_size}: {smaller}pad it to {high}"
        )
    if several and max(sizes) == patch_size:
        raise ValueError(f"a volume of {sizes} voxels: give one larger than {patch_size}^3, like crop={2 * patch_size}")
    return sizes[0] // patch_size, sizes[1] // patch_size, sizes[2] // patch_size


def patchify(volume: Tensor, patch_size: int) -> Tensor:
    """Split volumes `(B, C, D, H, W)` into patch tokens `(B, L, C*s^3)`, L in raster order.

    Raises:
        ValueError: sizes that are not divisible by the patch's edge s.
    """
    t, h, w = grid_size(volume.shape[2:], patch_size)
    (b, c), s = volume.shape[:2], patch_size
    tokens = volume.reshape(b, c, t, s, h, s, w, s)
    tokens = tokens.permute(0, 2, 4, 6, 1, 3, 5, 7)  # B T H W C s s s
    return tokens.reshape(b, t * h * w, c * s**3)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: int) -> Tensor:
    """Join patch tokens `(B, L, C*s^3)` of a grid (T, H, W) to volumes `(B, C, T*s, H*s, W*s)`: undoes `patchify`.

    Raises:
        ValueError: a number or width of tokens that does not fit the grid.
    """
    t, h, w = triple(grid)
    (b, length, width), s = tokens.shape, patch_size
    if length != t * h * w or width % s**3:
        raise ValueError(f"{length} tokens of {width} values do not fill a grid of {(t, h, w)} patches of {s}^3 voxels")
    c = width // s**3
    volume = tokens.reshape(b, t, h, w, c, s, s, s)
    volume = volume.permute(0, 4, 1, 5, 2, 6, 3, 7)  # B C T s H s W s
    return volume.reshape(b, c, t * s, h * s, w * s)


def token_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens `(B, L, F)` in raster order as a map `(B, F, T, H, W)`: a view with the channels last in memory."""
    return tokens.unflatten(1, tuple(grid)).permute(0, 4, 1, 2, 3)


def constant_patches(volume: Tensor, patch_size: int) -> Tensor:
    """Which patches of volumes `(B, C, D, H, W)` have a constant intensity in each channel, as air: bool `(B, L)`."""
    grid_size(volume.shape[2:], patch_size)
    low = high = volume
    for axis in (2, 3, 4):  # all at once would take ten times as long
        low = low.unflatten(axis, (-1, patch_size)).amin(dim=axis + 1)
        high = high.unflatten(axis, (-1, patch_size)).amax(dim=axis + 1)
    return (low == high).all(dim=1).flatten(1)


def random_mask(
    batch: int, length: int, ratio: float, generator: torch.Generator | None = None, air: Tensor | None = None
) -> Tensor:
    """Mask the same fraction of random tokens in each sample: `(B, L)` on the generator's device, True = masked.

    Args:
        batch, length: B and L.
        ratio: fraction of tokens to mask; round(ratio * L) are masked, at least one and never all.
        air: bool `(B, L)`, tokens that are neither masked nor counted in L; None: there are none.

    Raises:
        ValueError: a ratio outside (0, 1), or fewer than two tokens besides air.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the mask ratio must be in (0, 1), got {ratio}")
    lengths = [length] * batch if air is None else (~air).sum(dim=1).tolist()
    if batch and min(lengths) < 2:
        raise ValueError(f"{min(lengths)} token cannot be split into visible and masked ones: use a larger volume")
    device = generator.device if generator is not None else None
    draws = torch.rand(batch, length, generator=generator, device=device)
    if air is not None:
        draws = draws.masked_fill(air, 2.0)
    counts = torch.tensor([min(max(round(ratio * n), 1), n - 1) for n in lengths], device=device)
    mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
    return mask.scatter_(1, draws.argsort(dim=1), torch.arange(length, device=device) < counts[:, None])


def split_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the visible `(B, L-M)` and of the masked tokens `(B, M)` of a mask `(B, L)`, int64, in raster order.

    Raises:
        ValueError: not a bool mask, different counts per sample, nothing visible or nothing masked.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"a mask must be a bool tensor of shape (batch, tokens), got {mask.dtype} {tuple(mask.shape)}")
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"all samples of a batch must mask the same number of tokens, got {sorted(set(counts))}")
    if not 0 < counts[0] < mask.shape[1]:
        raise ValueError(
            f"a mask must leave some tokens visible and mask some, got {counts[0]} masked of {mask.shape[1]}"
        )
    return select_tokens(~mask).indices, select_tokens(mask).indices


def select_tokens(chosen: Tensor) -> Selection:
    """The chosen tokens of each sample, `(B, L)` bool. It waits for a GPU: the largest number is read."""
    counts = chosen.sum(dim=1)
    fewest, most = counts.aminmax()
    # A stable sort of True before False keeps raster order.
    index = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(most)]
    return Selection(index, None if fewest == most else torch.arange(int(most), device=chosen.device) < counts[:, None])


def tokens_at(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens `(B, L, E)` at the indices `(B, N)`: `(B, N, E)`. With R rows of indices a sample, `(B*R, N, E)`."""
    rows = indices.reshape(len(tokens), -1)
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2])).reshape(*indices.shape, -1)


def alternating_orders(grid: int | Sequence[int]) -> Tensor:
    """The place of each token of a grid (T, H, W), or a cube, in three orders, `(3, L)`; the first is raster order.

    W, H and T are the fastest axes in turn, and H, T and W the second fastest: runs of tokens that are longer than a
    row lie in each of the three planes.
    """
    t_size, h_size, w_size = triple(grid)
    t, h, w = torch.cartesian_prod(*(torch.arange(n) for n in (t_size, h_size, w_size))).unbind(dim=1)
    return torch.stack([(t * h_size + h) * w_size + w, (w * t_size + t) * h_size + h, (h * w_size + w) * t_size + t])


def one_hot_coordinates(grid: int | Sequence[int]) -> Tensor:
    """One-hot coordinates of the tokens of a grid (T, H, W), or a cube, along each axis: `(L, 3, A)` float32."""
    sizes = triple(grid)
    return one_hot(torch.cartesian_prod(*(torch.arange(n) for n in sizes)), max(sizes)).float()


def token_sequences(
    index: Tensor, valid: Tensor | None, orders: Tensor | None, coordinates: Tensor | None
) -> list[TokenSequence]:
    """The sequence of the tokens at `index`, int64 `(B, V)`, in each of several orders.

    Args:
        valid: bool `(B, V)`, False for padding; None: there is none.
        orders: `(K, L)`, see `alternating_orders`; None: one sequence, of the tokens as they are given.
        coordinates: `(L, 3, A)`, see `one_hot_coordinates`; None: leave them out.
    """
    if orders is None:
        return [TokenSequence(coordinates=None if coordinates is None else coordinates[index], valid=valid)]
    sequences = []
    for places in orders:
        key = places[index]
        if valid is not None:
            key = key.where(valid, len(places))
        order = key.argsort(dim=1)  # not stable, as ONNX has no such operator
        sequences.append(
            TokenSequence(
                order,
                order.argsort(dim=1),
                None if coordinates is None else coordinates[index.gather(1, order)],
                None if valid is None else valid.gather(1, order),
            )
        )
    return sequences


def reorder(tokens: Tensor, order: Tensor | None) -> Tensor:
    """Tokens `(B, V, E)` in an order `(B, V)` or `(1, V)`; None: as they are."""
    if order is None:
        return tokens
    return tokens.index_select(1, order[0]) if len(order) == 1 else tokens_at(tokens, order)


def random_boxes(shape: Sequence[int], largest: float, generator: torch.Generator) -> Tensor:
    """Boxes in a volume (D, H, W) that cover a fraction of it, drawn from 0 to `largest`, or more; True inside."""
    covered = np.zeros(tuple(shape), dtype=bool)
    wanted = largest * torch.rand((), generator=generator, dtype=torch.float64).item() * covered.size
    low, high = BOX_EDGES
    while np.count_nonzero(covered) < wanted:
        draws = torch.rand(2, len(shape), generator=generator, dtype=torch.float64).tolist()
        sizes = [max(round(n * (low + (high - low) * u)), 1) for n, u in zip(shape, draws[0], strict=True)]
        starts = [int(u * (n - size + 1)) for n, size, u in zip(shape, sizes, draws[1], strict=True)]
        covered[tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))] = True
    return torch.from_numpy(covered)
