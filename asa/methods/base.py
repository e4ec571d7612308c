"""The interface between a method and the training loop."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
MODALITY = "modality_"  # begins keys of a batch


class Method(Protocol):
    """A pretraining or fine-tuning objective: an `nn.Module` with these members.

    Calling it on a batch (see `asa.data.loading.crops`) returns a dict with the scalar "loss" to minimise, and for the
    log, detached, other scalars, and pairs `(2,)` of a sum and a number of samples, which are logged as their ratio.

    - `task`: the task of `asa.tasks` that trains it: "pretraining", "segmentation", "classification", "regression",
      "restoration", or `package.module.Class` of a plugin.
    - `model`: the network, which is kept in checkpoints.
    - `mirrored`: whether batches have the "mirror" of each image.
    - optional: `drops_air`: whether batches have "air", the patches of constant intensity of each image.
    - optional: `excludes`: whether batches may have "excluded", the patches that do not count in the loss.
    - optional: `progress(done)`: called before each step with the fraction of the steps that are done.
    """

    task: str
    mirrored: bool

    @property
    def model(self) -> nn.Module: ...

    def forward(self, batch: Batch) -> dict[str, Tensor]: ...


class Pretraining(Method, Protocol):
    """A pretraining objective, with what its validation shows.

    - `error`: names of two returned scalars: its error, and that of a trivial prediction, as
      PREDICTOR_loss or PREDICTOR_l1.
    - `pictures`: figures of a batch by name: four volumes `(B, C, D, H, W)` each, the last drawn as a heat map.
    """

    error: tuple[str, str]

    def pictures(self, batch: Batch) -> dict[str, dict[str, Tensor]]: ...


def sums_by_modality(batch: Batch, **values: Tensor) -> dict[str, Tensor]:
    """For the log of several modalities: the sum of values `(B,)` over the samples of each, and their number, `(2,)`.

    They are named "VALUE_NAME" for each "modality_NAME" `(B,)` of the batch: 1 for its samples, 0 for others.
    """
    own = {key.removeprefix(MODALITY): batch[key] for key in batch if key.startswith(MODALITY)}
    return {
        f"{name}_{modality}": torch.stack([value.detach().float().where(mask > 0, 0).sum(), mask.sum()])
        for name, value in values.items()
        for modality, mask in own.items()
    }
