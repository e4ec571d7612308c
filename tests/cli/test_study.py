"""`asa run`: folders are recognised, the stages compose, and what is done is not done again."""

import json
import shlex
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from asa.cli import COMMANDS, study
from asa.cli.study import plan_stages, read_study, run_study
from asa.config import as_overrides, compose
from asa.data.datasets.folder import recognise
from asa.data.store import Store
from asa.reporting.pages import write_study as write_page
from asa.tasks import run

LABELS = {1: "csf", 2: "gm", 3: "wm"}


def scan(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), path)


def nnunet(root: Path) -> None:
    scan(root / "imagesTr" / "a_0000.nii.gz")
    scan(root / "labelsTr" / "a.nii.gz")
    content = '{"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}'
    (root / "dataset.json").write_text(content)


def bids(root: Path) -> None:
    scan(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    scan(root / "derivatives" / "manual" / "sub-1" / "anat" / "sub-1_dseg.nii.gz")


def freesurfer(root: Path) -> None:
    (root / "bert" / "mri").mkdir(parents=True)
    for name in ("T1", "aseg"):
        (root / "bert" / "mri" / f"{name}.mgz").touch()


def files(root: Path) -> None:
    for name in ("a_T1", "b_T1", "a_seg", "b_seg"):
        scan(root / f"{name}.nii.gz")


def structures(root: Path) -> None:  # of asa-phantom
    for name in ("s1_T1.nii.gz", "s1_structures.nii.gz"):
        scan(root / name)


def settings(**given: object) -> dict[str, object]:
    return compose("run", as_overrides("run", {"strip": "none", **given}))


@pytest.mark.parametrize(
    ("make", "labelled", "unlabelled"),
    [
        (nnunet, {"data": "nnunet"}, {"data": "nnunet"}),
        (bids, {"data": "bids", "data.label": "dseg", "data.label_root": "derivatives/manual"}, {"data": "bids"}),
        (freesurfer, {"data": "freesurfer"}, {"data": "freesurfer", "data.label": None}),
        (
            files,
            {"data": "folder", "data.images": {"t1": "*_T1.nii.gz"}, "data.label": "*_seg.nii.gz"},
            {"data": "folder", "data.images": {"t1": "*_T1.nii.gz"}},
        ),
        (
            structures,
            {"data": "folder", "data.images": {"t1": "*_T1.nii.gz"}, "data.label": "*_structures.nii.gz"},
            {"data": "folder", "data.images": {"t1": "*_T1.nii.gz"}},
        ),
    ],
)
def test_a_folder_is_recognised_by_what_lies_in_it(tmp_path: Path, make, labelled, unlabelled) -> None:
    make(tmp_path)
    for wanted, which in ((labelled, True), (unlabelled, False)):
        found = {
            key: str(value).removeprefix(f"{tmp_path}/") for key, value in recognise(tmp_path, labelled=which).items()
        }
        assert found == {key: str(value) for key, value in wanted.items()} | {"data.root": str(tmp_path)}


def test_numbers_are_part_of_a_name_and_two_kinds_of_images_are_not_mixed(tmp_path: Path) -> None:
    for name in ("head_001.nii.gz", "head_002.nii.gz", "head3.nii.gz"):
        scan(tmp_path / name)
    assert recognise(tmp_path, labelled=False)["data.images"] == {"t1": "*.nii.gz"}
    scan(tmp_path / "head_FLAIR.nii.gz")
    with pytest.raises(ValueError, match=r"3 \*.nii.gz, 1 \*_FLAIR.nii.gz; one image a scan"):
        recognise(tmp_path, labelled=False)


@pytest.mark.parametrize("names", [[], ["a.nii.gz"], ["a_T1.nii.gz", "a_FLAIR.nii.gz", "a_seg.nii.gz"]])
def test_a_folder_that_is_not_recognised_says_what_is_in_it(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        scan(tmp_path / name)
    with pytest.raises(ValueError, match=r"one image and one label map a scan were expected: prepare it"):
        recognise(tmp_path, labelled=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        recognise(tmp_path / "other", labelled=True)


def test_several_labelled_subjects_are_compared_in_folds_and_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "find_spec", lambda _: None)  # without the extra atlas
    files(tmp_path / "lab")
    bids(tmp_path / "raw")
    given = {"labelled": tmp_path / "lab", "labels": LABELS, "out": tmp_path / "study"}
    stages = {stage.name: stage for stage in plan_stages(settings(**given, unlabelled=tmp_path / "raw", new=tmp_path))}
    assert list(stages) == [
        *("labelled", "unlabelled", "encoder", "scratch", "pretrained", "comparison", "predictions"),
    ]
    for stage in stages.values():
        compose(stage.command, as_overrides(stage.command, stage.settings))
    scratch, pretrained = dict(stages["scratch"].settings), dict(stages["pretrained"].settings)
    assert pretrained.pop("init") == "runs/encoder" == stages["encoder"].settings["out"]
    assert {**scratch, "out": None} == {**pretrained, "out": None}, "they differ in their first weights alone"
    assert (scratch["data.split.folds"], scratch["data.split.fold"]) == (2, "all")
    assert stages["predictions"].settings["checkpoint"] == ["runs/pretrained/fold0", "runs/pretrained/fold1"]

    for name in ("b_T1", "b_seg"):
        (tmp_path / "lab" / f"{name}.nii.gz").unlink()
    stages = {stage.name: stage for stage in plan_stages(settings(**given))}
    assert list(stages) == ["labelled", "pretrained"]
    assert stages["pretrained"].settings["init"] == study.ENCODER


def test_networks_are_compared_with_registration_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "find_spec", lambda name: name == "ants")
    files(tmp_path / "lab")
    for number in range(5):
        given = settings(labelled=tmp_path / "lab", labels=LABELS, out=tmp_path / "study")
        stages = {stage.name: stage for stage in plan_stages(given)}
        assert list(stages)[-4:] == ["comparison", "atlas", "atlas_scores", "atlas_comparison"]
        for stage in stages.values():
            compose(stage.command, as_overrides(stage.command, stage.settings))
        assert stages["atlas"].settings["labelled"] == min(number + 1, study.ATLASES), "one subject is left to predict"
        first, second = stages["atlas_comparison"].settings["compare"].values()
        assert first == stages["atlas_scores"].settings["out"] and second == "runs/pretrained/evaluation"
        scan(tmp_path / "lab" / f"c{number}_T1.nii.gz")
        scan(tmp_path / "lab" / f"c{number}_seg.nii.gz")


def test_labels_without_names_are_asked_for_before_anything_is_prepared(tmp_path: Path) -> None:
    files(tmp_path / "lab")
    values = np.resize(np.array([0, 1, 3, 3], np.uint8), (4, 4, 4))
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "lab" / "a_seg.nii.gz")
    with pytest.raises(ValueError, match=r"labels= .*a_seg.nii.gz holds the values 1, 3; name all, like"):
        run_study(settings(labelled=tmp_path / "lab", out=tmp_path / "study"))
    assert not (tmp_path / "study").exists()
    nnunet(tmp_path / "declared")
    plan_stages(settings(labelled=tmp_path / "declared", out=tmp_path / "study"))


