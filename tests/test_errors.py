"""Errors in one line: what happened to which file, and what to do."""

import shutil
from pathlib import Path

import pytest
from ranks import replaced

from asa.cli import main
from asa.errors import listed, reason_of
from asa.methods.pretrain import MaskedPretraining


def test_a_removed_folder_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found:
        (tmp_path / "run" / "x" / "log.jsonl").open("a")
    file = tmp_path / "run" / "x" / "log.jsonl"
    assert reason_of(found.value) == (
        f"{file}: the folder {tmp_path / 'run'} was removed while it was in use: put it back, and run this again"
    )
    with pytest.raises(FileNotFoundError) as found:
        (tmp_path / "log.jsonl").open()
    assert reason_of(found.value) == f"{tmp_path / 'log.jsonl'}: no such file or folder"


def test_a_removed_working_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    shutil.rmtree(tmp_path / "study")
    with pytest.raises(FileNotFoundError) as found:
        Path("done.json").read_text()
    assert "done.json: the folder in which this runs was removed: put it back" in reason_of(found.value)


def test_a_run_whose_folder_is_removed_says_which_and_what_to_do(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, steps = tmp_path / "run", []

    def forward(self: MaskedPretraining, batch: dict) -> dict:
        steps.append(1)
        if len(steps) == 3:
            shutil.rmtree(run)
        return original(self, batch)

    tiny = "model=asa_tiny crop=32 loader.workers=0 train.device=cpu train.steps=9 train.log_every=1 optim.warmup=1"
    with replaced(MaskedPretraining, "forward", forward) as original:
        assert main(["pretrain", f"data.store={store}", f"out={run}", *tiny.split()]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line == (
        f"asa-pretrain: error: {run / 'log.jsonl'}: the folder {run} was removed while it was in use: put it back, and "
        "run this again"
    )
    assert not run.exists()


def test_ids_are_listed_up_to_a_limit_with_the_number_of_the_others() -> None:
    assert [listed(list("abc"), limit) for limit in (4, 3, 2)] == ["a, b, c", "a, b, c", "a, b and 1 more"]
