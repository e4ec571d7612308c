"""Classification: scores against loops, subject-grouped folds, and the commands from table to table."""

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asa.cli import finetune, predict, pretrain
from asa.config import build, compose
from asa.data.splits import read_split
from asa.evaluation.scans import (
    auc,
    calibration_error,
    mean_auc,
    scan_scores,
    score_classes,
    weighted_cross_entropy,
)
from asa.methods.sa_swin import SASwinPretraining
from asa.methods.segment import Segmentation
from asa.methods.whole_scans import Classification
from asa.models.classifier import Classifier, asa_classifier_tiny, sa_swin_classifier_tiny
from asa.models.sa_swin import sa_swin_tiny
from asa.models.sa_swin_unet import sa_swin_unet_tiny
from asa.models.sw_vit import sw_vit_tiny
from asa.tasks import whole_scans
from asa.tasks.pretraining import Pretraining
from asa.training.checkpoint import read_weights
from asa.training.loop import TrainSettings
from asa.training.optim import OptimSettings
from asa.training.plan import make_plan, volume_batch
from asa.training.pretrained import load_pretrained, read_source

SMALLEST = ("+model.embed_dim=4", "+model.num_heads=[1,1,2,2]", "+model.window=2", "+model.cross_heads=2")


def run(monkeypatch: pytest.MonkeyPatch, command, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["asa", *map(str, arguments)])
    return command.main()


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_the_right_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 6, 20) / 5, rng.random(20) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert auc(-scores, positive) == pytest.approx(1 - np.mean(pairs))


def test_auc_of_one_kind_alone_is_not_a_number_and_of_several_classes_the_mean() -> None:
    assert math.isnan(auc(np.arange(3.0), np.ones(3, bool)))
    shares, truth = np.random.default_rng(0).dirichlet(np.ones(3), 12), np.arange(12) % 3
    assert mean_auc(shares, truth) == pytest.approx(np.mean([auc(shares[:, k], truth == k) for k in range(3)]))
    two = shares[:, :2] / shares[:, :2].sum(axis=1, keepdims=True)
    assert mean_auc(two, truth % 2) == auc(two[:, 1], truth % 2 == 1)


