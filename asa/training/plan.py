"""The cost of a run before it is started: parameters, operations, memory and time.

Operations are those of matrix products and convolutions. A step is traced with tensors that have a shape and no data
(PyTorch's fake tensors), so they are counted in seconds whatever the model's size. Memory is that of the weights and
what belongs to them; the activations come on top, and are measured on a GPU (`asa.training.gpu_check.step_peak`).

An example of a micro-batch is made by a function of the method, like `volume_batch`. Its floating-point values are not
used, so these tensors may be on the meta device. Integers and booleans that decide shapes, like "seed" and the label
maps of region attention, need their values.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from asa.settings import OptimSettings, TrainSettings
from asa.training.device import Backend, pick_device
from asa.training.distributed import world_size
from asa.training.gpu_check import GIB, fit_line, step_peak
from asa.training.optim import Schedule, freeze

Example: TypeAlias = Callable[[Any], Mapping[str, Any]]


class OperationCounter(TorchDispatchMode):
    """Counts the operations in its context.

    Operations on tensors without data are not computed. Others are, as they decide shapes: for example the indices of
    masked patches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with nullcontext() if _without_data((args, kwargs)) else unset_fake_temporarily():
            out = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.operations += _convolution_gradient(*args, **kwargs)
        elif func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out


def _convolution_gradient(out: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> int:
    """Operations of a convolution's gradients: as many as forward for each of image and weight.

    PyTorch's own formula ignores groups: it counts a depthwise convolution as a full one.
    """
    transposed, wanted = rest[4], rest[7]
    forward = conv_flop_count(list(image.shape), list(weight.shape), list(out.shape), transposed=transposed)
    return forward * sum(wanted[:2])


def _without_data(tree: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) or getattr(leaf, "is_meta", False) for leaf in tree_leaves(tree))


