"""Lower precision and checkpointing change the cost of a step, not its result; the machine decides on "auto"."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from asa.cli import pretrain
from asa.methods.pretrain import MaskedPretraining
from asa.methods.segment import Segmentation
from asa.models.masked_autoencoder import asa_tiny
from asa.models.unet import unet_tiny
from asa.training import device
from asa.training.device import autocast, pick_precision

CPU = torch.device("cpu")
HAS_UNITS = device.has_bf16_units  # conftest.py replaces it in the tests
BATCH = {
    "image": torch.rand(2, 1, 96, 32, 32, generator=torch.Generator().manual_seed(0)),
    "label": torch.randint(3, (2, 1, 96, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8),
    "seed": torch.arange(2),
}


def make(kind: str, checkpointing: bool = False) -> nn.Module:
    torch.manual_seed(0)
    size = dict(img_size=(96, 32, 32), checkpointing=checkpointing)
    if kind == "pretrain":
        return MaskedPretraining(model=asa_tiny(**size))
    return Segmentation(model=unet_tiny(out_channels=3, feature_size=4, **size))


def step(method: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a batch; for the U-Net, whose bfloat16 is slow on many CPUs, of its first sample."""
    count = 1 if isinstance(method, Segmentation) else 2
    with autocast(CPU, dtype):
        loss = method({key: value[:count] for key, value in BATCH.items()})["loss"]
    return loss, list(torch.autograd.grad(loss, list(method.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_checkpointing_gives_the_same_loss_and_gradients_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    plain, kept = step(make(kind), dtype), step(make(kind, checkpointing=True), dtype)
    assert torch.equal(plain[0], kept[0])
    assert all(torch.equal(one, other) for one, other in zip(plain[1], kept[1], strict=True))


# In this small U-Net the coarsest level normalises over three voxels, which is sensitive to precision.
@pytest.mark.parametrize(("kind", "cosine"), [("pretrain", 0.99), ("finetune", 0.9)])
def test_bf16_loss_is_within_one_percent_of_fp32_and_its_gradient_has_the_same_direction(
    kind: str, cosine: float
) -> None:
    method = make(kind)
    (full, full_gradients), (half, half_gradients) = step(method), step(method, torch.bfloat16)
    assert half.dtype == torch.float32  # the loss is computed in float32
    torch.testing.assert_close(half, full, rtol=0.01, atol=0)
    one, other = (torch.cat([g.flatten() for g in gradients]) for gradients in (full_gradients, half_gradients))
    assert torch.cosine_similarity(one, other, dim=0) > cosine


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_fp16_loss_is_within_one_percent_of_fp32(kind: str) -> None:
    method = make(kind).cuda()
    batch = {key: value if key == "seed" else value.cuda() for key, value in BATCH.items()}
    losses = []
    for dtype in (torch.float32, torch.float16):
        with torch.no_grad(), autocast(torch.device("cuda"), dtype):
            losses.append(method(batch)["loss"])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, torch.float32),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_auto_is_bf16_on_a_cpu_with_units_for_it_and_fp32_on_others(
    capabilities: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bf16_units", HAS_UNITS)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_precision("auto", CPU) == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pick_precision("auto", CPU) == torch.float32
    monkeypatch.undo()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # an older torch
    assert not HAS_UNITS()


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bf16_on_a_gpu_that_does_not_emulate_it_and_fp16_on_others(
    supported: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def natively(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", natively)
    assert pick_precision("auto", torch.device("cuda")) == dtype


def test_bf16_by_name_on_a_cpu_without_units_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"several times as long as in fp32; precision=auto chooses fp32 here"):
        assert pick_precision("bf16", CPU) == torch.bfloat16
    monkeypatch.setattr(device, "has_bf16_units", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_precision("bf16", CPU) == torch.bfloat16


@pytest.mark.filterwarnings("ignore:precision=bf16 on a CPU")
def test_a_resumed_run_keeps_the_precision_that_its_configuration_and_log_name(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = [
        "model=asa_tiny",
        "+model.embed_dim=24",
        "+model.depth=2",
        "+model.num_heads=2",
        "crop=32",
        "optim.warmup=0",
    ]
    tiny += ["data.split.validation=0", "loader.workers=0", "train.device=cpu", "train.batch_size=1"]

    def run(name: str, *more: str) -> str:
        """The precision in the run's configuration; the log must name the same."""
        monkeypatch.setattr(
            sys, "argv", ["asa-pretrain", f"data.store={store}", f"out={tmp_path}/{name}", *tiny, *more]
        )
        assert pretrain.main() == 0, capfd.readouterr().err
        chosen: str = yaml.safe_load((tmp_path / name / "config.yaml").read_text())["train"]["precision"]
        captured = capfd.readouterr()
        assert f"computing in {chosen} on cpu" in captured.out + captured.err
        return chosen

    assert run("a", "train.steps=1") == "fp32"
    monkeypatch.setattr(device, "has_bf16_units", lambda: True)  # another machine
    assert run("b", "train.steps=1") == "bf16"
    assert run("a", "train.steps=2") == "fp32"
    monkeypatch.setattr(device, "has_bf16_units", lambda: False)
    assert run("b", "train.steps=2") == "bf16"
    monkeypatch.setattr(
        sys, "argv", ["asa-pretrain", f"data.store={store}", f"out={tmp_path}/b", *tiny, "train.precision=fp32"]
    )
    assert pretrain.main() == 1 and "train.precision was bf16, is fp32" in capfd.readouterr().err
