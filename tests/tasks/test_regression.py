"""Regression of a planted age: scores against loops, the network's units, and the commands from table to table."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from stores import with_subjects
from untrained import call

import asa
from asa.cli import evaluate, export, finetune, predict, prepare
from asa.data.io.files import write_whole
from asa.data.io.nifti import write_image
from asa.evaluation.scans import measures, score_numbers
from asa.methods.whole_scans import Classification, Regression
from asa.models.classifier import asa_classifier_tiny, asa_regressor_tiny, sa_swin_regressor_tiny
from asa.training.checkpoint import read_description
from asa.training.checkpoint_files import find_weights

SCANS = 16
SMALL = dict(img_size=16, embed_dim=24, depth=1, num_heads=2)

# ---------------------------------------------------------------------------------------------- scores


def test_the_scores_are_the_loops_over_their_definitions() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(20, 80, 30)
    predicted = 50 + 0.7 * (truth - 50) + rng.normal(0, 5, 30)
    found, n = measures(predicted, truth), len(truth)
    mean = sum(truth) / n
    slope, offset = np.polyfit(truth, predicted - truth, 1)
    assert found["mae"] == pytest.approx(sum(abs(p - t) for p, t in zip(predicted, truth, strict=True)) / n)
    residual = sum((p - t) ** 2 for p, t in zip(predicted, truth, strict=True))
    assert found["r2"] == pytest.approx(1 - residual / sum((t - mean) ** 2 for t in truth))
    assert found["correlation"] == pytest.approx(np.corrcoef(predicted, truth)[0, 1])
    assert found["bias_slope"] == pytest.approx(slope) and found["bias"] == pytest.approx(slope * mean + offset)
    scores = score_numbers(predicted, truth, 45.0, [str(k) for k in range(n)])
    assert scores.mean_predictor_mae == pytest.approx(sum(abs(45.0 - t) for t in truth) / n)
    for name, value in found.items():
        assert getattr(scores, f"{name}_low") < value < getattr(scores, f"{name}_high")
    assert -0.5 < scores.bias_slope_low < -0.3 < scores.bias_slope_high < -0.1


def test_the_interval_of_a_regression_resamples_subjects_not_scans() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(20, 80, 20)
    predicted, names = truth + rng.normal(0, 5, 20), [str(k) for k in range(20)]
    alone = score_numbers(predicted, truth, 50.0, names)
    copies = score_numbers(np.repeat(predicted, 4), np.repeat(truth, 4), 50.0, list(np.repeat(names, 4)))
    assert (copies.mae_low, copies.mae_high) == pytest.approx((alone.mae_low, alone.mae_high))
    assert (copies.scans, copies.subjects) == (80, 20)


def test_what_is_undefined_is_not_a_number() -> None:
    one = score_numbers(np.array([30.0]), np.array([40.0]), 50.0, ["a"])
    assert one.mae == 10 and one.mean_predictor_mae == 10 and one.bias == -10
    assert all(math.isnan(value) for value in (one.r2, one.correlation, one.bias_slope, one.mae_low))
    assert "MAE 10, of the training mean" in one.text("age") and "nan" not in one.text("age")
    alike = measures(np.array([0.0, 0.1, 0.2]), np.full(3, 0.1))  # whose mean is rounded to another number
    assert all(math.isnan(alike[name]) for name in ("r2", "correlation", "bias_slope"))


# ---------------------------------------------------------------------------------------------- network


def test_the_network_answers_in_the_units_of_the_table_also_under_autocast() -> None:
    torch.manual_seed(0)
    model = asa_regressor_tiny(mean=70.0, sd=10.0, **SMALL)
    volume = torch.rand(3, 1, 16, 16, 16)
    head = model.head(model.encoder(volume).mean(dim=1))[:, 0]
    torch.testing.assert_close(model(volume), 70 + 10 * head)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(volume)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())  # not rounded to what bfloat16 can say near 70


def test_the_loss_is_the_error_in_sds_and_a_mean_over_parts_of_a_batch() -> None:
    torch.manual_seed(0)
    method = Regression(model=asa_regressor_tiny(mean=70.0, sd=10.0, **SMALL))
    image, target = torch.rand(4, 1, 16, 16, 16), torch.tensor([60.0, 65.0, 71.0, 88.0])
    whole = method({"image": image, "target": target})
    parts = [method({"image": image[k : k + 2], "target": target[k : k + 2]})["loss"] for k in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, whole["loss"])
    found = method.model(image).tolist()
    expected = sum(abs(p - t) for p, t in zip(found, target.tolist(), strict=True)) / 4
    assert float(whole["mae"]) == pytest.approx(expected) and float(whole["loss"]) == pytest.approx(expected / 10)


def test_networks_that_do_not_fit_are_named() -> None:
    for mean, sd in ((math.nan, 1.0), (0.0, 0.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="needs the mean and the SD of the training scans"):
            asa_regressor_tiny(mean=mean, sd=sd, **SMALL)
    with pytest.raises(ValueError, match="method=regress needs model=..._regressor_..."):
        Regression(model=asa_classifier_tiny(2, **SMALL))
    with pytest.raises(ValueError, match="method=classify needs model=..._classifier_..."):
        Classification(model=asa_regressor_tiny(mean=0.0, sd=1.0, **SMALL))
    both = sa_swin_regressor_tiny(
        mean=0.0, sd=1.0, img_size=32, embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2
    )
    volume = torch.rand(1, 1, 32, 32, 32)
    assert both.mirrored and both(volume, volume.flip(-1)).shape == (1,)


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls with a dark middle that grows with the age, a store of them, the table, and a split."""
    folder = tmp_path_factory.mktemp("ages")
    axes = np.meshgrid(*[np.linspace(-1.05, 1.05, 32)] * 3, indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    lines = ["subject,age,sex"]
    for k in range(SCANS):
        age = 20 + 4 * ((5 * k) % SCANS)
        image = np.where(radius < 0.1 + age / 120, 300.0, 900.0) + np.random.default_rng(k).normal(0, 20, radius.shape)
        image = np.where(radius < 1, image.clip(min=1), 0)
        write_image(folder / "raw" / f"s{k:02}_T1.nii.gz", image, np.diag([4.0, 4.0, 4.0, 1.0]))
        lines.append(f"s{k:02},{age},{'fm'[k % 2]}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    store = [f"data.root={folder / 'raw'}", "data=folder", "data.images={t1: '*_T1.nii.gz'}", f"out={folder / 'store'}"]
    assert prepare.main([*store, "prepare.midway=false"]) == 0
    names = [f"s{k:02}" for k in range(SCANS)]
    split = {"train": names[:10], "validation": names[10:12], "test": names[12:]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def options(cohort: Path, out: Path, *changes: str) -> list[str]:
    given = {
        "data.store": str(cohort / "store"), "data.table": str(cohort / "table.csv"), "data.column": "age",
        "out": str(out), "data.split_file": str(cohort / "split.json"), "method": "regress", "crop": "32",
        "model": "asa_regressor_tiny", "+model.embed_dim": "24", "+model.depth": "1", "+model.num_heads": "2",
        "data.placement": "centre", "train.steps": "60", "train.batch_size": "10", "optim.lr": "0.01",
        "optim.warmup": "5", "loader.workers": "0", "train.device": "cpu", "augment.rotation": "0",
        "augment.scale": "[1,1]", "augment.gamma": "[1,1]",
    }  # fmt: skip
    given |= dict(change.split("=", 1) for change in changes)
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def run(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "age"
    assert finetune.main(options(cohort, out)) == 0
    return out


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_planted_age_is_learnt_and_predicted_in_years(cohort: Path, run: Path, tmp_path: Path, monkeypatch) -> None:
    scores = json.loads((run / "scores_test.json").read_text())
    assert scores["column"] == "age" and scores["scans"] == scores["subjects"] == 4
    assert scores["mae"] < 0.5 * scores["mean_predictor_mae"] and scores["correlation"] > 0.8
    tested = {row["id"]: row for row in rows_of(run / "predictions_test.csv")}
    ages = {row["subject"]: float(row["age"]) for row in rows_of(cohort / "table.csv")}
    train = [ages[f"s{k:02}"] for k in range(10)]
    number = read_description(run)["data"]["number"]
    assert number == {"column": "age", "mean": pytest.approx(np.mean(train)), "sd": pytest.approx(np.std(train))}
    assert all(float(row["training_mean"]) == pytest.approx(np.mean(train)) for row in tested.values())
    assert all(float(row["age"]) == ages[id] for id, row in tested.items())
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (last,) = [line for line in logged if line["group"] == "validation"]
    assert last["loss"] == pytest.approx(last["mae"] / number["sd"]) and last["mae"] < last["mean_predictor_mae"]

    given = (f"checkpoint={run}", "predict.device=cpu")
    folder = (f"input={cohort / 'raw'}", "images={t1: '*_T1.nii.gz'}", f"out={tmp_path / 'raw'}")
    assert call(predict, monkeypatch, *given, *folder) == 0
    stored = (f"input={cohort / 'store'}", "part=test", f"out={tmp_path / 'stored'}")
    write_whole(tmp_path / "stored" / "predictions.csv", b"id,age\ns00,40\n")  # of somebody else
    assert call(predict, monkeypatch, *given, *stored) == 1
    assert (tmp_path / "stored" / "predictions.csv").read_bytes() == b"id,age\ns00,40\n"
    (tmp_path / "stored" / "predictions.csv").unlink()
    for _ in range(2):
        assert call(predict, monkeypatch, *given, *stored) == 0
    raw = {row["id"]: float(row["predicted"]) for row in rows_of(tmp_path / "raw/predictions.csv")}
    assert len(raw) == SCANS
    for row in rows_of(tmp_path / "stored/predictions.csv"):
        assert float(row["predicted"]) == pytest.approx(float(tested[row["id"]]["predicted"]), abs=1e-3)
        assert raw[row["id"]] == pytest.approx(float(row["predicted"]), abs=0.5)  # prepared to float16 in the store

    scan = (f"input={cohort / 'raw' / 's00_T1.nii.gz'}", f"out={tmp_path / 'added'}")
    shutil.copytree(tmp_path / "stored", tmp_path / "added")
    assert call(predict, monkeypatch, *given, *scan) == 0  # rows of other scans stay
    added, kept = ({row["id"] for row in rows_of(tmp_path / name / "predictions.csv")} for name in ("added", "stored"))
    assert added == {"s00_T1"} | kept

    subjects = {f"s{k:02}": f"p{k // 2}" for k in range(SCANS)}
    copy = with_subjects(cohort / "store", tmp_path / "store", subjects)
    assert call(predict, monkeypatch, *given, f"input={copy}", f"out={tmp_path / 'named'}") == 0
    assert {row["id"]: row["subject"] for row in rows_of(tmp_path / "named/predictions.csv")} == subjects

    scored = (f"predictions={tmp_path / 'stored'}", f"truth={cohort / 'table.csv'}", "policy=regression")
    assert call(evaluate, monkeypatch, *scored, f"out={tmp_path / 'scores'}") == 0
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary.pop("without_prediction") == SCANS - 4 and summary.pop("notes") == []
    assert summary == {key: pytest.approx(value, abs=2e-3) for key, value in scores.items()}
    assert summary["bias_slope_low"] <= summary["bias_slope"] <= summary["bias_slope_high"]


def test_a_stopped_regression_ends_with_the_weights_of_one_that_was_not(cohort: Path, tmp_path: Path) -> None:
    quick = ("train.steps=4", "train.batch_size=2", "optim.schedule=constant", "optim.warmup=0")
    assert finetune.main(options(cohort, tmp_path / "whole", *quick)) == 0
    assert finetune.main(options(cohort, tmp_path / "halves", *quick, "train.steps=2")) == 0
    assert finetune.main(options(cohort, tmp_path / "halves", *quick)) == 0
    whole, halves = (find_weights(tmp_path / name).read_bytes() for name in ("whole", "halves"))
    assert whole == halves


def test_the_network_is_exported_with_its_units(cohort: Path, run: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "age.onnx"
    assert call(export, monkeypatch, f"checkpoint={run}", f"out={out}") == 0
    volume = torch.rand(2, 1, 32, 32, 32)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (found,) = session.run(["number"], {"image": volume.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(found, asa.load_model(run)(volume).numpy(), rtol=1e-4)
    about = json.loads(session.get_modelmeta().custom_metadata_map["asa"])
    assert about["number"]["column"] == "age"


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ("subject,age\ns00,20\ns01,old\n", "age", "s01: age is 'old' and not a number: give one, or leave the cell"),
        ("subject,age\ns00,20\ns01,nan\n", "age", "s01: age is 'nan' and not a number"),
        ("subject,age\ns00,20\ns01,1e999\n", "age", "s01: age is '1e999' and not a number"),
        ("subject,age\ns00,20\ns01,20\n", "age", "the training scans have 1 values of age"),
        ("subject,age\ns00,20\n", "height", "give id, subject or participant_id, and height"),
        ("subject,predicted\ns00,20\n", "predicted", "predictions have a column of this name: rename yours"),
        ("subject,age\ns00,20\n", "null", "data.table and data.column have to be given with method=regress"),
    ],
)
def test_a_column_that_cannot_be_learnt_is_refused(
    cohort: Path, tmp_path: Path, table: str, column: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_text(table)
    changes = (f"data.table={tmp_path / 'table.csv'}", f"data.column={column}")
    assert finetune.main(options(cohort, tmp_path / "run", *changes)) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "run" / "checkpoints").exists()


def test_two_values_are_enough(cohort: Path, tmp_path: Path) -> None:
    ages = "".join(f"s{k:02},{20 + 40 * (k % 2)}\n" for k in range(SCANS))
    (tmp_path / "table.csv").write_text(f"subject,age\n{ages}")
    changes = (f"data.table={tmp_path / 'table.csv'}", "plan=only")
    assert finetune.main(options(cohort, tmp_path / "run", *changes)) == 0


def test_scans_without_a_number_are_left_out_and_named(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (cohort / "table.csv").read_text().replace("s03,80,m", "s03,,m").replace("s13,24,m\n", "")
    (tmp_path / "table.csv").write_text(text)
    changes = (f"data.table={tmp_path / 'table.csv'}", "train.steps=1", "train.batch_size=1", "optim.warmup=0")
    assert finetune.main(options(cohort, tmp_path / "run", *changes)) == 0
    printed = capsys.readouterr().out
    assert "left out, without age in the table: s03, s13" in printed and "on 9 scans" in printed
    assert [row["id"] for row in rows_of(tmp_path / "run/predictions_test.csv")] == ["s12", "s14", "s15"]


def test_tables_of_other_tasks_are_refused(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "truth.csv").write_text("id,age\na,30\nb,40\n")
    given = (
        f"predictions={tmp_path}",
        f"truth={tmp_path / 'truth.csv'}",
        f"out={tmp_path / 'out'}",
        "policy=regression",
    )
    assert call(evaluate, monkeypatch, *given) == 1
    assert "predictions.csv: no such table" in capsys.readouterr().err
    for table, message in (
        ("id,subject,class,predicted,p_x,p_y\na,,,x,0.9,0.1\n", "not the table of a regression"),
        ("id,subject,age,predicted,training_mean\na,,,abc,30\n", "a: predicted is 'abc' and not a number"),
    ):
        (tmp_path / "predictions.csv").write_text(table)
        assert call(evaluate, monkeypatch, *given) == 1
        assert message in capsys.readouterr().err
