"""Laws of attention inside regions, and of the focal region loss."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from asa import FocalRegionLoss, RegionAttention, region_attention
from asa.restoration import regions
from asa.restoration.regions import choose_backend, coarse_labels, region_index, region_keys


def qkv(b: int = 3, m: int = 2, length: int = 30, d: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, m, length, d, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def random_labels(b: int = 3, length: int = 30) -> Tensor:
    """Images with 2, 7 and 15 regions, each of many parts."""
    generator = torch.Generator().manual_seed(2)
    counts = (2, 7, 15)
    return torch.stack([torch.randint(counts[i % 3], (length,), generator=generator) for i in range(b)])


def one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """The definition: for every token a softmax over the tokens with its label."""
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for i in range(q.shape[2]):
            own = torch.nonzero(labels[b] == labels[b, i]).flatten()
            scores = (k[b][:, own] * q[b][:, i : i + 1]).sum(-1) / q.shape[-1] ** 0.5  # M n
            out[b, :, i] = (scores.softmax(-1)[:, :, None] * v[b][:, own]).sum(1)
    return out


def value_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = attend(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out, *torch.autograd.grad((out * weights).sum(), inputs))


def varlen_reference(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest: int, _: int) -> Tensor:
    """What PyTorch's kernel computes, sequence by sequence, to test the call without a GPU."""
    assert ends_q.dtype == torch.int32 and ends_q[0] == 0 and ends_q[-1] == len(q)
    assert ends_q.diff().max() == longest and torch.equal(ends_q, ends_k)
    parts = []
    for a, b in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        heads = (x[a:b].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*heads).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("backend", ["segments", "dense", "varlen", "auto"])
def test_every_backend_is_dense_masked_attention(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "varlen":
        monkeypatch.setattr(regions, "runs_varlen", lambda q: True)
        monkeypatch.setattr(regions, "find_varlen", lambda: varlen_reference)
    inputs, labels = qkv(), random_labels()
    found = value_and_gradients(lambda *x: region_attention(*x, labels, backend), inputs)
    expected = value_and_gradients(lambda *x: one_query_at_a_time(*x, labels), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_changes_outside_a_region_do_not_change_its_attention(backend: str) -> None:
    torch.manual_seed(0)
    attention, labels = RegionAttention(16, 2, backend), random_labels()
    tokens = torch.randn(3, 30, 16)
    inside = labels == 1
    other = torch.where(inside[..., None], tokens, torch.randn_like(tokens))
    before, after = attention(tokens, labels), attention(other, labels)
    torch.testing.assert_close(before[inside], after[inside], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before[~inside], after[~inside])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([5, -3, 0], torch.int8),
        ([250, 0, 255], torch.uint8),
        ([10**12, -(10**12), 7], torch.int64),
        ([-1, -2, -3], torch.int32),
    ],
)
def test_relabelling_changes_nothing(values: list[int], dtype: torch.dtype) -> None:
    inputs = qkv()
    labels = random_labels() % 3
    renamed = torch.tensor(values)[labels].to(dtype)
    before, after = (region_attention(*inputs, names) for names in (labels, renamed))
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


def test_one_region_is_global_attention_and_singletons_give_v() -> None:
    q, k, v = qkv()
    whole = region_attention(q, k, v, torch.full((3, 30), 4))
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(region_attention(q, k, v, torch.arange(30).expand(3, -1)), v)


