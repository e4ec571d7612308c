"""The comparison with a network from a file of the user's."""

from pathlib import Path

import pytest

from scripts.reproduce.released_step import compare, load

NETWORK = """
from torch import nn
from neighbour import WIDTH

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, WIDTH, 8, stride=8)

    def forward(self, volumes):
        found = self.layer(volumes)
        return found, found.square().mean()

class Lossless(Network):
    def forward(self, volumes):
        return self.layer(volumes)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a network that imports its neighbour."""
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    (tmp_path / "network.py").write_text(NETWORK)
    return tmp_path


SIZES = {"size": "tiny", "edge": 32, "batch": 2, "repeats": 1}


def test_both_networks_train_alternately_and_their_ratio_is_printed(checkout: Path) -> None:
    line = compare(load(f"{checkout / 'network.py'}:Network"), precision="fp32", **SIZES)
    _, batch, precision, ours, other, ratio, _ = (cell.strip() for cell in line.split("|"))
    assert (batch, precision) == ("2", "fp32")
    assert float(ratio) == pytest.approx(float(ours) / float(other), rel=0.02, abs=0.006)


def test_a_network_without_a_loss_and_a_missing_name_are_named(checkout: Path) -> None:
    with pytest.raises(ValueError, match="Lossless returns no loss"):
        compare(load(f"{checkout / 'network.py'}:Lossless"), precision="fp32", **SIZES)
    with pytest.raises(ValueError, match="has no 'Missing'"):
        load(f"{checkout / 'network.py'}:Missing")
    with pytest.raises(ValueError, match="give FILE.py:NAME"):
        load(str(checkout / "network.py"))
