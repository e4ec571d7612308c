"""The benchmark's rows, operation counts and failures, at tiny sizes. Timings are not tested."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import forked_rows

from asa import LinearWindowAttention

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmark is a script of the checkout, not of the package
main = importlib.import_module("scripts.benchmark.__main__")
clock = importlib.import_module("scripts.benchmark.clock")
plan = importlib.import_module("scripts.benchmark.plan")
row = importlib.import_module("scripts.benchmark.row")

COMMON = {"device": "cpu", "precision": "fp32", "threads": 1, "repeats": 1, "matrix": 64}
RATE = 1e9
EVERY = {"name", "part", "status", "seconds", "seconds_best", "repeats", "volumes_per_second", "peak_bytes"}


def rates() -> dict[str, float]:
    return {"fp32": RATE}


def toy(network: str, edge: int = 64, **own: Any) -> dict[str, Any]:
    return {"kind": "step", "network": network, "size": "tiny", "edge": edge, "batch": 1, **COMMON, **own}


def step_operations(edge: int, batch: int, *, window: int | None) -> int:
    """Of a tiny pretraining step, by hand; a multiplication and an addition are two. No window: all tokens."""
    width, depth, decoder_depth, patch = 96, 4, 2, 8**3
    length = (edge // 8) ** 3
    masked = round(0.75 * length)
    visible = length - masked

    def block(count: int, shift: int) -> int:
        sizes = [count]
        if window:
            head = min(shift, count)
            whole, tail = divmod(count - head, window)
            sizes = [head, *[window] * whole, tail]
        attention = sum(2 * 2 * size**2 * width for size in sizes)  # q k^T, and its product with v
        return attention + 2 * count * width**2 * (3 + 1 + 4 + 4)  # qkv, proj, MLP

    embed = 2 * visible * patch * width
    inner = sum(block(visible, shift=(i % 2) * (window or 0) // 2) for i in range(depth))
    inner += sum(block(length, shift=(i % 2) * (window or 0) // 2) for i in range(decoder_depth))
    inner += 2 * visible * width**2 + 2 * masked * width * patch  # projection, head
    # Backward costs twice the forward pass, but the image wants no gradient.
    return batch * (2 * embed + 3 * inner)


@pytest.mark.parametrize(("edge", "batch"), [(48, 1), (40, 2)])
def test_operations_of_a_pretraining_step_are_those_of_the_formula(edge: int, batch: int) -> None:
    for network, window in (("asa", 16), ("dense", None), ("written", None)):
        found = row.measure(toy(network, edge, batch=batch), rates)
        expected = step_operations(edge, batch, window=window)
        assert found["operations"] == expected
        assert found["fraction"] == pytest.approx(expected / (found["seconds"] * RATE))
        assert found["equivalent"] == pytest.approx(found["seconds"] * RATE / batch)


def test_both_dense_attentions_compute_the_same() -> None:
    networks = importlib.import_module("scripts.benchmark.networks")
    windows, tokens = LinearWindowAttention(24, 3, window=8), torch.randn(2, 40, 24)
    fused, written = (networks.DenseAttention(windows, written=way)(tokens) for way in (False, True))
    torch.testing.assert_close(fused, written)


def test_the_dense_network_differs_in_attention_only() -> None:
    networks = importlib.import_module("scripts.benchmark.networks")
    ours, twin = (networks.make_method(name, "tiny", 32).model for name in ("asa", "dense"))
    sizes = [
        {name: tuple(p.shape) for name, p in model.named_parameters() if "relative_position_bias" not in name}
        for model in (ours, twin)
    ]
    assert sizes[0] == sizes[1]
    assert not any("relative_position_bias" in name for name, _ in twin.named_parameters())


@pytest.mark.parametrize("network", ["unet", "conv", "light", "unetr", pytest.param("swin", marks=pytest.mark.slow)])
def test_segmentation_networks_train_and_predict(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SECOND", 0)  # warm enough after one call
    trained = row.measure(toy(network), rates)
    window: dict[str, Any] = {"kind": "window", "volume": [64, 64, 64], "windows": 1, "overlap": 0.5}
    slid = row.measure(toy(network, **window), rates)
    # A step is a forward pass and about twice as much backward.
    assert 2.5 < trained["operations"] / slid["operations"] < 3.2


def test_importance_and_loader_rows_are_measured(tmp_path: Path) -> None:
    scored = row.measure({"kind": "importance", "importance": "orientation", "edge": 16, "batch": 2, **COMMON}, rates)
    assert scored["volumes_per_second"] == pytest.approx(2 / scored["seconds"]) and "operations" not in scored
    crops = {"kind": "loader", "edge": 16, "batch": 1, "volume": [20, 24, 20], "workers": 0, "scratch": str(tmp_path)}
    for augment in (False, True):
        read = row.measure({**crops, "augment": augment, **COMMON}, None)
        assert read["calls"] == row.BATCHES and "equivalent" not in read


def test_region_rows_are_measured() -> None:
    spec = {"kind": "attention", "edge": 12, "regions": 5, "batch": 1, **COMMON}
    segments, dense = (row.measure({**spec, "backend": backend}, rates) for backend in ("segments", "dense"))
    assert dense["operations"] == 4 * 144**2 * 8 * 32 > segments["operations"] and segments["extra_bytes"] >= 0
    labels = row.voronoi(12, 5)
    assert labels.shape == (1, 12, 12) and len(labels.unique()) == 5
    assert row.measure({"kind": "restore", "size": "tiny", "edge": 32, "regions": 3, **COMMON}, rates)["seconds"] > 0


def test_operations_on_a_store_of_many_scans_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one process here; the command takes a new one for each."""
    monkeypatch.setattr(importlib.import_module("scripts.benchmark.scale"), "LINKS", 5)
    rows = plan.plan(["scale"], "tiny", 64, 1, {**COMMON, "scratch": str(tmp_path)}, [16])
    for spec in rows:
        found = row.scale(spec, torch.device("cpu"))
        assert found["seconds"] > 0 and found["extra_bytes"] >= 0 and found["manifest_bytes"] > 5000, spec["name"]
    store = importlib.import_module("asa").Store(tmp_path / "scale-16" / "store")
    assert len(store) == 16 and store.verify() == []
    on_disk = sum(512 * path.stat().st_blocks / path.stat().st_nlink for path in tmp_path.rglob("*.*"))
    assert on_disk < 500_000 < 16 * store.image(store.records.ids[0]).nbytes


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_with_a_loader_reports_the_fraction_of_time_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(row, "READY", 1)
    spec = toy("asa", 16, kind="fed", volume=[20, 24, 20], workers=workers, scratch=str(tmp_path))
    found = row.measure(spec, None)
    assert 0 < found["waiting"] < 1 and found["calls"] == row.STEPS and "equivalent" not in found


