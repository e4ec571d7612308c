"""A GPU gives the same results as a CPU. Skipped without a GPU."""

import importlib
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import asa
from asa.data.loading.crops import CropDataset
from asa.data.store import Store
from asa.methods.pretrain import MaskedPretraining
from asa.restoration.regions import find_varlen, runs_varlen
from asa.settings import LoaderSettings, OptimSettings, TrainSettings
from asa.training.checkpoint_files import list_checkpoints
from asa.training.device import Backend
from asa.training.loop import train
from asa.training.plan import step_peak, volume_batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of the checkout, not of the package
simulation = importlib.import_module("scripts.simulate_cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", ["orientation", "magnitude"])
def test_importance_agrees(kind: str) -> None:
    volume = torch.rand(2, 2, 32, 40, 48)
    expected = asa.gradient_importance(volume, kind=kind)
    torch.testing.assert_close(asa.gradient_importance(volume.cuda(), kind=kind).cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [128, 100])
@pytest.mark.parametrize("shift", [0, 16])
def test_window_attention_and_its_gradients_agree(length: int, shift: int) -> None:
    torch.manual_seed(0)
    layer = asa.LinearWindowAttention(64, 4, window=32, shift=shift)
    tokens = torch.randn(2, length, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(tokens).square().sum(), [tokens, *layer.parameters()])
    there = tokens.detach().cuda().requires_grad_()
    layer.cuda()
    found = torch.autograd.grad(layer(there).square().sum(), [there, *layer.parameters()])
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.cpu(), one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_pretraining_runs_and_stays_close_to_the_cpu(store: Path, tmp_path: Path, precision: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        opened = Store(store)
        method = MaskedPretraining(model=asa.asa_tiny(img_size=32))
        dataset = CropDataset(opened, opened.records, (32, 32, 32))
        settings = TrainSettings(
            steps=8, batch_size=4, device=device, precision=precision if device == "cuda" else "fp32", log_every=8
        )
        run = tmp_path / device
        run.mkdir()
        losses[device] = train(
            method,
            dataset,
            run,
            settings=settings,
            optim=OptimSettings(lr=1e-3),
            loader=LoaderSettings(workers=0),
            description={"model": {}},
        )["loss"]
        assert list_checkpoints(run)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


@pytest.mark.parametrize("name", ["asa, decoded in part", "vit_conv", "primus_tiny"])  # the last draws on the device
def test_a_run_that_is_resumed_has_the_bits_of_an_uninterrupted_one(store: Path, tmp_path: Path, name: str) -> None:
    def go_on(run: Path, steps: int) -> list[Tensor]:
        torch.manual_seed(0)
        method, opened = simulation.ROWS[name](), Store(store)
        own = dict(labelled=hasattr(method, "background_weights"), air=8, crop="random")
        settings = TrainSettings(steps=steps, batch_size=2, device="cuda", save_every=2, deterministic=True)
        run.mkdir(exist_ok=True)
        train(
            method,
            CropDataset(opened, opened.records, (64, 64, 64), **own),
            run,
            settings=settings,
            optim=OptimSettings(lr=1e-3, schedule="constant"),
            loader=LoaderSettings(workers=0),
            description={"model": {}},
        )
        return [weight.detach().cpu() for weight in method.parameters()]

    whole = go_on(tmp_path / "whole", 4)
    go_on(tmp_path / "cut", 2)
    assert all(torch.equal(one, other) for one, other in zip(whole, go_on(tmp_path / "cut", 4), strict=True))


@pytest.mark.parametrize("name", ["asa", "vit_conv"])
def test_a_compiled_run_has_nearly_the_losses_of_an_ordinary_one(store: Path, tmp_path: Path, name: str) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method, opened = simulation.ROWS[name](), Store(store)
        dataset = CropDataset(opened, opened.records, (64, 64, 64), labelled=hasattr(method, "background_weights"))
        settings = TrainSettings(steps=4, batch_size=2, device="cuda", precision="bf16", compile=compiled)
        run = tmp_path / str(compiled)
        run.mkdir()
        own = dict(optim=OptimSettings(lr=1e-3), loader=LoaderSettings(workers=0), description={"model": {}})
        losses.append(train(method, dataset, run, settings=settings, **own)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_measured_peak_of_a_step_is_that_of_a_run(store: Path, tmp_path: Path) -> None:
    opened, settings = Store(store), TrainSettings(steps=3, batch_size=4, device="cuda", precision="fp32")
    optim, backend = OptimSettings(), Backend(torch.device("cuda"), torch.float32)

    def make() -> MaskedPretraining:
        return MaskedPretraining(model=asa.asa_tiny(img_size=64))

    planned = step_peak(make, partial(volume_batch, count=4), settings, optim, backend)
    torch.cuda.reset_peak_memory_stats()
    dataset, loader = CropDataset(opened, opened.records, (64, 64, 64)), LoaderSettings(workers=0)
    train(make(), dataset, tmp_path, settings=settings, optim=optim, loader=loader, description={"model": {}})
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


@pytest.mark.parametrize("backend", ["segments", "varlen"])
def test_region_attention_and_its_gradients_agree(backend: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 200, 16, requires_grad=True) for _ in range(3)]
    labels = torch.randint(5, (2, 200))
    dtype = torch.float32 if backend == "segments" else torch.float16
    on_gpu = [x.detach().cuda().to(dtype).requires_grad_() for x in inputs]
    if backend == "varlen" and not (runs_varlen(on_gpu[0]) and find_varlen()):
        pytest.skip("this GPU or PyTorch has no variable-length attention")
    found = asa.region_attention(*on_gpu, labels.cuda(), backend)
    expected = asa.region_attention(*inputs, labels, "dense")
    tolerance = dict(atol=1e-4, rtol=1e-4) if backend == "segments" else dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found.float().cpu(), expected, **tolerance)
    ours = torch.autograd.grad(found.float().square().sum(), on_gpu)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float().cpu(), b, **tolerance)
