"""The tables of scripts/reproduce/few_labels.py."""

from pathlib import Path

import pytest
from scored import write_run

from scripts.reproduce.few_labels import ARMS, SCRATCH, TESTED, Run, draw_curve, encoder, folds_of, read_dice, report
from scripts.reproduce.structures import STRUCTURES


@pytest.mark.parametrize("folds", [TESTED, folds_of(3), folds_of(4)])
def test_each_brain_is_tested_once(folds: list[tuple[int, int]]) -> None:
    assert sorted(brain for first, last in folds for brain in range(first, last)) == list(range(15))


def test_arms_share_an_encoder_where_the_pretraining_is_the_same() -> None:
    assert encoder("unet", 1, 2) == encoder("light", 1, 2) == encoder("pretrained", 1, 2) == "pretrained1_seed2"
    pretrained = [arm for arm in ARMS if arm not in SCRATCH]
    folders = {encoder(arm, 0, 0): ARMS[arm].pretraining for arm in pretrained}
    assert all(folders[encoder(arm, 0, 0)] == ARMS[arm].pretraining for arm in pretrained)
    assert len({*folders.values()}) == len(folders)


def test_the_tables_pair_the_arms_by_brain_and_seed(tmp_path: Path) -> None:
    best = {(1, "pretrained"): "1e-2", (1, "scratch"): "3e-2", (1, "atlas"): "-"}
    dice = {("pretrained", 0): [0.5, 0.6], ("pretrained", 1): [0.7, 0.8]}
    dice |= {("scratch", 0): [0.4, 0.4], ("scratch", 1): [0.2, 0.4]}
    for (arm, seed), brains in dice.items():
        run = Run(0, 1, seed, arm, best[1, arm])
        write_run(tmp_path / "evaluated" / run.name(), dict.fromkeys(STRUCTURES, brains))
    write_run(tmp_path / "evaluated" / "fold0_1_atlas", dict.fromkeys(STRUCTURES, (0.3, 0.5)))  # of no seed
    found = read_dice(tmp_path, [0], [0, 1], best)
    assert {key: values.shape for key, values in found.items()} == dict.fromkeys(best, (2, 2, len(STRUCTURES)))
    draw_curve(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    table = report(found, [0, 1], best)
    # Differences 0.1 and 0.2 for seed 0, 0.5 and 0.4 for seed 1, 0.3 for both brains over the seeds.
    assert "| 1 | 0 | scratch | 0.400 | +0.150 (" in table
    assert "| 1 | 1 | scratch | 0.300 | +0.450 (" in table
    assert "| 1 | all | pretrained | 0.650 |" in table
    assert "| 1 | 0 | atlas | 0.400 | +0.150 (" in table and "| 1 | 1 | atlas | 0.400 | +0.350 (" in table
    assert "| 1 | all | scratch | 0.350 | +0.300 (+0.300 to +0.300)" in table
    assert f"| 1 | scratch | 3e-2 | {' | '.join(['0.35'] * len(STRUCTURES))} |" in table
