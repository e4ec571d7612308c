"""Segmentation: a U-Net trained by Dice and cross-entropy at five resolutions, or a linear probe at one.

Letters: image `B C D H W`, label `B 1 D H W` of class indices (or 255: counts nowhere), K classes or R regions.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from asa.losses.segmentation import DeeplySupervisedDiceCE, DeeplySupervisedRegionLoss
from asa.methods.base import Batch
from asa.models.probe import SEGMENTING, LinearProbe
from asa.models.unet import SegmentationUNet
from asa.ops.nested import paint, painting_order


class Segmentation(nn.Module):
    """Supervised segmentation with deep supervision.

    Args:
        model: the network; its `out_channels` is the number of classes, background included.

    Raises:
        ValueError: a model that segments nothing.
    """

    def __init__(self, *, model: SegmentationUNet | LinearProbe) -> None:
        super().__init__()
        _check_model(model)
        self.model = model
        self.loss = DeeplySupervisedDiceCE()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image" and "label"."""
        return {"loss": self.loss(self.model(batch["image"], deep_supervision=True), batch["label"])}

    def label_map(self, logits: Tensor) -> Tensor:
        """Class indices of a volume's logits: `(K, D, H, W)` -> `(D, H, W)`."""
        return logits.argmax(dim=0)


class RegionSegmentation(nn.Module):
    """Supervised segmentation of regions that may lie inside each other, a sigmoid each, with deep supervision.

    Args:
        model: the network; its `out_channels` is the number of regions.
        regions: name -> class indices that it joins.

    Raises:
        ValueError: a model that segments nothing or has other channels; regions that do not make labels, see
            `asa.ops.nested.painting_order`.
    """

    def __init__(self, *, model: SegmentationUNet | LinearProbe, regions: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        _check_model(model)
        self.order = painting_order(regions)
        if model.out_channels != len(regions):
            raise ValueError(f"a network of {model.out_channels} channels for {len(regions)} regions: one for each")
        self.model = model
        self.loss = DeeplySupervisedRegionLoss(list(regions.values()))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image" and "label"."""
        return {"loss": self.loss(self.model(batch["image"], deep_supervision=True), batch["label"])}

    def label_map(self, logits: Tensor) -> Tensor:
        """Class indices of a volume's logits: `(R, D, H, W)` -> `(D, H, W)`."""
        return paint(logits.sigmoid(), self.order)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, SEGMENTING):
        raise ValueError(f"segmentation takes model=unet_... or model=probe_..., not {type(model).__name__}")
