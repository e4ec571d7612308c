"""Names, folders and files of others, and failures of what asa stands on: one line that names the file."""

import errno
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from test_hostile import tampered
from untrained import a_scan, call, checkpoint

from asa.cli import predict
from asa.data.datasets import folder, nnunet
from asa.data.datasets.record import check_records
from asa.data.io.files import LONGEST_ID, check_id, read_json, write_json, write_whole
from asa.data.io.tables import read_rows
from asa.data.splits import read_split
from asa.data.store import append_records
from asa.errors import LONGEST, one_line
from asa.export.hub import export_hub
from asa.inference.layout import label_maps_of
from asa.tasks.run import find_task
from asa.training import checkpoint as checkpoints
from asa.training.checkpoint import read_weights, save_checkpoint
from asa.training.loop import resume
from asa.training.optim import EMA
from asa.training.pretrained import read_source
from asa.training.run_folder import _check_config
from asa.training.run_log import Queued, RunLog

MINE = {"images": {"t1": "/x.nii"}}


# --- tasks


@pytest.mark.parametrize("name", [
    "asa.tasks.run.Task", "asa.tasks.run.predict_task", "asa.tasks.segmentation.Segmentation", "os.system",
    "x" * 10**6,
])  # fmt: skip
def test_a_checkpoint_names_only_tasks_that_there_are(tmp_path: Path, monkeypatch, capsys, name: str) -> None:
    file, scan = tampered(tmp_path, task=name), a_scan(tmp_path)
    assert call(predict, monkeypatch, f"checkpoint={file}", f"input={scan}", f"out={tmp_path}/out") == 1
    error = capsys.readouterr().err
    assert "no task" in error and len(error) < 300 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["stores.write_tree", "examples.Nothing", "asa.tasks.run.Task", "pathlib.Path"])
def test_what_is_no_task_of_a_plugin_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no task|does not exist|not allowed|not a function"):
        find_task(name, ["stores", "examples", "pathlib"])


# --- names


@pytest.mark.parametrize("ids", [("s1", "S1"), ("caf\u00e9", "cafe\u0301"), ("\u00c9", "e\u0301")])
def test_ids_that_are_one_file_on_some_systems_are_refused(ids: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="differ in case or in the form of accents alone"):
        check_records([{"id": id, "subject": "p", **MINE} for id in ids])


def test_ids_of_a_store_and_of_files_to_predict_are_compared_too(tmp_path: Path, monkeypatch, capsys) -> None:
    from asa.data.preprocessing.cohort import CohortSettings, prepare_cohort

    one, other = a_scan(tmp_path, "scan"), tmp_path / "again" / "SCAN.nii.gz"
    other.parent.mkdir()
    other.write_bytes(one.read_bytes())
    for image, more in ((one, True), (other, False)):
        records = folder.records(image.parent, images={"t1": image.name.replace("scan", "*").replace("SCAN", "*")})
        if more:
            assert prepare_cohort(records, tmp_path / "store", CohortSettings(), progress=False).prepared == ["scan"]
    with pytest.raises(ValueError, match="SCAN and scan .* are one file on some systems"):
        prepare_cohort(records, tmp_path / "store", CohortSettings(), progress=False)
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("a_x", "a/X"):
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(one.read_bytes())
    trained = checkpoint(tmp_path / "run")
    assert call(predict, monkeypatch, f"checkpoint={trained}", f"input={tmp_path}/in", f"out={tmp_path}/out") == 1
    assert "are one file on some systems" in capsys.readouterr().err


def test_a_long_id_and_a_long_message_are_cut() -> None:
    with pytest.raises(ValueError, match=f"longer than {LONGEST_ID} bytes") as caught:
        check_id("x" * 10**7)
    assert len(str(caught.value)) < 300
    assert len(one_line(ValueError("a" + "b" * 10**7 + "c"))) < LONGEST + 10
    assert one_line(ValueError("a" + "b" * 10**7 + "c")).startswith("ab") and one_line(OSError()) == "OSError"


