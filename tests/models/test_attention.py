"""LW-MSA and SLW-MSA against dense attention with the equivalent mask."""

import pytest
import torch
from torch import Tensor

from asa import LinearWindowAttention, SWViT
from asa.models.sw_vit import fused_attention, window_runs, written_attention

LENGTHS = [64, 50, 17, 16, 15, 9, 5, 1]


def window_of(token: int, window: int, shift: int) -> int:
    """Number of a token's window: the edges are shift, shift + window, ..."""
    return (token - shift) // window


def dense_reference(layer: LinearWindowAttention, tokens: Tensor) -> Tensor:
    """Token by token and head by head: attend to every token of the same window, and to nothing else."""
    batch, length, dim = tokens.shape
    heads, d = layer.num_heads, dim // layer.num_heads
    out = torch.zeros_like(tokens)
    for b in range(batch):
        q, k, v = (layer.qkv(tokens[b]) @ torch.eye(3 * dim, dtype=tokens.dtype)).chunk(3, dim=1)
        for i in range(length):
            neighbours = [
                j
                for j in range(length)
                if window_of(i, layer.window, layer.shift) == window_of(j, layer.window, layer.shift)
            ]
            for m in range(heads):
                part = slice(m * d, (m + 1) * d)
                bias = torch.stack([layer.relative_position_bias[m, i - j + layer.window - 1] for j in neighbours])
                logits = torch.stack([q[i, part] @ k[j, part] for j in neighbours]) / d**0.5 + bias
                weights = torch.exp(logits - logits.max())
                weights = weights / weights.sum()
                out[b, i, part] = sum(weights[n] * v[j, part] for n, j in enumerate(neighbours))
    return layer.proj(out)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shift", [0, 4, 7])
def test_windowed_attention_equals_dense_attention_with_the_equivalent_mask(length: int, shift: int) -> None:
    torch.manual_seed(length)
    layer = LinearWindowAttention(6, 2, window=8, shift=shift).double()
    torch.nn.init.normal_(layer.relative_position_bias)
    tokens = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 6, dtype=torch.float64)
    inputs = [tokens, *layer.parameters()]
    fast, slow = layer(tokens), dense_reference(layer, tokens)
    torch.testing.assert_close(fast, slow)
    for one, other in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((slow * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_fused_and_written_attention_agree() -> None:
    torch.manual_seed(0)
    windows = torch.randn(3, 5, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    fused, written = fused_attention(windows, bias), written_attention(windows, bias)
    torch.testing.assert_close(fused, written)
    weight = torch.randn_like(fused)
    for one, other in zip(
        torch.autograd.grad((fused * weight).sum(), [windows, bias]),
        torch.autograd.grad((written * weight).sum(), [windows, bias]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shift", range(8))
def test_runs_of_windows_cover_the_sequence_once(length: int, shift: int) -> None:
    windows = [
        list(range(start + i * size, start + (i + 1) * size))
        for start, count, size in window_runs(length, 8, shift)
        for i in range(count)
    ]
    assert [token for window in windows for token in window] == list(range(length))
    assert all(len({window_of(token, 8, shift) for token in window}) == 1 for window in windows)
    assert len({window_of(window[0], 8, shift) for window in windows}) == len(windows)


@pytest.mark.parametrize("length", [40, 37])
def test_a_changed_token_changes_only_what_its_windows_reach(length: int) -> None:
    torch.manual_seed(0)
    blocks = SWViT(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, window=8).blocks.double()
    tokens = torch.randn(1, length, 12, dtype=torch.float64)
    for changed in (0, 3, 18, length - 1):
        reached = {changed}
        before, after = tokens, tokens.clone()
        after[0, changed] = torch.randn(12, dtype=torch.float64)
        for block in blocks:
            shift = block.attention.shift
            reached = {j for j in range(length) for i in reached if window_of(i, 8, shift) == window_of(j, 8, shift)}
            before, after = block(before), block(after)
            differs = {j for j in range(length) if not torch.equal(before[0, j], after[0, j])}
            assert differs == reached


def test_every_second_block_is_shifted_by_half_a_window() -> None:
    model = SWViT(img_size=16, embed_dim=12, depth=4, num_heads=2, window=7)
    assert [block.attention.shift for block in model.blocks] == [0, 3, 0, 3]


@pytest.mark.parametrize(
    ("dim", "heads", "window", "shift", "reason"),
    [
        (10, 3, 8, 0, "10 is not divisible by 3"),
        (12, 3, 8, 8, "got window 8, shift 8"),
        (12, 3, 8, -1, "got window 8, shift -1"),
        (12, 3, 0, 0, "got window 0, shift 0"),
    ],
)
def test_inconsistent_sizes_raise_an_error(dim: int, heads: int, window: int, shift: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LinearWindowAttention(dim, heads, window, shift)
