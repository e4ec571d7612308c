"""Attention inside the regions of a label map, and sums over them.

Letters: label map `B H W` or, with one label per token, `B L`; M heads of width d; T = B*L tokens of a batch; a group
is c regions of n tokens each.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("auto", "segments", "dense", "varlen")
# Up to this length one masked product is as fast as gathering, or faster, for any regions; at 1,024 tokens it is slower
# even if nine tenths of the scores are inside regions (CPU, 8 heads of width 32).
DENSE_TOKENS = 256


@dataclass(frozen=True)
class RegionIndex:
    """The tokens of each region: computed once from a label map, shared by all layers."""

    keys: Tensor  # region of each token (B, L), numbered over the whole batch: images share no region
    order: Tensor  # tokens of the batch sorted by the length of their region, then by region, (T,)
    inverse: Tensor  # index of each token in that order, (T,)
    groups: tuple[tuple[int, int], ...]  # (c, n) of the runs of equally long regions in that order

    def to(self, device: torch.device) -> "RegionIndex":
        """The index of tokens on a device. From the host this does not wait for the device."""
        keys, order, inverse = (x.to(device, non_blocking=True) for x in (self.keys, self.order, self.inverse))
        return RegionIndex(keys, order, inverse, self.groups)


def region_keys(labels: Tensor) -> tuple[Tensor, int]:
    """Number the regions of a batch of labels `(B, ...)`, any integers, from 0, so that images share no region.

    Returns the numbers, and an upper bound K that they are all below; some numbers may not occur.
    """
    check_labels(labels)
    labels = labels.long()
    low, high = (int(end) for end in torch.aminmax(labels))
    if high - low < labels.numel() // len(labels):
        keys, count = labels - low, high - low + 1
    else:  # sparse labels: sorting them is slower
        values, keys = torch.unique(labels, return_inverse=True)
        count = len(values)
    first = count * torch.arange(len(labels), device=labels.device)
    return keys + first.view(-1, *[1] * (labels.ndim - 1)), count * len(labels)


def check_labels(labels: Tensor) -> None:
    """Raise a ValueError for an empty label map, or labels that are not integers."""
    if labels.numel() == 0:
        raise ValueError(f"a label map of shape {tuple(labels.shape)} is empty: every pixel needs a region")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"a label map must have integers, got {labels.dtype}")


def coarse_labels(labels: Tensor, factor: int, *, majority: bool) -> Tensor:
    """A label map at a lower resolution, one label per block of pixels: `(B, H, W)` -> `(B, ceil(H/F), ceil(W/F))`.

    `factor` is the edge F of a block in pixels; blocks cut by the border are filled with the nearest pixels. With
    `majority` it is the most frequent label, of equally frequent ones the first in raster order; else the label of the
    block's first pixel (nearest neighbour).
    """
    if not majority or factor == 1:
        return labels[:, ::factor, ::factor]
    rows, columns = (torch.arange(n + -n % factor, device=labels.device).clamp(max=n - 1) for n in labels.shape[1:])
    whole = labels[:, rows][:, :, columns]
    blocks = whole.unfold(1, factor, factor).unfold(2, factor, factor).flatten(3)  # B h w F*F
    votes = torch.zeros(blocks.shape, dtype=torch.int32, device=labels.device)
    for label in blocks.unbind(3):
        votes += blocks == label[..., None]
    pixels = blocks.shape[3]
    rank = votes * pixels - torch.arange(pixels, dtype=torch.int32, device=labels.device)  # without ties
    return blocks.gather(3, rank.argmax(dim=3, keepdim=True))[..., 0]


def region_index(labels: Tensor) -> RegionIndex:
    """Sort the tokens of a batch by region.

    Regions of equal length are consecutive, so that one attention call without padding takes them all. As the lengths
    sum to T, there are at most sqrt(2 T) different ones. A region may consist of several parts. The lengths are read
    from the labels `(B, L)`, any integers: labels on a GPU are waited for and those on the host are not.
    """
    if labels.ndim != 2:
        raise ValueError(f"token labels must be of shape (batch, tokens), got {tuple(labels.shape)}: flatten the map")
    keys, count = region_keys(labels)
    lengths = torch.bincount(keys.flatten(), minlength=count)
    by_length = torch.argsort(lengths, stable=True)
    rank = by_length.argsort()
    order = torch.argsort(rank[keys.flatten()], stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    sizes, counts = torch.unique_consecutive(lengths[by_length], return_counts=True)
    groups = tuple((c, n) for c, n in zip(counts.tolist(), sizes.tolist(), strict=True) if n)
    return RegionIndex(keys, order, inverse, groups)


def region_attention(q: Tensor, k: Tensor, v: Tensor, regions: RegionIndex | Tensor, backend: str = "auto") -> Tensor:
    """Softmax(q k^T / sqrt(d)) v over the tokens of the query's own region (R-MSA of RAT, MICCAI 2024).

    Args:
        q, k, v: `(B, M, L, d)`.
        regions: labels `(B, L)`, or their `region_index`, which several layers can share.
        backend: `"segments"` gathers each region and attends inside it: any device and dtype, memory linear in L.
            `"dense"` is one product with an L x L mask. `"varlen"` is PyTorch's variable-length attention: a GPU of
            compute capability 8.0 or higher, float16 or bfloat16. `"auto"` is varlen where it runs, dense for short
            sequences, else segments.

    Returns `(B, M, L, d)`; a ValueError for inconsistent shapes, an unknown backend, or one that does not run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    index = region_index(regions) if isinstance(regions, Tensor) else regions
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must all be (B, M, L, d), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if index.keys.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"labels of shape {tuple(index.keys.shape)} do not fit {q.shape[2]} tokens of {q.shape[0]} images"
        )
    chosen = choose_backend(index, q) if backend == "auto" else backend
    if chosen == "dense":
        mask = index.keys[:, None, :, None] == index.keys[:, None, None, :]  # B 1 L L
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if chosen == "varlen" and not (runs_varlen(q) and find_varlen()):
        raise ValueError(
            "variable-length attention needs a GPU of compute capability 8.0, float16 or bfloat16, a head width "
            f"divisible by 8 and torch.nn.attention.varlen, got {q.dtype} on {q.device.type}: use backend='segments'"
        )
    b, m, length, d = q.shape
    tokens = (x.transpose(1, 2).reshape(b * length, m, d) for x in (q, k, v))
    q, k, v = (_Permutation.apply(x, index.order, index.inverse) for x in tokens)
    attend = _variable_length if chosen == "varlen" else _by_segments
    out: Tensor = _Permutation.apply(attend(q, k, v, index.groups), index.inverse, index.order)  # T M d
    return out.view(b, length, m, d).transpose(1, 2)


