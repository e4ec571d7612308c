"""What the training loop asks of a method."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Any]


class Method(Protocol):
    """A pretraining objective or a fine-tuning task: an `nn.Module` with these members.

    Calling it on a batch (see `asa.data.loader`) returns a dict with the scalar "loss" to minimise, and any other
    scalars to log, detached. `model` is the network that is kept afterwards.
    """

    model: nn.Module

    def forward(self, batch: Batch) -> dict[str, Tensor]: ...
