"""The cost of a run before it is started: parameters, operations, memory and time.

A step is traced with tensors that have a shape and no data (PyTorch's fake tensors), so a plan takes seconds whatever
the model's size. Operations are those of matrix products and convolutions. Memory is that of all tensors of the step
alive at the same time.

Batches are given as an example micro-batch, or as a function that makes one for a method, like `volume_batch`. Their
floating-point values are not used, so these tensors may be on the meta device. Integers and booleans that decide
shapes, like "seed" and the label maps of region attention, need their values.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from asa.training.device import autocast, pick_device, pick_precision, precision_name
from asa.training.distributed import world_size
from asa.training.optim import Schedule, freeze

GIB = 2**30
HEAP = (1.2, 1.4)  # heap of a run on a CPU, relative to its tensors: the smallest and largest in docs/planning.md
CPU, GPU = torch.device("cpu"), torch.device("cuda")

ExampleBatch: TypeAlias = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


class TensorTracker(TorchDispatchMode):
    """Counts the operations in its context, and the bytes of the tensors that are created there and still alive.

    Operations on tensors without data are not computed. Others are, as they decide shapes: for example the indices of
    masked patches. Tensors `existing` before and their views are not counted.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with nullcontext() if _without_data((args, kwargs)) else unset_fake_temporarily():
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        # Counted as FlopCounterMode does, which itself would keep the tensors of recomputed blocks alive.
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.operations += _convolution_gradient(*args, **kwargs)
        elif func.overloadpacket in flop_registry:
            self.operations += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _convolution_gradient(out: Tensor, image: Tensor, weight: Tensor, *rest: Any) -> int:
    """Operations of a convolution's gradients: as many as forward for each of image and weight.

    PyTorch's own formula ignores groups: it counts a depthwise convolution as a full one.
    """
    transposed, wanted = rest[4], rest[7]
    forward = conv_flop_count(list(image.shape), list(weight.shape), list(out.shape), transposed=transposed)
    return forward * sum(wanted[:2])


def _without_data(tree: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) or getattr(leaf, "is_meta", False) for leaf in tree_leaves(tree))


@dataclass(frozen=True)
class StepTrace:
    """The micro-batches of a step, traced without data."""

    forward: int  # operations of a micro-batch's forward pass
    both: int  # operations of its forward and backward passes
    kept: int  # bytes of the batch and the activations that a micro-batch keeps for its backward pass
    peak: int  # maximum of bytes alive at the same time, including gradients, excluding weights and optimizer


def trace_step(method: nn.Module, batch: Mapping[str, Tensor], dtype: torch.dtype, micro_batches: int) -> StepTrace:
    """Trace the forward and backward passes of a step without data.

    Args:
        method: on the meta device; its parameters are replaced.
        batch: a micro-batch on the meta device, except for tensors whose values decide shapes.
        dtype: of autocast.
        micro_batches: of the step. From the second one on, gradients exist from the beginning.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        method.to_empty(device=CPU)
    tracker = TensorTracker([*method.parameters(), *method.buffers()])
    with fake, tracker:
        for _ in range(min(micro_batches, 2)):
            operations, live = tracker.operations, tracker.live
            inputs = {
                key: torch.empty_like(value, device=CPU) if value.is_meta else value for key, value in batch.items()
            }
            with autocast(CPU, dtype):
                loss = method(inputs)["loss"]
            forward, kept = tracker.operations - operations, tracker.live - live
            loss.backward()
            both = tracker.operations - operations
            del loss, inputs
    return StepTrace(forward, both, kept, tracker.peak)


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step in bytes, weights and gradients in float32."""

    weights: int
    gradients: int  # of the trained parameters
    states: int  # of the optimizer
    kept: int  # batch and activations that a micro-batch keeps for its backward pass
    peak: int  # maximum of everything together; the other four do not add up to it


@dataclass(frozen=True)
class Plan:
    """The cost of a run."""

    encoder: int  # parameters; 0 without an encoder
    total: int  # parameters
    forward: int  # operations of the forward passes of a step over all its micro-batches
    step: int  # operations of a whole step, including what checkpointing computes again
    memory: dict[str, StepMemory]  # by device and precision, like "CPU, fp32" and "GPU, 16 bit"


