"""Laws of the gradient importance."""

import math

import numpy as np
import pytest
import torch

from asa import gradient_importance
from asa.losses import reconstruction


def per_voxel_reference(volume: np.ndarray, patch: int, bins: int, kind: str) -> np.ndarray:
    """Eq. (1) voxel by voxel in float64: `(D, H, W)` -> `(L,)`."""
    depth, height, width = volume.shape
    padded = np.pad(volume.astype(np.float64), 1, mode="edge")
    scores = []
    for t in range(depth // patch):
        for h in range(height // patch):
            for w in range(width // patch):
                histogram, total = np.zeros((bins, bins)), 0.0
                for z in range(t * patch, (t + 1) * patch):
                    for y in range(h * patch, (h + 1) * patch):
                        for x in range(w * patch, (w + 1) * patch):
                            gx = padded[z + 1, y + 1, x + 2] - padded[z + 1, y + 1, x]
                            gy = padded[z + 1, y + 2, x + 1] - padded[z + 1, y, x + 1]
                            gz = padded[z + 2, y + 1, x + 1] - padded[z, y + 1, x + 1]
                            length = math.sqrt(gx * gx + gy * gy + gz * gz)
                            total += length
                            if length == 0:
                                continue
                            theta, phi = math.acos(gz / length), abs(math.atan2(gy, gx))
                            row = min(int(theta / (math.pi / bins)), bins - 1)
                            column = min(int(phi / (math.pi / bins)), bins - 1)
                            histogram[row, column] += length
                norm = math.sqrt((histogram**2).sum())
                if kind == "magnitude":
                    scores.append(total / patch**3)
                else:
                    scores.append((histogram / norm).mean() if norm > 0 else 0.0)
    return np.array(scores)


@pytest.mark.parametrize("kind", ["orientation", "magnitude"])
@pytest.mark.parametrize("bins", [1, 5, 9, 16])
def test_importance_equals_a_loop_over_voxels(kind: str, bins: int) -> None:
    volume = torch.rand(2, 1, 8, 12, 16, generator=torch.Generator().manual_seed(bins))
    volume[0, 0, :4, :4, :4] = 0.5  # a flat patch
    volume[1, 0, :, :, 8:] = 0.0
    scores = gradient_importance(volume, 4, bins, kind)
    for sample in range(2):
        expected = per_voxel_reference(volume[sample, 0].numpy(), 4, bins, kind)
        np.testing.assert_allclose(scores[sample].numpy(), expected, atol=1e-6)


def test_axis_aligned_edges_fall_into_one_bin() -> None:
    ramp = torch.arange(8.0)
    for axis, sign in ((2, 1), (2, -1), (3, 1), (3, -1), (4, 1), (4, -1)):
        volume = (sign * ramp.reshape([-1 if i == axis else 1 for i in range(5)])).expand(1, 1, 8, 8, 8)
        # One direction in one bin: the normalised histogram has a single 1.
        scores = gradient_importance(volume, 8, 9)
        assert scores.item() == pytest.approx(1 / 81)
        np.testing.assert_allclose(
            scores[0].numpy(), per_voxel_reference(volume[0, 0].numpy(), 8, 9, "orientation"), atol=1e-7
        )


@pytest.mark.parametrize("bins", [2, 3, 4, 6, 9, 16])
def test_an_angle_at_an_edge_is_in_the_bin_nearer_to_90_degrees_and_a_right_angle_in_the_upper_one(bins: int) -> None:
    for k in range(1, bins):
        cosine = torch.tensor([math.cos(k * math.pi / bins) if 2 * k != bins else 0.0])
        assert reconstruction._angle_bin(cosine, bins) == (k if 2 * k <= bins else k - 1)


@pytest.mark.parametrize("kind", ["orientation", "magnitude"])
def test_a_flat_volume_scores_0(kind: str) -> None:
    assert torch.equal(gradient_importance(torch.full((1, 1, 16, 16, 16), 3.7), kind=kind), torch.zeros(1, 8))


def test_scaling_the_intensities_changes_no_orientation_score() -> None:
    volume = torch.rand(1, 1, 16, 16, 16)
    scores = gradient_importance(volume)
    torch.testing.assert_close(gradient_importance(1000 * volume), scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_importance(0.001 * volume), scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        gradient_importance(4 * volume, kind="magnitude"), 4 * gradient_importance(volume, kind="magnitude")
    )


def test_channels_are_averaged_and_samples_are_independent() -> None:
    volume = torch.rand(3, 2, 8, 16, 8)
    scores = gradient_importance(volume)
    for sample in range(3):
        channels = [gradient_importance(volume[sample : sample + 1, c : c + 1])[0] for c in range(2)]
        torch.testing.assert_close(scores[sample], torch.stack(channels).mean(dim=0))


def test_cutting_into_slabs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = torch.rand(3, 2, 40, 16, 24)
    slabs = list(reconstruction._slabs(volume.flatten(0, 1), 8, 1))
    assert len(slabs) == 6 and all(len(list(group)) == 5 for group in slabs)
    whole = list(reconstruction._slabs(volume.flatten(0, 1), 8, 2**30))
    assert len(whole) == 1
    original = reconstruction._slabs
    monkeypatch.setattr(reconstruction, "_slabs", lambda volumes, patch, budget: original(volumes, patch, 1))
    cut = gradient_importance(volume)
    monkeypatch.setattr(reconstruction, "_slabs", lambda volumes, patch, budget: original(volumes, patch, 2**30))
    assert torch.equal(gradient_importance(volume), cut)


def test_half_precision_is_computed_in_float32() -> None:
    volume = torch.rand(1, 1, 8, 8, 8).half()
    assert torch.equal(gradient_importance(volume), gradient_importance(volume.float()))


def test_invalid_arguments_raise_an_error() -> None:
    with pytest.raises(ValueError, match="importance must be one of"):
        gradient_importance(torch.zeros(1, 1, 8, 8, 8), kind="edges")
    with pytest.raises(ValueError, match="bins must be at least 1"):
        gradient_importance(torch.zeros(1, 1, 8, 8, 8), bins=0)