def test_the_interval_resamples_subjects_not_scans() -> None:
    rng = np.random.default_rng(1)
    score = rng.random(20)
    shares, truth = np.stack([1 - score, score], axis=1), (score + rng.normal(0, 0.3, 20) > 0.5).astype(int)
    alone = score_classes(shares, truth, [str(k) for k in range(20)])
    copies = score_classes(np.repeat(shares, 4, axis=0), np.repeat(truth, 4), [str(k // 4) for k in range(80)])
    assert alone.auc_low < mean_auc(shares, truth) < alone.auc_high
    # Four scans of a person are not four persons.
    assert copies.auc_high - copies.auc_low > 0.7 * (alone.auc_high - alone.auc_low)
    assert math.isnan(score_classes(shares, truth, ["one"] * 20).auc_low)


def test_calibration_is_the_loop_over_its_definition() -> None:
    rng = np.random.default_rng(2)
    shares, truth = rng.dirichlet(np.ones(3), 50), rng.integers(0, 3, 50)
    expected = 0.0
    for b in range(15):
        rows = [k for k in range(50) if b / 15 <= shares[k].max() < (b + 1) / 15 or (b == 14 and shares[k].max() == 1)]
        if rows:
            right = np.mean([shares[k].argmax() == truth[k] for k in rows])
            expected += len(rows) / 50 * abs(right - np.mean([shares[k].max() for k in rows]))
    assert calibration_error(shares, truth) == pytest.approx(expected)
    assert calibration_error(np.eye(3)[truth], truth) == 0


def test_balanced_accuracy_weighs_classes_alike_and_confusion_counts() -> None:
    truth = np.array([0] * 9 + [1])
    scores = score_classes(np.tile([0.9, 0.1], (10, 1)), truth, [str(k) for k in range(10)])
    assert scores.balanced_accuracy == 0.5 and scores.confusion == [[9, 0], [1, 0]] and scores.auc == 0.5


def random_classes(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties, and classes of different sizes."""
    draws = np.random.default_rng(classes)
    truth = np.repeat(np.arange(classes), np.arange(5, 5 + classes))
    scores = np.round(draws.random((len(truth), classes)) + np.eye(classes)[truth], 1) + 0.1
    return scores / scores.sum(axis=1, keepdims=True), truth


@pytest.mark.parametrize("classes", [2, 3])
def test_the_mean_of_the_shares_of_all_scans_is_the_score(classes: int) -> None:
    probabilities, truth = random_classes(classes)
    scores = score_classes(probabilities, truth, [str(k) for k in range(len(truth))])
    for name, shares in scan_scores(probabilities, truth).items():
        assert shares.mean() == pytest.approx(getattr(scores, name))


def test_the_variance_of_the_mean_share_is_that_of_delong() -> None:
    (probabilities, truth), first = random_classes(2), lambda values: values[:, 1]
    wins = np.array(
        [[(a > b) + (a == b) / 2 for b in first(probabilities[truth == 0])] for a in first(probabilities[truth == 1])]
    )
    ours = scan_scores(probabilities, truth)["auc"]
    spread = sum(np.square(wins.mean(axis=axis) - wins.mean()).mean() / wins.shape[1 - axis] for axis in (0, 1))
    assert np.square(ours - ours.mean()).mean() / len(ours) == pytest.approx(spread)


def test_without_scans_of_a_second_class_there_is_no_auc() -> None:
    found = scan_scores(np.tile([0.9, 0.1], (3, 1)), np.zeros(3, dtype=int))
    assert np.isnan(found["auc"]).all() and (found["balanced_accuracy"] == 1).all()


# ---------------------------------------------------------------------------------------------- networks


def test_class_weights_multiply_the_loss_of_their_samples() -> None:
    torch.manual_seed(0)
    model = asa_classifier_tiny(2, img_size=16, embed_dim=24, depth=1, num_heads=2)
    batch = {"image": torch.rand(4, 1, 16, 16, 16), "target": torch.tensor([0, 1, 1, 0])}
    one, other = (
        Classification(model=model, weights=[1.0, 3.0])(
            {"image": batch["image"][part], "target": batch["target"][part]}
        )
        for part in (slice(0, 2), slice(2, 4))
    )
    whole = Classification(model=model, weights=[1.0, 3.0])(batch)["loss"]
    torch.testing.assert_close((one["loss"] + other["loss"]) / 2, whole)  # a batch in parts
    entropy = torch.nn.functional.cross_entropy(model(batch["image"]), batch["target"], reduction="none")
    torch.testing.assert_close(whole, (entropy * torch.tensor([1.0, 3.0, 3.0, 1.0])).mean())


@pytest.mark.parametrize("kind", ["sa_swin", "asa"])
def test_a_network_with_cross_attention_needs_both_sides_and_receives_both(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "asa":
        model = asa_classifier_tiny(3, img_size=(32, 32, 64), embed_dim=24, depth=1, num_heads=2, symmetry=True)
    else:
        model = sa_swin_classifier_tiny(3, img_size=32, embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)
    volume = torch.rand(2, 1, 32, 32, 64)
    assert model.mirrored and model(volume, volume.flip(-1)).shape == (2, 3)
    assert not torch.equal(model(volume, volume.flip(-1)), model(volume, volume))
    with pytest.raises(ValueError, match="pass both"):
        model(volume)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        Classifier(sw_vit_tiny(img_size=16), 1)
    with pytest.raises(ValueError, match="classifier"):
        Classification(model=torch.nn.Linear(1, 2))
    with pytest.raises(ValueError, match="3 numbers for 2 classes"):
        Classification(model=asa_classifier_tiny(2, img_size=16), weights=[1, 1, 1])
    for weights in ([-1, 2], [math.nan, 1], [0, 0]):
        with pytest.raises(ValueError, match=r"must be 0 or more, and not all 0"):
            Classification(model=asa_classifier_tiny(2, img_size=16), weights=weights)


@pytest.mark.parametrize("kind", ["classify", "segment", "pretrain"])
def test_a_run_that_looks_at_the_mirror_image_can_be_planned(kind: str) -> None:
    options = dict(img_size=(32, 32, 64), embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)
    makes = {
        "classify": lambda: Classification(model=sa_swin_classifier_tiny(2, **options)),
        "segment": lambda: Segmentation(model=sa_swin_unet_tiny(2, **options)),
        "pretrain": lambda: SASwinPretraining(model=sa_swin_tiny(**options)),
    }
    settings, optim = TrainSettings(precision="fp32"), OptimSettings()

    def batch(method: torch.nn.Module) -> dict[str, torch.Tensor]:
        return volume_batch(method, settings.batch_size, label=kind == "segment", target=kind == "classify")

    plan = make_plan(makes[kind], batch, settings=settings, optim=optim)
    assert 0 < plan.encoder < plan.total and 0 < plan.forward < plan.step


# ---------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    options = [
        f"data.store={store}", f"out={folder / 'run'}", "model=sa_swin_tiny", "method=sa_swin", "crop=32", *SMALLEST,
        "data.split.validation=1", "train.steps=1", "train.batch_size=1", "optim.warmup=0", "loader.workers=0",
        "train.device=cpu", "data.health=healthy",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, pretrain, *options) == 0
    return folder / "run"


def options_of(store: Path, out: Path, table: Path) -> list[str]:
    return [
        f"data.store={store}", f"out={out}", "method=classify", f"data.classes={table}", "crop=32", "train.steps=2",
        "train.batch_size=2", "optim.warmup=0", "loader.workers=0", "train.device=cpu", "data.split.folds=2",
        "data.split.fold=0", "data.split.validation=0",
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["sa_swin", "asa", "asa with symmetry"])
def test_a_classification_goes_from_a_table_to_a_table(
    model: str, pretrained: Path, store: Path, raw: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    table = tmp_path / "classes.csv"
    test = ("s0", "s1")
    table.write_text("subject,class\ns0,sick\ns1,well\ns2,well\ns3,sick\n")
    extra = ["model=asa_classifier_tiny", "+model.embed_dim=24", "+model.depth=1", "+model.num_heads=2"]
    if model == "asa with symmetry":
        extra += ["model.symmetry=true"]
    elif model == "sa_swin":
        extra = ["model=sa_swin_classifier_tiny", f"init={pretrained}", *SMALLEST]
    options = [*options_of(store, tmp_path / "run", table), *extra]
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["s2", "s3"], "test": test}))
    assert run(monkeypatch, finetune, *options, f"data.split_file={split}") == 0
    said = capsys.readouterr().out
    assert "test: AUC" in said and ("encoder and cross-attention loaded" in said) == (model == "sa_swin")
    assert read_split(tmp_path / "run/split.json")["test"] == list(test)
    with (tmp_path / "run/predictions_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(test) and {row["class"] for row in rows} == {"sick", "well"}
    assert all(float(row["p_sick"]) + float(row["p_well"]) == pytest.approx(1, abs=1e-5) for row in rows)
    scores = json.loads((tmp_path / "run/scores_test.json").read_text())
    assert scores["classes"] == ["sick", "well"] and np.sum(scores["confusion"]) == 2
    assert run(monkeypatch, predict, f"checkpoint={tmp_path / 'run'}", f"input={raw / 's0_T1.nii.gz'}",
               f"out={tmp_path / 'out'}", "predict.device=cpu") == 0  # fmt: skip
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        (again,) = csv.DictReader(file)
    assert float(again["p_sick"]) == pytest.approx(float(rows[0]["p_sick"]), abs=0.01)


def test_a_pretrained_network_is_loaded_whole_or_refused(pretrained: Path) -> None:
    source, origin = read_source(pretrained)
    options = dict(img_size=32, embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)
    model = sa_swin_classifier_tiny(2, in_channels=3, **options)
    node = origin["model"]
    load_pretrained("RUN", source, origin, model, node)
    volume = torch.rand(1, 1, 32, 32, 32)
    alone = sa_swin_classifier_tiny(2, **options)
    load_pretrained("RUN", source, origin, alone, node)
    torch.testing.assert_close(alone.encoder(volume), model.encoder(volume.expand(-1, 3, -1, -1, -1)))
    torch.testing.assert_close(
        alone.saca.state_dict(), {k: source.weights[f"saca.{k}"] for k in alone.saca.state_dict()}
    )
    with pytest.raises(ValueError, match="does not match"):
        load_pretrained("RUN", source, origin, sa_swin_classifier_tiny(2, img_size=32), node)
    with pytest.raises(ValueError, match="add model.position=False"):
        load_pretrained("RUN", source, origin, model, {**node, "position": True})
    with pytest.raises(ValueError, match="add model.self_attention=True"):
        load_pretrained("RUN", source, origin, model, {**node, "self_attention": False})
    with pytest.raises(ValueError, match="pretrained with cross_heads=2, this model has 4: add model.cross_heads=2"):
        load_pretrained("RUN", source, origin, model, {**node, "cross_heads": 4})


def test_a_pretraining_of_sa_swin_goes_on_from_another(pretrained: Path, store: Path, tmp_path: Path) -> None:
    options = [
        f"data.store={store}", f"out={tmp_path / 'run'}", "model=sa_swin_tiny", "method=sa_swin", "crop=32", *SMALLEST,
        f"init={pretrained}",
    ]  # fmt: skip
    task = Pretraining(compose("pretrain", options))
    method = build(task.config["method"])
    task.load_init(method)
    weights, _ = read_weights(pretrained)
    for name, value in method.model.state_dict().items():
        assert torch.equal(value, weights[f"model.{name}"]), name


def test_what_a_classification_lacks_is_named(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    table = tmp_path / "classes.csv"
    options = [*options_of(store, tmp_path / "run", table), "model=asa_classifier_tiny"]
    assert run(monkeypatch, finetune, *options, "data.classes=null") == 1
    assert "data.classes has to be given" in capsys.readouterr().err
    table.write_text("id,class\ns0,a\ns1,b\n")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["s0", "s2"], "test": ["s1", "s3"]}))
    assert run(monkeypatch, finetune, *options, f"data.split_file={split}") == 1
    assert "has no scan in the training part" in capsys.readouterr().err


def test_subjects_without_a_class_are_in_no_part_of_the_split(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "classes.csv"
    table.write_text("id,class\ns1,a\ns3,b\n")
    base = [*options_of(store, tmp_path / "run", table), "model=asa_classifier_tiny", "method.weights=null"]
    halves = whole_scans.Classification(compose("finetune", base))  # two folds of two subjects
    assert sorted(len(part) for part in halves.split.values()) == [0, 1, 1]
    assert {*halves.split["train"], *halves.split["test"]} == {"s1", "s3"}
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["s0", "s1", "s2", "s3"], "test": []}))
    given = [*base, f"data.split_file={split}", "data.split.folds=null", "data.split.fold=null"]
    assert [one["id"] for one in whole_scans.Classification(compose("finetune", given)).parts["train"]] == ["s1", "s3"]
    few = whole_scans.Classification(compose("finetune", [*given, "data.labelled=2"]))
    assert few.split["train"] == ["s1", "s3"], "labelled subjects are labelled"
    split.write_text(json.dumps({"train": ["s0", "s2"], "test": ["s1"]}))
    with pytest.raises(ValueError, match="has no scan that can be used"):
        whole_scans.Classification(compose("finetune", given))


def test_the_validation_loss_is_that_of_training(store: Path, tmp_path: Path, monkeypatch) -> None:
    logits, target = torch.randn(5, 3, generator=torch.manual_seed(0)), torch.tensor([0, 2, 1, 1, 0])
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = (torch.nn.functional.cross_entropy(logits, target, reduction="none") * weights[target]).mean()
    found = weighted_cross_entropy(logits.softmax(1).numpy(), target.numpy(), weights.numpy())
    assert found == pytest.approx(float(expected), rel=1e-5)
    table, split = tmp_path / "classes.csv", tmp_path / "split.json"
    table.write_text("subject,class\ns0,sick\ns1,well\ns2,well\ns3,sick\n")
    split.write_text(json.dumps({"train": ["s2", "s3"], "validation": ["s0", "s1"]}))
    small = ["model=asa_classifier_tiny", "+model.embed_dim=24", "+model.depth=1", "+model.num_heads=2"]
    options = [*options_of(store, tmp_path / "run", table), *small, f"data.split_file={split}"]
    assert run(monkeypatch, finetune, *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if line["group"] == "validation")
    assert {line["group"] for line in lines} >= {"validation"}


def test_scores_of_a_test_part_with_one_class_are_written_with_an_undefined_auc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probabilities, truth = np.array([[0.2, 0.8], [0.4, 0.6]]), np.array([1, 1])
    scores = score_classes(probabilities, truth, ["a", "b"])
    monkeypatch.setattr(whole_scans, "load_model", lambda run, plugins: torch.nn.Identity())
    task = SimpleNamespace(
        target_names=["x", "y"], score=lambda *_: (scores, probabilities), table=lambda predicted: ""
    )
    task.parts, task.config, task.train = {"test": ["a", "b"]}, {"plugins": []}, SimpleNamespace(device="cpu")
    whole_scans.WholeScans.finish(task, tmp_path, None, {})
    written = json.loads((tmp_path / "scores_test.json").read_text())
    assert written["auc"] is None and written["balanced_accuracy"] == 1