def test_true_regions_denoise_better_than_shuffled_ones_and_the_whole_image() -> None:
    torch.manual_seed(0)
    labels = (torch.arange(400) // 50)[None]
    clean = torch.randn(8)[labels].view(1, 1, 400, 1)
    noisy = clean + 0.5 * torch.randn(1, 1, 400, 1)
    alike = torch.zeros_like(noisy)  # equal scores: a region's mean

    def error(regions: Tensor) -> float:
        return F.mse_loss(region_attention(alike, alike, noisy, regions), clean).item()

    shuffled = labels[:, torch.randperm(400)]
    assert error(labels) < 0.1 * F.mse_loss(noisy, clean).item()
    assert min(error(shuffled), error(torch.zeros_like(labels))) > 5 * error(labels)


def test_images_share_no_region() -> None:
    q, k, v = qkv()
    labels = random_labels()
    together = region_attention(q, k, v, labels)
    for i in range(3):
        alone = region_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_the_index_sorts_tokens_into_whole_regions() -> None:
    labels = random_labels()
    index = region_index(labels)
    assert torch.equal(index.order[index.inverse], torch.arange(90))
    ends = torch.tensor([n for c, n in index.groups for _ in range(c)]).cumsum(0)
    for part in index.keys.flatten()[index.order].tensor_split(ends[:-1]):
        assert len(part.unique()) == 1
    assert len(ends) == sum(len(row.unique()) for row in labels)


def test_region_numbers_are_below_their_upper_bound() -> None:
    for labels in (random_labels(), torch.tensor([[10**15, 3], [-5, 3]])):
        keys, count = region_keys(labels)
        assert keys.min() >= 0 and keys.max() < count
        assert not set(keys[0].tolist()) & set(keys[1].tolist())


def test_only_short_sequences_use_a_dense_mask() -> None:
    def chosen(labels: Tensor) -> str:
        return choose_backend(region_index(labels), torch.zeros(1, 1, labels.shape[1], 8))

    edge = regions.DENSE_TOKENS
    assert chosen((torch.arange(edge)[None] > 5).long()) == "dense"
    assert chosen(torch.zeros(1, edge, dtype=torch.int64)) == "segments"  # global attention needs no mask
    assert chosen((torch.arange(edge + 1)[None] > 5).long()) == "segments"  # the mask would grow quadratically


def test_wrong_inputs_of_the_attention_raise_an_error() -> None:
    inputs = qkv()
    for labels, message in (
        (torch.zeros(3, 30), "must have integers"),
        (torch.zeros(3, 0, dtype=torch.int64), "empty"),
        (torch.zeros(3, 29, dtype=torch.int64), "do not fit 30 tokens"),
        (torch.zeros(3, 5, 6, dtype=torch.int64), "flatten"),
    ):
        with pytest.raises(ValueError, match=message):
            region_attention(*inputs, labels)
    with pytest.raises(ValueError, match="backend must be one of"):
        region_attention(*inputs, random_labels(), "fast")
    with pytest.raises(ValueError, match="needs a GPU"):
        region_attention(*inputs, random_labels(), "varlen")
    with pytest.raises(ValueError, match="not divisible by 3 attention heads"):
        RegionAttention(10, 3)


PEAK = """
import re, torch
from asa.restoration.regions import region_attention
torch.set_num_threads(1)

def high_water():  # KiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def peak(length):
    q, k, v = (torch.randn(1, 8, length, 32) for _ in range(3))
    labels = torch.arange(length)[None] // 256
    open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark, which a child inherits
    before = high_water()
    region_attention(q, k, v, labels, "segments")
    return high_water() - before

peak(512)
print(peak(4096), peak(16384))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory of a part of a process needs Linux"
)
def test_peak_memory_is_linear_in_the_tokens() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert few > 1024 and many < 5 * few
    assert many < 128 * 1024  # a mask of 16,384^2 alone has 256 MiB


def reference_focal_loss(prediction: Tensor, target: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Image by image and region by region."""
    losses = []
    for b in range(len(target)):
        error = (prediction[b] - target[b]).abs()
        means = {int(r): error[:, labels[b] == r].mean().item() for r in labels[b].unique()}
        largest = max(means.values())
        weight = torch.tensor([[means[int(r)] / largest if largest else 0.0 for r in row] for row in labels[b]])
        losses.append((error * (1 + beta * weight)).mean())
    return torch.stack(losses).mean()


def pictures() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.rand(2, 3, 2, 6, 5, generator=generator)
    labels = torch.randint(-2, 3, (3, 6, 5), generator=generator) * torch.tensor([1, 100, 0]).view(3, 1, 1)
    return prediction.requires_grad_(), target, labels


@pytest.mark.parametrize("beta", [1.0, 1e-3, 3.0])
def test_the_focal_loss_equals_its_reference(beta: float) -> None:
    prediction, target, labels = pictures()
    found = FocalRegionLoss(beta)(prediction, target, labels)
    expected = reference_focal_loss(prediction, target, labels, beta)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(loss, prediction) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_of_a_uniform_error_is_one_plus_beta_times_the_error() -> None:
    _, target, labels = pictures()
    assert FocalRegionLoss(0.5)(target + 0.25, target, labels).item() == pytest.approx(1.5 * 0.25)
    assert FocalRegionLoss()(target + 0.25, target, labels).item() == pytest.approx(2 * 0.25)


def test_beta_zero_is_the_absolute_error() -> None:
    prediction, target, labels = pictures()
    torch.testing.assert_close(FocalRegionLoss(0)(prediction, target, labels), F.l1_loss(prediction, target))


def test_a_perfect_prediction_has_zero_loss_and_a_finite_gradient() -> None:
    _, target, labels = pictures()
    prediction = target.clone().requires_grad_()
    loss = FocalRegionLoss()(prediction, target, labels)
    loss.backward()
    assert loss == 0 and prediction.grad is not None and prediction.grad.isfinite().all()


def test_the_loss_of_a_batch_is_the_mean_over_its_images() -> None:
    prediction, target, labels = pictures()
    loss = FocalRegionLoss()
    alone = [loss(prediction[i : i + 1], target[i : i + 1], labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(prediction, target, labels), torch.stack(alone).mean())


def test_the_worst_region_has_the_largest_weight() -> None:
    target = torch.zeros(1, 1, 2, 4)
    labels = torch.tensor([[[0, 0, 1, 1]] * 2])
    prediction = torch.tensor([[[[0.1, 0.1, 0.4, 0.4]] * 2]])
    weights = FocalRegionLoss().weights(prediction - target, labels)
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.25, 1, 1]] * 2]))


