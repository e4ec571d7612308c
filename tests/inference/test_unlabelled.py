"""Unlabelled scans in a fine-tuning: which they are, that their own labels are not read, and resuming."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import LABELS, write_brain
from stores import with_subjects, without_labels

from asa.data.datasets import folder
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.splits import training_digests, write_split
from asa.data.store import Store
from asa.inference import unlabelled
from asa.inference.atlas import Atlas
from asa.inference.unlabelled import UnlabelledScans
from asa.ops.labels import IGNORED
from asa.tasks.run import finetune
from asa.training.checkpoint import read_description

TINY = {
    "model": "vit_conv_tiny", "crop": 32, "loader.workers": 0, "train.device": "cpu", "train.steps": 2,
    "train.batch_size": 4, "train.save_every": 1, "optim.warmup": 0, "data.placement": "random",
    "data.split.validation": 0, "data.split.test": 1,
}  # fmt: skip


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The atlases of each registration, which gives class 2 below the middle and ignores the first slice."""
    calls: list[list[str]] = []

    def carried(scan: np.ndarray, spacing: Sequence[float], atlases: Sequence[Atlas]) -> np.ndarray:
        calls.append([atlas.id for atlas in atlases])
        probabilities = np.zeros((atlases[0].classes, *scan.shape[1:]), np.float32)
        probabilities[0], probabilities[2, : scan.shape[1] // 2] = 0.4, 0.6
        probabilities[:, 0] = 0
        return probabilities

    monkeypatch.setattr(unlabelled, "carry_over", carried)
    monkeypatch.setattr(unlabelled, "load_ants", lambda threads: None)
    return calls


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of unlabelled scans: two of new subjects, one called as a labelled subject, and a copy of another one."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("stores") / "others"
    for name, seed in (("u0", 10), ("u1", 11), ("s1", 12), ("copy", 2)):  # s2 of the labelled store has the seed 2
        write_brain(raw, name, seed)
    records = folder.records(raw, images={"t1": "*_T1.nii.gz"})
    assert not prepare_cohort(records, out, CohortSettings(), progress=False).failures
    return out


def test_the_rest_of_the_training_part_is_trained_on_with_carried_labels(
    store: Path, tmp_path: Path, registered: list[list[str]]
) -> None:
    run = tmp_path / "run"
    finetune(store, run, **TINY, **{"data.labelled": 1, "data.unlabelled": "rest"})
    split, content = (json.loads((run / name).read_text()) for name in ("split.json", "carried.json"))
    assert len(split["train"]) == 1 and registered == [split["train"]] * 2
    rest = {"s0", "s1", "s2", "s3"} - {*split["train"], *split["test"]}
    assert content["atlases"] == dict.fromkeys(rest, split["train"][0])
    assert rest == {path.stem for path in (run / "carried").glob("*.npy")}
    trained = [Store(store).record(id) for id in (*split["train"], *rest)]
    assert read_description(run)["data"]["scans"] == training_digests(trained)["scans"]

    source = UnlabelledScans("rest", Store(store), split, [], run)
    for id in rest:
        label, own = source.label(id), Store(store).label(id)
        assert label is not None and own is not None and label.shape == own.shape and label.dtype == np.uint8
        middle = label.shape[1] // 2
        assert (label[0, 0] == IGNORED).all() and (label[0, 1:middle] == 2).all() and not label[0, middle:].any()
        assert np.array_equal(source.image(id), Store(store).image(id))
    (labelled,) = split["train"]
    assert np.array_equal(source.label(labelled), Store(store).label(labelled))


def test_scans_of_the_store_without_a_label_map_are_among_the_rest(
    store: Path, tmp_path: Path, registered: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = with_subjects(store, tmp_path / "store", {f"s{k}": f"s{k}" for k in range(4)})
    without_labels(copy, "s1")
    finetune(copy, tmp_path / "run", **TINY, **{"data.unlabelled": "rest"})
    split, content = (json.loads((tmp_path / "run" / name).read_text()) for name in ("split.json", "carried.json"))
    assert sorted([*split["train"], *split["test"]]) == ["s0", "s2", "s3"] and list(content["atlases"]) == ["s1"]
    assert "left out" not in capsys.readouterr().out
    write_split(tmp_path / "split.json", {"train": ["s0", "s1"], "validation": [], "test": ["s2"]})
    given = {"data.split_file": tmp_path / "split.json", "data.unlabelled": "rest"}
    finetune(copy, tmp_path / "other", **TINY, **given)
    assert list(json.loads((tmp_path / "other" / "carried.json").read_text())["atlases"]) == ["s1"]
    assert "left out" not in capsys.readouterr().out


def test_a_run_that_is_resumed_registers_only_what_is_missing_and_keeps_its_scans(
    store: Path, tmp_path: Path, registered: list[list[str]]
) -> None:
    settings = {**TINY, "data.labelled": 1, "data.unlabelled": "rest"}
    finetune(store, tmp_path / "run", **settings)
    finetune(store, tmp_path / "run", **settings | {"train.steps": 3})
    assert len(registered) == 2
    next((tmp_path / "run" / "carried").glob("*.npy")).unlink()
    finetune(store, tmp_path / "run", **settings | {"train.steps": 4})
    assert len(registered) == 3


def test_labels_of_other_atlases_are_not_kept(store: Path, tmp_path: Path, registered: list[list[str]]) -> None:
    split = {"train": ["s0"], "validation": [], "test": ["s3"]}
    for atlas in ("s0", "s1"):  # the first was stopped before its first step
        scans = UnlabelledScans("rest", Store(store), {**split, "train": [atlas]}, ["s2"], tmp_path)
        scans.carry_labels()
    assert registered == [["s0"], ["s1"]]


def test_labels_are_carried_again_to_other_voxels_and_a_scan_that_fails_costs_no_others(
    store: Path, raw: Path, tmp_path: Path, registered: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = {"train": ["s0"], "validation": [], "test": ["s3"]}
    coarse, records = tmp_path / "coarse", folder.records(raw, images={"t1": "*_T1.nii.gz"}, label="*_seg.nii.gz")
    prepare_cohort(records, coarse, CohortSettings(settings=PrepareSettings(spacing=4), labels=LABELS), progress=False)
    for path in (store, coarse):  # the first was stopped before its first step
        scans = UnlabelledScans("rest", Store(path), split, ["s1", "s2"], tmp_path)
        scans.carry_labels()
        assert all(scans.label(id).shape == Store(path).label(id).shape for id in ("s1", "s2"))
    assert len(registered) == 4
    UnlabelledScans("rest", Store(coarse), split, ["s2"], tmp_path).carry_labels()  # s1 was left out
    assert len(registered) == 4
    carried = unlabelled.carry_over

    def fails(scan: np.ndarray, *others: object) -> np.ndarray:
        if np.array_equal(scan, Store(coarse).image("s1")):
            raise ValueError("not a brain")
        return carried(scan, *others)

    monkeypatch.setattr(unlabelled, "carry_over", fails)
    (tmp_path / "carried/s1.npy").unlink()
    with pytest.raises(ValueError, match=r"no labels for s1 \(not a brain\): leave this scan out"):
        UnlabelledScans("rest", Store(coarse), split, ["s2", "s1"], tmp_path).carry_labels()
    assert len(registered) == 4 and (tmp_path / "carried/s2.npy").exists()


def test_a_resumed_run_with_other_unlabelled_scans_is_refused_as_other_settings(
    store: Path, others: Path, tmp_path: Path, registered: list[list[str]]
) -> None:
    finetune(store, tmp_path / "run", **TINY, **{"data.labelled": 1})
    with pytest.raises(ValueError, match="holds a run with other settings"):
        finetune(store, tmp_path / "run", **TINY, **{"data.labelled": 1, "data.unlabelled": str(others)})
    assert not registered


def test_scans_of_another_store_are_those_that_the_split_does_not_know(
    store: Path, others: Path, tmp_path: Path, registered: list[list[str]]
) -> None:
    finetune(store, tmp_path / "run", **TINY, **{"data.unlabelled": str(others)})
    first, second, _ = json.loads((tmp_path / "run" / "split.json").read_text())["train"]  # they take turns
    content = json.loads((tmp_path / "run" / "carried.json").read_text())
    assert content["atlases"] == {"u0": first, "u1": second} and registered == [[first], [second]]


def test_stores_that_do_not_fit_and_nothing_unlabelled_are_refused(
    store: Path, raw: Path, tmp_path: Path, registered: list[list[str]]
) -> None:
    with pytest.raises(
        ValueError, match="data.unlabelled=rest: there are no unlabelled scans, as data.labelled leaves"
    ):
        finetune(store, tmp_path / "run", **TINY, **{"data.unlabelled": "rest"})
    with pytest.raises(ValueError, match="there are no unlabelled scans, as the labelled store has all of its scans"):
        finetune(store, tmp_path / "run", **TINY, **{"data.unlabelled": str(store)})
    records = folder.records(raw, images={"t1": "*_T1.nii.gz"})
    prepare_cohort(records, tmp_path / "wide", CohortSettings(settings=PrepareSettings(margin=9)), progress=False)
    with pytest.raises(
        ValueError, match=r"another way than .* \(prepare\.margin: \d there, 9 here\): prepare both alike"
    ):
        finetune(store, tmp_path / "run", **TINY, **{"data.unlabelled": str(tmp_path / "wide")})
    # A background of NaN that one of them accepts changes no other scan.
    prepare_cohort(records, tmp_path / "nan", CohortSettings(settings=PrepareSettings(nan="zero")), progress=False)
    with pytest.raises(ValueError, match="the labelled store has all of its scans"):
        finetune(store, tmp_path / "run", **TINY, **{"data.unlabelled": str(tmp_path / "nan")})
    assert not (tmp_path / "run").exists() and not registered
