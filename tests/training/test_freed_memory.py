"""Freed memory is kept by the process, so that the tensors of a step reuse mapped pages."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, statistics, sys, torch
from asa.training.device import keep_freed_memory
accepted = sys.argv[1] == "keep" and keep_freed_memory()
def fill():
    return [torch.ones(2**24) for _ in range(2)]  # 64 MiB each
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(6):  # until the heap has grown
    fill()
# The median, as a single step may map all pages again; memory that is returned to the system costs that every time.
print(accepted, statistics.median_low(faults() for _ in range(7)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_memory_of_a_step_is_reused_by_the_next_step():
    def faults(how: str) -> tuple[str, int]:
        root = str(Path(__file__).parents[2])
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, cwd=root)
        accepted, count = run.stdout.split()
        return accepted, int(count)

    accepted, kept = faults("keep")
    if accepted == "False":
        pytest.skip("this C library is not glibc")
    assert kept < 100 < faults("default")[1]
