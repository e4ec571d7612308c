"""Exponential moving average (EMA) of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The exponential moving average of a method's parameters. Buffers are constant and not averaged.

    Args:
        method: on its device, with the initial weights.
        decay: of the average; 0 keeps no average, and the weights themselves are used. The effective decay rises from
            (1 + step) / (10 + step), so that the average of a short run is not dominated by its initial weights.
    """

    def __init__(self, method: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: list[Tensor] = list(method.parameters())
        self.mean = [weight.detach().clone() for weight in self.weights] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step 1, 2, ..."""
        if self.decay:
            torch._foreach_lerp_(self.mean, self.weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the current weights."""
        for mean, weight in zip(self.mean, self.weights, strict=False):
            mean.copy_(weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the average in place of the weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, mean in zip(self.weights, self.mean, strict=False):  # no pairs without decay
            weight.data, mean.data = mean.data, weight.data