def test_windows_are_counted_as_monai_places_them() -> None:
    torch, inferers = importlib.import_module("torch"), importlib.import_module("monai.inferers")
    for volume in ([80, 96, 80], [64, 64, 64], [64, 65, 130]):
        seen: list[int] = []
        inferers.sliding_window_inference(
            torch.zeros(1, 1, *volume), (64,) * 3, 1, lambda x, seen=seen: (seen.append(1), x)[1], overlap=plan.OVERLAP
        )
        assert len(seen) == plan.count_windows(volume, 64)


def test_a_full_run_has_every_row_once_in_its_part() -> None:
    rows = plan.plan(list(plan.PARTS), "base", 128, 1, {})
    parts = [spec["part"] for spec in rows]
    assert {part: parts.count(part) for part in plan.PARTS} == {
        "pretrain": 3, "fast": 2, "finetune": 5, "importance": 2, "loader": 6, "fed": 3, "window": 3, "growth": 9,
        "regions": 5, "digests": 2, "scale": 24,
    }  # fmt: skip
    assert len({(spec["part"], spec["name"]) for spec in rows}) == len(rows)
    growth = [(spec["network"], spec["edge"]) for spec in rows if spec["part"] == "growth"]
    edges = (64, 96, 128, 160)
    assert growth == [("asa", edge) for edge in (*edges, 192)] + [("dense", edge) for edge in edges]
    assert [spec["windows"] for spec in rows if spec["part"] == "window"] == [8, 8, 8]
    regions = [(spec["backend"], spec["tokens"], spec["regions"]) for spec in rows if spec["kind"] == "attention"]
    assert regions == [("segments", 16384, 40), ("dense", 16384, 40), ("segments", 4096, 10), ("segments", 65536, 160)]


