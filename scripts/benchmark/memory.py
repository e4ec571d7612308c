"""The memory of a training step on a CPU, traced without data: what a run takes in addition to Python and libraries.

`python -m scripts.plan_check` compares it with the memory measured. `plan=only` does not guess activations: it measures
a step on a GPU.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from asa.settings import OptimSettings, TrainSettings
from asa.training.device import autocast
from asa.training.optim import freeze
from asa.training.plan import Example, OperationCounter, make_plan, without_values

CPU = torch.device("cpu")


class TensorTracker(OperationCounter):
    """Counts the bytes of the tensors that are created in its context and still alive.

    Tensors `existing` before and their views are not counted.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step's micro-batches."""

    kept: int  # the batch and the activations that a micro-batch keeps for its backward pass
    peak: int  # maximum of bytes alive at the same time, including gradients, excluding weights and optimizer


def trace_memory(method: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype, micro_batches: int) -> StepMemory:
    """Trace the forward and backward passes of a step without data.

    Args:
        method: on the meta device; its parameters are replaced.
        batch: an example micro-batch, see `asa.training.plan`.
        dtype: of autocast.
        micro_batches: of the step. From the second one on, gradients exist from the beginning.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        method.to_empty(device=CPU)
    tracker, kept = TensorTracker([*method.parameters(), *method.buffers()]), 0
    with fake, tracker:
        for _ in range(min(micro_batches, 2)):
            live, inputs = tracker.live, without_values(batch)
            with autocast(CPU, dtype):
                loss = method(inputs)["loss"]
            kept = tracker.live - live
            loss.backward()
            del loss, inputs
    return StepMemory(kept, tracker.peak)


def step_memory(
    make: Callable[[], nn.Module],
    example: Example,
    *,
    settings: TrainSettings,
    optim: OptimSettings,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes of a training step at its peak, weights and optimizer included; arguments as in `make_plan`."""
    with torch.device("meta"):
        method: Any = make()
    if not optim.freeze_until:
        freeze(method.model, optim.freeze)
    plan = make_plan(make, example, settings=settings, optim=optim)
    # Not every network supports bf16 on a CPU; any 16-bit type has the same size.
    dtype = dtype if dtype == torch.float32 else torch.float16
    return plan.weights + plan.states + trace_memory(method, example(method), dtype, settings.accumulate).peak