def count_operations(method: nn.Module, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Operations of a micro-batch: of its forward pass, and of its forward and backward passes.

    The method is on the meta device, and its parameters are replaced.
    """
    counter, fake = OperationCounter(), FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        method.to_empty(device="cpu")
    with fake, counter:
        loss = method(without_values(batch))["loss"]
        forward = counter.operations
        loss.backward()
    return forward, counter.operations


def logged(make: Callable[[], nn.Module], example: Example) -> list[str]:
    """Names of what a method returns of a batch, without computing it."""
    with torch.device("meta"):
        method = make()
    batch, fake = example(method), FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        method.to_empty(device="cpu")
    with fake, OperationCounter():  # it computes what decides shapes
        return list(method(without_values(batch)))


def without_values(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an example, those whose values are not used as fake ones, inside a FakeTensorMode."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return {
        key: torch.empty_like(value, device="cpu") if value.is_meta or value.is_floating_point() else value
        for key, value in tensors.items()
    }


@dataclass(frozen=True)
class Plan:
    """The cost of a run: parameters, operations of a step over all its micro-batches, and bytes in float32."""

    encoder: int  # parameters; 0 without an encoder
    total: int  # parameters
    forward: int  # operations of the forward passes
    step: int  # operations of the whole step, including what checkpointing computes again
    weights: int  # bytes, including those of their moving average
    gradients: int  # of the trained parameters
    states: int  # of the optimizer


def volume_batch(method: Any, count: int, *, label: bool = False, target: bool = False) -> dict[str, Tensor]:
    """A micro-batch of `count` volumes on the meta device, of the channels and size of the method's encoder.

    With `label` it has a label map "label", with `target` a class index "target".
    """
    encoder = method.model.encoder
    image = torch.empty(count, encoder.in_channels, *encoder.img_size, device="meta")
    batch = {"image": image, "seed": torch.arange(count)}
    if method.mirrored:
        batch["mirror"] = torch.empty_like(image)
    if target:
        batch["target"] = torch.zeros(count, dtype=torch.int64, device="meta")
    if label:
        batch["label"] = torch.empty((count, 1, *encoder.img_size), dtype=torch.uint8, device="meta")
    return batch


def micro_batch(settings: TrainSettings) -> int:
    """Samples of a micro-batch in one process."""
    return settings.batch_size // settings.accumulate // world_size()


def make_plan(
    make: Callable[[], nn.Module], example: Example, *, settings: TrainSettings, optim: OptimSettings
) -> Plan:
    """Compute the cost of a run in one process without running it.

    `make` makes the method, and `example` a micro-batch of it, see the module's docstring. A ValueError for settings
    that do not fit each other.
    """
    Schedule(optim, settings.steps, settings.batch_size)
    with torch.device("meta"):
        method: Any = make()
    if not optim.freeze_until:
        freeze(method.model, optim.freeze)
    forward, both = count_operations(method, example(method))
    encoder = getattr(method.model, "encoder", None)
    total = _count(method)
    gradients = 4 * sum(weight.numel() for weight in method.parameters() if weight.requires_grad)
    return Plan(
        encoder=_count(encoder) if isinstance(encoder, nn.Module) else 0,
        total=total,
        forward=forward * settings.accumulate,
        step=both * settings.accumulate,
        weights=4 * total * (2 if settings.ema else 1),
        gradients=gradients,
        states=gradients * (int(optim.momentum > 0) if optim.name == "sgd" else 2),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def show_plan(
    make: Callable[[], nn.Module],
    example: Example,
    scans: int,
    settings: TrainSettings,
    optim: OptimSettings,
    rate: float | None,
    names: tuple[str, str],
) -> str:
    """The plan of a run, see `make_plan`, as text; `names` are those of items of a batch and of the training part.

    The rate is the TFLOP/s that the run will reach; None: that of matrix products is measured on this machine.
    """
    plan = make_plan(make, example, settings=settings, optim=optim)
    for_gpu = settings.precision == "fp16" and pick_device("auto").type == "cpu"
    backend = Backend.of("auto", "fp32" if for_gpu else settings.precision)
    if backend.device.type == "cuda":
        memory = fit_line(step_peak(make, example, settings, optim, backend), backend.device)
    else:
        memory = "and the batch and activations, which are measured where there is a GPU"
    if rate is not None:
        return plan_report(plan, settings, scans, rate * 1e12, "as given by plan_rate", memory, names)
    products = f"{backend.precision} matrix products ({backend.device.type})"
    source = f"measured here by {products}: an upper limit, so the run takes longer"
    return plan_report(plan, settings, scans, measure_rate(backend), source, memory, names)


def measure_rate(backend: Backend) -> float:
    """Operations per second of large matrix products on this machine, measured in about a second."""
    device, dtype = backend.device, backend.dtype
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)

    def seconds(products: int) -> float:
        out[0, 0].item()  # waits for the device
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        out[0, 0].item()
        return time.perf_counter() - start

    count = max(1, min(round(0.5 / seconds(1)), 1000))
    return 2 * n**3 * count / seconds(count)


def plan_report(
    plan: Plan,
    settings: TrainSettings,
    scans: int,
    rate: float,
    source: str,
    memory: str,
    names: tuple[str, str] = ("volumes", "scans"),
) -> str:
    """A plan as text of about ten lines.

    `rate` is in operations per second, from `source`; `memory` is what is known beside that of the weights.
    """
    volumes, seconds = settings.steps * settings.batch_size, plan.step / rate
    parts = f"{settings.accumulate} micro-batches" if settings.accumulate > 1 else "one micro-batch"
    halves = f"encoder {plan.encoder / 1e6:.2f} M, decoder {(plan.total - plan.encoder) / 1e6:.2f} M, "
    return "\n".join(
        [
            "plan only: nothing is trained and no folder is made",
            f"parameters  {halves if plan.encoder else ''}total {plan.total / 1e6:.2f} M",
            f"operations  per step of {settings.batch_size} {names[0]} in {parts}: "
            f"{plan.forward / 1e9:,.1f} GFLOP forward, {plan.step / 1e9:,.1f} forward and backward, "
            f"{plan.step / settings.batch_size / 1e12:.3g} TFLOP each",
            "            (matrix products and convolutions, by the formulas of torch.utils.flop_counter)",
            f"memory      weights {plan.weights / GIB:.2f} GiB, gradients {plan.gradients / GIB:.2f}, "
            f"optimizer {plan.states / GIB:.2f};",
            f"            {memory}",
            f"run         {settings.steps} steps: {volumes} {names[0]}, "
            f"{volumes / scans:,.1f} epochs of {scans} {names[1]}",
            f"time        {_duration(settings.steps * seconds)} ({seconds:.3g} s per step) "
            f"at {rate / 1e12:.4g} TFLOP/s, {source}",
        ]
    )


def _duration(seconds: float) -> str:
    """A time in the largest unit of which it is more than one."""
    units = (("days", 86400), ("h", 3600), ("min", 60))
    name, length = next(((name, length) for name, length in units if seconds > length), ("s", 1))
    return f"{seconds / length:.3g} {name}"
