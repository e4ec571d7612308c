"""Checks before a run starts on a GPU, with a simulated GPU."""

import sys

import pytest
import torch

from asa.cli import pretrain
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_tiny
from asa.settings import OptimSettings, TrainSettings
from asa.training import plan
from asa.training.device import Backend
from asa.training.plan import check_gpu, fit_line, preflight, volume_batch

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Simulate a GPU: gpu(capability, architectures, free memory in GiB, version of torch)."""

    def simulate(capability: tuple[int, int], built: list[str], free: float = 32, version: str = "2.8.0+cu126") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla X")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free * 2**30), 32 * 2**30))
        monkeypatch.setattr(torch, "__version__", version)

    return simulate


def test_commands_check_the_gpu_before_they_start(gpu, store, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    gpu((7, 0), ["sm_80"], version="2.13.0+cu130")
    arguments = [f"data.store={store}", f"out={tmp_path}/run", "model=asa_tiny", "crop=32", "train.device=cuda"]
    monkeypatch.setattr(sys, "argv", ["asa-pretrain", *arguments])
    assert pretrain.main() == 1 and "sm_70" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    gpu((7, 0), ["sm_70"])
    monkeypatch.setattr(plan, "step_peak", lambda *given: 2**30)
    (line,) = preflight(
        lambda: MaskedPretraining(model=asa_tiny(img_size=32)),
        lambda m: volume_batch(m, 2),
        TrainSettings(),
        OptimSettings(),
        Backend(GPU, torch.float16),
    )
    assert line.startswith("memory: a step takes 1.0 GiB, 32.0 of 32.0")


def test_a_cpu_is_always_supported() -> None:
    assert check_gpu(torch.device("cpu")) == []


def test_a_v100_without_kernels_is_refused_with_advice_what_to_install(gpu) -> None:
    gpu((7, 0), ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], version="2.13.0+cu130")
    with pytest.raises(ValueError, match=r"Tesla X is sm_70.*sm_75.*torch 2\.8.*CUDA 12\.6") as error:
        check_gpu(GPU)
    assert "\n" not in str(error.value)


def test_a_gpu_newer_than_its_torch_is_refused_with_other_advice(gpu) -> None:
    gpu((12, 0), ["sm_70", "sm_80", "sm_90"])
    with pytest.raises(ValueError, match=r"sm_120.*newer build"):
        check_gpu(GPU)


def test_a_v100_is_accepted_with_the_advised_torch_and_noted_with_a_later_one(gpu) -> None:
    gpu((7, 0), ["sm_50", "sm_70", "sm_90"])
    assert check_gpu(GPU) == []
    gpu((7, 0), ["sm_50", "sm_70", "sm_90"], version="2.10.0+cu126")
    (note,) = check_gpu(GPU)
    assert note.startswith("note:") and "torch 2.8" in note


@pytest.mark.parametrize(
    ("capability", "built", "supported"),
    [
        ((8, 6), ["sm_80"], True),  # a later minor of the same major
        ((8, 0), ["sm_86"], False),  # not an earlier one
        ((9, 0), ["sm_80"], False),  # nor another major
        ((9, 0), ["sm_80", "compute_80"], True),  # but the driver compiles portable code
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100"], True),
        ((8, 0), [], False),
    ],
)
def test_code_runs_on_later_minors_and_portable_code_on_all_later_gpus(gpu, capability, built, supported) -> None:
    gpu(capability, built)
    if supported:
        assert check_gpu(GPU) == []
    else:
        with pytest.raises(ValueError, match="is built for"):
            check_gpu(GPU)


def test_a_step_that_does_not_fit_gives_a_warning_with_advice(gpu) -> None:
    gpu((8, 0), ["sm_80"], free=10)
    assert fit_line(4 * 2**30, GPU) == "memory: a step takes 4.0 GiB, 10.0 of 32.0 GiB are free on Tesla X"
    assert fit_line(int(9.5 * 2**30), GPU).startswith("warning: memory: a step takes 9.5 GiB, 10.0 of 32.0")
    assert "train.accumulate" in fit_line(20 * 2**30, GPU)
    assert fit_line(None, GPU).startswith("warning: memory: a step does not fit, 10.0 of 32.0 GiB are free")
