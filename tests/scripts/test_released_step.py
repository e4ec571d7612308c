"""The comparison with the released network, from a checkout of the user's."""

from pathlib import Path

import pytest

from scripts.reproduce.released_step import FILE, compare, load

NETWORK = """
from torch import nn
from neighbour import WIDTH

class PretrainMEDIUMVIT(nn.Module):
    def __init__(self, img_size, mask_ratio):
        super().__init__()
        self.layer = nn.Conv3d(1, WIDTH, 8, stride=8)

    def forward(self, volumes, mask):
        tokens = self.layer(volumes).flatten(2).transpose(1, 2)
        return tokens[mask].reshape(len(volumes), -1, WIDTH)
"""


def checkout(folder: Path, network: str) -> Path:
    """A checkout with a network that imports its neighbour."""
    file = folder / FILE
    file.parent.mkdir(parents=True)
    (file.parent / "neighbour.py").write_text("WIDTH = 512\n")
    file.write_text(network)
    return folder


def test_the_networks_train_in_turn_and_their_ratios_are_printed(tmp_path: Path) -> None:
    network = load(checkout(tmp_path, NETWORK))
    line = compare(network, size="tiny", edge=32, batch=2, precision="fp32", repeats=1)
    _, batch, precision, *numbers, _ = (cell.strip() for cell in line.split("|"))
    assert (batch, precision) == ("2", "fp32")
    base, fast, released, *ratios = map(float, numbers)
    assert ratios == pytest.approx([base / released, fast / released], rel=0.02, abs=0.006)


def test_what_is_not_such_a_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkout of github.com/LL3RD/ASA"):
        load(tmp_path)
    with pytest.raises(ValueError, match="has no PretrainMEDIUMVIT"):
        load(checkout(tmp_path, NETWORK.replace("PretrainMEDIUMVIT", "Other")))