@pytest.mark.parametrize("names", ['{"0": "../../evil"}', '{"0": "T1", "1": " "}', '{"0": ".hidden"}', '{"0": 3}'])
def test_a_channel_of_a_dataset_is_a_name(tmp_path: Path, names: str) -> None:
    write_dataset(tmp_path, names)
    with pytest.raises(ValueError, match=r"dataset.json: the channel .* rename it"):
        nnunet.records(tmp_path)


@pytest.mark.parametrize("names", ['{"0": "T1", "00": "T2"}', '{"0": "T1", "0": "T2"}'])
def test_a_channel_number_twice_is_refused(tmp_path: Path, names: str) -> None:
    write_dataset(tmp_path, names)
    with pytest.raises(ValueError, match=r"dataset.json: .* twice"):
        nnunet.records(tmp_path)


def write_dataset(root: Path, names: str) -> None:
    about = '"labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"'
    (root / "dataset.json").write_text(f'{{"channel_names": {names}, {about}}}')


# --- folders of runs and predictions


@pytest.mark.parametrize("content", [[{"train": [], "val": []}, None], [{"train": [], "val": []}, 3]])
def test_a_fold_that_is_none_is_named(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "splits_final.json", content)
    with pytest.raises(ValueError, match=r"splits_final.json: a fold of nnU-Net has lists"):
        read_split(tmp_path / "splits_final.json", 1)


def test_a_table_of_volumes_without_ids_names_no_label_map(tmp_path: Path) -> None:
    file = tmp_path / "sub-1" / "anat" / "sub-1_dseg.nii.gz"
    write_whole(file, b"")
    (tmp_path / "dataset_description.json").write_text("{}")
    (tmp_path / "volumes.csv").write_text("file\nsub-1/anat/sub-1_dseg.nii.gz\n")
    assert label_maps_of(tmp_path) == {}


@pytest.mark.parametrize("line", ["[" * 10**5, '{"step": Infinity}', '{"step": 1e999}', '{"step": []}', "\udcff"])
def test_a_damaged_line_of_a_log_is_left_out(tmp_path: Path, line: str) -> None:
    whole = '{"step": 1, "group": "validation"}'
    (tmp_path / "log.jsonl").write_bytes(f"{whole}\n{line}\n".encode("utf-8", "surrogateescape"))
    log = RunLog(tmp_path, total=2, start=1, trackers=())
    assert log.steps("validation") == [1] and (tmp_path / "log.jsonl").read_text() == f"{whole}\n"
    log.close()


@pytest.mark.parametrize("train", ["{steps: .inf}", "{steps: x}", "{steps: [1]}", "{steps: .nan}"])
def test_settings_of_a_run_that_are_none_are_named(tmp_path: Path, train: str) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(f"train: {train}")
    with pytest.raises(ValueError, match=r"config.yaml: not the settings of a run"):
        _check_config(tmp_path, {"train": {"steps": 1}})


@pytest.mark.parametrize("how", [SystemExit(3), KeyboardInterrupt(), ValueError("quota")])
def test_a_tracker_that_ends_its_thread_is_said_to_have_failed(how: BaseException) -> None:
    def fail() -> None:
        raise how

    said: list[str] = []
    tracker = Queued("Fake", fail, said.append)  # type: ignore[arg-type]
    tracker.thread.join(10)
    assert len(said) == 1 and re.match(
        r"warning: Fake failed \((SystemExit\(3\)|KeyboardInterrupt\(\)|quota)\)", said[0]
    )


# --- a checkpoint that is removed, a disk that is full


