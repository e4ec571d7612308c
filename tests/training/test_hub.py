"""The Hugging Face Hub, spoken to by a server on loopback: what is published is what is loaded, and nothing else is."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub, serving
from untrained import a_scan, call, checkpoint, voxels

import asa
from asa.cli import export, predict
from asa.data.io.files import read_json, sha256_of, write_json
from asa.data.splits import stored_digests
from asa.evaluation.policies import get_policy
from asa.evaluation.summary import CaseRow, summarise
from asa.export.hub import export_hub
from asa.restoration.rat import rat_tiny
from asa.tasks.prediction import subjects_of_part
from asa.training.checkpoint import DamagedCheckpoint, load_model, read_description, save_checkpoint
from asa.training.checkpoint_files import fetch, find_weights
from asa.training.pretrained import read_source

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
CARD = ("licence=cc-by-4.0", "trained_on='Ellipsoids of noise, made by a test.'")
SUBJECTS = {"scans": ["0" * 32, "1" * 32], "subjects": ["2" * 16]}


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Settings of the environment as a new process would read them, with a cache of the test's own."""

    def restart(**environment: str) -> None:
        for key, value in {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test", **environment}.items():
            monkeypatch.setenv(key, value)
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)
        fetch.cache_clear()

    return restart


@pytest.fixture
def hub(fresh: Callable[..., None]) -> Iterator[Hub]:
    with serving() as hub:
        fresh(HF_ENDPOINT=hub.url)
        yield hub
    fetch.cache_clear()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: Hub, tmp_path: Path, seed: int = 0) -> str:
    """The commit of an exported network under org/net."""
    run, folder = checkpoint(tmp_path / f"run{seed}", seed, **SUBJECTS), tmp_path / f"hub{seed}"
    export_hub(run, folder, licence="cc-by-4.0", trained_on="Noise.")
    return hub.push("org/net", files_of(folder))


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def test_a_folder_is_published_as_it_is_and_loaded_and_predicts_as_the_run_does(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, scan = checkpoint(tmp_path / "run", **SUBJECTS), tmp_path / "hub", a_scan(tmp_path)
    assert call(export, monkeypatch, f"checkpoint={run}", f"out={folder}", "format=hub", *CARD) == 0
    import huggingface_hub

    huggingface_hub.create_repo("org/net")
    huggingface_hub.upload_folder(repo_id="org/net", folder_path=folder)
    hub.push("org/net", {"pytorch_model.bin": b"a pickle", "training.pt": b"another"})
    hub.requests.clear()
    assert same_weights(asa.load_model("hf://org/net"), load_model(run))
    fetched = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert fetched == {"model.safetensors", "digests.json"}
    assert same_weights(load_model(folder), load_model(run))  # a folder that was downloaded by other means

    source, description = read_source("hf://org/net")  # init=
    assert source.weights.keys() == read_source(run)[0].weights.keys()
    assert stored_digests(description["data"]) == SUBJECTS
    for number, given in enumerate((run, "hf://org/net@main")):
        common = (f"input={scan}", f"out={tmp_path / str(number)}", "predict.device=cpu")
        assert call(predict, monkeypatch, f"checkpoint={given}", *common) == 0
    assert np.array_equal(*(voxels(tmp_path / number / "a.nii.gz") for number in ("0", "1")))


def test_a_revision_is_what_it_was_and_main_is_the_newest(hub: Hub, tmp_path: Path, fresh: Callable[..., None]) -> None:
    first, second = published(hub, tmp_path, seed=1), published(hub, tmp_path, seed=2)
    assert same_weights(load_model(f"hf://org/net@{first}"), load_model(tmp_path / "run1"))
    assert same_weights(load_model(f"hf://org/net@{second}"), load_model(tmp_path / "run2"))
    assert same_weights(load_model(Path("hf://org/net")), load_model(tmp_path / "run2"))
    with pytest.raises(FileNotFoundError, match="hf://org/net@v9: the model has no revision v9"):
        load_model("hf://org/net@v9")


def test_what_was_fetched_is_used_without_a_network_and_the_rest_says_what_to_do(
    hub: Hub, tmp_path: Path, fresh: Callable[..., None]
) -> None:
    commit = published(hub, tmp_path)
    load_model("hf://org/net")
    hub.requests.clear()
    fresh(HF_HUB_OFFLINE="1")
    assert same_weights(load_model("hf://org/net"), load_model(tmp_path / "run0"))
    with pytest.raises(FileNotFoundError, match="unset HF_HUB_OFFLINE") as caught:
        load_model("hf://org/net@v2")
    assert "HF_HUB_OFFLINE is set" in str(caught.value) and f"holds only the revisions {commit}, main" in str(
        caught.value
    )
    assert not hub.requests
    fresh(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"))  # the discard port
    with pytest.raises(
        FileNotFoundError, match="cannot be reached .* does not hold it: connect .* hf download org/net"
    ):
        load_model("hf://org/net")


def test_weights_that_are_not_those_of_the_digests_are_refused(hub: Hub, tmp_path: Path) -> None:
    published(hub, tmp_path)
    other = checkpoint(tmp_path / "other", 5) / "checkpoints" / "step-00000001" / "model.safetensors"
    hub.push("org/net", {"model.safetensors": other.read_bytes()})
    with pytest.raises(DamagedCheckpoint, match="has changed since it was written"):
        load_model("hf://org/net")
    hub.push("org/bare", {"model.safetensors": other.read_bytes(), "pytorch_model.bin": b"a pickle"})
    with pytest.raises(ValueError, match=r"hf://org/bare: has no digests\.json"):
        load_model("hf://org/bare")


def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="hf://org/nothing: no such model on the Hub, or a private"):
        load_model("hf://org/nothing")
    for wrong in ("hf://net", "hf://a/b/c", "hf://a/b@"):
        with pytest.raises(ValueError, match=r"give hf://ORG/NAME, or hf://ORG/NAME@REVISION"):
            load_model(wrong)
    with pytest.raises(ValueError, match="part=test: hf://org/net has no split"):
        subjects_of_part({"part": "test", "checkpoint": "hf://org/net", "atlas": None})
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "asa-mri\[hub\]"'):
        load_model("hf://org/nothing")


@pytest.mark.parametrize("etag", ["../../../../stolen", "{}/stolen", "../refs/main"])
def test_an_etag_of_a_server_names_no_file(hub: Hub, tmp_path: Path, etag: str) -> None:
    commit = published(hub, tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    hub.etag = etag.format(tmp_path)
    assert same_weights(load_model("hf://org/net"), load_model(tmp_path / "run0"))
    cache = tmp_path / "home" / "hub" / "models--org--net"
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    snapshot = cache / "snapshots" / commit
    assert written == {snapshot / "model.safetensors", snapshot / "digests.json", cache / "refs" / "main"}
    assert (cache / "refs" / "main").read_text() == commit


@pytest.mark.parametrize("sha", ["../../../../stolen", "{}/stolen", "HEAD", "a" * 39 + "/"])
def test_a_commit_of_a_server_that_is_not_hexadecimal_is_refused_before_anything_is_written(
    hub: Hub, tmp_path: Path, sha: str
) -> None:
    published(hub, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    hub.sha = sha.format(tmp_path)
    with pytest.raises(ValueError, match=r"hf://org/net: the server names the commit '.*': it is not the Hub"):
        load_model("hf://org/net")
    assert not [line for line in hub.requests if "/resolve/" in line]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_revision_leads_out_of_no_cache(hub: Hub, tmp_path: Path) -> None:
    published(hub, tmp_path)
    for revision in ("../../../x", "/etc/x", "v1/../../../../x"):
        with pytest.raises(ValueError, match="give hf://ORG/NAME"):
            load_model(f"hf://org/net@{revision}")
    assert not hub.requests


def test_what_the_library_of_the_hub_has_fetched_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    commit = published(hub, tmp_path)
    import huggingface_hub

    huggingface_hub.snapshot_download("org/net", allow_patterns=["model.safetensors", "digests.json"])
    hub.requests.clear()
    assert same_weights(load_model("hf://org/net"), load_model(tmp_path / "run0"))
    assert not [line for line in hub.requests if "/resolve/" in line]
    found = huggingface_hub.try_to_load_from_cache("org/net", "model.safetensors", revision="main")
    assert commit in found


def test_a_server_that_does_not_answer_is_left_and_the_copy_in_the_cache_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(hub, tmp_path)
    hub.silent.set()
    monkeypatch.setattr("asa.training.checkpoint_files.PATIENCE", 0.3)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="hf://org/net: the Hub cannot be reached .*does not hold it: connect"):
        load_model("hf://org/net")
    hub.silent.clear()
    load_model("hf://org/net")
    hub.silent.set()
    fetch.cache_clear()
    assert same_weights(load_model("hf://org/net"), load_model(tmp_path / "run0"))
    assert time.monotonic() - start < 10


def test_the_card_has_licence_data_evaluation_and_digests(tmp_path: Path) -> None:
    run, out = checkpoint(tmp_path / "run", **SUBJECTS), tmp_path / "hub"
    values = {metric.name: 0.5 for metric in get_policy("ibsr").metrics}
    rows = [CaseRow(case, label, values, 8, 8, 1.0, 1.0) for case in ("a", "b") for label in ("left_x", "middle")]
    own, labels = sha256_of(find_weights(run))[:8], {1: "left_x", 5: "middle"}
    scores = tmp_path / "scores" / "summary.json"
    write_json(scores, summarise(rows, labels, networks=[own], notes=["note: <b>of few cases"]).as_json())
    export_hub(run, out, licence="cc-by-4.0", trained_on="Ten heads.", evaluation=tmp_path / "scores")
    from huggingface_hub import ModelCard

    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "asa-mri",
        "image-segmentation",
    )
    results = {(one.metric_name, one.metric_value) for one in card.data.eval_results}
    assert ("dice left_x", 0.5) in results and ("dice middle", 0.5) in results
    assert "\nnote: &lt;b&gt;of few cases\n" in card.text and "this network is" not in card.text
    for networks, said in ((["0a", own], f"were made by 0a and {own}"), ([], "may be of another network")):
        write_json(scores, summarise(rows, labels, networks=networks).as_json())
        export_hub(run, tmp_path / "others", licence="mit", trained_on="Ten heads.", evaluation=tmp_path / "scores")
        other = ModelCard.load(tmp_path / "others" / "README.md")
        assert f"The predictions {said}; this network is {own}." in other.text and not other.data.eval_results
    assert "Ten heads." in card.text and "1 subjects and 2 images" in card.text
    assert read_json(out / "digests.json")["model.safetensors"] in card.text
    assert read_json(out / "training_subjects.json") == SUBJECTS
    assert read_json(out / "digests.json") == {
        path.name: sha256_of(path) for path in out.iterdir() if path.name != "digests.json"
    }


def test_evaluations_that_a_card_cannot_show_are_refused_in_these_words(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", **SUBJECTS)
    for summary in ({"classes": ["a", "b"], "auc": 0.5}, {"patients": 1, "results": {"top": {"auc": 0.5}}}):
        write_json(tmp_path / "scores" / "summary.json", summary)
        with pytest.raises(ValueError, match="a card shows evaluations of label maps and of restored images"):
            export_hub(run, tmp_path / "x", licence="mit", trained_on="Noise.", evaluation=tmp_path / "scores")


def test_the_card_of_a_restoration_has_its_window_and_no_preparation(tmp_path: Path) -> None:
    about = {"window": [-1000.0, 1000.0], "regions": None, "subject": None}
    shell, node = torch.nn.Module(), {"_target_": "asa.restoration.rat.rat_tiny", "in_channels": 1}
    shell.model = rat_tiny(in_channels=1)
    save_checkpoint(tmp_path / "run", 1, shell, {"model": node, "task": "restoration", "data": about}, {}, keep=1)
    export_hub(tmp_path / "run", tmp_path / "hub", licence="mit", trained_on="CT slices.")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "# Restoration of 2-D images by asa" in card and "-1000.0" in card and "brain" not in card
    assert "Scans are prepared" not in card and "- 2d\n" in card


def test_a_command_with_paths_of_this_machine_is_not_published(tmp_path: Path) -> None:
    command = "/home/jane/strip {image} {mask}"
    run = checkpoint(tmp_path / "run", prepare={"crop": "none", "strip": command})
    export_hub(run, tmp_path / "hub", licence="other", trained_on="Noise.")
    assert not any(b"jane" in content for content in files_of(tmp_path / "hub").values())
    assert read_description(tmp_path / "hub")["data"]["prepare"] == {"crop": "none", "strip": "COMMAND {image} {mask}"}


def test_nothing_is_exported_without_licence_and_data_or_over_other_files(tmp_path: Path) -> None:
    run, out = checkpoint(tmp_path / "run"), tmp_path / "hub"
    for licence in (None, "CC BY"):
        with pytest.raises(ValueError, match="give one in the Hub's words"):
            export_hub(run, out, licence=licence, trained_on="Noise.")
    with pytest.raises(ValueError, match="trained_on= has to be given"):
        export_hub(run, out, licence="other", trained_on=None)
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        export_hub(run, out, licence="other", trained_on="Noise.", evaluation=tmp_path)
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not a folder of asa-export"):
        export_hub(run, tmp_path / "full", licence="other", trained_on="Noise.")
    export_hub(run, out, licence="other", trained_on="Noise.")
    assert json.loads((out / "config.json").read_text())["data"]["channels"] == ["t1"]
    export_hub(run, out, licence="mit", trained_on="Noise.")  # again, with another licence
    assert "license: mit" in (out / "README.md").read_text()