def volume_batch(method: Any, count: int, *, label: bool = False, target: bool = False) -> dict[str, Tensor]:
    """A micro-batch of `count` volumes on the meta device, of the channels and size of the method's encoder.

    Args:
        method: its `model.encoder` has `in_channels` and `img_size`.
        count: volumes.
        label, target: add a label map "label", a class index "target".
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
    make: Callable[[], nn.Module], batch: ExampleBatch, *, settings: TrainSettings, optim: OptimSettings
) -> Plan:
    """Compute the cost of a run without running it.

    Args:
        make: makes the method.
        batch: an example micro-batch, see the module's docstring.
        settings, optim: of the run, which is planned for one process.

    Raises:
        ValueError: settings that do not fit each other.
    """
    Schedule(optim, settings.steps, settings.batch_size)
    memory, trace, method = {}, None, _on_meta(make)
    cpu = precision_name(pick_precision("auto", torch.device("cpu")))
    special = {"auto": {"CPU": cpu, "GPU": "fp16"}, "fp16": {"GPU": "fp16"}}
    for device, name in special.get(settings.precision, dict.fromkeys(("CPU", "GPU"), settings.precision)).items():
        trace, memory[f"{device}, {'16 bit' if device == 'GPU' and name != 'fp32' else name}"] = step_memory(
            make, pick_precision(name, GPU), batch, settings=settings, optim=optim, gpu=device == "GPU"
        )
    assert trace is not None
    encoder = getattr(method.model, "encoder", None)
    return Plan(
        encoder=_count(encoder) if isinstance(encoder, nn.Module) else 0,
        total=_count(method),
        forward=trace.forward * settings.accumulate,
        step=trace.both * settings.accumulate,
        memory=memory,
    )


def step_memory(
    make: Callable[[], nn.Module],
    dtype: torch.dtype,
    batch: ExampleBatch,
    *,
    settings: TrainSettings,
    optim: OptimSettings,
    gpu: bool,
) -> tuple[StepTrace, StepMemory]:
    """The trace of a step and its memory on a CPU or a GPU; see `make_plan`.

    On a GPU the attention probabilities are counted although its fused kernels do not keep them: a few percent.
    """
    method = _on_meta(make)
    if not optim.freeze_until:
        freeze(method.model, optim.freeze)
    example = _without_values(batch(method) if callable(batch) else batch)
    weights = 4 * _count(method)
    # The trace runs on a CPU, where not every network supports bf16; any 16-bit type has the same size.
    trace = trace_step(method, example, dtype if dtype == torch.float32 else torch.float16, settings.accumulate)
    peak = trace.peak
    if gpu and hasattr(method, "run_untiled"):
        with TensorTracker() as tracker:
            method.run_untiled(example)
        peak = max(peak, trace.kept + tracker.peak + (weights if settings.accumulate > 1 else 0))
    gradients = 4 * sum(weight.numel() for weight in method.parameters() if weight.requires_grad)
    states = gradients * (int(optim.momentum > 0) if optim.name == "sgd" else 2)
    ema = weights if settings.ema else 0
    return trace, StepMemory(weights, gradients, states, trace.kept, weights + states + ema + peak)


def _on_meta(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make()


def _without_values(example: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a micro-batch, floating-point ones on the meta device."""
    tensors = {key: value for key, value in example.items() if isinstance(value, Tensor)}
    return {key: value.to("meta") if value.is_floating_point() else value for key, value in tensors.items()}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def wants_plan(plan: str | None, rate: float | None) -> bool:
    """Whether the settings `plan` and `plan_rate` ask for a plan instead of a run.

    Raises:
        ValueError: a `plan` other than null or "only", or a `plan_rate` that is not a positive number.
    """
    if plan not in (None, "only"):
        raise ValueError(f"plan={plan}: choose only, or null")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise ValueError(f"plan_rate={rate}: give the TFLOP/s that the run will reach, like 40")
    return plan is not None


def show_plan(
    make: Callable[[], nn.Module],
    batch: ExampleBatch,
    scans: int,
    settings: TrainSettings,
    optim: OptimSettings,
    rate: float | None,
    names: tuple[str, str],
) -> str:
    """The plan of a run as text.

    Args:
        make, batch, settings, optim: see `make_plan`.
        scans: in the training part.
        rate: TFLOP/s that the run will reach; None: the rate of matrix products is measured on this machine.
        names: of the items of a batch and of the training part.
    """
    plan = make_plan(make, batch, settings=settings, optim=optim)
    if rate is not None:
        return plan_report(plan, settings, scans, rate * 1e12, "as given by plan_rate", names)
    device = pick_device("auto")
    for_gpu = settings.precision == "fp16" and device.type == "cpu"
    dtype = torch.float32 if for_gpu else pick_precision(settings.precision, device)
    kind = precision_name(dtype)
    source = f"measured here by {kind} matrix products ({device.type}): an upper limit, so the run takes longer"
    return plan_report(plan, settings, scans, measure_rate(device, dtype), source, names)


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products on this machine, measured in about a second."""
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
    names: tuple[str, str] = ("volumes", "scans"),
) -> str:
    """A plan as text of about ten lines: `rate` operations per second, from `source`; the rest as in `show_plan`."""
    volumes, seconds = settings.steps * settings.batch_size, plan.step / rate
    low, high = HEAP
    parts = f"{settings.accumulate} micro-batches" if settings.accumulate > 1 else "one micro-batch"
    halves = f"encoder {plan.encoder / 1e6:.2f} M, decoder {(plan.total - plan.encoder) / 1e6:.2f} M, "
    lines = [
        "plan only: nothing is trained and no folder is made",
        f"parameters  {halves if plan.encoder else ''}total {plan.total / 1e6:.2f} M",
        f"operations  per step of {settings.batch_size} {names[0]} in {parts}: "
        f"{plan.forward / 1e9:,.1f} GFLOP forward, {plan.step / 1e9:,.1f} forward and backward, "
        f"{plan.step / settings.batch_size / 1e12:.3g} TFLOP each",
        "            (matrix products and convolutions, by the formulas of torch.utils.flop_counter)",
    ]
    for title, (device, memory) in zip(("memory", ""), plan.memory.items(), strict=False):
        lines.append(
            f"{title:<12}{device}: peak {memory.peak / GIB:.2f} GiB per step; weights "
            f"{memory.weights / GIB:.2f}, gradients {memory.gradients / GIB:.2f}, optimizer {memory.states / GIB:.2f}, "
            f"batch and activations {memory.kept / GIB:.2f}"
        )
    lines += [
        f"            (of tensors; the heap of a process on a CPU takes {low} to {high} times this: docs/planning.md)",
        f"run         {settings.steps} steps: {volumes} {names[0]}, "
        f"{volumes / scans:,.1f} epochs of {scans} {names[1]}",
        f"time        {_duration(settings.steps * seconds)} ({seconds:.3g} s per step) at {rate / 1e12:.4g} TFLOP/s, "
        f"{source}",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """A time in the largest unit of which it is more than one."""
    units = (("days", 86400), ("h", 3600), ("min", 60))
    name, length = next(((name, length) for name, length in units if seconds > length), ("s", 1))
    return f"{seconds / length:.3g} {name}"