def test_a_checkpoint_that_is_removed_while_it_is_read_is_looked_for_again(tmp_path: Path) -> None:
    run, shell = checkpoint(tmp_path / "run"), torch.nn.Linear(8, 8)
    _, description = read_weights(run)
    ended = threading.Event()

    def train() -> None:
        step = 2
        while not ended.is_set():
            save_checkpoint(run, step, shell, description, {}, keep=1)
            step += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(150):
            assert read_weights(run)[1]["format"] == 1
            assert read_source(run)[1]["data"] == description["data"]
    finally:
        ended.set()
        thread.join()


def test_a_named_checkpoint_that_was_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = checkpoint(tmp_path / "run")
    (file,) = run.rglob("model.safetensors")
    read = checkpoints._read

    def removed(path: Path, *how: bool):
        path.unlink(missing_ok=True)
        return read(path, *how)

    monkeypatch.setattr(checkpoints, "_read", removed)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{file}: no checkpoint here")):
        read_weights(file)


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "records.jsonl").touch()
    monkeypatch.setattr("os.fsync", full)
    for write in (lambda: write_whole(tmp_path / "x", b"1"), lambda: append_records(tmp_path, [b"{}"])):
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/(x|records.jsonl)'"):
            write()
    assert not (tmp_path / "x").exists()

    def torn(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match=r"step-00000001: could not be written \(not all of it, as on a full disk\)"):
        checkpoint(tmp_path / "run")


# --- a card of a network


def test_texts_of_an_evaluation_are_plain_text_on_the_card(tmp_path: Path) -> None:
    run, out = checkpoint(tmp_path / "run"), tmp_path / "hub"
    bad = "x</td><script>alert(1)</script>\n\n## Licence\n\nmit | [a](http://b) `c`"
    statistic = {"mean": 0.5, "low": 0.4, "high": 0.6, "used": 3}
    summary = {"cases": 3, "asa": bad, "policy": {"name": bad}, "results": {bad: {bad: statistic}}}
    write_json(tmp_path / "summary.json", summary)
    export_hub(run, out, licence="other", trained_on="Noise.", evaluation=tmp_path)
    body = (out / "README.md").read_text().split("---\n", 2)[2]
    assert "<script>" not in body and body.count("\n## Licence") == 1 and not re.search(r"(?<!\\)\]\(", body)
    (row,) = [line for line in body.splitlines() if line.startswith("| x")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


@pytest.mark.parametrize("change", [
    {"results": {"a": {"dice": {}}}}, {"results": {"a": 3}}, {"policy": 3}, {"cases": "x"}, {"cases": None},
    {"results": {"a": {"dice": {"mean": "x", "low": 1, "high": 1, "used": 1}}}}, {"policy": {}},
])  # fmt: skip
def test_an_evaluation_that_is_none_is_no_card(tmp_path: Path, change: dict) -> None:
    run = checkpoint(tmp_path / "run")
    summary = {"cases": 3, "asa": "0", "policy": {"name": "ibsr"}, "results": {}}
    write_json(tmp_path / "summary.json", summary | change)
    with pytest.raises(ValueError, match=r"summary.json: not as asa-evaluate writes it"):
        export_hub(run, tmp_path / "hub", licence="other", trained_on="Noise.", evaluation=tmp_path)
    assert not (tmp_path / "hub").exists()


def test_a_key_twice_in_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": 1})[:-1] + ', "a": 2}')
    with pytest.raises(ValueError, match=r"x.json: not valid JSON \(a key is twice among a\)"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("training", [{}, {"optimizer": 3}, {"optimizer": {}, "scaler": {}, "random": [1]}])
def test_a_training_state_of_something_else_is_named(tmp_path: Path, training: dict) -> None:
    method = torch.nn.Linear(2, 2)
    optimizer, scaler = torch.optim.SGD(method.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    save_checkpoint(tmp_path, 1, method, {}, training, keep=1)
    with pytest.raises(ValueError, match=r"step-00000001: its training state does not fit this run \("):
        resume(tmp_path, method, optimizer, scaler, EMA(method, 0.0), {})


def test_a_folder_in_the_place_of_a_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder: give a table"):
        read_rows(tmp_path)
