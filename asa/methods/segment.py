"""Segmentation: a U-Net trained by Dice and cross-entropy at five resolutions, or a head on tokens at one.

Letters: image `B C D H W`, label `B 1 D H W` of class indices (or 255: ignored), K classes or R regions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from asa.losses.segmentation import DeeplySupervisedDiceCE, DeeplySupervisedRegionLoss
from asa.methods.base import Batch
from asa.ops.nested import paint, painting_order


class SegmentationNetwork(Protocol):
    """A module that segments volumes `(B, C, D, H, W)`, also one of your own package.

    With the keyword `deep_supervision` it returns the logits of all its resolutions as a list, the finest first.
    """

    encoder: Any  # with img_size and in_channels; init= loads its weights
    out_channels: int  # classes K, background included, or regions R

    @property
    def mirrored(self) -> bool:
        """Whether it also takes the mirror image, as the keyword `mirrored`."""


def is_segmentation_network(model: object) -> bool:
    """Whether a module has the attributes of a `SegmentationNetwork`: `isinstance` does not see modules in a module."""
    return all(hasattr(model, name) for name in ("encoder", "out_channels", "mirrored"))


class Segmentation(nn.Module):
    """Supervised segmentation with deep supervision.

    Args:
        background_weight: of a background voxel in the cross-entropy, see `DeeplySupervisedDiceCE`; or the weights of
            the first and the last step, between which it changes by the same factor each step: small structures are
            found early, and in the end are not predicted too large.
        scales: resolutions whose loss has a weight, from the finest; None: all.

    Raises:
        ValueError: a model that is not a segmentation network, a weight outside (0, 1], not one or two weights, or no
            resolution.
    """

    task = "segmentation"

    def __init__(
        self, model: SegmentationNetwork, *, background_weight: float | Sequence[float] = 1.0, scales: int | None = None
    ) -> None:
        super().__init__()
        if not is_segmentation_network(model):
            raise ValueError(
                "segmentation needs model=unet_..., sa_swin_unet_..., vit_..., or a comparator, "
                f"got {type(model).__name__}"
            )
        self.model: Any = model
        self.background_weights = _first_and_last(background_weight)
        self.loss: nn.Module = DeeplySupervisedDiceCE(background_weight=self.background_weights[0], scales=scales)

    def progress(self, done: float) -> None:
        """Set the background's weight for the next step, of which the fraction `done` of the training comes before."""
        first, last = self.background_weights
        if isinstance(self.loss, DeeplySupervisedDiceCE):
            self.loss.background_weight = first ** (1 - done) * last**done

    @property
    def mirrored(self) -> bool:
        """Whether batches have the mirror image."""
        return self.model.mirrored

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image" and "label", and "mirror" if the network takes it."""
        mirrored = {"mirrored": batch["mirror"]} if self.mirrored else {}
        logits = self.model(batch["image"], deep_supervision=True, **mirrored)
        if not self.training and isinstance(self.loss, DeeplySupervisedDiceCE):
            self.loss.background_weight = self.background_weights[1]  # so that validations can be compared
        return {"loss": self.loss(logits, batch["label"])}

    def label_map(self, logits: Tensor) -> Tensor:
        """Class indices of a volume's logits: `(K, D, H, W)` -> `(D, H, W)`."""
        return logits.argmax(dim=0)


def _first_and_last(weight: float | Sequence[float]) -> tuple[float, float]:
    """The background's weight in the first and the last step."""
    weights = [weight, weight] if isinstance(weight, int | float) else list(weight)
    if len(weights) != 2 or not all(0 < one <= 1 for one in weights):
        raise ValueError(
            f"method.background_weight={weight}: must be in (0, 1], or two of them, for the first and the last step"
        )
    return weights[0], weights[1]


class RegionSegmentation(Segmentation):
    """Supervised segmentation of regions, class indices by name, that may be nested, each with a sigmoid.

    Deep supervision and `scales` are as in `Segmentation`; the network has an output channel for each region.

    Raises:
        ValueError: a model that is not a segmentation network or has another number of channels; regions that cannot
            be converted to labels, see `asa.ops.nested.painting_order`.
    """

    def __init__(
        self, model: SegmentationNetwork, *, regions: Mapping[str, Sequence[int]], scales: int | None = None
    ) -> None:
        super().__init__(model=model)
        self.order = painting_order(regions)
        if model.out_channels != len(regions):
            raise ValueError(
                f"the network has {model.out_channels} output channels for {len(regions)} regions: one each is needed"
            )
        self.loss = DeeplySupervisedRegionLoss(list(regions.values()), scales=scales)

    def label_map(self, logits: Tensor) -> Tensor:
        """Class indices of a volume's logits: `(R, D, H, W)` -> `(D, H, W)`."""
        return paint(logits.sigmoid(), self.order)
