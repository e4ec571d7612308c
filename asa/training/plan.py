"""The cost of a run before it is started: parameters, operations, memory and time; and whether its GPU can do it.

Operations are those of matrix products and convolutions. A step is traced with tensors that have a shape and no data
(PyTorch's fake tensors), so they are counted in seconds whatever the model's size. Memory is that of the weights and
what belongs to them; the activations come on top, and are measured on a GPU (`step_peak`).

An example of a micro-batch is made by a function of the method, like `volume_batch`. Its floating-point values are not
used, so these tensors may be on the meta device. Integers and booleans that decide shapes, like "seed" and the label
maps of region attention, need their values.
"""

import re
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
from asa.training.device import Backend, on_device, pick_device
from asa.training.distributed import world_size
from asa.training.optim import EMA, Schedule, freeze, make_optimizer

Example: TypeAlias = Callable[[Any], Mapping[str, Any]]

GIB = 2**30
VOLTA = (7, 0)
FOR_VOLTA = "torch 2.8 built for CUDA 12.6 (pytorch.org/get-started/previous-versions)"
USABLE = 0.9  # fraction of a GPU's free memory that a step may take; the allocator needs some


class OperationCounter(TorchDispatchMode):
    """Counts the operations in its context; computed are those on tensors with data, which decide shapes."""

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
    """Operations of a micro-batch: of its forward pass, and of both passes; of a method on the meta device."""
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
    """A micro-batch of `count` volumes on the meta device, of the channels and size of the method's encoder."""
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
    """The cost of a run in one process; a ValueError for settings that do not fit each other.

    `make` makes the method, and `example` a micro-batch of it, see the module's docstring.
    """
    Schedule(optim, settings.steps, settings.batch_size)
    with torch.device("meta"):
        method: Any = make()
    if not optim.freeze_until:
        freeze(method.model, optim.freeze)
    forward, both = count_operations(method, example(method))
    encoder, total = getattr(method.model, "encoder", None), _count(method)
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
    memory = "and the batch and activations, which are measured where there is a GPU"
    if backend.device.type == "cuda":
        memory = fit_line(step_peak(make, example, settings, optim, backend), backend.device)
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
    """A plan as text; `rate` in operations per second, from `source`; `memory`: beside that of the weights."""
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


# --- on a GPU


def preflight(
    make: Callable[[], nn.Module], example: Example, settings: TrainSettings, optim: OptimSettings, backend: Backend
) -> list[str]:
    """Lines about the GPU of a run, if it uses one: advice, and the memory of a step compared with the free memory.

    A ValueError if this PyTorch does not support the GPU.
    """
    if backend.device.type != "cuda":
        return []
    advice = check_gpu(backend.device)  # before the step, which needs kernels
    return [*advice, fit_line(step_peak(make, example, settings, optim, backend), backend.device)]


def step_peak(
    make: Callable[[], Any], example: Example, settings: TrainSettings, optim: OptimSettings, backend: Backend
) -> int | None:
    """Bytes that tensors take on a GPU at the peak of a training step, measured in two steps; None: they do not fit.

    `make` makes the method, and `example` a micro-batch of it, of which tensors on the meta device become zeros.
    """
    try:
        method = make()
        if not optim.freeze_until:
            freeze(method.model, optim.freeze)
        tensors = {key: value for key, value in example(method).items() if isinstance(value, Tensor)}
        filled = {name: torch.zeros_like(one, device="cpu") if one.is_meta else one for name, one in tensors.items()}
        batch = on_device(filled, backend.device)
        method.to(backend.device)
        optimizer, average = make_optimizer(method, optim), EMA(method, settings.ema)
        torch.cuda.reset_peak_memory_stats(backend.device)
        for step in (1, 2):  # the first one makes the optimizer's states
            for _ in range(min(settings.accumulate, 2)):
                with backend.autocast():
                    loss = method(batch)["loss"]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
        return torch.cuda.max_memory_allocated(backend.device)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def check_gpu(device: torch.device) -> list[str]:
    """Lines of advice on a GPU and this PyTorch, usually none; a ValueError if it has no kernels for this GPU."""
    if device.type != "cuda":
        return []
    capability = torch.cuda.get_device_capability(device)
    name, built = torch.cuda.get_device_name(device), torch.cuda.get_arch_list()
    own = "sm_{}{}".format(*capability)
    if not any(_runs(architecture, capability) for architecture in built):
        advice = FOR_VOLTA if capability <= VOLTA else "a newer build of torch, see pytorch.org/get-started"
        built_for = f"torch {torch.__version__} is built for {', '.join(built) or 'no GPU'}"
        raise ValueError(f"{name} is {own}, and {built_for}: install {advice}, or set train.device=cpu")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if capability == VOLTA and version > (2, 8):
        return [
            f"note: {name} is {own}: from torch 2.9 on (here {torch.__version__}) fp16 3-D convolutions may run "
            f"without cuDNN on it, which is slow: {FOR_VOLTA}"
        ]
    return []


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture (like "sm_80", "sm_90a", "compute_90") runs on a GPU of this capability."""
    if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)) is None:
        return False
    kind, suffix, built = found[1], found[4], (int(found[2]), int(found[3]))
    if suffix == "a":
        return built == capability
    # The driver compiles "compute" for any newer GPU.
    return built <= capability and ((kind == "compute" and not suffix) or built[0] == capability[0])


def fit_line(needed: int | None, device: torch.device) -> str:
    """A line that compares the bytes that a step needs at its peak, None if they do not fit, with a GPU's free ones."""
    torch.cuda.empty_cache()  # of what the measurement has left
    free, total = torch.cuda.mem_get_info(device)
    takes = "does not fit" if needed is None else f"takes {needed / GIB:.1f} GiB"
    name = torch.cuda.get_device_name(device)
    line = f"memory: a step {takes}, {free / GIB:.1f} of {total / GIB:.1f} GiB are free on {name}"
    if needed is not None and needed <= USABLE * free:
        return line
    return f"warning: {line}: raise train.accumulate, set model.checkpointing=true, or take a smaller crop"
