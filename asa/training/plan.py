"""What a run will cost, said before it is started: parameters, operations, memory, time.

A step is traced with tensors that have a shape and no data (PyTorch's fake tensors), so a plan takes seconds whatever
its size. Operations are those of matrix products and convolutions. Memory is what the step's tensors hold, followed
from the first to the last.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from asa.methods.classify import Classification
from asa.methods.pretrain import MaskedPretraining
from asa.ops.gradients import gradient_importance
from asa.training.device import autocast
from asa.training.distributed import world_size
from asa.training.loop import TrainSettings
from asa.training.optim import OptimSettings, Schedule, freeze

GIB = 2**30
CPU = torch.device("cpu")


class Accounts(TorchDispatchMode):
    """Follows the tensors that are made in its context: bytes that live now, their peak, and operations.

    Operations on tensors without data give such again. Others are computed: what decides shapes, like the places of
    masked patches, has to have data.

    Args:
        known: tensors from before, which are not counted, nor are views of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

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
        # As FlopCounterMode counts, which would keep the tensors of recomputed blocks alive.
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

    PyTorch's formula is the same but for groups, which it does not know of: it counts a depthwise one as a full one.
    """
    transposed, wanted = rest[4], rest[7]
    return conv_flop_count(list(image.shape), list(weight.shape), list(out.shape), transposed=transposed) * sum(
        wanted[:2]
    )


def _without_data(tree: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) or getattr(leaf, "is_meta", False) for leaf in tree_leaves(tree))


@dataclass(frozen=True)
class StepTrace:
    """A step's micro-batches, gone through without data.

    Args:
        forward: operations of a micro-batch's forward pass.
        both: with its backward pass.
        kept: bytes of batch and activations that a micro-batch leaves for its backward pass.
        peak: most bytes of tensors alive at once, gradients among them, weights and optimizer not.
    """

    forward: int
    both: int
    kept: int
    peak: int


def trace_step(method: nn.Module, batch: Mapping[str, Tensor], dtype: torch.dtype, micro_batches: int) -> StepTrace:
    """Go through the forward and backward passes of a step without data.

    Args:
        method: on the meta device; its parameters are replaced.
        batch: a micro-batch on the meta device, but for what has to have data: "seed", and label maps of regions.
        dtype: that autocast computes in.
        micro_batches: of the step. From the second on, gradients are there from the beginning.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        method.to_empty(device=CPU)
    accounts = Accounts([*method.parameters(), *method.buffers()])
    with fake, accounts:
        for _ in range(min(micro_batches, 2)):
            counted, held = accounts.operations, accounts.live
            given = {
                key: torch.empty_like(value, device=CPU) if value.is_meta else value for key, value in batch.items()
            }
            with autocast(CPU, dtype):
                loss = method(given)["loss"]
            forward, kept = accounts.operations - counted, accounts.live - held
            loss.backward()
            both = accounts.operations - counted
            del loss, given
    return StepTrace(forward, both, kept, accounts.peak)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step, weights and gradients in float32.

    Args:
        weights: parameters.
        gradients: of those that learn.
        states: of the optimizer.
        kept: batch and activations that a micro-batch keeps for its backward pass.
        peak: of everything at the worst moment. The others are not all there then.
    """

    weights: int
    gradients: int
    states: int
    kept: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Args:
        encoder, total: parameters.
        forward, step: operations of a step over all its micro-batches: the forward passes, and with the backward ones
            (and what checkpointing computes again).
        memory: by "CPU" and "GPU" with the type computed in, like "CPU, fp32".
    """

    encoder: int
    total: int
    forward: int
    step: int
    memory: dict[str, StepMemory]


