"""Segmentation: a U-Net trained by Dice and cross-entropy at five resolutions.

Letters: image `B C D H W`, label `B 1 D H W` of class indices (or 255: counts nowhere), K classes.
"""

from torch import Tensor, nn

from asa.losses.segmentation import DeeplySupervisedDiceCE
from asa.methods.base import Batch
from asa.models.sa_swin_unet import SASwinUNet
from asa.models.unet import SegmentationUNet


class Segmentation(nn.Module):
    """Supervised segmentation with deep supervision.

    Args:
        model: the U-Net, on tokens or on a SA-Swin; its `out_channels` is the number of classes, background included.

    Raises:
        ValueError: a model that segments nothing.
    """

    def __init__(self, *, model: SegmentationUNet | SASwinUNet) -> None:
        super().__init__()
        if not isinstance(model, SegmentationUNet | SASwinUNet):
            raise ValueError(f"segmentation takes a U-Net (model=unet_...), not {type(model).__name__}")
        self.model = model
        self.loss = DeeplySupervisedDiceCE()

    @property
    def mirrored(self) -> bool:
        """Whether batches hold the mirror image."""
        return self.model.mirrored

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image" and "label", and "mirror" where the network looks at it."""
        logits = self.model(batch["image"], deep_supervision=True, mirrored=batch.get("mirror"))
        return {"loss": self.loss(logits, batch["label"])}
