"""Speed and memory of asa on this machine, compared with other networks.

Every row is measured in a new process. The parent process does not import torch: on Linux, a child's peak memory
starts at the memory of its parent.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.benchmark.plan import PARTS, SCALES, Spec, plan
from scripts.benchmark.report import write

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""

    def number(text: str) -> int:
        if int(text) < 1:
            raise ValueError(text)
        return int(text)

    number.__name__ = "positive number"
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Speed and memory of asa.", formatter_class=form)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device")
    types = ("fp32", "bf16", "fp16")
    parser.add_argument("--precision", choices=types, default="fp32", help="autocast precision")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--size", choices=("base", "small", "tiny"), default="base", help="size of the networks")
    parser.add_argument("--batch", type=number, default=1, help="global batch size")
    parser.add_argument("--repeats", type=number, default=5, help="timed repeats per row, fewer after 60 s")
    parser.add_argument("--threads", type=number, default=None, help="CPU threads; None: the default of torch")
    parser.add_argument(
        "--edge", type=number, default=128, help="edge of the training volumes in voxels, a multiple of 32"
    )
    parser.add_argument("--records", type=number, nargs="+", default=SCALES, help="scans in the stores of part scale")
    parser.add_argument("--matrix", type=number, default=4096, help="edge of the matrices for the machine's rate")
    parser.add_argument("--timeout", type=number, default=900, help="seconds until a row counts as failed")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of bench.json and bench.md")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    if options.edge % 32 or options.edge < 64:
        parser.error(f"--edge must be a multiple of 32 and at least 64, got {options.edge}")
    return options


def run_row(spec: Spec, timeout: float) -> dict[str, Any]:
    """Measure a row in a new process: its numbers and "status" "ok", or another one and its "reason"."""
    command = [sys.executable, "-m", "scripts.benchmark.row", json.dumps(spec)]
    # A new session, so that its child processes can be ended with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after {timeout:g} s"}
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"status": "failed", "reason": f"ended by {name}" + (": out of memory?" if name == "SIGKILL" else "")}
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return {"status": "failed", "reason": lines[-1], "errors": errors[-4000:]}
    return {"status": "ok", **json.loads(out.splitlines()[-1])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a row failed."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="asa-bench-") as scratch:
        keys = ("device", "precision", "threads", "repeats", "matrix")
        common = {**{key: getattr(options, key) for key in keys}, "scratch": scratch}
        machine = run_row({"kind": "machine", **common}, options.timeout)
        if machine.pop("status") != "ok":
            print(machine["reason"], file=sys.stderr)
            return 1
        common |= {key: machine[key] for key in ("device", "precision", "threads")}
        machine |= {"matrix": options.matrix, "size": options.size, "batch": options.batch}
        specs = plan(options.parts, options.size, options.edge, options.batch, common, options.records)
        return measure(specs, machine, options.out, lambda: options.timeout)


def measure(specs: Sequence[Spec], machine: dict[str, Any], out: Path, left: Callable[[], float]) -> int:
    """Measure rows, print them and write the report after each; 1 if one failed.

    Args:
        specs: of the rows.
        machine: what is written above the tables.
        out: folder of the report.
        left: seconds until the next row counts as failed.
    """
    rows: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}
    for k, spec in enumerate(specs, start=1):
        print(f"[{k}/{len(specs)}] {spec['part']}: {spec['name']} ...", end=" ", flush=True)
        key = json.dumps({name: value for name, value in spec.items() if name != "part"})
        if key not in done:
            timeout = left()
            done[key] = run_row(spec, timeout) if timeout else {"status": "failed", "reason": "no time was left"}
        row = done[key]
        shown = f"{row['seconds']:.4g} s" if row["status"] == "ok" else f"{row['status'].upper()}: {row['reason']}"
        print(shown, flush=True)
        rows.append({**spec, **row})
        page = write(out, machine, rows)
    print(f"\n{page}\nwrote {out.absolute() / 'bench.md'} and bench.json")
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
