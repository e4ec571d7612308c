"""Restoration of images: a network trained by the focal region loss.

Letters: image `B C H W` and target `B C sH sW` in [0, 1], label map `B H W`, upscaling factor s.
"""

import torch
from torch import Tensor, nn

from asa.methods.base import Batch
from asa.restoration.loss import FocalRegionLoss, psnr
from asa.restoration.rat import RegionAttentionTransformer
from asa.restoration.restormer import Restormer


class Restoration(nn.Module):
    """Denoising, synthesis or super-resolution from pairs of degraded and clean images.

    Args:
        model: the network, a region attention transformer, or a Restormer to compare it with.
        beta: weight of the focal term of the loss; 0 is the plain absolute error.

    Raises:
        ValueError: a model that is neither, or a negative beta.
    """

    task = "restoration"
    mirrored = False

    def __init__(self, *, model: RegionAttentionTransformer | Restormer, beta: float = 1.0) -> None:
        super().__init__()
        if not isinstance(model, RegionAttentionTransformer | Restormer):
            raise ValueError(f"restoration needs model=rat_... or model=restormer_..., got {type(model).__name__}")
        self.model = model
        self.loss = FocalRegionLoss(beta)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss of a batch with "image", "target" and "regions" (see `asa.restoration.pairs`).

        Returns:
            "loss"; and for the log "mae", the mean absolute error, and "psnr" in dB for a data range of 1, the mean
            over the images.
        """
        target, regions, s = batch["target"].float(), batch["regions"], self.model.upscale
        prediction = self.model(batch["image"], regions).float()
        fine = regions.repeat_interleave(s, dim=1).repeat_interleave(s, dim=2)
        loss = self.loss(prediction, target, fine)
        with torch.no_grad():
            error = prediction - target
            return {"loss": loss, "mae": error.abs().mean(), "psnr": psnr(error).mean()}