def test_wrong_inputs_of_the_focal_loss_raise_an_error() -> None:
    prediction, target, labels = pictures()
    with pytest.raises(ValueError, match="differ in shape"):
        FocalRegionLoss()(prediction[:, :1], target, labels)
    with pytest.raises(ValueError, match="does not fit images"):
        FocalRegionLoss()(prediction, target, labels[:, :3])
    with pytest.raises(ValueError, match="0 or more"):
        FocalRegionLoss(-1)


# ------------------------------------------------------------------------------------------ coarser label maps


def reference_majority(labels: Tensor, factor: int) -> Tensor:
    """Block by block: the first of the most frequent labels."""
    b, h, w = labels.shape
    out = torch.empty(b, -(-h // factor), -(-w // factor), dtype=labels.dtype)
    for k in range(b):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                rows = [min(i * factor + r, h - 1) for r in range(factor)]
                columns = [min(j * factor + c, w - 1) for c in range(factor)]
                block = [int(labels[k, r, c]) for r in rows for c in columns]
                out[k, i, j] = max(block, key=lambda label: (block.count(label), -block.index(label)))
    return out


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (13, 6), (1, 3)])
def test_majority_pooling_takes_the_most_frequent_label_of_each_block(factor: int, h: int, w: int) -> None:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(-2, 2, (3, h, w), generator=generator) * 70000  # few labels give many ties
    found = coarse_labels(labels, factor, majority=True)
    assert found.dtype == labels.dtype and torch.equal(found, reference_majority(labels, factor))


def test_a_single_pixel_changes_the_corner_of_a_block_but_not_its_majority() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 4, 4] = 1
    assert coarse_labels(labels, 4, majority=False).sum() == 1 and not coarse_labels(labels, 4, majority=True).any()
