"""MR and CT in one pretraining: several stores are one cohort, each scan prepared in the way of its own modality."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import asa
from asa.config import build
from asa.data.datasets import folder
from asa.data.io.nifti import read_image, write_image
from asa.data.joined import JoinedStores, open_stores, records_by_modality
from asa.data.loading.loader import collate
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.store import Store
from asa.export.hub import export_hub
from asa.inference.preprocessing import ScanPreprocessor
from asa.methods.base import sums_by_modality
from asa.reporting.viewing import reconstructed
from asa.tasks.pretraining import Pretraining
from asa.tasks.run import call, configure
from asa.training.checkpoint import read_description, read_weights
from asa.training.checkpoint_files import find_weights
from asa.training.steps import Meter
from tests.ranks import log, ranks
from tests.stores import read_tree, with_subjects, write_tree

TINY = {
    **{"model": "asa_tiny", "+model.embed_dim": 24, "+model.depth": 1, "+model.num_heads": 2},
    **{"model.decoder_depth": 1, "crop": 32, "train.steps": 3, "train.batch_size": 4, "train.log_every": 1},
    **{"train.device": "cpu", "train.precision": "fp32", "train.log_to": [], "loader.workers": 0},
    **{"data.placement": "random", "data.split.validation": 1},
}
SWIN = {
    **{"model": "sa_swin_tiny", "method": "sa_swin"},
    **{key: value for key, value in TINY.items() if not key.startswith(("model", "+model"))},
}


def write_ct(out: Path, raw: Path) -> Path:
    """Heads in HU of the shapes of the raw brains: air, skull and brain."""
    out.mkdir()
    for path in sorted(raw.glob("*_T1.nii.gz")):
        scan = read_image(path)
        hu = np.where(scan.data > 0, scan.data / 25, -1000)
        hu[(scan.data > 0) & (scan.data < 450)] = 900
        write_image(out / path.name.replace("_T1", "_CT"), hu.astype(np.float32), scan.affine)
    return out


def prepared(raw: Path, out: Path, channel: str, glob: str, *ids: str, **settings: Any) -> Path:
    """A store of one channel of some scans, or of all."""
    records = [one for one in folder.records(raw, images={channel: glob}) if not ids or one["id"] in ids]
    how = CohortSettings(settings=PrepareSettings(**settings))
    assert not prepare_cohort(records, out, how, progress=False).failures
    return out


@pytest.fixture(scope="module")
def heads(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ct(tmp_path_factory.mktemp("heads") / "ct", raw)


@pytest.fixture(scope="module")
def stores(raw: Path, heads: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four T1 and, of three of the same subjects, CT."""
    root = tmp_path_factory.mktemp("joined")
    mr = prepared(raw, root / "mr", "t1", "*_T1.nii.gz")
    ct = prepared(heads, root / "ct", "ct", "*_CT.nii.gz", "s0", "s1", "s2", window=[0, 80])
    return [str(mr), str(ct)]


def task_of(out: Path, **settings: Any) -> tuple[Pretraining, Any]:
    """A task and its method."""
    task = Pretraining(configure("pretrain", {**TINY, "out": str(out), **settings}))
    torch.manual_seed(0)
    return task, build(task.config["method"])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(find_weights(run))[0]


def losses(run: Path) -> list[tuple[float, ...]]:
    return [*log(run, "loss"), *log(run, "loss", "masked_mse", group="validation")]


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same losses and weights to the bit."""
    pairs = zip(weights(one).items(), weights(other).items(), strict=True)
    return losses(one) == losses(other) and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(scope="module")
def joint(stores: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on both modalities."""
    run = asa.pretrain(stores, tmp_path_factory.mktemp("joint") / "run", **TINY)
    assert run is not None
    return run


# ---- one store, and a cohort in two ----


