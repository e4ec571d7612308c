"""A checkpoint carries digests of its training data, and fine-tuning warns when a held-out subject is part of it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from stores import read_tree, write_tree

from asa.cli import COMMANDS
from asa.data.splits import LeakedSubject, find_leaks, stored_digests, training_digests, write_split
from asa.training.checkpoint import read_weights
from asa.training.checkpoint_files import find_weights

TINY = ["loader.workers=0", "train.device=cpu", "optim.warmup=1", "train.steps=2"]
PRETRAIN = [*TINY, "model=asa_tiny", "crop=32", "train.batch_size=2"]
FINETUNE = [*TINY, "model=unet_tiny", "+model.feature_size=4", "crop=[64,32,32]", "train.batch_size=1"]
SPLIT = {"train": ["b0"], "validation": [], "test": ["b2", "b3"]}


def entry(subject: str, **identity: str) -> dict[str, Any]:
    return {"id": f"{subject}-{'-'.join(identity.values())}", "subject": subject, "identity": identity}


def test_a_scan_is_identified_by_the_voxels_of_any_channel() -> None:
    digests = training_digests([entry("a", t1="11"), entry("b", t1="22")])
    here = [entry("x", t1="11", flair="99"), entry("y", t1="33"), entry("z", t1="44")]
    split = {"train": ["z"], "validation": ["y"], "test": ["x"]}
    assert find_leaks(here, split, digests) == [LeakedSubject("test", "x", "scan")]


def test_one_session_is_enough_for_a_leak_and_training_subjects_are_none() -> None:
    digests = training_digests([entry("a", t1="11")])
    here = [entry("x", t1="55"), entry("x", t1="11"), entry("y", t1="11")]
    found = find_leaks(here, {"train": ["y"], "validation": ["x"], "test": []}, digests)
    assert found == [LeakedSubject("validation", "x", "scan")]


def test_a_name_alone_is_a_weaker_match() -> None:
    digests = training_digests([entry("sub-1", t1="11"), entry("sub-2", t1="22")])
    here = [entry("sub-1", t1="33"), entry("sub-2", t1="22"), entry("sub-3", t1="44")]
    found = find_leaks(here, {"train": [], "validation": [], "test": ["sub-1", "sub-2", "sub-3"]}, digests)
    assert found == [LeakedSubject("test", "sub-1", "name"), LeakedSubject("test", "sub-2", "scan")]


def test_digests_accumulate_and_contain_no_names() -> None:
    first = training_digests([entry("Jane Roe", t1="11", t2="12")])
    both = training_digests([entry("b", t1="22"), entry("Jane Roe", t1="11")], first)
    names = sorted(hashlib.sha256(name.encode()).hexdigest()[:16] for name in ("Jane Roe", "b"))
    assert both == {"scans": ["11", "12", "22"], "subjects": names}
    assert stored_digests({"channels": ["t1"], **both}) == both and stored_digests({"channels": ["t1"]}) is None


# ---- the commands ----


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that succeeds, and return what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [f"asa-{name}", *arguments])
        capsys.readouterr()
        code = COMMANDS[name].main()
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def store_of(store: Path, out: Path, subjects: dict[str, str]) -> Path:
    """The four scans as a store of other subjects: name -> digest of the voxels."""
    manifest = read_tree(store)
    for record, (subject, digest) in zip(manifest["records"], subjects.items(), strict=True):
        record |= {"subject": subject, "identity": {"t1": digest}}
    write_tree(out, manifest)
    for folder in ("images", "labels"):
        (out / folder).symlink_to(store / folder)
    return out


def test_fine_tuning_warns_of_leaked_subjects(command, store: Path, tmp_path: Path) -> None:
    wide = store_of(store, tmp_path / "wide", {"a0": "00", "b3": "33", "a2": "22", "a9": "99"})
    own = store_of(store, tmp_path / "own", {"b0": "b0", "b1": "b1", "b2": "22", "b3": "b3"})
    write_split(tmp_path / "before.json", {"train": ["a0", "b3", "a2"], "validation": [], "test": ["a9"]})
    write_split(tmp_path / "split.json", SPLIT)
    command(
        "pretrain", f"data.store={wide}", f"out={tmp_path}/pre", f"data.split_file={tmp_path}/before.json", *PRETRAIN
    )
    before = read_weights(tmp_path / "pre")[1]["data"]
    assert before["scans"] == ["00", "22", "33"] and len(before["subjects"]) == 3

    arguments = [f"data.store={own}", f"data.split_file={tmp_path}/split.json", *FINETUNE]
    out = command("finetune", f"out={tmp_path}/fine", f"init={tmp_path}/pre", *arguments)
    (warning,) = (line for line in out.splitlines() if line.startswith("warning"))
    assert "scans of 1 held-out subject (test: b2)" in warning and "optimistic" in warning
    (note,) = (line for line in out.splitlines() if line.startswith("note"))
    assert "(test: b3)" in note
    assert json.loads((tmp_path / "fine" / "seen.json").read_text()) == {
        "init": str(tmp_path / "pre"),
        "seen": [
            {"part": "test", "subject": "b2", "match": "scan"},
            {"part": "test", "subject": "b3", "match": "name"},
        ],
    }
    after = read_weights(tmp_path / "fine")[1]["data"]
    assert after["scans"] == ["00", "22", "33", "b0"] and len(after["subjects"]) == 4
    assert not any(name in json.dumps(after) for name in ("a0", "b3"))


def test_no_leak_is_reported_and_an_older_checkpoint_cannot_be_checked(command, store: Path, tmp_path: Path) -> None:
    own = store_of(store, tmp_path / "own", {"b0": "b0", "b1": "b1", "b2": "b2", "b3": "b3"})
    write_split(tmp_path / "split.json", SPLIT)
    data = [f"data.store={own}", f"data.split_file={tmp_path}/split.json"]
    command("pretrain", f"out={tmp_path}/pre", *data, *PRETRAIN)
    assert "was not trained on any held-out subject" in command(
        "finetune", f"out={tmp_path}/fine", f"init={tmp_path}/pre", *data, *FINETUNE
    )
    assert json.loads((tmp_path / "fine" / "seen.json").read_text())["seen"] == []

    weights = find_weights(tmp_path / "pre")
    _, description = read_weights(weights)
    description["data"] = {"channels": ["t1"]}
    old = tmp_path / "old.safetensors"
    save_file(load_file(weights), old, metadata={"asa": json.dumps(description)})
    out = command("finetune", f"out={tmp_path}/later", f"init={old}", *data, *FINETUNE)
    assert "is not checked" in out and not (tmp_path / "later" / "seen.json").exists()
    # What came before stays unknown: the next check must not find the list whole.
    assert stored_digests(read_weights(tmp_path / "later")[1]["data"]) is None


def test_fine_tuning_says_how_the_scans_of_the_encoder_differ_from_its_own(
    command, store: Path, tmp_path: Path
) -> None:
    write_split(tmp_path / "split.json", SPLIT)
    own = store_of(store, tmp_path / "own", {"b0": "b0", "b1": "b1", "b2": "b2", "b3": "b3"})
    data = [f"data.store={own}", f"data.split_file={tmp_path}/split.json"]
    command("pretrain", f"out={tmp_path}/pre", *data, *PRETRAIN)
    weights = find_weights(tmp_path / "pre")
    said = {}
    for name, prepare, edge in (("alike", {}, 1.05), ("other", {"strip": "robex", "bias": True, "margin": 9}, 2.0)):
        _, description = read_weights(weights)
        description["data"]["prepare"] |= prepare
        description["data"]["spacing"] = [[edge] * 3] * 2
        file = tmp_path / f"{name}.safetensors"
        save_file(load_file(weights), file, metadata={"asa": json.dumps(description)})
        out = command("finetune", f"out={tmp_path}/{name}", f"init={file}", *data, *FINETUNE)
        said[name] = [line.partition(": it is")[0] for line in out.splitlines() if line.startswith("note")]
    differs = "prepare.strip=robex (here none), prepare.bias=true (here false), voxels of 2 x 2 x 2 mm (here 1 x 1 x 1)"
    found = f"note: {tmp_path}/other.safetensors was trained on scans that are otherwise: {differs}"
    assert said == {"alike": [], "other": [found]}
