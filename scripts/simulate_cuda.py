"""Take the training step of every method to simulated CUDA tensors, on a machine without a GPU.

PyTorch's FakeTensorMode computes devices, dtypes and shapes, but no values: it finds tensors of different devices or
dtypes that meet, and every point where the host waits for the device. Autograd needs a real device, so this is the
forward pass, with the guard and the average of the weights. It needs a CUDA build of PyTorch, for example in an
environment of its own:

    python -m venv cuda && cuda/bin/python -m pip install torch==2.12.0 ".[swin]"
    cuda/bin/python scripts/simulate_cuda.py
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asa.baselines.puzzle import PuzzlePretraining
from asa.baselines.puzzle_net import puzzle_tiny
from asa.inference.segmentation import sliding_window
from asa.methods.pretrain import MaskedPretraining
from asa.methods.sa_swin import SASwinPretraining
from asa.methods.segment import RegionSegmentation, Segmentation
from asa.methods.whole_scans import Classification, Regression
from asa.models.classifier import asa_classifier_tiny, asa_regressor_tiny, sa_swin_classifier_tiny
from asa.models.create import create_model
from asa.models.masked_autoencoder import asa_tiny
from asa.models.sa_swin import sa_swin_tiny
from asa.models.sa_swin_unet import sa_swin_unet_tiny
from asa.models.unet import unet_tiny
from asa.models.vit_seg import vit_conv_tiny, vit_linear_tiny, vit_seg_tiny
from asa.restoration.method import Restoration
from asa.restoration.rat import rat_tiny
from asa.restoration.restormer import restormer_tiny
from asa.settings import PredictSettings
from asa.training.device import PRECISIONS, on_device
from asa.training.optim import EMA
from asa.training.run_log import SilentLog
from asa.training.steps import NonFiniteGuard

SIZE = 64  # edge of the volumes
VOLUME: dict[str, Any] = dict(img_size=SIZE)
CLASSES: dict[str, Any] = dict(out_channels=4)
ALTERNATING: dict[str, Any] = dict(order="alternating", bias="grid")
CHEAP: dict[str, Any] = dict(decode=0.25, air="drop", masks=2, normalise=True)
REGIONS = {"whole": [1, 2], "core": [2]}
COMPARATORS = ("unetr_tiny", "swin_unetr_tiny", "nnformer_tiny", "transbts_tiny", "resenc_tiny", "primus_tiny")


def compiled(method: nn.Module) -> nn.Module:
    """The method with its network's graph captured as `train.compile` does, and then run without code generation."""
    method.get_submodule("model").compile(backend="eager")
    return method


def _comparator(name: str) -> nn.Module:
    model: Any = create_model(name, **VOLUME, **CLASSES)
    return Segmentation(model=model)


ROWS: dict[str, Callable[..., nn.Module]] = {
    "asa": lambda: MaskedPretraining(model=asa_tiny(**VOLUME)),
    "asa, decoded in part": lambda: MaskedPretraining(model=asa_tiny(**VOLUME), **CHEAP),
    "mae": lambda: MaskedPretraining(model=asa_tiny(**VOLUME, position="sincos"), importance=None),
    "sa_swin": lambda: SASwinPretraining(model=sa_swin_tiny(**VOLUME)),
    "sa_swin, positions": lambda: SASwinPretraining(model=sa_swin_tiny(**VOLUME, position=True)),
    "rpl": lambda: PuzzlePretraining(model=puzzle_tiny(2, 26, **VOLUME)),
    "jigsaw": lambda: PuzzlePretraining(model=puzzle_tiny(27, 100, **VOLUME), permutations=100),
    "unet": lambda: Segmentation(model=unet_tiny(**VOLUME, **CLASSES)),
    "unet with the mirror image": lambda: Segmentation(model=unet_tiny(**VOLUME, **CLASSES, symmetry=True)),
    "unet, regions": lambda: RegionSegmentation(model=unet_tiny(**VOLUME, out_channels=2), regions=REGIONS),
    "vit_seg": lambda: Segmentation(model=vit_seg_tiny(**VOLUME, **CLASSES)),
    "vit_conv": lambda: Segmentation(model=vit_conv_tiny(**VOLUME, **CLASSES, **ALTERNATING)),
    "sa_swin_unet": lambda: Segmentation(model=sa_swin_unet_tiny(**VOLUME, **CLASSES)),
    "vit_linear": lambda: Segmentation(model=vit_linear_tiny(**VOLUME, **CLASSES)),
    "asa classifier": lambda: Classification(model=asa_classifier_tiny(**VOLUME, classes=3)),
    "sa_swin classifier": lambda: Classification(model=sa_swin_classifier_tiny(**VOLUME, classes=3)),
    "asa regressor": lambda: Regression(model=asa_regressor_tiny(40.0, 10.0, **VOLUME)),
    "rat": lambda: Restoration(model=rat_tiny(upscale=2)),
    "rat, by segments": lambda: Restoration(model=rat_tiny(backend="segments")),
    "restormer": lambda: Restoration(model=restormer_tiny(upscale=2)),
    "asa, mirrored patches": lambda: MaskedPretraining(model=asa_tiny(**VOLUME, mirror_patches=True)),
    "asa, alternating orders": lambda: MaskedPretraining(model=asa_tiny(**VOLUME, **ALTERNATING), air="drop"),
    "vit_seg, alternating orders": lambda: Segmentation(model=vit_seg_tiny(**VOLUME, **CLASSES, **ALTERNATING)),
    "asa, compiled": lambda: compiled(MaskedPretraining(model=asa_tiny(**VOLUME))),
    "unet, compiled": lambda: compiled(Segmentation(model=unet_tiny(**VOLUME, **CLASSES))),
    **{name: partial(_comparator, name) for name in COMPARATORS},
}
WEIGHTS = "MONAI's window weights are read"
PREDICTED = (*COMPARATORS, "unet", "unet with the mirror image", "vit_seg", "vit_conv", "sa_swin_unet", "vit_linear")