def test_labels_that_name_only_some_values_or_none_are_refused(tmp_path: Path) -> None:
    files(tmp_path / "lab")
    values = np.resize(np.array([0, 1, 3, 3], np.uint8), (4, 4, 4))
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "lab" / "a_seg.nii.gz")
    given = {"labelled": tmp_path / "lab", "out": tmp_path / "study", "plan": "only"}
    for labels, reason in (({1: "x"}, "holds the values 1, 3; name all"), ("csf", "should be values and names")):
        with pytest.raises(ValueError, match=reason):
            run_study(settings(**given, labels=labels))
    with pytest.raises(ValueError, match=r"prepare.strip='nope'"):
        run_study(settings(**given, labels={1: "x", 3: "y"}) | {"strip": "nope"})
    with pytest.raises(ValueError, match="train.steps=0"):
        run_study(settings(**given, labels={1: "x", 3: "y"}, finetune={"train.steps": 0}))
    assert not (tmp_path / "study").exists(), "what is wrong is found before the file is written"


def test_a_store_takes_the_place_of_a_folder(tmp_path: Path, store: Path) -> None:
    bids(tmp_path / "raw")
    given = compose("run", as_overrides("run", {"labelled": store, "unlabelled": tmp_path / "raw", "strip": "none"}))
    stages = {stage.name: stage for stage in plan_stages(given)}
    assert [name for name, stage in stages.items() if stage.command == "prepare"] == ["unlabelled"]
    assert stages["scratch"].settings["data.store"] == str(store.resolve())
    assert stages["scratch"].settings["data.split.folds"] == len(Store(store).records)
    assert [stage.name for stage in plan_stages(given | {"unlabelled": None, "strip": None})][:2] == [
        *("scratch", "pretrained"),
    ]


