"""What a first run of asa on a GPU should check, in about ten minutes.

Fused operations against the written-out ones, one process over NCCL, a demonstration of pretraining, time, fraction of
the matrix rate (MFU) and memory of training steps against `plan=only`, and the tests that need a GPU. Without a GPU the
same at tiny sizes, which checks this script.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmark import __main__ as bench
from scripts.benchmark.plan import Spec, describe

GPU: dict[str, Any] = {
    "size": "base",
    "edge": 128,
    "batches": (1, 8, 32),
    "precisions": ("bf16", "fp16"),
    "tests": "tests",
    "demo": {"subjects": 4, "resolution": 2, "steps": 200, "warmup": 20},
    "matrix": 8192,
}
CPU: dict[str, Any] = {
    "size": "tiny",
    "edge": 64,
    "batches": (1,),
    "precisions": ("fp32",),
    "tests": "tests/training/test_gpu.py",
    "demo": {"subjects": 2, "resolution": 4, "steps": 10, "warmup": 2},
    "matrix": 64,
}


def plan(sizes: dict[str, Any], common: Spec) -> list[Spec]:
    """The rows, the quick ones first; the tests, which take minutes, last."""
    rows: list[Spec] = []
    for precision in sizes["precisions"]:
        own = {"part": "checks", "kind": "agreement", "precision": precision, "size": sizes["size"]}
        rows.append({**own, "name": f"window attention, fused, {precision}", "operation": "windows"})
        rows.append({**own, "name": f"region attention as on this device, {precision}", "operation": "regions"})
    rows.append({"part": "checks", "name": "one process over NCCL (on a CPU: gloo)", "kind": "collectives"})
    rows.append({"part": "checks", "name": "demonstration of pretraining on phantoms", "kind": "demo", **sizes["demo"]})
    for batch in sizes["batches"]:
        for network in ("asa", "unet"):
            for precision in sizes["precisions"]:
                name = f"{describe(network, sizes['size'], sizes['edge'])}, batch {batch}, {precision}"
                own = {"network": network, "size": sizes["size"], "edge": sizes["edge"], "batch": batch}
                step = {"part": "steps", "name": name, "kind": "step", **own, "precision": precision, "planned": True}
                rows.append(step)
    rows.append({"part": "checks", "name": "pytest -m gpu", "kind": "tests", "tests": sizes["tests"]})
    return [{**common, **row} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print and write; 1 if a row failed or there was no time for it."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__, formatter_class=form)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats per step")
    parser.add_argument("--minutes", type=float, default=15, help="rows that are not reached by then fail")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of bench.json and bench.md")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes

    def left() -> float:
        return max(0.0, end - time.monotonic())

    with tempfile.TemporaryDirectory(prefix="asa-gpu-check-") as scratch:
        common: Spec = {"device": options.device, "precision": "auto", "threads": None, "scratch": scratch, "batch": 1}
        common |= {"repeats": options.repeats, "matrix": CPU["matrix"]}
        machine = bench.run_row({**common, "kind": "machine"}, left())
        if machine.pop("status") != "ok":
            print(machine["reason"], file=sys.stderr)
            return 1
        sizes = GPU if machine["device"] == "cuda" else CPU
        if machine["precision"] == "fp16":  # what "auto" is on a GPU without bfloat16
            sizes = {**sizes, "precisions": ("fp16",)}
        common |= {"device": machine["device"], "threads": machine["threads"], "matrix": sizes["matrix"]}
        common["precision"] = sizes["precisions"][0]
        shown = {"precision": " and ".join(sizes["precisions"]), "size": sizes["size"], "matrix": CPU["matrix"]}
        batches = ", ".join(map(str, sizes["batches"]))
        return bench.measure(plan(sizes, common), {**machine, **shown, "batch": batches}, options.out, left)


if __name__ == "__main__":
    sys.exit(main())
