"""The cost of a run is planned without running it."""

import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asa.cli import COMMANDS
from asa.data.store import MANIFEST, RECORDS
from asa.methods.pretrain import MaskedPretraining
from asa.methods.sa_swin import SASwinPretraining
from asa.methods.segment import Segmentation
from asa.models.masked_autoencoder import asa_tiny
from asa.models.sa_swin import sa_swin_tiny
from asa.models.unet import unet_tiny
from asa.restoration.method import Restoration
from asa.restoration.rat import rat_tiny
from asa.settings import OptimSettings, TrainSettings
from asa.training import plan as planning
from asa.training.device import Backend
from asa.training.plan import _duration, count_operations, make_plan, plan_report, show_plan, volume_batch
from scripts.benchmark.memory import TensorTracker, step_memory, trace_memory
from scripts.plan_check import CHANNELS, ROWS

ROOT = Path(__file__).parents[2]
SIZE = (64, 32, 32)
VOLUMES = partial(volume_batch, count=2)
SETTINGS, OPTIM = TrainSettings(steps=100, batch_size=2, precision="fp32"), OptimSettings()


def maker(kind: str, checkpointing: bool = False) -> Callable[[], nn.Module]:
    if kind == "restore":
        return lambda: Restoration(model=rat_tiny(upscale=2))
    size = dict(img_size=SIZE, checkpointing=checkpointing)
    if kind == "pretrain":
        return lambda: MaskedPretraining(model=asa_tiny(**size))
    return lambda: Segmentation(model=unet_tiny(out_channels=3, feature_size=4, **size))


def batch_on(device: str, size: int = 2, kind: str = "") -> dict[str, torch.Tensor]:
    if kind == "restore":
        regions = torch.arange(40 * 40).view(1, 40, 40) // 300  # of several sizes
        images = {"image": torch.rand(size, 1, 40, 40, device=device)}
        images["target"] = torch.rand(size, 1, 80, 80, device=device)
        return {**images, "regions": regions.repeat(size, 1, 1), "seed": torch.arange(size)}
    return {
        "image": torch.zeros(size, 1, *SIZE, device=device),
        "label": torch.zeros(size, 1, *SIZE, device=device, dtype=torch.uint8),
        "seed": torch.arange(size),
    }


def traced(kind: str, *, checkpointing: bool = False, size: int = 2, micro_batches: int = 1, dtype=torch.float32):
    """Operations by the plan, and memory by the trace that the benchmark has."""
    with torch.device("meta"):
        methods = [maker(kind, checkpointing)() for _ in range(2)]
    batch = batch_on("meta", size, kind)
    forward, both = count_operations(methods[0], batch)
    return SimpleNamespace(forward=forward, both=both, **vars(trace_memory(methods[1], batch, dtype, micro_batches)))


