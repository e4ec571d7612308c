"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The mean of a method's parameters over the last steps; buffers are constants and stay out.

    Args:
        method: on its device, with the weights to start from.
        decay: share of the old mean that a step keeps; 0 keeps no mean, and the weights stand in its place. It rises
            from (1 + step) / (10 + step), so that a short run is not the mean of its start.
    """

    def __init__(self, method: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: list[Tensor] = list(method.parameters())
        self.mean = [weight.detach().clone() for weight in self.weights] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 1, 2, ..."""
        if self.decay:
            torch._foreach_lerp_(self.mean, self.weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def restart(self) -> None:
        """Make the present weights the mean."""
        for mean, weight in zip(self.mean, self.weights, strict=False):
            mean.copy_(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the mean in the place of the weights for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, mean in zip(self.weights, self.mean, strict=False):  # without decay there is no mean
            weight.data, mean.data = mean.data, weight.data
