"""The commands as a user runs them, on tiny phantoms, and what they say about bad input."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import asa
from asa import cli
from asa.cli import COMMANDS
from asa.data.store import Store
from asa.tasks.volumes import default_crop, padding_advice
from asa.training.checkpoint import load_model, read_description
from asa.training.checkpoint_files import list_checkpoints

TINY = ["loader.workers=0", "train.device=cpu", "train.log_every=1", "optim.warmup=1"]
PRETRAIN = [*TINY, "model=asa_tiny", "crop=32", "train.steps=2", "train.batch_size=2"]
FINETUNE = [*TINY, "model=unet_tiny", "+model.feature_size=4", "crop=[64,32,32]", "train.steps=2", "train.batch_size=1"]


class Result:
    """Exit code and output of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in this process: command("prepare", "key=value", ...)."""

    def run(name: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"asa-{name}", *map(str, arguments)])
        capsys.readouterr()
        code = COMMANDS[name].main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def failed_in_one_line(result: Result, *parts: str) -> bool:
    """Whether a command failed with an error line that holds these parts."""
    lines = [line for line in result.err.splitlines() if ": error: " in line]
    return result.code == 1 and len(lines) == 1 and all(part in lines[0] for part in parts)


def test_from_phantom_to_report(command, tmp_path: Path) -> None:
    out = tmp_path / "with space"
    assert command("phantom", "kind=ibsr", "subjects=3", "seed=3", "resolution=4", f"out={out}/raw").code == 0
    prepared = command("prepare", "data=ibsr", f"data.root={out}/raw", f"out={out}/store")
    assert prepared.code == 0 and "3 prepared" in prepared.out
    again = command("prepare", "data=ibsr", f"data.root={out}/raw", f"out={out}/store")
    assert "0 prepared, 3 done before" in again.out
    assert command("prepare", "data=ibsr", f"data.root={out}/raw", f"out={out}/store", "verify=true").code == 0

    pretrained = command(
        "pretrain", f"data.store={out}/store", f"out={out}/pre", "data.split={validation: 1, test: 1}", *PRETRAIN
    )
    assert pretrained.code == 0 and "of the mean predictor's" in pretrained.out
    split = ["data.split={validation: 1, test: 1}"]
    tuned = command("finetune", f"data.store={out}/store", f"out={out}/fine", f"init={out}/pre", *split, *FINETUNE)
    assert tuned.code == 0 and "loaded" in tuned.out and "not part of the encoder" in tuned.out

    predicted = command("predict", f"checkpoint={out}/fine", f"input={out}/store", "part=test", f"out={out}/pred")
    assert predicted.code == 0
    (prediction,) = (out / "pred").glob("*.nii.gz")
    name = prediction.name.removesuffix(".nii.gz")
    source = nibabel.load(out / "raw" / name / f"{name}_ana_strip.nii.gz")
    made = nibabel.load(prediction)
    assert made.shape == source.shape and np.array_equal(made.affine, source.affine)
    assert made.get_data_dtype() == np.uint8 and set(np.unique(made.dataobj)) <= {0, 1, 2, 3}

    # The raw file gives the same label map as the store.
    file = out / "raw" / name / f"{name}_ana_strip.nii.gz"
    assert command("predict", f"checkpoint={out}/fine", f"input={file}", f"out={out}/pred2").code == 0
    direct = nibabel.load(out / "pred2" / f"{name}_ana_strip.nii.gz")
    assert (np.asarray(direct.dataobj) == np.asarray(made.dataobj)).mean() > 0.999

    scored = command(
        "evaluate",
        f"predictions={out}/pred",
        f"truth={out}/store",
        f"split_file={out}/fine/split.json",
        f"out={out}/ev",
    )
    assert scored.code == 0 and "HD95" in scored.out
    written = {"cases.csv", "summary.json", "digests.json", "report.html"}
    assert {path.name for path in (out / "ev").iterdir()} == written
    assert json.loads((out / "ev" / "summary.json").read_text())["results"]["gm"]["dice"]["used"] == 1


def test_a_perfect_prediction_scores_1_from_a_folder(command, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "pred").mkdir()
    for k in range(4):
        (tmp_path / "pred" / f"s{k}.nii.gz").write_bytes((raw / f"s{k}_seg.nii.gz").read_bytes())
    result = command(
        "evaluate", f"predictions={tmp_path}/pred", f"truth={raw}", "pattern=*_seg.nii.gz",
        "labels={1: csf, 2: gm, 5: wm}", f"out={tmp_path}/ev",
    )  # fmt: skip
    assert result.code == 0
    found = json.loads((tmp_path / "ev" / "summary.json").read_text())["results"]
    assert [found[tissue]["dice"]["mean"] for tissue in ("csf", "gm", "wm")] == [1, 1, 1]
    assert [found[tissue]["hd95_mm"]["mean"] for tissue in ("csf", "gm", "wm")] == [0, 0, 0]
    (tmp_path / "split.json").write_text('{"train": ["s0"], "validation": [], "test": ["s1"]}')
    refused = command(
        "evaluate", f"predictions={tmp_path}/pred", f"truth={raw}", "pattern=*_seg.nii.gz",
        "labels={1: csf, 2: gm, 5: wm}", f"split_file={tmp_path}/split.json", f"out={tmp_path}/part",
    )  # fmt: skip
    assert failed_in_one_line(refused, "split.json chooses scans of a store", "predict the part")


def test_one_label_map_in_the_place_of_a_folder_is_called_a_file(command, raw: Path, tmp_path: Path) -> None:
    given = (f"predictions={raw}", f"truth={raw}/s0_seg.nii.gz", "labels={1: csf}", f"out={tmp_path}/ev")
    assert failed_in_one_line(command("evaluate", *given), "s0_seg.nii.gz is a file: give the folder")


def test_what_a_store_says_itself_is_not_given_beside_it(command, store: Path, tmp_path: Path) -> None:
    for given in ("labels={1: csf}", "ignored=[3]", "images='x/*.nii.gz'"):
        failed = command("evaluate", f"predictions={tmp_path}", f"truth={store}", f"out={tmp_path}/ev", given)
        assert failed_in_one_line(failed, f"{given.partition('=')[0]}= is for a folder of label maps")
    failed = command("evaluate", f"predictions={tmp_path}", f"truth={store}", f"out={tmp_path}/ev", "part=validation")
    assert failed_in_one_line(failed, "part=validation: give split_file=RUN/split.json")


def test_names_that_do_not_match_are_shown_with_the_patterns_that_would(command, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "pred").mkdir()
    for k in range(4):
        (tmp_path / "pred" / f"s{k}_SS.nii.gz").write_bytes((raw / f"s{k}_seg.nii.gz").read_bytes())
    (tmp_path / "truth").mkdir()
    for k in range(4):
        (tmp_path / "truth" / f"s{k}_tissues.nii.gz").write_bytes((raw / f"s{k}_seg.nii.gz").read_bytes())
    arguments = [f"truth={tmp_path}/truth", "labels={1: csf, 2: gm, 5: wm}", f"out={tmp_path}/ev"]
    failed = command("evaluate", f"predictions={tmp_path}/pred", *arguments)
    assert failed.code == 1 and "the folder holds s0_SS, s1_SS" in failed.err
    patterns = [f"predictions='{tmp_path}/pred/*_SS.nii.gz'", "pattern='*_tissues.nii.gz'"]
    assert f"{' '.join(patterns)} would match 4 of them" in failed.err
    assert command("evaluate", *arguments, *patterns).code == 0
    assert len((tmp_path / "ev" / "cases.csv").read_text().splitlines()) == 1 + 4 * 3


def test_a_finished_run_is_left_as_it_is_and_a_longer_one_goes_on(command, store: Path, tmp_path: Path) -> None:
    arguments = [f"data.store={store}", f"out={tmp_path}/run", *PRETRAIN, "optim.schedule=constant"]
    assert command("pretrain", *arguments).code == 0
    weights = list_checkpoints(tmp_path / "run")[-1] / "model.safetensors"
    before = weights.read_bytes()
    assert command("pretrain", *arguments).code == 0
    assert weights.read_bytes() == before
    longer = command("pretrain", *arguments, "train.steps=3")
    assert longer.code == 0 and list_checkpoints(tmp_path / "run")[-1].name == "step-00000003"
    other = command("pretrain", *arguments, "optim.lr=0.5")
    assert failed_in_one_line(other, "optim.lr", "choose another out=")
    # A run that does not say a setting is not guessed to have it off.
    file = tmp_path / "run" / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "  ema:" not in line))
    assert failed_in_one_line(command("pretrain", *arguments, "train.steps=4"), "train.ema was None, is 0.0")


def test_pretrained_and_scratch_runs_share_everything_but_the_encoder(command, store: Path, tmp_path: Path) -> None:
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/pre", *PRETRAIN).code == 0
    start = [
        f"data.store={store}",
        "data.split={validation: 0, test: 1}",
        *FINETUNE,
        "optim.lr=0.0",
        "optim.warmup_lr=0.0",
    ]
    for name, init in (("scratch", "null"), ("tuned", tmp_path / "pre")):
        assert command("finetune", f"out={tmp_path}/{name}", f"init={init}", *start).code == 0
    one, other = (
        load_file(list_checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("scratch", "tuned")
    )
    same = {name for name in one if (one[name] == other[name]).all()}
    assert {name for name in one if ".encoder." not in name} <= same
    assert any(name not in same for name in one)


def test_labelled_subsets_are_nested(command, store: Path, tmp_path: Path) -> None:
    subjects = []
    for n in (1, 2):
        arguments = [f"data.store={store}", "data.split={validation: 0, test: 1}", f"data.labelled={n}", *FINETUNE]
        assert command("finetune", f"out={tmp_path}/{n}", *arguments).code == 0
        subjects.append(json.loads((tmp_path / str(n) / "split.json").read_text()))
    assert subjects[0]["train"] == subjects[1]["train"][:1] and subjects[0]["test"] == subjects[1]["test"]
    assert failed_in_one_line(
        command("finetune", f"out={tmp_path}/9", *arguments[:2], "data.labelled=9", *FINETUNE), "labelled=9"
    )


def test_bad_input_is_one_line_and_leaves_nothing_behind(command, raw: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert failed_in_one_line(command("pretrain", f"out={out}", "data.store=absent"), "absent", "asa-prepare")
    assert failed_in_one_line(command("pretrain", f"out={out}", f"data.store={store}", "train.stepz=1"), "train.steps")
    assert failed_in_one_line(command("finetune", f"out={out}", f"data.store={store}", "init=absent"), "absent")
    assert failed_in_one_line(command("predict", "checkpoint=absent", f"input={raw}", f"out={out}"), "absent")
    undeclared = command(
        "prepare", f"data.root={raw}", "data.images={t1: *_T1.nii.gz}", "data.label=*_seg.nii.gz",
        "labels={1: csf, 2: gm}", f"out={tmp_path}/other",
    )  # fmt: skip
    assert failed_in_one_line(undeclared, "4 scans failed") and "label value 5" in undeclared.out
    assert not out.exists()
    assert list((tmp_path / "other").rglob("*.npy")) == []


def test_a_prediction_never_replaces_the_scan(command, raw: Path, store: Path, tmp_path: Path) -> None:
    split = ["data.split={validation: 0, test: 1}"]
    assert command("finetune", f"data.store={store}", f"out={tmp_path}/fine", *split, *FINETUNE).code == 0
    scans = tmp_path / "scans"
    scans.mkdir()
    scan = scans / "a.nii.gz"
    scan.write_bytes((raw / "s0_T1.nii.gz").read_bytes())
    before = scan.read_bytes()
    given = ("predict", f"checkpoint={tmp_path}/fine", f"input={scans}", f"out={scans}")
    assert failed_in_one_line(command(*given), "is not empty and not a folder of asa-predict")
    (scans / "volumes.csv").write_text("id\n")  # as if it were one
    assert failed_in_one_line(command(*given), "1 scan failed") and scan.read_bytes() == before


def test_an_encoder_with_other_position_codes_is_refused(command, store: Path, tmp_path: Path) -> None:
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/mae", *PRETRAIN, "method=mae").code == 0
    arguments = [f"data.store={store}", f"out={tmp_path}/fine", f"init={tmp_path}/mae", *FINETUNE]
    assert failed_in_one_line(command("finetune", *arguments), "add model.position=sincos")
    assert command("finetune", *arguments, "model.position=sincos").code == 0


def test_a_linear_probe_leaves_the_encoder_that_it_measures_as_it_was(command, store: Path, tmp_path: Path) -> None:
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/pre", *PRETRAIN).code == 0
    arguments = [
        f"data.store={store}", f"out={tmp_path}/probe", f"init={tmp_path}/pre", "experiment=linear_probe", *TINY,
        "model=vit_linear_tiny", "crop=32", "train.steps=2", "data.split={validation: 1, test: 1}", "predict.overlap=0",
        "train.best=dice",
    ]  # fmt: skip
    result = command("finetune", *arguments)
    assert result.code == 0 and "best dice " in result.out
    before, after = (
        load_file(list_checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("pre", "probe")
    )
    encoder = {name for name in after if name.startswith("model.encoder.")}
    assert after.keys() - encoder == {"model.head.weight", "model.head.bias"}
    assert all(np.array_equal(before[name], after[name]) for name in encoder)
    predicted = command(
        "predict", f"checkpoint={tmp_path}/probe/best", f"input={store}", "part=test", f"out={tmp_path}/p"
    )
    assert predicted.code == 0 and len(list((tmp_path / "p").glob("*.nii.gz"))) == 1
    wrong = [argument.replace("/probe", "/wrong") for argument in arguments]
    assert failed_in_one_line(command("finetune", *wrong, "optim.freeze=[encodre]"), "encodre", "encoder, head")


def test_a_head_on_tokens_is_trained_and_used_as_the_unet_is(command, store: Path, tmp_path: Path) -> None:
    pretrain = ["pretrain", f"data.store={store}", f"out={tmp_path}/pre", *PRETRAIN, "method.normalise=true"]
    assert command(*pretrain).code == 0
    assert read_description(tmp_path / "pre")["data"]["normalised"]  # maps of its errors need to know
    trained = command(
        "finetune", f"data.store={store}", f"out={tmp_path}/fine", f"init={tmp_path}/pre", *TINY, "model=vit_seg_tiny",
        "crop=32", "train.steps=2", "data.split={validation: 1, test: 1}", "method.background_weight=0.1",
        "optim.encoder_lr=0.05", "optim.warmup=0", "predict.overlap=0",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert read_description(tmp_path / "fine")["data"]["overlap"] == 0
    arguments = [f"checkpoint={tmp_path}/fine", f"input={store}", "part=test"]
    assert command("predict", *arguments, f"out={tmp_path}/p", "predict.overlap=0").code == 0
    assert len(list((tmp_path / "p").glob("*.nii.gz"))) == 1
    refused = [f"data.store={store}", f"out={tmp_path}/other", *FINETUNE, "method.background_weight=0"]
    assert failed_in_one_line(command("finetune", *refused), "method.background_weight=0: must be in (0, 1]")


@pytest.mark.parametrize(
    ("model", "init"),
    [
        pytest.param("unetr_tiny", "trained from scratch", marks=pytest.mark.slow),
        # Shifted windows make a large graph to export.
        pytest.param("swin_unetr_tiny", "trained from scratch", marks=pytest.mark.slow),
        pytest.param("nnformer_tiny", "trained from scratch", marks=pytest.mark.slow),
        pytest.param("transbts_tiny", "trained from scratch", marks=pytest.mark.slow),
        pytest.param("resenc_tiny", "the transfer is possible", marks=pytest.mark.slow),
        ("primus_tiny", "the transfer is possible"),
    ],
)
def test_a_comparator_trains_resumes_predicts_and_exports(
    command, store: Path, tmp_path: Path, model: str, init: str
) -> None:
    arguments = [
        f"data.store={store}", f"out={tmp_path}/fine", *TINY, f"model={model}", "crop=[32,32,64]",
        "data.split={validation: 1, test: 1}", "optim.warmup=0", "train.batch_size=1", "predict.overlap=0",
    ]  # fmt: skip
    trained = command("finetune", *arguments, "train.steps=2")
    assert trained.code == 0, trained.err
    resumed = command("finetune", *arguments, "train.steps=3")
    assert resumed.code == 0 and "step-00000003" in str(sorted((tmp_path / "fine/checkpoints").iterdir())), resumed.err
    given = [f"checkpoint={tmp_path}/fine", f"input={store}", "part=test", "predict.overlap=0"]
    assert command("predict", *given, f"out={tmp_path}/p").code == 0
    assert len(list((tmp_path / "p").glob("*.nii.gz"))) == 1
    exported = command("export", f"checkpoint={tmp_path}/fine", "format=onnx", f"out={tmp_path}/x.onnx")
    assert exported.code == 0 and (tmp_path / "x.onnx").is_file(), exported.err
    assert command("export", f"checkpoint={tmp_path}/fine", "format=bundle", f"out={tmp_path}/bundle").code == 0
    described = json.loads((tmp_path / "bundle/configs/metadata.json").read_text())
    assert f"baselines.{model}" in described["description"] and described["references"] == []
    words = ["licence=cc-by-4.0", "trained_on=phantoms"]
    hub = command("export", f"checkpoint={tmp_path}/fine", "format=hub", f"out={tmp_path}/hub", *words)
    assert hub.code == 0 and load_model(tmp_path / "hub").out_channels == 4, hub.err
    other = [argument.replace("/fine", "/other") for argument in arguments]
    started = command("finetune", *other, "train.steps=2", f"init={tmp_path}/fine", "transfer=explain")
    assert init in (started.out if started.code == 0 else started.err)


def test_labels_with_a_side_want_a_partner_under_mirroring(command, raw: Path, tmp_path: Path) -> None:
    prepared = command(
        "prepare", f"data.root={raw}", "data.images={t1: *_T1.nii.gz}", "data.label=*_seg.nii.gz",
        "labels={1: left_x, 2: right_x, 5: wm}", f"out={tmp_path}/store",
    )  # fmt: skip
    assert prepared.code == 0
    arguments = [
        f"data.store={tmp_path}/store",
        f"out={tmp_path}/fine",
        *FINETUNE,
        "data.split={validation: 0, test: 1}",
    ]
    assert failed_in_one_line(command("finetune", *arguments, "data.lateral_pairs=[]"), "left_x", "data.lateral_pairs")
    assert failed_in_one_line(command("finetune", *arguments, "data.lateral_pairs=5"), "is a list of pairs", "got 5")
    assert command("finetune", *arguments).code == 0
    assert read_description(tmp_path / "fine")["data"]["lateral_pairs"] == [["left_x", "right_x"]]


def test_folders_of_others_are_left_alone(command, raw: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("my: precious\n")
    assert failed_in_one_line(command("pretrain", f"data.store={store}", f"out={tmp_path}", *PRETRAIN), "not a run")
    images = [f"data.root={raw}", "data.images={t1: *_T1.nii.gz}"]
    assert failed_in_one_line(command("prepare", *images, f"out={tmp_path}"), "not a store")
    assert (tmp_path / "config.yaml").read_text() == "my: precious\n" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        "train.accumulate=0",
        "train.device=foo",
        "train.clip=-1",
        "optim.name=lion",
        "optim.betas=[0.9]",
        "loader.workers=-1",
        "crop=abc",
        "data.split=3",
        "data.mirror_probability=2",
        "method.mask_ratio=abc",
        "model.patch_size=0",
    ],
)
def test_wrong_values_are_one_line_and_leave_nothing_behind(command, store: Path, tmp_path: Path, wrong: str) -> None:
    result = command("pretrain", f"data.store={store}", f"out={tmp_path}/run", *PRETRAIN, wrong)
    assert failed_in_one_line(result)
    assert not (tmp_path / "run").exists()


def test_an_encoder_of_another_size_is_refused(command, store: Path, tmp_path: Path) -> None:
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/pre", *PRETRAIN).code == 0
    arguments = [f"data.store={store}", f"out={tmp_path}/fine", f"init={tmp_path}/pre", *FINETUNE, "model=unet_small"]
    assert failed_in_one_line(command("finetune", *arguments), "does not match", "Choose model=unet_tiny, the size")
    assert not (tmp_path / "fine").exists()


def test_a_pretrained_network_predicts_anomaly_maps_and_an_image_with_nan_is_named(
    command, store: Path, tmp_path: Path
) -> None:
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/pre", *PRETRAIN).code == 0
    scored = command("predict", f"checkpoint={tmp_path}/pre", f"input={store}", f"out={tmp_path}/maps")
    assert scored.code == 0 and "anomaly.csv, and a map of each scan" in scored.out, scored.err
    split = ["data.split={validation: 0, test: 1}"]
    assert command("finetune", f"data.store={store}", f"out={tmp_path}/fine", *split, *FINETUNE).code == 0
    broken = tmp_path / "scans" / "a.nii.gz"
    broken.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.full((40, 40, 40), np.nan, np.float32), np.eye(4)), broken)
    result = command("predict", f"checkpoint={tmp_path}/fine", f"input={broken.parent}", f"out={tmp_path}/p")
    assert failed_in_one_line(result, "1 scan failed") and "a.nii.gz" in result.out
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["volumes.csv"]


def test_a_command_runs_from_another_directory(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "asa", "pretrain", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0 and "asa-pretrain" in shown.stdout and "out  (required)" in shown.stdout


def test_the_resolved_configuration_can_be_printed(command, store: Path) -> None:
    result = command("pretrain", "--print", f"data.store={store}", "out=x")
    assert yaml.safe_load(result.out)["train"]["steps"] == 20000
    assert not Path("x").exists()


def test_a_store_remembers_its_preparation(store: Path) -> None:
    assert Store(store).settings["normalise"] == "percentile"


def test_a_short_run_needs_no_settings_of_its_schedule(command, store: Path, tmp_path: Path) -> None:
    arguments = [f"data.store={store}", "loader.workers=0", "train.device=cpu", "train.steps=1", "train.batch_size=1"]
    short = command("pretrain", *arguments, f"out={tmp_path}/pre", "model=asa_tiny", "crop=128")
    assert short.code == 0 and "a crop of 128x128x128 voxels is 8" in short.out and "crop=[96,96,96] fits" in short.out
    # A run of a version whose default was a number of steps is continued.
    file = tmp_path / "pre" / "config.yaml"
    assert "warmup: 0.025" in file.read_text()
    file.write_text(file.read_text().replace("warmup: 0.025", "warmup: 0"))
    assert command("pretrain", *arguments, f"out={tmp_path}/pre", "model=asa_tiny", "crop=128").code == 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pretrain", ["model=asa_tiny", "crop=128"]),
        ("finetune", ["model=unet_tiny", "crop=128"]),
        ("finetune", ["model=asa_classifier_tiny", "method=classify", "data.classes={classes}", "crop=128"]),
    ],
)
def test_a_plan_names_a_crop_that_is_mostly_padding(command, store: Path, tmp_path: Path, name, arguments) -> None:
    classes = tmp_path / "classes.csv"
    classes.write_text("subject,class\ns0,a\ns1,b\ns2,a\ns3,b\n")
    arguments = [argument.format(classes=classes) for argument in arguments]
    planned = command(name, *arguments, f"data.store={store}", f"out={tmp_path}/run", "plan=only", "plan_rate=1")
    assert planned.code == 0 and "a crop of 128x128x128 voxels is 8" in planned.out, planned.err
    assert planned.out.index("crop=[96,96,96] fits") < planned.out.index("memory")


@pytest.mark.parametrize(
    ("crop", "shapes", "fitting"),
    [
        (128, [(53, 66, 52)], "crop=[64,96,64] fits them and has 5.3 times fewer voxels"),
        ([64, 96, 64], [(53, 66, 52)], None),
        (128, [(150, 190, 140), (60, 200, 150)], None),
        ([128, 64, 128], [(20, 200, 70), (40, 180, 60)], "crop=[64,64,96] fits"),
        (32, [(10, 10, 10)], None),
        (
            64,
            [(10, 10, 10), (20, 20, 20), (20, 24, 20)],
            "is 98% padding, as the volumes have 20x20x20: crop=[32,32,32]",
        ),
    ],
)
def test_a_crop_that_is_mostly_padding_is_named_with_one_that_fits(crop, shapes, fitting) -> None:
    advice = padding_advice(crop, [{"shape": [1, *shape]} for shape in shapes])
    assert advice is None if fitting is None else fitting in advice


@pytest.mark.parametrize(
    ("shapes", "crop"),
    [([(47, 52, 43)], [64, 64, 64]), ([(150, 97, 20), (60, 60, 65)], [128, 128, 96]), ([(182, 218, 182)], [128] * 3)],
)
def test_a_crop_that_is_not_given_holds_the_scans(tmp_path: Path, shapes, crop: list[int]) -> None:
    assert default_crop(tmp_path, [{"shape": [1, *shape]} for shape in shapes]) == crop


def test_a_run_keeps_the_crop_that_it_began_with(command, store: Path, tmp_path: Path) -> None:
    given = [f"data.store={store}", f"out={tmp_path}/run", *PRETRAIN, "crop=null"]
    begun = command("pretrain", *given)
    assert begun.code == 0 and "crop=[96,96,96] voxels" in begun.out
    large = [{"shape": [1, 100, 100, 100]}]
    assert default_crop(tmp_path / "run", large) == [96, 96, 96]
    assert default_crop(tmp_path / "another", large) == [128, 128, 128]


def test_a_crop_that_the_network_refuses_is_not_advised(command, store: Path, tmp_path: Path) -> None:
    small = [{"shape": [1, 10, 20, 30]}]
    assert "crop=[64,32,32] fits" in padding_advice(128, small, lambda crop: crop != [32, 32, 32])
    assert padding_advice(64, small, lambda crop: False) is None
    given = [f"data.store={store}", f"out={tmp_path}/run", "plan=only", "plan_rate=1", "model=unet_tiny"]
    planned = command("finetune", *given, "data.split.validation=1", "crop=128")
    found = re.search(r"crop=(\[\S+\]) fits", planned.out)
    assert found is not None, planned.err
    assert command("finetune", *given, "data.split.validation=1", f"crop={found[1]}").code == 0


def test_a_scan_has_features_in_every_encoder_at_any_size(command, raw: Path, store: Path, tmp_path: Path) -> None:
    method = ["model=sa_swin_tiny", "method=sa_swin"]
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/asa", *PRETRAIN).code == 0
    assert command("pretrain", f"data.store={store}", f"out={tmp_path}/swin", *PRETRAIN, *method).code == 0
    tuned = command("finetune", f"data.store={store}", f"out={tmp_path}/unet", *FINETUNE, "data.split.validation=1")
    assert tuned.code == 0 and "loss " in tuned.out
    scan = raw / "s0_T1.nii.gz"
    for run, edges in (("asa", (32, 32, 32)), ("swin", (32, 32, 32)), ("unet", (64, 32, 32))):
        stride = getattr(asa.load_encoder(tmp_path / run), "patch_size", 32)
        tokens = asa.features(scan, tmp_path / run, device="cpu")
        assert tokens.shape[1:] == tuple(edge // stride for edge in edges) and np.isfinite(tokens).all()
        if run != "unet":  # as pretraining sees it: the crop at the centre
            (index,) = (k for k, record in enumerate(Store(store).records) if record["id"] == "s0")
            crop = asa.CropDataset(Store(store), Store(store).records, edges)[index]["image"]
            encoder = asa.load_encoder(tmp_path / run)
            with torch.inference_mode():
                expected = encoder(crop[None])[0]
            np.testing.assert_allclose(tokens.reshape(len(tokens), -1).T, expected.numpy(), atol=2e-3)
        larger = asa.features(scan, tmp_path / run, img_size=(64, 64, 96), device="cpu")
        assert larger.shape == (len(tokens), *(edge // stride for edge in (64, 64, 96)))
    with pytest.raises(ValueError, match="33"):
        asa.load_encoder(tmp_path / "asa", img_size=33)


def test_an_index_alone_is_the_crop_of_the_first_epoch(store: Path) -> None:
    crops = asa.CropDataset(asa.Store(store), asa.Store(store).records, (32, 32, 32), crop="random", seed=3)
    for index in range(len(crops)):
        one, other = crops[index], crops[index, 0]
        assert one["id"] == other["id"] and torch.equal(one["image"], other["image"])
    assert [sample["id"] for sample in crops] == [record["id"] for record in crops.records]


def test_a_text_in_the_place_of_a_mapping_is_named_with_an_example(command, raw: Path, tmp_path: Path) -> None:
    prepare = ["prepare", f"data.root={raw}", f"out={tmp_path}/x"]
    assert failed_in_one_line(command(*prepare), "'data.images={t1: *_T1.nii.gz}'", "data.table=FILE")
    one = command(*prepare, "data.images=*_T1.nii.gz")
    assert failed_in_one_line(one, "data.images=*_T1.nii.gz: ", "like 'data.images={t1: *_T1.nii.gz}'")
    images = "data.images={t1: *_T1.nii.gz}"
    assert failed_in_one_line(command(*prepare, images, "regions=x"), "regions=x: ", "regions={whole: [1, 2]")
    assert not (tmp_path / "x").exists()


def test_images_are_shown_beside_a_folder_of_true_label_maps(
    command, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pred").mkdir()
    for k in range(2):
        (tmp_path / "pred" / f"s{k}.nii.gz").write_bytes((raw / f"s{k}_seg.nii.gz").read_bytes())
    drawn = []
    monkeypatch.setattr("asa.tasks.evaluation.write_report", lambda path, summary, cases: drawn.append(cases))
    arguments = [
        f"predictions={tmp_path}/pred", f"truth={raw}", "pattern=*_seg.nii.gz", "labels={1: csf, 2: gm, 5: wm}",
        f"out={tmp_path}/ev", "allow_missing=true",
    ]  # fmt: skip
    assert command("evaluate", *arguments, f"images='{raw}/*_T1.nii.gz'").code == 0
    assert [case.image for case in drawn[0]] == [raw / f"s{k}_T1.nii.gz" for k in range(4)]
    assert command("evaluate", *arguments).code == 0 and drawn[1][0].image is None
    assert failed_in_one_line(command("evaluate", *arguments, f"images='{raw}/*_T9.nii.gz'"), "_T9.nii.gz")


HEAVY = "torch", "monai", "nibabel", "scipy"


def in_a_process(calls: Sequence[Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Output of each `asa ...`, one after the other in one new process, and the heavy packages imported until then."""
    code = (
        "import contextlib, io, json, sys\nfrom asa.cli import main\n"
        f"for arguments in {calls!r}:\n"
        "    shown = io.StringIO()\n"
        "    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):\n"
        "        with contextlib.suppress(SystemExit): main(arguments)\n"
        f"    print(json.dumps([shown.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_threads_do_not_spin_for_long_beside_other_processes() -> None:
    code = "import os, sys, asa.cli; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, expected in (({}, "10000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=others | given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_help_needs_no_heavy_package() -> None:
    for name, (shown, heavy) in zip(COMMANDS, in_a_process([[name, "--help"] for name in COMMANDS]), strict=True):
        assert shown.startswith(f"usage: asa-{name} ") and "settings:" in shown and heavy == [], name


def test_settings_are_checked_before_heavy_packages_are_imported() -> None:
    wrong = {
        ("evaluate", "out=x", "polcy=ibsr"): "did you mean policy?",
        ("pretrain", "out=x", "data.store=y", "train.stepz=3"): "did you mean train.steps?",
        ("pretrain", "out=x", "data.store=y", "train.steps=many"): "many",
        ("finetune", "out=x", "model=asa_tiny"): "choose unet_tiny",
        ("predict", "out=x"): "checkpoint, input has to be given",
    }
    found = in_a_process([list(arguments) for arguments in wrong])
    for (arguments, message), (shown, heavy) in zip(wrong.items(), found, strict=True):
        assert f"asa-{arguments[0]}: error: " in shown and message in shown and heavy == [], arguments


def test_asa_with_a_command_is_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--print", "out=x", "data.store=y"]
    printed = []
    for run in (lambda: cli.main(["pretrain", *arguments]), lambda: cli.pretrain.main(arguments)):
        assert run() == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "steps: 20000" in printed[0]
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert cli.main(["pretrian", "out=x"]) == 1
    assert "did you mean pretrain?" in capsys.readouterr().err
    for main in (cli.main, cli.pretrain.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--version"])
        assert not stopped.value.code and capsys.readouterr().out == f"asa {asa.__version__}\n"


def test_commands_on_windows_say_where_they_run(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert failed_in_one_line(command("orient", "input=a", "out=b", "axes=RAS"), "WSL 2")
