"""The arms of scripts/reproduce/recipe.py, its tables, and its figure."""

import json
from pathlib import Path

import pytest
from scored import write_run

from asa.config import compose
from scripts.reproduce import recipe
from scripts.reproduce.structures import STRUCTURES


@pytest.mark.parametrize("arm", recipe.ARMS)
def test_each_arm_sees_as_many_samples_and_is_fine_tuned_as_it_was_pretrained(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretraining = compose("pretrain", recipe.pretrain_settings(tmp_path, arm, 0))
    train, method = pretraining["train"], pretraining["method"]
    assert train["steps"] * train["batch_size"] * method["masks"] == recipe.SAMPLES

    given: list[str] = []
    monkeypatch.setattr(recipe, "finetune", lambda out, name, split, steps, *settings, init: given.extend(settings))
    recipe.finetune_arm(tmp_path, arm, 3, 0, steps=10)
    network = compose("finetune", ["experiment=structures_light", "data.store=store", "out=run", *given])["model"]
    of_the_encoder = ("patch_size", "window", "position", "mirror_patches", "depth")
    assert [network.get(key) for key in of_the_encoder] == [pretraining["model"].get(key) for key in of_the_encoder]


def pretrained(out: Path, arm: str, seed: int, first: float, probe: float) -> None:
    """The log of a pretraining: two validations."""
    folder = recipe.run_folder(out, arm, seed)
    folder.mkdir(parents=True)
    lines = [
        {"group": "validation", "step": step, "linear_dice": probe * step / 300, "linear_dice_first": first}
        for step in (150, 300)
    ]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_the_tables_pair_the_arms_by_seed_and_brain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "cost", lambda out, arms: {"deep_slow": (20.0, 0.5), "deep": (6.0, 0.2)})
    arms, seeds = ("deep_slow", "deep"), (0, 1)
    for arm, probes in {"deep_slow": (0.2, 0.3), "deep": (0.25, 0.35)}.items():
        for seed, probe in zip(seeds, probes, strict=True):
            pretrained(tmp_path, arm, seed, 0.1, probe)
    for arm, dice in {"deep_slow": [0.5, 0.6], "deep": [0.6, 0.8]}.items():
        for seed in seeds:
            name = recipe.finetuned_name(arm, 1, seed)
            write_run(tmp_path / "evaluated" / name, dict.fromkeys(STRUCTURES, dice))

    table = recipe.report(tmp_path, arms, seeds, tuned=("deep", "deep_slow"), labelled=(1,))

    rows = {row.split("|")[1].strip(): row for row in table.splitlines() if row.startswith("| `")}
    assert "| 20.00 | 1.00 | 1.00 | 0.250 (" in rows["`deep_slow`"] and "|  | 0.150 (" in rows["`deep_slow`"]
    assert "| 6.00 | 0.30 | 0.40 | 0.300 (" in rows["`deep`"]
    assert "| 0.050 (0.050 to 0.050) | 0.200 (" in rows["`deep`"]
    assert "| 1 | all | deep_slow | 0.550 | +0.150 (" in table
    with_dice = (tmp_path / "recipe.png").stat().st_size

    table = recipe.report(tmp_path, arms, seeds, tuned=(), labelled=(1,))

    assert "labelled" not in table
    assert 0 < (tmp_path / "recipe.png").stat().st_size < with_dice
