"""Freed memory is kept, so that a step's tensors lie in pages that are mapped already."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, statistics, sys, torch
from asa.training.allocator import keep_freed_memory
told = sys.argv[1] == "keep" and keep_freed_memory()
def fill():
    return [torch.ones(2**24) for _ in range(2)]  # 64 MiB each
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(6):  # until the heap has the shape that it needs
    fill()
# The median, as a single step was once seen to map all its pages anew; memory that is given back costs that every time.
print(told, statistics.median_low(faults() for _ in range(7)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_the_memory_of_a_step_serves_the_next_one():
    def faults(how: str) -> tuple[str, int]:
        root = str(Path(__file__).parents[2])
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, cwd=root)
        told, count = run.stdout.split()
        return told, int(count)

    told, kept = faults("keep")
    if told == "False":
        pytest.skip("this C library is not glibc")
    assert kept < 100 < faults("leave")[1]
