"""The forward pass of every method on a simulated GPU: no mixed devices or dtypes, and no waiting for the device."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of the checkout, not of the package
simulation = importlib.import_module("scripts.simulate_cuda")

pytestmark = [
    pytest.mark.fakegpu,
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", simulation.ROWS)
def test_no_step_waits_for_the_device(name: str, precision: str) -> None:
    assert simulation.waits_of_step(name, precision) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", simulation.PREDICTED)
def test_a_sliding_window_waits_once_for_the_device_and_no_window_does(name: str, precision: str) -> None:
    assert simulation.waits_of_prediction(name, precision) == [simulation.WEIGHTS]


def test_copies_that_block_and_values_that_are_read_are_noticed() -> None:
    with simulation.simulated() as device:
        there = torch.ones(3).to("cuda", non_blocking=True)
        assert device.waits == []
        there.cpu()
        torch.ones(3).to("cuda")
        assert device.waits == ["copy from cuda to cpu", "copy from cpu to cuda"]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there.sum().item()
        with pytest.raises(RuntimeError, match="[Dd]evice"):
            there + torch.ones(3)