@pytest.mark.slow
def test_a_run_writes_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "run_row", forked_rows(main.run_row, row.main, tmp_path))
    options = ["--parts=pretrain", "--size=tiny", "--edge=64", "--matrix=64", "--repeats=2", "--threads=1"]
    assert main.main(["--device=cpu", f"--out={tmp_path / 'out'}", *options]) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [found["name"] for found in written["rows"]] == [
        "asa_tiny, 1 x 64^3",
        "dense ViT-MAE twin of asa_tiny, fused attention, 1 x 64^3",
        "dense ViT-MAE twin of asa_tiny, written-out attention, 1 x 64^3",
    ]
    for found in written["rows"]:
        assert set(found) >= EVERY | {"operations", "matrix_rate", "fraction", "relative_time"}
        assert found["status"] == "ok" and found["repeats"] == 2 and 50 * 2**20 < found["peak_bytes"] < 4 * 2**30
    assert written["rows"][0]["relative_time"] == 1
    assert written["machine"]["torch"] and written["machine"]["threads"] == 1 and written["machine"]["processor"]
    page = (tmp_path / "out" / "bench.md").read_text()
    assert page in shown and "| asa_tiny, 1 x 64^3" in page and "## Pretraining step" in page


def test_a_failing_row_gives_its_reason_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(spec: dict[str, Any], timeout: float) -> dict[str, Any]:
        if spec["kind"] == "machine":
            known = {
                "device": "cpu",
                "precision": "fp32",
                "threads": 1,
                "processor": "a chip",
                "cores": 1,
                "system": "an OS",
            }
            return {
                "status": "ok",
                **known,
                "asa": "0",
                "torch": "2",
                "monai": "1",
                "python": "3",
                "matrix_rates": rates(),
            }
        if spec["edge"] == 96 and spec["network"] == "asa":
            return {"status": "failed", "reason": "MemoryError: too large"}
        numbers = {"seconds": 2.0, "seconds_best": 1.0, "repeats": 3, "volumes_per_second": 0.5, "peak_bytes": 2**30}
        return {"status": "ok", **numbers, "equivalent": float(spec["edge"] ** 3)}

    monkeypatch.setattr(main, "run_row", measured)
    assert main.main(["--parts=growth", f"--out={tmp_path}"]) == 1
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [found["status"] for found in rows] == ["ok", "failed", *["ok"] * 7]
    assert [found.get("relative_time_per_token") for found in rows] == [1, None, 1, 1, 1, 1, 1, 1, 1]
    assert rows[3]["relative_peak_per_token"] == pytest.approx((64 / 160) ** 3)
    assert "asa_base, 1 x 96^3: FAILED: MemoryError: too large" in capsys.readouterr().out


def test_a_row_fails_by_its_own_error_or_by_timeout() -> None:
    broken = main.run_row(toy("asa", 20), timeout=300)
    assert broken["status"] == "failed" and "not a whole number of patches" in broken["reason"]
    late = main.run_row(toy("asa"), timeout=0.1)
    assert late == {"status": "failed", "reason": "not done after 0.1 s"}


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--parts=pretrain,swimming", "--edge=100", "--repeats=0"):
        with pytest.raises(SystemExit):
            main.parse([option])
        assert option.split("=")[0] in capsys.readouterr().err
