"""The parallel map; worker processes end with their parent and ignore the signals that stop it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asa.data.io.parallel import in_processes

ROOT = Path(__file__).parents[3]
# A process that prints the pid of the worker of its loader, and neither exhausts nor closes the loader.
LOADING = """
import sys, time
import numpy as np
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import LoaderSettings, make_loader

class Volumes:
    def image(self, id): return np.zeros((1, 8, 8, 8), np.float16)
    def label(self, id): return None

if __name__ == "__main__":
    loader = iter(make_loader(CropDataset(Volumes(), [{"id": "a"}], (8, 8, 8)), 1, LoaderSettings(workers=1)))
    next(loader)
    print(loader._workers[0].pid, flush=True)
    time.sleep(float(sys.argv[1]))
"""


def loading(tmp_path: Path, seconds: float) -> tuple[subprocess.Popen[str], int]:
    (tmp_path / "loading.py").write_text(LOADING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "loading.py"), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
def test_a_process_ends_while_its_loader_is_open(tmp_path):
    process, worker = loading(tmp_path, 0)
    assert process.wait(60) == 0
    assert gone(worker, 60)


@needs_proc
def test_a_killed_process_leaves_no_worker(tmp_path):
    process, worker = loading(tmp_path, 60)
    process.kill()
    process.wait(60)
    assert gone(worker, 60)


@needs_proc
def test_a_worker_outlives_the_signals_that_stop_a_run(tmp_path):
    process, worker = loading(tmp_path, 60)
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        assert not gone(worker, 1)
    finally:
        process.kill()
        process.wait(60)
    assert gone(worker, 60)


# ---------------------------------------------------------------------------------------------- the parallel map


@pytest.mark.parametrize("workers", [1, 2])
def test_a_map_yields_each_job_with_its_result(workers):
    pairs = in_processes(abs, [-3, 2, -1], workers, title="", unit="", progress=False)
    assert sorted(pairs) == [(-3, 3), (-1, 1), (2, 2)]


def test_the_job_of_a_killed_process_has_no_result_and_an_exception_is_raised():
    keywords = {"title": "", "unit": "", "progress": False}
    assert list(in_processes(os._exit, [3], 2, **keywords)) == [(3, None)]
    jobs = [str(k) for k in range(30)]
    jobs[3] = jobs[17] = "__import__('os')._exit(1)"
    expected = [(job, eval(job) if job.isdigit() else None) for job in jobs]
    assert sorted(in_processes(eval, jobs, 2, **keywords), key=str) == sorted(expected, key=str)  # harms no other job
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_processes(int, ["1", "x"], 2, **keywords))
