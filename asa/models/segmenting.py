"""The networks that turn a volume into logits of its voxels."""

from typing import TypeAlias

from asa.models.probe import LinearProbe
from asa.models.sa_swin_unet import SASwinUNet
from asa.models.unet import SegmentationUNet

SegmentationNetwork: TypeAlias = SegmentationUNet | SASwinUNet | LinearProbe
