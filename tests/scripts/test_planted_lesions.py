"""The maps and the table of scripts/reproduce/planted.py."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asa.inference.anomaly import AnomalyMap
from asa.ops.patches import Selection, patchify

planted = importlib.import_module("scripts.reproduce.planted")


class VisibleMean(nn.Module):
    """Predicts the mean of the visible voxels, and counts how often each patch was predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(patch_size=8, grid=(4, 4, 5))
        self.times = torch.zeros(80)

    def forward(self, volume: Tensor, *, visible: Selection, decoded: Selection) -> Tensor:
        assert not set(visible.indices[0].tolist()) & set(decoded.indices[0].tolist())
        self.times[decoded.indices[0]] += 1
        mean = patchify(volume, 8)[0, visible.indices[0]].mean()
        return mean.expand(1, decoded.indices.shape[1], 8**3)


@pytest.mark.parametrize("masked", [1, 3])
def test_a_patch_is_predicted_only_where_it_is_masked_and_air_stays(masked: int) -> None:
    torch.manual_seed(0)
    window = torch.rand(1, 1, 32, 32, 40) + 1
    window[..., 32:] = 0  # 16 of 80 patches
    network = VisibleMean()
    found = planted.PredictedPatches(network, masked=masked)(window)
    tissue = (patchify(window, 8)[0] != 0).any(dim=1)
    assert network.times[tissue].tolist() == [masked] * 64 and not network.times[~tissue].any()
    assert found.shape == window.shape and not found[..., 32:].any()
    patches, tolerance = patchify(window, 8)[0, tissue], 1e-5
    # A patch cannot enter its own prediction: the same but for the groups, whose means differ a little.
    assert (found[..., :32] - patches.mean()).abs().max() < 0.02
    changed = window.clone()
    changed[..., :8, :8, :8] += 100  # one patch
    again = planted.PredictedPatches(VisibleMean(), masked=masked)(changed)
    torch.testing.assert_close(again[..., :8, :8, :8], found[..., :8, :8, :8], atol=tolerance, rtol=0)
    assert (again - found)[..., 8:, :, :32].max() > 1  # it is visible to others


def test_a_window_of_air_is_not_predicted() -> None:
    window = torch.zeros(1, 1, 32, 32, 40)
    window[..., :8, :8, :8] = 1
    assert torch.equal(planted.PredictedPatches(VisibleMean(), masked=3)(window), window)


def test_the_measures_of_a_perfect_map_and_of_an_inverted_one() -> None:
    lesion = np.zeros((4, 4, 4), bool)
    lesion[1, 1, :2] = True
    inside = torch.ones(4, 4, 4, dtype=torch.bool)
    shown = torch.from_numpy(lesion).float()
    healthy = {"a": AnomalyMap(torch.zeros(4, 4, 4), inside)}
    assert planted.measure(healthy, {"a": AnomalyMap(shown, inside)}, {"a": lesion}) == (1, 1, 1, 2 / 64, 1)
    scan, area, precision, chance, hits = planted.measure(
        healthy, {"a": AnomalyMap(0.5 - shown, inside)}, {"a": lesion}
    )
    assert (scan, area, chance, hits) == (1, 0, 2 / 64, 0) and precision == pytest.approx(2 / 64)
