"""A cohort prepared by the workers of a dask scheduler: the same store, and a worker that dies loses nothing."""

import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asa
from asa.cli import prepare
from asa.data.datasets.record import Record
from asa.data.io.nifti import write_image
from asa.data.io.parallel import on_cluster
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Stands for a skull strip: the first call terminates the worker that called it.
STRIP = """
[ -e "$1" ] || { touch "$1"; kill -9 $PPID; exit; }
cp "$2" "$3"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", **quiet) as cluster:
        yield cluster


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[list[Record], CohortSettings, Path]:
    """Five scans, the third one damaged, with a strip that terminates one worker unless the file exists."""
    rng, mask = np.random.default_rng(0), np.zeros((16, 16, 16))
    mask[3:13, 4:12, 3:13] = 1
    write_image(tmp_path / "mask.nii.gz", mask, np.eye(4), dtype=np.uint8)
    records: list[Record] = []
    for k in range(5):
        path = tmp_path / f"s{k}.nii.gz"
        write_image(path, rng.uniform(10, 99, (16, 16, 16)), np.eye(4))
        records.append({"id": f"s{k}", "subject": f"p{k}", "images": {"t1": str(path)}})
    (tmp_path / "s2.nii.gz").write_bytes(b"no scan")
    (tmp_path / "strip.sh").write_text(STRIP)
    words = ["sh", tmp_path / "strip.sh", tmp_path / "killed", tmp_path / "mask.nii.gz", "{mask}", "{image}"]
    strip = shlex.join(map(str, words)).replace("'{mask}'", "{mask}").replace("'{image}'", "{image}")
    return records, CohortSettings(settings=PrepareSettings(strip=strip)), tmp_path / "killed"


def bytes_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*.*") if path.name != ".lock"}


def test_the_store_of_a_cluster_that_loses_a_worker_is_that_of_this_process(cluster, cohort, tmp_path, capfd) -> None:
    records, settings, killed = cohort
    before = {worker.pid for worker in cluster.workers.values()}
    far = prepare_cohort(records, tmp_path / "far", settings, scheduler=cluster.scheduler_address)
    assert killed.is_file() and before != {worker.pid for worker in cluster.workers.values()}
    assert "prepare: 100%" in capfd.readouterr().err.replace("\r", "\n")
    near = prepare_cohort(records, tmp_path / "near", settings, progress=False)
    assert far.prepared == near.prepared == ["s0", "s1", "s3", "s4"] and far.failures == near.failures
    assert bytes_of(tmp_path / "far") == bytes_of(tmp_path / "near") and list(far.failures) == ["s2"]
    again = prepare_cohort(records, tmp_path / "far", settings, scheduler=cluster.scheduler_address, progress=False)
    assert again.skipped == near.prepared and bytes_of(tmp_path / "far") == bytes_of(tmp_path / "near")


def terminate(_: int) -> None:
    import os

    os._exit(1)


def double(number: int) -> int:
    return 2 * number


def test_a_job_that_terminates_its_workers_gives_no_result_and_the_others_theirs(cluster, monkeypatch) -> None:
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)  # 3 by default, each with a new worker
    address, options = cluster.scheduler_address, {"title": "t", "unit": "u", "progress": False}
    assert list(on_cluster(terminate, [1], address, **options)) == [(1, None)]
    assert sorted(on_cluster(double, range(50), address, **options)) == [(k, 2 * k) for k in range(50)]


def test_a_worker_that_does_not_see_the_store_is_named(cluster, tmp_path, monkeypatch) -> None:
    file = tmp_path / "lock"
    file.write_text("here")
    there = Path(f"{tmp_path}/elsewhere/lock")
    monkeypatch.setattr(type(file), "read_bytes", lambda self: b"here")
    with pytest.raises(ValueError, match=rf"dask worker tcp://.* does not see {tmp_path}/elsewhere: choose an out="):
        list(on_cluster(double, [1], cluster.scheduler_address, title="t", unit="u", shared=there, progress=False))


def test_workers_with_threads_are_refused() -> None:
    options = {"threads_per_worker": 2, "processes": False, "dashboard_address": ":0", "silence_logs": 50}
    with (
        distributed.LocalCluster(n_workers=1, **options) as cluster,
        pytest.raises(ValueError, match="has 2 threads: start it with --nthreads 1"),
    ):
        list(on_cluster(double, [1], cluster.scheduler_address, title="t", unit="u", progress=False))


def process() -> dict[str, str]:
    import multiprocessing

    return {"asa": multiprocessing.current_process().name, "numpy": "2"}


def another_version(version: str) -> None:
    import asa

    asa.__version__ = version


def test_a_worker_with_other_versions_is_refused(cluster, cohort, tmp_path) -> None:
    address = cluster.scheduler_address
    with pytest.raises(ValueError, match=r"dask worker tcp://.* has asa Dask.* instead of MainProcess: install"):
        list(on_cluster(double, [1], address, title="t", unit="u", made_with=process, progress=False))
    records, settings, killed = cohort
    killed.touch()
    with distributed.Client(cluster) as client:
        client.run(another_version, "0.0.9")
        try:
            with pytest.raises(ValueError, match=rf"has asa 0.0.9 instead of {asa.__version__}: install the same"):
                prepare_cohort(records, tmp_path / "store", settings, scheduler=address, progress=False)
        finally:
            client.run(another_version, asa.__version__)
    assert not list((tmp_path / "store" / "images").glob("*"))


def slow(number: int) -> int:
    time.sleep(0.5)
    return number


def test_a_scheduler_that_is_lost_ends_the_command() -> None:
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": ":0", "silence_logs": 50}
    with (
        distributed.LocalCluster(n_workers=1, **options) as cluster,
        pytest.raises(ConnectionError, match="the dask scheduler was lost; give the same command again"),
    ):
        for _ in on_cluster(slow, range(8), cluster.scheduler_address, title="t", unit="u", progress=False):
            cluster.close()


def test_a_scheduler_that_was_killed_is_lost_too(cluster, monkeypatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise distributed.comm.CommClosedError("Stream is closed")

    monkeypatch.setattr(distributed.Client, "submit", killed)
    with pytest.raises(ConnectionError, match="the dask scheduler was lost; give the same command again"):
        list(on_cluster(double, [1], cluster.scheduler_address, title="t", unit="u", progress=False))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["executor=slurm"], "executor=slurm: choose processes or dask"),
        (["executor=dask"], "executor=dask and scheduler=ADDRESS go together"),
        (["scheduler=tcp://a:1"], "executor=dask and scheduler=ADDRESS go together"),
        (["executor=dask", "scheduler=tcp://a:1", "workers=2"], "workers= is for executor=processes"),
    ],
)
def test_settings_of_the_executor_that_contradict_each_other_are_named(tmp_path, capsys, wrong, reason) -> None:
    assert prepare.main(arguments=[f"data.root={tmp_path}", f"out={tmp_path}/store", *wrong]) == 1
    assert f"error: {reason}" in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_no_scheduler_and_no_dask_are_named(monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("asa.data.io.parallel.PATIENCE", 0.2)
    for wrong in (address, "nowhere"):
        with pytest.raises(ConnectionError, match=f"scheduler={wrong}: no dask scheduler answers there"):
            list(on_cluster(double, [1], wrong, title="t", unit="u"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r'executor=dask needs it: run pip install "asa-mri\[dask\]"'):
        list(on_cluster(double, [1], address, title="t", unit="u"))