class Device(TorchDispatchMode):
    """Computes on the host with values and on the simulated device without, and collects where the host waits for it.

    Reading a value of the device raises PyTorch's DataDependentOutputException; a copy that blocks is in `waits`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fake = any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs)))
        if not fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if waits and source.device.type != out.device.type:
                self.waits.append(f"copy from {source.device.type} to {out.device.type}")
        return out


@contextmanager
def simulated() -> Iterator[Device]:
    """A simulated device, which autocast takes for present."""
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", bool))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(patch("torch.cuda.Event", NoEvent))
        # Its kernels have no simulation.
        stack.enter_context(patch("asa.models.kernels.InstanceNorm._in_parts", lambda *_: False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Device())


class NoEvent:
    """Stands for a CUDA event."""

    def record(self) -> None: ...


def example(method: nn.Module) -> dict[str, Any]:
    """A batch of two on the host."""
    seed = torch.arange(2)
    if isinstance(method, Restoration):
        edge = SIZE * method.model.upscale
        images = {"image": torch.rand(2, 1, SIZE, SIZE), "target": torch.rand(2, 1, edge, edge)}
        return {
            **images,
            "regions": torch.arange(2 * SIZE**2).view(2, SIZE, SIZE) // 300,
            "seed": seed,
            "id": ["a", "b"],
        }
    image = torch.rand(2, 1, SIZE, SIZE, SIZE)
    label = torch.randint(3, (2, 1, SIZE, SIZE, SIZE), dtype=torch.uint8)
    batch: dict[str, Any] = {"image": image, "label": label, "seed": seed, "target": seed, "id": ["a", "b"]}
    if getattr(method, "drops_air", False):
        batch["air"] = torch.arange((SIZE // 8) ** 3)[None] < torch.tensor([[20], [90]])
    if getattr(method, "mirrored", False):
        batch |= {"mirror": image.flip(-1), "health": torch.tensor([1.0, float("nan")])}
    return batch


def waits_of_step(name: str, precision: str) -> list[str]:
    """Where the host waits for the device in the forward pass of a step, guard and averaged weights included.

    Raises:
        RuntimeError: tensors of different devices or dtypes meet; and others of PyTorch's.
    """
    method = ROWS[name]()
    batch, dtype = example(method), PRECISIONS[precision]
    with simulated() as device:
        to_device(method)
        guard = NonFiniteGuard(Path(), SilentLog(), torch.optim.SGD(method.parameters()), fp16=precision == "fp16")
        ema = EMA(method, 0.9)
        device.waits.clear()
        inputs = on_device(batch, torch.device("cuda"))
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            assert torch.is_autocast_enabled("cuda") == (dtype != torch.float32)
            result = method(inputs)
        loss = guard.add(inputs, result["loss"])
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        guard.check(1, loss)
        ema.update(1)
    return device.waits


def waits_of_prediction(name: str, precision: str) -> list[str]:
    """Where the host waits in the sliding window over a volume on the device, until its logits are there.

    MONAI reads the smallest weight of its Gaussian once per volume. The simulated device has no values, so the weights
    are replaced and the wait is noted.
    """
    method = ROWS[name]()
    with patch("torch.cuda.is_available", lambda: True):
        settings = PredictSettings(device="cuda", precision=precision)
    with simulated() as device, ExitStack() as stack:
        to_device(method)
        model = method.get_submodule("model").eval()
        device.waits.clear()

        def weights(size: tuple[int, ...], **own: Any) -> torch.Tensor:
            device.waits.append(WEIGHTS)
            return torch.empty(size, device=own["device"], dtype=own["dtype"])

        stack.enter_context(patch("monai.inferers.utils.compute_importance_map", weights))
        volume = torch.rand(1, SIZE, SIZE + 9, 2 * SIZE).to("cuda", non_blocking=True)
        logits = sliding_window(model, volume, settings)
        assert logits.device.type == "cuda" and logits.shape[1:] == volume.shape[1:]
    return device.waits


def to_device(method: nn.Module) -> None:
    """Replace the parameters and buffers of a method by those of the device (`nn.Module.to` cannot)."""
    for module in method.modules():
        for key, value in module._parameters.items():
            module._parameters[key] = None if value is None else nn.Parameter(value.detach().to("cuda"))
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to("cuda")


def main() -> int:
    """Print a table of all rows; the exit code is 1 if one of them fails or waits, but for MONAI's window weights."""
    if torch.version.cuda is None:
        print(f"torch {torch.__version__} is not a CUDA build: see the top of this script", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, volumes of {SIZE}^3, batch 2: where the host waits for the device\n")
    print(f"| | {' | '.join(PRECISIONS)} |\n|---|---|---|---|")
    bad = False
    for kind, waits, names in (("step", waits_of_step, ROWS), ("prediction", waits_of_prediction, PREDICTED)):
        for name in names:
            said = [_said(partial(waits, name, precision)) for precision in PRECISIONS]
            print(f"| {name}, {kind} | {' | '.join(said)} |", flush=True)
            bad |= set(said) != {"0" if kind == "step" else f"1: {WEIGHTS}"}
    return int(bad)


def _said(run: Callable[[], list[str]]) -> str:
    try:
        found = run()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return f"{len(found)}: {', '.join(found)}" if found else "0"


if __name__ == "__main__":
    sys.exit(main())