def make_plan(
    make: Callable[[], nn.Module],
    *,
    labelled: bool,
    settings: TrainSettings,
    optim: OptimSettings,
    example: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Work out what a run takes, without running it.

    Args:
        make: makes the method.
        labelled: batches have labels.
        settings, optim: of the run, which runs in one process.
        example: a micro-batch of the training data, for a network that does not tell the size of its images (and whose
            operations follow the regions in them). Its numbers are not used, but for whole ones.

    Raises:
        ValueError: settings that do not fit each other.
    """
    Schedule(optim, settings.steps, settings.batch_size)
    memory, trace, method = {}, None, _without_memory(make)
    precisions = {"CPU": settings.precision, "GPU": settings.precision}
    if settings.precision == "auto":
        precisions = {"CPU": "fp32", "GPU": "fp16"}
    elif settings.precision == "fp16":
        precisions.pop("CPU")
    for place, name in precisions.items():
        trace, memory[f"{place}, {'16 bit' if place == 'GPU' and name != 'fp32' else name}"] = step_memory(
            make, name, labelled=labelled, settings=settings, optim=optim, gpu=place == "GPU", example=example
        )
    assert trace is not None
    model = method.model
    return Plan(
        encoder=_count(model.encoder) if hasattr(model, "encoder") else 0,
        total=_count(method),
        forward=trace.forward * settings.accumulate,
        step=trace.both * settings.accumulate,
        memory=memory,
    )


def step_memory(
    make: Callable[[], nn.Module],
    precision: str,
    *,
    labelled: bool,
    settings: TrainSettings,
    optim: OptimSettings,
    gpu: bool,
    example: Mapping[str, Tensor] | None = None,
) -> tuple[StepTrace, StepMemory]:
    """The trace of a step, and what it says about memory on a CPU or a GPU. See `make_plan`.

    On a GPU the attention's probabilities are counted although its fused kernels do not keep them: a few percent.
    """
    method = _without_memory(make)
    freeze(method.model, optim.freeze)
    batch = _batch(method, micro_batch(settings), labelled) if example is None else _without_values(example)
    weights = 4 * _count(method)
    # Either of the two types of 16 bits: not every network takes bf16 on a CPU, where the trace runs.
    dtype = torch.float32 if precision == "fp32" else torch.float16
    trace = trace_step(method, batch, dtype, settings.accumulate)
    peak = trace.peak
    if gpu and isinstance(method, MaskedPretraining) and method.loss.importance:
        # A GPU scores whole batches at once where a CPU takes slabs.
        peak = max(
            peak, trace.kept + _importance_peak(batch["image"], method) + (weights if settings.accumulate > 1 else 0)
        )
    gradients = 4 * sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    states = gradients * (2 if optim.name == "adamw" else int(optim.momentum > 0))
    average = weights if settings.ema else 0
    return trace, StepMemory(weights, gradients, states, trace.kept, weights + states + average + peak)


def micro_batch(settings: TrainSettings) -> int:
    """Images or volumes of a micro-batch in one process."""
    return settings.batch_size // settings.accumulate // world_size()


def _batch(method: Any, part: int, labelled: bool) -> dict[str, Tensor]:
    """A micro-batch of `part` volumes on the meta device, of the size that the method's encoder takes."""
    encoder = method.model.encoder
    image = torch.empty(part, encoder.in_channels, *encoder.img_size, device="meta")
    batch = {"image": image, "seed": torch.arange(part)}
    if method.mirrored:
        batch["mirror"] = torch.empty_like(image)
    if isinstance(method, Classification):
        batch["target"] = torch.zeros(part, dtype=torch.int64, device="meta")
    if labelled:
        batch["label"] = torch.empty((part, 1, *encoder.img_size), dtype=torch.uint8, device="meta")
    return batch


def _without_values(example: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a micro-batch; those of numbers that are not whole on the meta device."""
    tensors = {key: value for key, value in example.items() if isinstance(value, Tensor)}
    return {key: value.to("meta") if value.is_floating_point() else value for key, value in tensors.items()}


def _importance_peak(image: Tensor, method: MaskedPretraining) -> int:
    with Accounts() as accounts:
        gradient_importance(image, method.loss.patch_size, method.loss.bins, method.loss.importance or "orientation")
    return accounts.peak


def _without_memory(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make()


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of this machine's large matrix products, measured in about a second."""
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
    """A plan in words, some ten lines.

    Args:
        plan: of `make_plan`.
        settings: of the run.
        scans: in its training part.
        rate: operations a second.
        source: where the rate is from.
        names: what a batch and the training part are made of.
    """
    volumes, seconds = settings.steps * settings.batch_size, plan.step / rate
    days = settings.steps * seconds / 86400
    parts = f"in {settings.accumulate} micro-batches" if settings.accumulate > 1 else "in one piece"
    halves = f"encoder {plan.encoder / 1e6:.2f} M, decoder {(plan.total - plan.encoder) / 1e6:.2f} M, "
    lines = [
        "plan only: nothing is trained, and no folder is made",
        f"parameters  {halves if plan.encoder else ''}total {plan.total / 1e6:.2f} M",
        f"operations  a step of {settings.batch_size} {names[0]} {parts}: {plan.forward / 1e9:,.1f} GFLOP forward, "
        f"{plan.step / 1e9:,.1f} with backward",
        "            (matrix products and convolutions, by the formulas of torch.utils.flop_counter)",
    ]
    for title, (place, memory) in zip(("memory", ""), plan.memory.items(), strict=False):
        lines.append(
            f"{title:<12}{place}: {memory.peak / GIB:.2f} GiB at the worst moment of a step; weights "
            f"{memory.weights / GIB:.2f}, gradients {memory.gradients / GIB:.2f}, optimizer {memory.states / GIB:.2f}, "
            f"batch and activations {memory.kept / GIB:.2f}"
        )
    lines += [
        "            (of tensors; on a CPU the heap of a run holds 1.2 to 1.8 times as much: docs/planning.md)",
        f"run         {settings.steps} steps: {volumes} {names[0]}, "
        f"{volumes / scans:,.1f} epochs of {scans} {names[1]}",
        f"time        {days:.3g} days ({seconds:.3g} s a step) at {rate / 1e12:.4g} TFLOP/s, {source}",
    ]
    return "\n".join(lines)
