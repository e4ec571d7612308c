"""Cross-validation in one command."""

import csv
import json
from pathlib import Path

import pytest
from stores import with_subjects, without_labels
from untrained import checkpoint

from asa.cli import COMMANDS
from asa.config import compose
from asa.data.io.nifti import read_image
from asa.data.splits import write_split
from asa.data.store import Store
from asa.inference.segmentation import PredictSettings, Segmenter
from asa.tasks import studies
from asa.tasks.studies import finetune_task
from asa.tasks.volumes import choose_split
from asa.training.checkpoint_files import find_weights

TINY = ["loader.workers=0", "train.device=cpu", "optim.warmup=0", "model=unet_tiny", "+model.feature_size=4"]
TINY += ["crop=[64,32,32]", "train.steps=2", "train.batch_size=1", "data.split.validation=0"]
TINY += ["predict.overlap=0"]
ALL = ["data.split.folds=2", "data.split.fold=all"]


@pytest.fixture
def finetune(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run asa-finetune into a folder: code, output, errors."""

    def run(*overrides: str) -> tuple[int, str, str]:
        capsys.readouterr()
        arguments = [f"data.store={store}", f"out={tmp_path}/cv", *TINY, *overrides]
        code = COMMANDS["finetune"].main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.slow
def test_each_scan_is_scored_by_the_run_that_did_not_see_it(finetune, store: Path, tmp_path: Path) -> None:
    code, out, _ = finetune(*ALL)
    assert code == 0 and f"asa-predict checkpoint=[{tmp_path}/cv/fold0,{tmp_path}/cv/fold1]" in out
    folder = tmp_path / "cv"
    cohort = Store(store)
    splits = [json.loads((folder / f"fold{k}" / "split.json").read_text()) for k in (0, 1)]
    subjects = {record["subject"] for record in cohort.records}
    assert set(splits[0]["test"]) | set(splits[1]["test"]) == subjects
    assert not any(set(split["test"]) & set(split["train"]) for split in splits)
    with (folder / "evaluation" / "cases.csv").open(newline="") as table:
        assert {row["id"] for row in csv.DictReader(table)} == {record["id"] for record in cohort.records}
    assert (folder / "evaluation" / "report.html").exists()

    # The label maps are those of the fold that tested the scan.
    for k in (0, 1):
        record = next(record for record in cohort.records if record["subject"] == splits[k]["test"][0])
        id, by_hand = record["id"], tmp_path / f"{k}.nii.gz"
        like = read_image(record["sources"]["t1"]["path"])
        segmenter = Segmenter(folder / f"fold{k}", PredictSettings(overlap=0))
        segmenter.segment_prepared(cohort.image(id), record["chain"], like, by_hand)
        assert by_hand.read_bytes() == (folder / "predictions" / f"{id}.nii.gz").read_bytes()

    # Given again, nothing is trained or predicted anew; one fold alone is the same run.
    weights, label_map = find_weights(folder / "fold1"), folder / "predictions" / f"{id}.nii.gz"
    before = (weights.stat().st_mtime_ns, label_map.stat().st_mtime_ns)
    assert finetune(*ALL)[0] == 0
    assert (weights.stat().st_mtime_ns, label_map.stat().st_mtime_ns) == before
    code, _, _ = finetune("data.split.folds=2", "data.split.fold=1", f"out={folder}/fold1")
    assert code == 0 and weights.stat().st_mtime_ns == before[0]


@pytest.mark.slow
def test_a_scan_without_a_label_map_is_trained_on_in_no_fold_and_not_scored(
    finetune, store: Path, tmp_path: Path
) -> None:
    copy = with_subjects(store, tmp_path / "store", {"s0": "s0", "s1": "s1", "s2": "s1", "s3": "s3"})
    without_labels(copy, "s2", "s3")  # one is of a subject with a labelled scan
    code, out, err = finetune(*ALL, f"data.store={copy}")
    assert code == 0 and out.count("left out, without a label map: s2, s3\n") == 2, err
    with (tmp_path / "cv" / "evaluation" / "cases.csv").open(newline="") as table:
        assert {row["id"] for row in csv.DictReader(table)} == {"s0", "s1"}
    given = ("data.split.folds=3", "data.split.fold=all", f"data.store={copy}", f"out={tmp_path}/x")
    assert "folds=3 must be from 2 to the number of subjects, 2" in finetune(*given)[2]
    assert not (tmp_path / "x").exists()


def test_a_fold_is_predicted_again_with_other_weights_settings_or_label_maps_and_else_not(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(tmp_path / "run"), tmp_path / "predictions"
    write_split(run / "split.json", {"train": ["s0"], "validation": [], "test": ["s1", "s2"]})
    config = {"data": {"store": str(store)}, "predict": {"overlap": 0}, "plugins": []}
    calls = []

    def predict(command: str, *settings: object) -> None:
        calls.append(command)
        out.mkdir(exist_ok=True)
        for id in ("s1", "s2"):
            (out / f"{id}.nii.gz").write_text(f"of prediction {len(calls)}")

    def made_again(**changed: object) -> bool:
        before = len(calls)
        studies._predict_fold(run, out, {**config, **changed})
        return len(calls) > before

    monkeypatch.setattr(studies, "call", predict)
    assert made_again() and not made_again()
    assert made_again(predict={"overlap": 0.5}) and made_again()
    (out / "s2.nii.gz").write_text("of another network")
    assert made_again() and not made_again()
    weights = find_weights(run)
    weights.write_bytes(weights.read_bytes() + b" ")
    assert made_again() and not made_again()


def test_folds_of_nnunet_are_of_cases_and_a_run_is_of_their_subjects(tmp_path: Path) -> None:
    folds = [{"train": ["p-1_a", "q_a"], "val": ["r_a", "r_b"]}, {"train": ["q_a", "r_a"], "val": ["p-1_a", "r_b"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    records = [{"id": id, "subject": id[:-2]} for id in ("p-1_a", "q_a", "r_a", "r_b")]
    data = {"split_file": str(tmp_path / "splits_final.json"), "split": {"fold": 0}}
    split = choose_split(records, data, tmp_path / "run")
    assert split == {"train": ["p-1", "q"], "validation": [], "test": ["r"]}
    with pytest.raises(
        ValueError, match=r"fold 1 has cases of subject r in train and in val: .* data\.subject='\(\.\*\)'"
    ):
        choose_split(records, data | {"split": {"fold": 1}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.split.fold=all"], "add data.split.folds=5"),
        (["data.split.folds=9", "data.split.fold=all"], "folds=9 must be from 2 to the number of subjects, 4"),
        ([*ALL, "data.split_file={split}"], "leave out data.split_file"),
        ([*ALL, "data.split.site=there"], "contradict"),
        ([*ALL, "method=classify", "~model.feature_size", "model=asa_classifier_tiny"], "fold=all is not for"),
        ([*ALL, "method=restore", "~model.feature_size", "model=rat_tiny"], "fold=all is not for"),
    ],
)
def test_folds_that_cannot_be_are_one_line_and_leave_nothing(
    finetune, tmp_path: Path, overrides: list[str], message: str
) -> None:
    write_split(tmp_path / "split.json", {"train": ["s0", "s1"], "validation": [], "test": ["s2"]})
    code, _, err = finetune(*(override.replace("{split}", f"'{tmp_path}/split.json'") for override in overrides))
    assert code == 1 and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "cv").exists()


def test_several_processes_are_told_to_take_the_folds_one_by_one(
    finetune, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setattr(studies, "world_size", lambda: 2)
    config = compose("finetune", [f"data.store={store}", "out=x", *ALL])
    with pytest.raises(ValueError, match="under torchrun give each fold by itself"):
        finetune_task(config)


def test_a_plan_is_of_one_fold_and_starts_nothing(finetune, tmp_path: Path) -> None:
    code, out, _ = finetune(*ALL, "plan=only", "plan_rate=1")
    assert code == 0 and "fold 0 of 2" in out and "parameters" in out
    assert not (tmp_path / "cv").exists()