def choose_backend(index: RegionIndex, q: Tensor) -> str:
    """The backend that `"auto"` is for these regions and queries."""
    if runs_varlen(q) and find_varlen():
        return "varlen"
    return "dense" if q.shape[2] <= DENSE_TOKENS and len(index.groups) > 1 else "segments"


def runs_varlen(q: Tensor) -> bool:
    """Whether variable-length attention, which is FlashAttention's, supports such queries."""
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def find_varlen() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention, None if this version does not have it."""
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None


def _by_segments(q: Tensor, k: Tensor, v: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Attention inside each region, `(T, M, d)` sorted by group -> the same."""
    sizes = [c * n for c, n in groups]
    parts = (x.split(sizes) for x in (q, k, v))  # its gradient is one copy, that of several slices a sum
    out = []
    for (c, n), q_part, k_part, v_part in zip(groups, *parts, strict=True):
        if n == 1:
            out.append(v_part)
            continue
        heads = (x.unflatten(0, (c, n)).transpose(1, 2) for x in (q_part, k_part, v_part))  # c M n d
        out.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _variable_length(q: Tensor, k: Tensor, v: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """The same by one kernel, which takes the end of each region."""
    attend = find_varlen()
    assert attend is not None
    lengths = torch.tensor([0, *(n for c, n in groups for _ in range(c))])
    ends = lengths.cumsum(0, dtype=torch.int32).to(q.device, non_blocking=True)
    longest = int(lengths.max())
    out: Tensor = attend(q, k, v, ends, ends, longest, longest)
    return out


class _Permutation(torch.autograd.Function):
    """Rows `(T, ...)` in another order."""

    # The gradient of a permutation is the inverse permutation; autograd's of indexing is a slower row-wise sum.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permutation.apply(gradient, inverse, order), None, None
