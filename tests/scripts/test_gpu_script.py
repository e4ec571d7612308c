"""The GPU check runs whole on a CPU, at tiny sizes, and notices what it is there for."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import forked_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script of the checkout, not of the package
bench = importlib.import_module("scripts.benchmark.__main__")
check = importlib.import_module("scripts.benchmark.gpu_check")
checks = importlib.import_module("scripts.benchmark.checks")
row = importlib.import_module("scripts.benchmark.row")

CPU = torch.device("cpu")
AGREEMENT = {"kind": "agreement", "precision": "fp32", "size": "tiny"}


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nilearn")
    (tmp_path / "test_one.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_one(): pass\n")
    monkeypatch.setitem(check.CPU, "tests", str(tmp_path / "test_one.py"))
    monkeypatch.setattr(bench, "run_row", forked_rows(bench.run_row, row.main, tmp_path))
    assert check.main(["--device=cpu", "--repeats=1", "--minutes=60", f"--out={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [found["status"] for found in rows] == ["ok"] * len(rows)
    kinds = [found["kind"] for found in rows]
    assert kinds == ["agreement", "agreement", "collectives", "demo", "step", "step", "tests"]
    assert rows[-1]["passed"] == 1
    steps = rows[4:6]
    assert [(found["network"], found["batch"]) for found in steps] == [("asa", 1), ("unet", 1)]
    for found in steps:
        assert 0 < found["planned_bytes"] < found["peak_bytes"] and found["fraction"] > 0
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "## Checks" in page and "## Training steps" in page and "plan=only GiB" in page


def test_a_gpu_has_every_step_in_both_precisions() -> None:
    rows = check.plan(check.GPU, {"device": "cuda"})
    steps = [(found["network"], found["batch"], found["precision"]) for found in rows if found["kind"] == "step"]
    assert steps == [(n, b, p) for b in (1, 8, 32) for n in ("asa", "unet") for p in ("bf16", "fp16")]
    assert all(found["planned"] for found in rows if found["kind"] == "step")
    names = [found["name"] for found in rows]
    assert len(set(names)) == len(names) and rows[-1]["tests"] == "tests"


@pytest.mark.parametrize("operation", ["windows", "regions"])
def test_an_operation_that_differs_is_noticed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checks.agreement({**AGREEMENT, "operation": operation}, CPU)
    assert found["error"] <= 1e-4 and found["gradient_error"] <= 1e-4 and found["written_seconds"] > 0
    fast, written, inputs = getattr(checks, operation)(AGREEMENT, CPU)
    monkeypatch.setattr(checks, operation, lambda *_: (lambda x: fast(x) * 1.01, written, inputs))
    with pytest.raises(ArithmeticError, match="value and gradient differ"):
        checks.agreement({**AGREEMENT, "operation": operation}, CPU)


def test_a_step_that_the_plan_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    monkeypatch.setattr(row, "step_peak", lambda *given: None)
    step = {"kind": "step", "network": "asa", "size": "tiny", "edge": 32, "batch": 1, "planned": True}
    found = row.measure({**step, "device": "cuda", "precision": "bf16", "repeats": 1}, None)
    assert found["status"] == "left out" and found["reason"].startswith("plan=only: a step does not fit in the 0 GiB")


def test_rows_that_are_not_reached_in_time_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = dict.fromkeys(("processor", "threads", "cores", "system", "asa", "torch", "monai", "python"), "x")
    machine |= dict.fromkeys(("precision", "size", "batch", "matrix"), "x") | {"matrix_rates": {"fp32": 1e9}}
    assert bench.measure(check.plan(check.CPU, {}), machine, tmp_path, lambda: 0.0) == 1
    assert capsys.readouterr().out.count("no time was left") >= 9
