"""Pretraining that continues from an earlier run: the whole network, on other scans or with another crop."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import asa
from asa.config import build
from asa.data.splits import training_digests
from asa.data.store import Store
from asa.tasks.pretraining import Pretraining
from asa.tasks.run import configure
from asa.training.checkpoint import read_description, read_weights
from asa.training.checkpoint_files import find_weights

TINY = {
    "model": "asa_tiny",
    "+model.embed_dim": 24,
    "+model.depth": 1,
    "+model.num_heads": 2,
    "model.decoder_depth": 1,
    "train.steps": 2,
    "train.device": "cpu",
    "train.log_to": [],
    "loader.workers": 0,
}


def split(folder: Path, *train: str, test: str = "s3") -> str:
    """A split file."""
    file = folder / f"{'_'.join(train)}.json"
    file.write_text(json.dumps({"train": list(train), "validation": [], "test": [test]}))
    return str(file)


@pytest.fixture(scope="module")
def first(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two of the scans."""
    folder = tmp_path_factory.mktemp("first")
    asa.pretrain(store, folder / "run", crop=32, **TINY, **{"data.split_file": split(folder, "s0", "s1")})
    return folder / "run"


def continued(store: Path, out: Path, init: Path, **settings: object) -> Pretraining:
    """The task of a run that continues from another one."""
    given = {**TINY, "crop": [32, 32, 64], "data.store": str(store), "out": str(out), "init": str(init), **settings}
    return Pretraining(configure("pretrain", given))


def test_a_continued_run_starts_with_all_weights_of_the_earlier_one(store: Path, first: Path, tmp_path: Path) -> None:
    task = continued(store, tmp_path, first, method="mae", **{"model.position": "mirror"})
    torch.manual_seed(1)
    method = build(task.config["method"])
    assert method.model.encoder.img_size == (32, 32, 64)
    task.load_init(method)
    weights, _ = read_weights(find_weights(first))
    loaded = method.model.state_dict()
    assert {f"model.{name}" for name in loaded} == set(weights)
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, weights[f"model.{name}"], rtol=0, atol=0)


def test_a_continued_run_is_trained_and_knows_the_scans_of_both(
    store: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"data.split_file": split(tmp_path, "s2", test="s0")}
    run = asa.pretrain(store, tmp_path / "run", crop=[32, 32, 64], init=str(first), **TINY, **parts)
    out = capsys.readouterr().out
    assert "tensors of the network from" in out and "trained on scans of 1 held-out subject (test: s0)" in out
    data = read_description(run)["data"]
    records = [record for record in Store(store).records if record["subject"] in ("s0", "s1", "s2")]
    assert {key: data[key] for key in ("scans", "subjects")} == training_digests(records)
    assert json.loads((run / "seen.json").read_text())["seen"] == [{"part": "test", "subject": "s0", "match": "scan"}]
    before, after = (read_weights(find_weights(folder))[0] for folder in (first, run))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_is_continued_from_another_folder_with_the_same_init(
    store: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"data.split_file": split(tmp_path, "s2"), "optim.schedule": "constant", "optim.warmup": 0}
    for folder, init, steps in ((first.parent, first.name, 2), (tmp_path, str(first), 3)):
        monkeypatch.chdir(folder)
        run = asa.pretrain(store, tmp_path / "run", crop=32, init=init, **TINY | parts | {"train.steps": steps})
    assert find_weights(run).parent.name == "step-00000003"


def test_a_scan_that_is_trained_on_and_held_out_under_two_names_is_said(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Path(shutil.copytree(store, tmp_path / "again"))
    rows = [json.loads(row) for row in (again / "records.jsonl").read_text().splitlines()]
    for row in rows:
        for file in again.glob(f"*/{row['id']}.*"):
            file.rename(file.with_stem(f"other_{row['id']}"))
        row |= {"id": f"other_{row['id']}", "subject": f"other_{row['subject']}"}
    (again / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**TINY, "crop": 32, "data.stores": [str(store), str(again)], "out": str(tmp_path / "run")}
    for test, expected in (("other_s0", "scans of 1 held-out subject (test: other_s0) are trained on"), ("s3", "")):
        parts = {"data.split_file": split(tmp_path, "s0", "s1", test=test)}
        Pretraining(configure("pretrain", {**given, **parts}))
        out = capsys.readouterr().out
        assert expected in out and ("are trained on" in out) == bool(expected)


def test_a_run_continues_where_its_store_has_moved_and_not_on_other_data(store: Path, tmp_path: Path) -> None:
    parts = {"data.split_file": split(tmp_path, "s0", "s1"), "train.deterministic": True, "optim.schedule": "constant"}

    def trained(out: str, place: Path, steps: int) -> Path:
        settings = {**TINY, **parts, "train.steps": steps, "optim.warmup": 0}
        return asa.pretrain(place, tmp_path / out, crop=32, **settings)

    whole = trained("whole", store, 3)
    trained("run", store, 2)
    moved, other = (Path(shutil.copytree(store, tmp_path / name)) for name in ("moved", "other"))
    rows = (other / "records.jsonl").read_text()
    identity = json.dumps(Store(store).records[0]["identity"])
    assert identity in rows
    (other / "records.jsonl").write_text(rows.replace(identity, '{"t1": "another scan"}'))
    with pytest.raises(ValueError, match=r"was trained on other data \(scans differ\): give the store"):
        trained("run", other, 3)
    (other / "records.jsonl").write_text(rows)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "settings": {**manifest["settings"], "spacing": 9.0}}))
    with pytest.raises(ValueError, match=r"other data \(prepare differ\)"):
        trained("run", other, 3)
    continued, uninterrupted = (read_weights(find_weights(run))[0] for run in (trained("run", moved, 3), whole))
    assert all(torch.equal(continued[name], uninterrupted[name]) for name in uninterrupted)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model.position": "sincos"}, "add model.position=mirror"),
        ({"model.mirror_patches": True}, "add model.mirror_patches=false"),
        ({"+model.num_heads": 4}, "add model.num_heads=2"),
        ({"model.decoder_depth": 2}, "add model.decoder_depth=1"),
        ({"model": "asa_small"}, "does not match the model"),
    ],
)
def test_another_network_is_refused_and_the_setting_is_named(
    store: Path, first: Path, tmp_path: Path, setting: dict[str, object], message: str
) -> None:
    task = continued(store, tmp_path, first, **setting)
    method = build(task.config["method"])
    with pytest.raises(ValueError, match=message):
        task.load_init(method)


def test_weights_of_other_packages_are_for_fine_tuning(store: Path, tmp_path: Path) -> None:
    torch.save({"patch_embedding.patch_embeddings.1.weight": torch.zeros(24, 512)}, tmp_path / "vit.pt")
    task = continued(store, tmp_path / "run", tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="pretraining continues from a run of asa-pretrain"):
        task.load_init(build(task.config["method"]))