@pytest.mark.parametrize("settings", [TINY, SWIN], ids=["asa", "sa_swin"])
def test_one_store_of_a_list_trains_as_the_store_to_the_bit(
    stores: list[str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    one = asa.pretrain(stores[0], tmp_path / "one", **settings)
    other = asa.pretrain([stores[0]], tmp_path / "list", **settings)
    assert one and other and same(one, other)
    assert not [key for key in json.loads((one / "log.jsonl").read_text().splitlines()[0]) if "t1" in key]
    assert read_description(one)["data"] == read_description(other)["data"]


def test_a_cohort_in_two_stores_of_one_modality_trains_as_in_one_to_the_bit(
    raw: Path, stores: list[str], tmp_path: Path
) -> None:
    subjects = {"s0": "a", "s1": "b", "s2": "c", "s3": "b"}  # one has a scan in each store
    parts = [prepared(raw, tmp_path / ids, "t1", "*_T1.nii.gz", *ids.split("-")) for ids in ("s0-s3", "s1-s2")]
    whole, *parts = (
        with_subjects(Path(path), tmp_path / f"copy{k}", subjects) for k, path in enumerate([stores[0], *parts])
    )
    one = asa.pretrain(whole, tmp_path / "one", **TINY)
    other = asa.pretrain(parts, tmp_path / "two", **TINY)
    assert one and other and same(one, other)
    assert (one / "split.json").read_bytes() == (other / "split.json").read_bytes()
    assert read_description(one)["data"] == read_description(other)["data"]


# ---- several modalities ----


def test_each_sample_is_of_the_modality_of_its_store_with_its_own_intensities(
    stores: list[str], tmp_path: Path
) -> None:
    task, method = task_of(tmp_path, **{"data.stores": stores, "data.placement": "centre", "data.split.validation": 0})
    crops = task.dataset(method)
    assert sorted(crops.ids) == ["ct/s0", "ct/s1", "ct/s2", "t1/s0", "t1/s1", "t1/s2", "t1/s3"]
    batch = collate([crops[k] for k in range(len(crops))])
    ct = torch.tensor([id.startswith("ct/") for id in batch["id"]])
    assert torch.equal(batch["modality_ct"], ct.float()) and torch.equal(batch["modality_t1"], (~ct).float())
    sources = dict(zip(("t1", "ct"), map(Store, stores), strict=True))
    for id, image in zip(batch["id"], batch["image"], strict=True):
        modality, own = id.split("/")
        whole = sources[modality].image(own)
        start = [(n - 32) // 2 for n in whole.shape[1:]]
        box = whole[:, *(slice(a, a + 32) for a in start)]
        assert torch.equal(image, torch.from_numpy(np.array(box)).float())


def test_without_held_out_subjects_scans_of_each_modality_are_validated(stores: list[str], tmp_path: Path) -> None:
    for seed in range(8):  # which orders the scans
        split = {"data.stores": stores, "data.split.validation": 0, "data.split.seed": seed}
        task, _ = task_of(tmp_path, **split)
        first = task._first_scans()
        assert [id.split("/")[0] for id in sorted(first.ids)] == ["ct", "ct", "t1", "t1"]
    one, _ = task_of(tmp_path, **{"data.store": stores[0], "data.split.validation": 0})
    assert one._first_scans().ids == one.parts["train"].ids[:4]


def test_a_subject_is_in_one_part_and_each_modality_is_divided(stores: list[str], tmp_path: Path) -> None:
    shared, _ = task_of(tmp_path / "shared", **{"data.stores": stores})
    assert all(len(scans) > 0 for scans in records_by_modality(shared.store, shared.parts["validation"]).values())
    copy = tmp_path / "others"  # CT of other people, but for s0
    shutil.copytree(stores[1], copy)
    tree = read_tree(copy)
    for entry in tree["records"]:
        entry["subject"] = {"s0": "s0", "s1": "p1", "s2": "p2"}[entry["id"]]
    write_tree(copy, tree)
    task, _ = task_of(tmp_path / "run", **{"data.stores": [stores[0], str(copy)]})
    subjects = [subject for part in task.split.values() for subject in part]
    assert sorted(subjects) == ["p1", "p2", "s0", "s1", "s2", "s3"]
    held_out = records_by_modality(task.store, task.parts["validation"])
    assert all(len(scans) > 0 for scans in held_out.values()) and len(task.split["validation"]) <= 2
    for name, subjects in task.split.items():
        assert {one["subject"] for one in task.parts[name]} == set(subjects)


def test_the_log_has_training_and_validation_of_each_modality(joint: Path, stores: list[str], tmp_path: Path) -> None:
    named = ("loss", "loss_t1", "loss_ct", "mean_predictor_loss_t1", "mean_predictor_loss_ct")
    assert all(value is not None for row in log(joint, *named[:1]) for value in row)
    validated = log(joint, "loss_t1", "loss_ct", "masked_mse_ct", "mean_predictor_loss_ct", group="validation")
    assert validated and all(value is not None for row in validated for value in row)
    (whole, t1, ct), *_ = log(joint, "loss", "loss_t1", "loss_ct", group="validation")
    scans = records_by_modality(open_stores(stores), task_of(joint, **{"data.stores": stores})[0].parts["validation"])
    counts = [len(part) for part in scans.values()]
    assert whole == pytest.approx((counts[0] * t1 + counts[1] * ct) / sum(counts))
    with pytest.raises(ValueError, match=r"train.best=loss_pet"):
        asa.pretrain(stores, tmp_path / "no", **TINY, **{"train.best": "loss_pet"})


@pytest.mark.parametrize("settings", [TINY, SWIN], ids=["asa", "sa_swin"])
def test_a_training_loss_is_the_mean_of_those_of_the_modalities(
    stores: list[str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {**settings, "data.stores": stores, "data.split.validation": 0}
    given |= {"data.health": "healthy"} if settings is SWIN else {}
    task = Pretraining(configure("pretrain", {**given, "out": str(tmp_path)}))
    torch.manual_seed(0)
    method = build(task.config["method"]).train()
    crops = task.dataset(method)
    batch = collate([crops[k] for k in range(len(crops))])
    found = method(batch)
    names = ["loss"] if settings is TINY else ["loss", "rotation", "contrastive", "inpainting", "symmetry"]
    for name in names:
        (one, first), (other, second) = (found[f"{name}_{modality}"].tolist() for modality in ("t1", "ct"))
        assert (first, second) == (4, 3)
        assert found[name].item() == pytest.approx((one + other) / 7, rel=1e-4, abs=1e-6)
    if settings is SWIN:  # the contrast of a view compares it with all others
        views = method.views(batch)
        z = F.normalize(method.model(views.cut, views.mirror).contrast.float(), dim=1)
        alike = (z @ z.T / method.contrast.log_temperature.exp()).fill_diagonal_(float("-inf"))
        each = F.cross_entropy(alike, torch.arange(14).roll(7), reduction="none").view(2, 7).mean(dim=0)
        expected = (each * batch["modality_ct"]).sum().item()
        assert found["contrastive_ct"][0].item() == pytest.approx(expected, rel=1e-4)
    plain = method({key: value for key, value in batch.items() if not key.startswith("modality_")})
    assert torch.equal(plain["loss"], found["loss"]) and plain.keys() == {k for k in found if found[k].dim() == 0}


def test_a_modality_without_samples_is_missing_from_the_log_and_steps_weigh_by_their_samples() -> None:
    def batch(*ct: float) -> dict[str, torch.Tensor]:
        return {"modality_ct": torch.tensor(ct), "modality_mr": 1 - torch.tensor(ct)}

    assert sums_by_modality({}, loss=torch.ones(2)) == {}
    meter = Meter(batch_size=3, accumulate=1)
    for of, value in ((batch(1.0, 1.0, 0.0), [1.0, 2.0, 8.0]), (batch(1.0, 0.0, 0.0), [6.0, 0.0, float("nan")])):
        meter.start_step()
        meter.add({"loss": torch.tensor(0.5), **sums_by_modality(of, loss=torch.tensor(value))})
    found = meter.read(gradient_norm=torch.tensor(1.0), lr=0.1)
    assert found["loss_ct"] == pytest.approx(3.0) and np.isnan(found["loss_mr"]) and found["loss"] == 0.5
    meter.start_step()
    meter.add(sums_by_modality(batch(1.0, 1.0, 1.0), loss=torch.ones(3)))
    assert "loss_mr" not in meter.read(gradient_norm=torch.tensor(1.0), lr=0.1)


def test_a_joint_run_that_is_resumed_equals_one_that_was_not_stopped(
    joint: Path, stores: list[str], tmp_path: Path
) -> None:
    asa.pretrain(stores, tmp_path / "run", **{**TINY, "train.steps": 2, "optim.schedule": "constant"})
    whole = asa.pretrain(stores, tmp_path / "whole", **{**TINY, "optim.schedule": "constant"})
    run = asa.pretrain(stores, tmp_path / "run", **{**TINY, "optim.schedule": "constant"})
    assert run and whole and (run / "split.json").read_bytes() == (whole / "split.json").read_bytes()
    assert losses(run)[-1] == losses(whole)[-1]
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(whole).values(), strict=True))


def test_two_processes_log_the_same_losses_of_each_modality_as_one(
    joint: Path, stores: list[str], tmp_path: Path
) -> None:
    ended = ranks(tmp_path, 2, _pretrain, stores, str(tmp_path / "run"))
    assert [one.code for one in ended] == [0, 0], ended[0].text + ended[1].text
    keys = ("loss", "loss_t1", "loss_ct")
    for one, two in zip(log(joint, *keys), log(tmp_path / "run", *keys), strict=True):
        assert [value is None for value in one] == [value is None for value in two]
        assert [v for v in two if v is not None] == pytest.approx([v for v in one if v is not None], rel=1e-4)
    one, two = (log(run, *keys, group="validation")[-1] for run in (joint, tmp_path / "run"))
    assert two == pytest.approx(one, rel=1e-3)


def _pretrain(stores: list[str], out: str) -> None:
    asa.pretrain(stores, out, **TINY)


# ---- health, labels ----


def test_health_is_known_by_subject_and_by_id_in_every_store(stores: list[str], tmp_path: Path) -> None:
    for key in ("id", "subject"):
        (tmp_path / "health.csv").write_text(f"{key},health\ns0,1\ns1,0\n")
        given = {"data.stores": stores, "data.health": str(tmp_path / "health.csv")}
        task = Pretraining(configure("pretrain", {**SWIN, **given, "out": str(tmp_path / "run")}))
        found = {id: own["health"] for id, own in task.attached.items()}
        assert [found[f"{modality}/s{k}"] for modality in ("t1", "ct") for k in (0, 1)] == [1, 0, 1, 0]
        assert np.isnan([found["t1/s2"], found["ct/s2"], found["t1/s3"]]).all()


def test_the_linear_probe_is_of_one_of_the_modalities(store: Path, stores: list[str], tmp_path: Path) -> None:
    run = asa.pretrain(stores, tmp_path / "run", **TINY, **{"data.labelled_store": str(store)})
    assert run and log(run, "linear_dice", group="validation")[-1][0] is not None


def test_voxels_with_an_ignored_value_are_left_out_where_a_store_has_no_labels(store: Path, stores: list[str]) -> None:
    joined = JoinedStores([store, stores[1]])
    assert joined.labels == {} and joined.label("t1/s0") is None and joined.label("ct/s0") is None


# ---- what a checkpoint is for ----


def test_a_checkpoint_takes_scans_that_are_prepared_as_either_modality(
    joint: Path, stores: list[str], raw: Path, heads: Path
) -> None:
    data = read_description(joint)["data"]
    assert set(data["modalities"]) == {"t1", "ct"} and data["channels"] == ["t1"]
    scans = {"t1": raw / "s1_T1.nii.gz", "ct": heads / "s1_CT.nii.gz"}
    for (modality, scan), path in zip(scans.items(), stores, strict=True):
        preprocessor = ScanPreprocessor(str(joint), data, None, channels=[modality])
        preprocessor.check_store(Store(path), "no")
        case, _ = preprocessor.prepare({modality: scan})
        np.testing.assert_allclose(case.image, Store(path).image("s1").astype(np.float32), atol=1e-3)
        other = stores[1 - stores.index(path)]
        with pytest.raises(ValueError, match="was prepared in another way"):
            preprocessor.check_store(Store(other), "no")
        assert asa.features({modality: scan}, joint).shape[0] == 24
    with pytest.raises(ValueError, match=r"was trained on scans of ct and t1: say which these are, like 'images="):
        asa.features(raw / "s1_T1.nii.gz", joint)
    with pytest.raises(ValueError, match=r"trained on scans of ct and t1, got flair: say which"):
        ScanPreprocessor(str(joint), data, None, channels=["flair"])


def test_features_of_a_store_and_of_files_of_either_modality_are_the_same(
    joint: Path, stores: list[str], heads: Path, tmp_path: Path
) -> None:
    given = {"checkpoint": str(joint), "device": "cpu"}
    call("embed", given, {"input": stores[1], "out": str(tmp_path / "stored.csv")})
    call("embed", given, {"input": str(heads), "images": {"ct": "*_CT.nii.gz"}, "out": str(tmp_path / "raw.csv")})
    tables = [(tmp_path / name).read_text().splitlines()[1:4] for name in ("stored.csv", "raw.csv")]
    for lines in zip(*tables, strict=True):
        one, other = (line.split(",") for line in lines)
        assert one[0] == other[0]
        assert [float(x) for x in one[1:]] == pytest.approx([float(x) for x in other[1:]], abs=1e-3)


def test_an_sa_swin_of_both_scores_scans_of_either(stores: list[str], raw: Path, tmp_path: Path) -> None:
    run = asa.pretrain(stores, tmp_path / "run", **{**SWIN, "train.steps": 1})
    cpu = {"predict.device": "cpu"}
    asa.predict(run, stores[1], tmp_path / "stored", **cpu)
    asa.predict(run, raw / "s0_T1.nii.gz", tmp_path / "file", images={"t1": "*.nii.gz"}, **cpu)
    rows = [(tmp_path / name / "asymmetry.csv").read_text().splitlines() for name in ("stored", "file")]
    assert [len(lines) for lines in rows] == [4, 2]
    with pytest.raises(ValueError, match="was prepared in another way"):
        asa.predict(run, stores[0], tmp_path / "no", healthy=stores[1], **cpu)


def test_a_published_encoder_says_how_each_modality_is_prepared(joint: Path, tmp_path: Path) -> None:
    export_hub(joint, tmp_path / "hub", licence="cc0-1.0", trained_on="made-up heads")
    card = (tmp_path / "hub" / "README.md").read_text().partition("when it predicts:")[2]
    said = json.loads(card.split("```")[1].removeprefix("json"))
    assert said["ct"]["window"] == [0, 80] and "window" not in said["t1"]
    assert set(read_description(tmp_path / "hub")["data"]["modalities"]) == {"t1", "ct"}


def test_reconstructions_of_held_out_scans_are_shown_by_modality(joint: Path) -> None:
    cases = reconstructed(joint, {"ids": None, "count": 4})
    assert {id.partition("/")[0] for id in cases} == {"t1", "ct"}


def test_a_network_is_fine_tuned_from_both_modalities(
    joint: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asa.finetune(
        store,
        tmp_path / "run",
        init=str(joint),
        model="unet_tiny",
        transfer="explain",
        crop=64,
        **{"+model.embed_dim": 24, "+model.depth": 1, "+model.num_heads": 2, "train.device": "cpu"},
    )
    assert "encoder" in capsys.readouterr().out


# ---- what does not fit ----


def test_stores_that_do_not_fit_are_refused_and_the_message_says_what_to_do(
    raw: Path, heads: Path, stores: list[str], tmp_path: Path
) -> None:
    mr, ct = stores
    two = tmp_path / "two"
    records = folder.records(raw, images={"t1": "*_T1.nii.gz", "seg": "*_seg.nii.gz"})
    prepare_cohort(records[:1], two, CohortSettings(), progress=False)

    def changed(name: str, source: str, change: Callable[[dict[str, Any]], None]) -> str:
        shutil.copytree(source, tmp_path / name)
        tree = read_tree(tmp_path / name)
        change(tree)
        write_tree(tmp_path / name, tree)
        return str(tmp_path / name)

    def larger(tree: dict[str, Any]) -> None:
        for entry in tree["records"]:
            entry["chain"]["stored_affine"] = np.diag([2.0, 2.0, 2.0, 1.0]).tolist()

    refused = {
        "has the channels t1, seg and .* ct: one network takes as many": [str(two), ct],
        "voxels of 1 x 1 x 1 mm in .*mr and of 2 x 2 x 2 mm in .*: prepare both": [mr, changed("big", ct, larger)],
        "is the middle of the volumes of .*mid and not of .*mr: prepare that one with prepare.midway": [
            mr,
            changed("mid", ct, lambda tree: tree["settings"].update(midway=True)),
        ],
        't1 scans prepared in another way than those of .*mr .prepare.normalise: .* there, "zscore" here.:': [
            mr,
            changed("zscore", mr, lambda tree: tree["settings"].update(normalise="zscore")),
        ],
        "s0 is in .*mr and in .*again: leave one out, or prepare one of them with dataset=NAME": [
            mr,
            changed("again", mr, lambda tree: None),
        ],
    }
    for message, paths in refused.items():
        with pytest.raises(ValueError, match=message):
            JoinedStores(paths)
    task = {"out": str(tmp_path / "run"), **TINY}
    with pytest.raises(ValueError, match="data.store and data.stores exclude each other"):
        asa.pretrain(mr, **task, **{"data.stores": stores})
    for wrong in ([], "x"):
        with pytest.raises(ValueError, match=r"data.stores=.*: give a list of stores, like \[stores/mr,stores/ct\]"):
            asa.pretrain([], **task, **{"data.stores": wrong})
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["s3"], "validation": ["s0"]}))
    with pytest.raises(ValueError, match="data.stores: the split has no ct scan in train"):
        asa.pretrain(stores, **task, **{"data.split_file": str(split)})