class Saved:
    """A tensor that the forward pass saves for the backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "restore"])
def test_planned_operations_and_kept_bytes_are_those_of_a_real_step(kind: str) -> None:
    method, batch, found = maker(kind)(), batch_on("cpu", kind=kind), traced(kind)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}
    kept: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        kept.add(saved)
        return saved

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            loss = method(batch)["loss"]
        assert counter.get_total_flops() == found.forward
        storages = [tensor.untyped_storage() for tensor in (*batch.values(), *(s.tensor for s in kept))]
        size = sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())
        del storages
        loss.backward()
    if kind == "restore":  # the counter counts the gradient of a depthwise convolution as that of a full one
        assert 2.9 * found.forward < found.both < 3.1 * found.forward < counter.get_total_flops()
    else:
        assert counter.get_total_flops() == found.both
    assert found.kept == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_checkpointing_keeps_less_memory_and_computes_more(kind: str) -> None:
    plain, less = traced(kind), traced(kind, checkpointing=True)
    assert less.kept < 0.6 * plain.kept and less.peak < plain.peak
    assert less.forward == plain.forward and plain.both < less.both < plain.both + plain.forward


def test_memory_increases_with_the_batch_and_decreases_with_16_bits() -> None:
    one, two, half = traced("pretrain", size=1), traced("pretrain", size=2), traced("pretrain", dtype=torch.float16)
    assert two.kept == pytest.approx(2 * one.kept, rel=0.05)
    copies = 2 * sum(
        parameter.numel() for parameter in maker("pretrain")().parameters()
    )  # of the weights, 16 bits each
    assert half.kept - copies < 0.75 * two.kept


def test_gradients_of_the_first_micro_batch_are_in_memory_during_the_second() -> None:
    weights = 4 * sum(parameter.numel() for parameter in maker("pretrain")().parameters())
    difference = traced("pretrain", micro_batches=2).peak - traced("pretrain").peak
    assert 0.8 * weights < difference < 1.2 * weights


def test_freed_tensors_do_not_count_and_views_count_once() -> None:
    with TensorTracker() as tracker:
        one = torch.empty(1000, device="meta")
        view = one[:10].reshape(2, 5)
        assert tracker.live == 4000
        del one
        assert tracker.live == 4000
        del view
        assert tracker.live == 0 and tracker.peak == 4000


def test_a_plan_is_consistent_and_its_days_follow_from_the_rate() -> None:
    plan = make_plan(maker("pretrain"), VOLUMES, settings=SETTINGS, optim=OPTIM)
    method = maker("pretrain")()
    weights = sum(parameter.numel() for parameter in method.parameters())
    assert plan.total == weights and plan.encoder == sum(p.numel() for p in method.model.encoder.parameters())
    assert plan.weights == plan.gradients == 4 * weights and plan.states == 8 * weights
    averaged = make_plan(maker("pretrain"), VOLUMES, settings=replace(SETTINGS, ema=0.9), optim=OPTIM)
    assert averaged.weights == 8 * weights
    peak = step_memory(maker("pretrain"), VOLUMES, settings=SETTINGS, optim=OPTIM)
    assert peak > plan.weights + plan.states + traced("pretrain").kept
    text = plan_report(replace(plan, step=86400 * 10**9), SETTINGS, 8, 1e9, "as given", "and more")
    assert "100 days" in text and "200 volumes, 25.0 epochs of 8 scans" in text


def test_accumulation_needs_the_same_operations_and_less_memory() -> None:
    given = [
        (maker("finetune"), partial(volume_batch, count=2 // n, label=True), replace(SETTINGS, accumulate=n))
        for n in (1, 2)
    ]
    whole, parts = (make_plan(make, example, settings=settings, optim=OPTIM) for make, example, settings in given)
    assert whole.step == parts.step
    whole, parts = (step_memory(make, example, settings=settings, optim=OPTIM) for make, example, settings in given)
    assert parts < whole and traced("finetune", size=1).kept < 0.6 * traced("finetune").kept


def test_sgd_has_one_state_and_fp16_can_be_planned_on_a_cpu() -> None:
    settings, optim = replace(SETTINGS, precision="fp16"), OptimSettings(name="sgd")
    plan = make_plan(maker("pretrain"), VOLUMES, settings=settings, optim=optim)
    assert plan.states == plan.weights
    text = show_plan(maker("pretrain"), VOLUMES, 8, settings, optim, None, ("volumes", "scans"))
    assert "measured here by fp32 matrix products (cpu)" in text and "measured where there is a GPU" in text


def test_the_memory_of_a_network_with_float32_levels_is_traced_in_16_bits() -> None:
    network = dict(img_size=32, embed_dim=4, num_heads=(1, 1, 2, 2), window=2, cross_heads=2)
    given = (lambda: SASwinPretraining(model=sa_swin_tiny(**network)), VOLUMES)
    whole, half = (
        step_memory(*given, settings=SETTINGS, optim=OPTIM, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half < whole


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "restore"])
def test_on_a_gpu_the_memory_of_real_steps_is_measured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    steps = []
    monkeypatch.setattr(planning.EMA, "update", lambda self, step: steps.append(step))
    backend, example = Backend(torch.device("cpu"), torch.float32), lambda method: batch_on("meta", kind=kind)
    if kind == "restore":
        example = lambda method: batch_on("cpu", kind=kind)  # noqa: E731
    settings = replace(SETTINGS, accumulate=2)
    assert planning.step_peak(maker(kind), example, settings, OPTIM, backend) == 3 * 2**30 and steps == [1, 2]

    def out_of_memory(method: nn.Module) -> None:
        raise torch.OutOfMemoryError

    assert planning.step_peak(maker(kind), out_of_memory, settings, OPTIM, backend) is None


def test_a_plan_on_a_gpu_shows_the_measured_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.Backend, "of", lambda device, precision: Backend(torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla X")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 2**30, 32 * 2**30))
    for peak, shown in ((3 * 2**30, "a step takes 3.0 GiB"), (None, "a step does not fit")):
        monkeypatch.setattr(planning, "step_peak", lambda *given, peak=peak: peak)
        text = show_plan(maker("pretrain"), VOLUMES, 8, SETTINGS, OPTIM, 2.0, ("volumes", "scans"))
        assert f"memory: {shown}, 30.0 of 32.0 GiB are free on Tesla X" in text


@pytest.fixture
def without_voxels(store: Path, tmp_path: Path) -> Path:
    """A store without its arrays."""
    (tmp_path / "store").mkdir()
    for file in (MANIFEST, RECORDS):
        shutil.copy(store / file, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("pretrain", ["model=asa_tiny", "crop=32"]),
        ("finetune", ["model=unet_tiny", "crop=[64,32,32]", "init=not/there/yet"]),
    ],
)
def test_a_plan_needs_no_arrays_and_writes_nothing(
    command: str, arguments: list[str], without_voxels: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    given = [f"data.store={without_voxels}", f"out={tmp_path}/run", "plan=only", "train.device=cuda:7"]
    monkeypatch.setattr(sys, "argv", [f"asa-{command}", *given, "plan_rate=2", *arguments])
    assert COMMANDS[command].main() == 0
    out = capsys.readouterr().out
    assert ("is not checked: not/there/yet: no checkpoint here" in out) == (command == "finetune")
    for part in (
        "encoder",
        "GFLOP forward",
        "TFLOP each",
        "optimizer",
        "epochs of",
        "at 2 TFLOP/s, as given",
    ):
        assert part in out
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_is_encoded_and_decoded(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def operations(*arguments: str) -> float:
        given = [f"data.store={store}", f"out={tmp_path}/run", "plan=only", "plan_rate=2", "model=asa_tiny", "crop=64"]
        monkeypatch.setattr(sys, "argv", ["asa-pretrain", *given, *arguments])
        assert COMMANDS["pretrain"].main() == 0
        return float(re.search(r"([0-9.]+) GFLOP forward", capsys.readouterr().out.replace(",", ""))[1])

    whole, part = operations(), operations("method.decode=0.25")
    assert part < 0.8 * whole
    assert operations("method.decode=0.25", "method.air=drop") < 0.95 * part  # the crops are read for it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("plan=also", "plan=also: choose only"),
        ("plan_rate=-1", "plan_rate=-1"),
        ("plan_rate=fast", "plan_rate=fast"),
        ("train.precision=fp8", "train.precision=fp8: choose auto, fp32, bf16 or fp16"),
    ],
)
def test_invalid_plan_settings_are_refused_in_one_line(
    wrong: str, message: str, without_voxels: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    given = [f"data.store={without_voxels}", f"out={tmp_path}/run", "model=asa_tiny", "crop=32", "plan=only", wrong]
    monkeypatch.setattr(sys, "argv", ["asa-pretrain", *given])
    assert COMMANDS["pretrain"].main() == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_within_15_percent_of_the_measured_peak() -> None:
    command = [sys.executable, "-m", "scripts.plan_check", "tiny"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_memory_table_of_the_docs_has_one_notation_and_the_range_of_its_heaps() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if re.match(r"\| .* \| \d+ \|", line)
    ]
    named = [row for row in table if row[0].startswith("`")]
    rows = [row for row in ROWS.values() if not row.checkpointing and "precision" not in row.train]
    for cells, row in zip(named, rows, strict=True):
        network, batch, channels, edge = re.match(r"`(\w+)`, (\d+) x (\d+) x (\d+)[³²]", cells[0]).groups()
        assert (network, int(batch), (int(edge),) * len(row.size)) == (row.network, row.batch, row.size)
        assert int(channels) == CHANNELS.get(network.partition("_")[0], 1)
    heaps = [int(row[4]) / int(row[2]) for row in table if row[4]]
    assert f"takes {min(heaps):.1f} to {max(heaps):.1f} times as much" in page


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.5, "0.5 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2 h"), (864000, "10 days")]
)
def test_a_planned_time_has_a_readable_unit(seconds: float, shown: str) -> None:
    assert _duration(seconds) == shown