def test_settings_of_a_command_are_added_to_its_stages(tmp_path: Path) -> None:
    files(tmp_path / "lab")
    added = {"finetune": {"train.steps": 7}, "prepare": {"prepare.spacing": 3}}
    stages = plan_stages(settings(labelled=tmp_path / "lab", labels=LABELS, out=tmp_path / "study", **added))
    for stage in stages:
        assert stage.command != "finetune" or stage.settings["train.steps"] == 7
        assert stage.command != "prepare" or stage.settings["prepare.spacing"] == 3


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Commands that a study has run, which do nothing."""
    calls: list[tuple[str, str]] = []

    def call(command: str, given: dict[str, object]) -> None:
        if given.get("experiment") == "missing":
            raise ValueError("no such experiment")
        calls.append((command, str(given["out"])))
        Path(str(given["out"])).mkdir(parents=True, exist_ok=True)
        (Path(str(given["out"])) / "report.html").touch()

    monkeypatch.setattr("asa.tasks.run.call", call)
    return calls


def write_study(folder: Path, **encoder: object) -> Path:
    stages = {
        "store": {"prepare": {"data.root": "x", "labels": {1: "csf"}, "out": "stores/a"}},
        "encoder": {"pretrain": {"data.store": "stores/a", "out": "runs/a", **encoder}},
        "network": {"finetune": {"data.store": "stores/a", "init": "runs/a", "out": "runs/b"}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return folder / "study.yaml"


def test_what_is_done_is_not_done_again_and_what_follows_a_change_is(tmp_path: Path, recorded, capsys) -> None:
    pytest.importorskip("jinja2")
    file = write_study(tmp_path / "s")
    run_study(compose("run", [f"labelled={file}"]))
    assert recorded == [("prepare", "stores/a"), ("pretrain", "runs/a"), ("finetune", "runs/b")]
    page = (tmp_path / "s" / "study.html").read_text()
    assert 'href="runs/b/report.html"' in page and "Not done yet" not in page
    recorded.clear()
    run_study(compose("run", [f"labelled={file}"]))
    assert recorded == [] and capsys.readouterr().out.count("done before") == 3
    run_study(compose("run", [f"labelled={file.parent}"]))
    assert recorded == [], "the study's folder stands for its file"
    run_study(compose("run", [f"labelled={write_study(tmp_path / 's', **{'train.steps': 5})}"]))
    assert recorded == [("pretrain", "runs/a"), ("finetune", "runs/b")]


def test_a_training_does_not_go_on_from_results_that_have_changed(tmp_path: Path, recorded) -> None:
    pytest.importorskip("jinja2")
    file = write_study(tmp_path / "s")
    run_study(compose("run", [f"labelled={file}"]))
    network = tmp_path / "s" / "runs" / "b"
    (network / "config.yaml").touch()  # it was trained
    write_study(tmp_path / "s", **{"train.steps": 5})
    for encoder in ([("pretrain", "runs/a")], []):
        recorded.clear()
        with pytest.raises(ValueError, match="stage network: runs/b was trained from results that have changed since"):
            run_study(compose("run", [f"labelled={file}"]))
        assert recorded == encoder
    shutil.rmtree(network)
    run_study(compose("run", [f"labelled={file}"]))
    assert recorded == [("finetune", "runs/b")]
    recorded.clear()
    run_study(compose("run", [f"labelled={file}"]))
    assert recorded == []


def test_a_change_that_is_refused_and_taken_back_leaves_all_done(tmp_path: Path, recorded) -> None:
    pytest.importorskip("jinja2")
    file = write_study(tmp_path / "s")
    run_study(compose("run", [f"labelled={file}"]))
    recorded.clear()
    write_study(tmp_path / "s", experiment="missing")
    with pytest.raises(ValueError, match="no such experiment"):
        read = read_study(file)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(file.parent)
            study._run(read)
    run_study(compose("run", [f"labelled={write_study(tmp_path / 's')}"]))
    assert recorded == []


def test_stages_that_do_not_read_what_has_changed_stay_done(tmp_path: Path, recorded) -> None:
    pytest.importorskip("jinja2")
    file = write_study(tmp_path / "s")
    text = file.read_text()
    file.write_text(text.replace("init: runs/a", "init: elsewhere"))
    run_study(compose("run", [f"labelled={file}"]))
    recorded.clear()
    file.write_text(file.read_text().replace("out: runs/a", "out: runs/a\n      train.steps: 5"))
    run_study(compose("run", [f"labelled={file}"]))
    assert recorded == [("pretrain", "runs/a")]


def test_what_a_study_sets_is_refused_and_an_encoder_is_that_of_the_pretrained_network(
    tmp_path: Path,
) -> None:
    files(tmp_path / "lab")
    given = {"labelled": tmp_path / "lab", "labels": LABELS, "out": tmp_path / "study"}
    stages = {one.name: one.settings for one in plan_stages(settings(**given, finetune={"init": "hf://org/name"}))}
    assert stages["pretrained"]["init"] == "hf://org/name" and "init" not in stages["scratch"]
    for command, taken in (("finetune", {"data": {"split": {"folds": 7}}}), ("pretrain", {"data.store": "x"})):
        with pytest.raises(ValueError, match=rf"{command}\.data.* is set by asa run"):
            plan_stages(settings(**given, **{command: taken}))
    with pytest.raises(ValueError, match="leave one of them out"):
        plan_stages(settings(**given, unlabelled=tmp_path / "lab", finetune={"init": "x"}))


def test_a_training_that_was_stopped_goes_on(tmp_path: Path, recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    file, usual = write_study(tmp_path / "s"), run.call

    def stopped(command: str, given: dict[str, object]) -> None:
        usual(command, given)
        if command == "finetune":
            (tmp_path / "s" / "runs" / "b" / "config.yaml").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr("asa.tasks.run.call", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_study(compose("run", [f"labelled={file}"]))
    monkeypatch.setattr("asa.tasks.run.call", usual)
    recorded.clear()
    run_study(compose("run", [f"labelled={file}"]))
    assert recorded == [("finetune", "runs/b")]


def test_subjects_whose_label_is_missing_are_in_no_fold(tmp_path: Path) -> None:
    bids(tmp_path / "lab")
    for number in (2, 3):
        scan(tmp_path / "lab" / f"sub-{number}" / "anat" / f"sub-{number}_T1w.nii.gz")
    given = settings(labelled=tmp_path / "lab", labels=LABELS, out=tmp_path / "study")
    assert [stage.name for stage in plan_stages(given)] == ["labelled", "pretrained"]


def test_a_folder_of_configurations_is_no_folder_of_scans(tmp_path: Path, capsys) -> None:
    files(tmp_path / "lab")
    arguments = ["--config-dir", str(tmp_path), str(tmp_path / "lab"), f"out={tmp_path / 's'}", "strip=none"]
    assert COMMANDS["run"].main(arguments) == 1
    assert "--config-dir is not for asa run" in capsys.readouterr().err


def test_a_stage_that_fails_is_named_and_the_next_call_begins_with_it(tmp_path: Path, recorded) -> None:
    pytest.importorskip("jinja2")
    file = write_study(tmp_path / "s", **{"train.steps": 5})
    stages = read_study(file)
    broken = [stages[0], stages[1]._replace(settings={**stages[1].settings, "experiment": "missing"}), stages[2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(file.parent)
        with pytest.raises(ValueError, match="stage encoder, asa-pretrain: no such experiment"):
            study._run(broken)
    assert "Not done yet: encoder, network" in (file.parent / "study.html").read_text()
    recorded.clear()
    run_study(compose("run", [f"labelled={file}"]))
    assert [command for command, _ in recorded] == ["pretrain", "finetune"]


def test_the_page_says_how_scores_are_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    (tmp_path / "network" / "evaluation").mkdir(parents=True)
    summary = {"results": {"gm": {"dice": {"mean": 0.5}}}, "notes": ["warning: trained on s1"]}
    (tmp_path / "network" / "evaluation" / "summary.json").write_text(json.dumps(summary))
    monkeypatch.chdir(tmp_path)
    row = {"name": "network", "typed": "asa-finetune", "out": "network", "seconds": 1, "finished": "2026-01-01"}
    write_page(Path("study.html"), [row], [])
    page = Path("study.html").read_text()
    assert "Dice 0.500, mean of 1 labels and regions" in page and "warning: trained on s1" in page


@pytest.mark.slow
def test_a_small_study_runs_whole_and_then_finds_all_of_it_done(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    monkeypatch.setattr(study, "find_spec", lambda _: None)  # without the extra atlas
    (tmp_path / "two").mkdir()
    for path in [*raw.glob("s0_*"), *raw.glob("s1_*")]:
        shutil.copy(path, tmp_path / "two")
    coarse = {"predict.overlap": 0}
    small = coarse | {"crop": [32, 32, 32], "train.steps": 2, "train.validate_every": 2, "optim.warmup": 0}
    given = {"labelled": tmp_path / "two", "new": raw / "s2_T1.nii.gz", "labels": {1: "csf", 2: "gm", 5: "wm"}}
    added = {"prepare": {"prepare.spacing": None}, "finetune": small, "predict": coarse}
    run_study(settings(**given, **added, out=tmp_path / "s"))
    page = (tmp_path / "s" / "study.html").read_text()
    assert "5 of 5 stages done" in page and "mean of 3 labels and regions" in page and "Dice" in page
    assert [path.name for path in (tmp_path / "s" / "predictions").glob("*.nii.gz")] == ["s2_T1.nii.gz"]
    capsys.readouterr()
    run_study(compose("run", [f"labelled={tmp_path / 's' / 'study.yaml'}"]))
    assert capsys.readouterr().out.count("done before") == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("stages: {}", "not a study"),
        ("stages: {a: {train: {out: x}}}", "no command train"),
        ("stages: {a: {prepare: {data: bids}}}", "stage a needs out="),
        ("stages: {a: [prepare]}", "one command and its settings"),
        ("stages: {a: {prepare: {out: x, dta: bids}}}", "dta"),
    ],
)
def test_a_file_that_is_no_study_says_why(tmp_path: Path, recorded, content: str, reason: str) -> None:
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(ValueError, match=reason):
        run_study(compose("run", [f"labelled={tmp_path / 'study.yaml'}"]))
    assert not recorded


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    files(tmp_path / "lab")
    for words, reason in (
        ([], "give a folder of labelled scans"),
        ([f"labelled={tmp_path}/lab"], "out= has to be given"),
        ([f"labelled={tmp_path}/lab", f"out={tmp_path}/s"], "strip= has to be given"),
        (["labelled=s.yaml", "out=x"], "out= is for a new study"),
    ):
        with pytest.raises(ValueError, match=reason):
            run_study(compose("run", words))
    with pytest.raises(FileNotFoundError, match="no such file"):
        run_study(compose("run", ["labelled=s.yaml"]))
    assert not (tmp_path / "s").exists()


def test_another_study_is_not_overwritten(tmp_path: Path, recorded) -> None:
    files(tmp_path / "lab")
    given = {"labelled": tmp_path / "lab", "labels": LABELS, "out": tmp_path / "s", "plan": "only"}
    run_study(settings(**given))
    run_study(settings(**given))
    with pytest.raises(ValueError, match="is another study, or was changed, and nothing of it was run: remove it"):
        run_study(settings(**given, finetune={"train.steps": 3}))
    (tmp_path / "s" / study.DONE).write_text("[]")
    with pytest.raises(ValueError, match="is another study, or was changed; asa run"):
        run_study(settings(**given, finetune={"train.steps": 3}))


def test_the_commands_of_a_plan_begin_with_a_cd_to_where_their_paths_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my study").mkdir()
    stages = {"net": {"finetune": {"data": {"store": "stores/a b"}, "out": "runs/x"}}}
    (tmp_path / "my study" / "study.yaml").write_text(yaml.safe_dump({"stages": stages}))
    run_study(compose("run", [f"labelled='{tmp_path}/my study/study.yaml'", "plan=only"]))
    first, command, *_ = capsys.readouterr().out.splitlines()
    assert shlex.split(first) == ["cd", f"{tmp_path}/my study"]
    assert shlex.split(command) == ["net:", "asa-finetune", "data.store='stores/a b'", "out=runs/x"]


def test_a_plan_takes_settings_nested_or_dotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"net": {"finetune": {"data": {"store": "stores/x"}, "out": "runs/x"}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"stages": stages}))
    run_study(compose("run", [f"labelled='{tmp_path}/study.yaml'", "plan=only"]))
    assert "again with plan=only when stores/x is there" in capsys.readouterr().out
