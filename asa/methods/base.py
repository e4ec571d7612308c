"""What the training loop asks of a method."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Any]


class Method(Protocol):
    """A pretraining objective or a fine-tuning task: an `nn.Module` with these members.

    Calling it on a batch (see `asa.data.loading.crops`) returns a dict with the scalar "loss" to minimise, and any
    other scalars to log, detached. `model` is the network that is kept afterwards, `mirrored` whether batches hold the
    "mirror" of each image. Optional: `run_untiled(batch)`, see `asa.methods.pretrain.MaskedPretraining`.
    """

    model: nn.Module
    mirrored: bool

    def forward(self, batch: Batch) -> dict[str, Tensor]: ...


class Pretraining(Method, Protocol):
    """A pretraining objective, with what is shown of its progress.

    `error` names two of the numbers that it returns: its error, and that of a trivial prediction of the same voxels.
    `pictures` gives volumes to draw of a batch: each picture four `(B, C, D, H, W)`, the last one as a heat map.
    """

    error: tuple[str, str]

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]: ...
