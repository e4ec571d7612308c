"""Errors in one line: what happened to which file, and what to do."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import replaced
from untrained import a_scan, checkpoint

from asa.cli import main
from asa.data.preprocessing import scan
from asa.errors import counted, listed, reason_of
from asa.inference.segmentation import Segmenter
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


def test_a_store_whose_folder_is_removed_is_not_begun_anew(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scans = tmp_path / "store", []

    def removing(*args: Any, **options: Any) -> Any:
        scans.append(1)
        if len(scans) == 2:
            shutil.rmtree(out)
        return original(*args, **options)

    settings = [f"data.root={raw}", "data.images={t1: '*_T1.nii.gz'}", f"out={out}"]
    with replaced(scan, "prepare_case", removing) as original:
        assert main(["prepare", "data=folder", *settings]) == 1
    check_removed(out, "prepare", out / "records.jsonl", capsys)
    assert len(scans) == 2


@pytest.mark.parametrize("options", [[], ["probabilities=true", "uncertainty=entropy"], ["layout=bids"]])
def test_predictions_whose_folder_is_removed_are_not_begun_anew(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, scans = checkpoint(tmp_path / "run"), tmp_path / "out", []
    for name in "abc":
        a_scan(tmp_path / "scans" / f"sub-{name}" / "anat", f"sub-{name}_T1w")

    def removing(*args: Any, **options: Any) -> Any:
        scans.append(1)
        if len(scans) == 2:
            shutil.rmtree(out)
        return original(*args, **options)

    given = [f"checkpoint={run}", f"input={tmp_path / 'scans'}", f"out={out}", "predict.device=cpu"]
    with replaced(Segmenter, "probabilities", removing) as original:
        assert main(["predict", *given, *options]) == 1
    check_removed(out, "predict", out / "*", capsys)
    assert len(scans) == 2


def test_pages_that_asa_did_not_write_are_not_replaced(
    store: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations, viewer = [tmp_path / name for name in "ab"], tmp_path / "niivue.umd.js"
    viewer.write_text("(function(a,b){b((a=self).niivue={})})(this,function(){});")
    maps, images = f"predictions={raw}/*_seg.nii.gz", "data.images={t1: '*_T1.nii.gz'}"
    commands = {
        evaluations[0] / "report.html": ["evaluate", maps, f"truth={store}", f"out={evaluations[0]}"],
        evaluations[1] / "report.html": ["evaluate", maps, f"truth={store}", f"out={evaluations[1]}"],
        tmp_path / "c" / "comparison.html": [
            *("evaluate", f"compare=[{evaluations[0]},{evaluations[1]}]", f"out={tmp_path / 'c'}")
        ],
        tmp_path / "s_check" / "quality_control.html": [
            *("prepare", "data=folder", f"data.root={raw}", images, f"out={tmp_path / 's'}", "check=only")
        ],
        tmp_path / "v.html": ["view", f"input={store}", f"out={tmp_path / 'v.html'}", f"viewer={viewer}"],
    }
    for page, command in commands.items():
        page.parent.mkdir(exist_ok=True)
        page.write_text("<html>mine</html>")
        assert main(command) == 1
        assert f"{page}: exists and is no page of asa: move it away" in capsys.readouterr().err
        assert page.read_text() == "<html>mine</html>"
        page.unlink()
        for _ in range(2):
            assert main(command) == 0
    (table := evaluations[0] / "cases.csv").write_text("id,label\nmine,1\n")
    assert main(commands[evaluations[0] / "report.html"]) == 1
    assert f"{table}: exists and is no table of asa-evaluate" in capsys.readouterr().err
    assert table.read_text() == "id,label\nmine,1\n"


def check_removed(out: Path, command: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    what = f"{file}: the folder {out} was removed while it was in use: put it back, and run this again"
    assert line == f"asa-{command}: error: {what}" and not out.exists()


def test_ids_are_listed_up_to_a_limit_with_the_number_of_the_others() -> None:
    assert [listed(list("abc"), limit) for limit in (4, 3, 2)] == ["a, b, c", "a, b, c", "a, b and 1 more"]


def test_one_of_a_kind_has_no_plural() -> None:
    assert [counted(number, "scan") for number in (0, 1, 2)] == ["0 scans", "1 scan", "2 scans"]
