"""Laws of patchify and of the random masks."""

import pytest
import torch

from asa import patchify, random_mask, unpatchify
from asa.ops.patches import grid_size, split_indices


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, (8, 8, 8), 4), (3, (4, 12, 8), 4), (2, (6, 4, 10), 2)])
def test_unpatchify_undoes_patchify(channels: int, size: tuple[int, int, int], patch: int) -> None:
    volume = torch.randn(2, channels, *size)
    tokens = patchify(volume, patch)
    grid = [n // patch for n in size]
    assert torch.equal(unpatchify(tokens, grid, patch), volume)


def test_tokens_are_patches_in_raster_order() -> None:
    volume = torch.randn(2, 3, 4, 8, 6)
    tokens = patchify(volume, 2)
    row = 0
    for t in range(2):
        for h in range(4):
            for w in range(3):
                patch = volume[:, :, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
                assert torch.equal(tokens[:, row], patch.flatten(1))
                row += 1
    assert tokens.shape == (2, row, 24)


def test_sizes_that_are_not_divisible_by_the_patch_size_raise_an_error() -> None:
    with pytest.raises(ValueError, match=r"whole number of patches of 4: pad it to \(4, 8, 4\)"):
        grid_size((4, 5, 4), 4, several=True)  # what is left would be one patch
    with pytest.raises(ValueError, match=r"larger than 4\^3"):
        grid_size((4, 4, 4), 4, several=True)
    assert grid_size((4, 4, 4), 4) == (1, 1, 1) and grid_size((4, 8, 4), 4, several=True) == (1, 2, 1)
    with pytest.raises(ValueError, match=r"whole number of patches of 4: crop it to \(8, 8, 8\), or pad it to .*12\)"):
        patchify(torch.zeros(1, 1, 8, 8, 9), 4)
    with pytest.raises(ValueError, match=r"patches of 4: pad it to \(8, 4, 8\)$"):
        patchify(torch.zeros(1, 1, 8, 3, 8), 4)
    with pytest.raises(ValueError, match="do not fill"):
        unpatchify(torch.zeros(1, 9, 64), (2, 2, 2), 4)


@pytest.mark.parametrize(
    ("length", "ratio", "count"),
    [(4096, 0.75, 3072), (100, 0.6, 60), (10, 0.01, 1), (10, 0.99, 9), (10, 0.75, 8), (15, 0.3, 4), (10, 0.26, 3)],
)
def test_every_sample_masks_the_exact_count(length: int, ratio: float, count: int) -> None:
    mask = random_mask(7, length, ratio)
    assert mask.dtype == torch.bool and mask.shape == (7, length)
    assert mask.sum(dim=1).tolist() == [count] * 7


def test_the_same_generator_gives_the_same_mask_and_samples_differ() -> None:
    first, second = (random_mask(3, 64, 0.75, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, random_mask(3, 64, 0.75, torch.Generator().manual_seed(6)))


def test_all_tokens_are_masked_equally_often() -> None:
    mask = random_mask(4000, 16, 0.75, torch.Generator().manual_seed(0))
    # 4000 draws: the standard deviation of a fraction of 0.75 is 0.007.
    assert (mask.float().mean(dim=0) - 0.75).abs().max() < 0.035


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_a_ratio_outside_0_to_1_raises_an_error(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
        random_mask(1, 8, ratio)


def test_indices_of_visible_and_masked_tokens_are_in_raster_order() -> None:
    mask = random_mask(3, 20, 0.6)
    visible, masked = split_indices(mask)
    for row in range(3):
        assert visible[row].tolist() == [i for i in range(20) if not mask[row, i]]
        assert masked[row].tolist() == [i for i in range(20) if mask[row, i]]


def test_different_counts_per_sample_raise_an_error() -> None:
    with pytest.raises(ValueError, match="same number"):
        split_indices(torch.tensor([[True, False, False], [True, True, False]]))
    with pytest.raises(ValueError, match="some tokens visible"):
        split_indices(torch.ones(1, 3, dtype=torch.bool))
