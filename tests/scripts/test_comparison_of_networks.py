"""The comparison of scripts/reproduce/comparators.py, at a small size."""

import sys
from pathlib import Path

import numpy as np
import pytest

from asa.config import compose
from asa.data.io.nifti import read_image, read_label, write_label
from asa.models import create_model
from scripts.reproduce import comparators
from scripts.reproduce.commands import quoted
from tests.conftest import write_brain


@pytest.mark.slow
def test_a_network_is_trained_scored_and_measured_in_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for k in range(2):
        write_brain(data, f"s{k}", seed=k)
        image = (data / f"s{k}_T1.nii.gz").rename(data / f"s{k}_SS.nii.gz")
        label = read_label(data / f"s{k}_seg.nii.gz").data
        write_label(data / f"s{k}_tissues.nii.gz", np.where(label == 5, 3, label), read_image(image))
    arguments = ["--networks", "primus_tiny", "--spacing", "3", "--crop", "32", "32", "32", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["comparators", str(data), str(out), *arguments, "--tested", "1"])
    comparators.main()
    millions = sum(p.numel() for p in create_model("primus_tiny", out_channels=4, img_size=32).parameters()) / 1e6
    dice = comparators.mean_dice(out, "primus_tiny")
    assert dice.shape == (1,) and 0 <= dice[0] < 1
    row = (out / "comparators.md").read_text().splitlines()[-1]
    assert row.startswith(f"| `primus_tiny` | {millions:.2f} | {dice[0]:.3f} | 1.0 | ")
    assert 0.001 < float(row.split("|")[-2]) < 1  # GiB
    assert row in capsys.readouterr().out


def test_too_few_brains_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds 0 ID_tissues"):
        comparators.prepare(tmp_path, tmp_path / "out", 2.0, tested=6)


def test_a_path_with_any_sign_is_one_setting() -> None:
    place = "/a b/it's, {here}=[1]"
    assert compose("export", quoted(out=place))["out"] == place
