"""Restoration of images: the focal region loss, the PSNR, and the method that trains a network.

Letters: image `B C H W` and target `B C sH sW` in [0, 1], label map `B H W` of regions r, upscaling factor s.
"""

import torch
from torch import Tensor, nn

from asa.methods.base import Batch
from asa.restoration.rat import RestorationNetwork
from asa.restoration.regions import region_keys


class FocalRegionLoss(nn.Module):
    """Absolute error with larger weights for regions that are restored badly (RAT, MICCAI 2024).

    e = |prediction - target|, a_r = mean of e over region r, w = a_r / the largest a_r of the image, and
    L = mean of e * (1 + beta * w). The weights have no gradient; they are 0 in an image that is restored perfectly.

    Args:
        beta: additional weight of the worst region; 0 is the plain absolute error (L1).

    Raises:
        ValueError: a negative beta.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta={beta}: must be 0 or more")
        self.beta = beta

    def weights(self, error: Tensor, regions: Tensor) -> Tensor:
        """w of each pixel, `(B, H, W)`, from errors `(B, C, H, W)` and label maps `(B, H, W)`."""
        keys, count = region_keys(regions)  # on the host where the labels are: their range is read
        keys = keys.to(error.device, non_blocking=True)
        flat = keys.flatten()
        total = torch.zeros(count, dtype=torch.float32, device=error.device)
        sums = total.index_add(0, flat, error.detach().float().mean(dim=1).flatten())
        pixels = total.index_add(0, flat, torch.ones_like(flat, dtype=torch.float32))
        means = (sums / pixels.clamp(min=1)).view(len(error), -1)  # B regions
        largest = means.amax(dim=1, keepdim=True)
        return (means / largest).where(largest > 0, 0.0).flatten()[keys]

    def forward(self, prediction: Tensor, target: Tensor, regions: Tensor) -> Tensor:
        """The loss, a scalar in float32; a ValueError for inconsistent shapes.

        Args:
            prediction, target: `(B, C, H, W)`.
            regions: label map `(B, H, W)`, any integers, on the host or the images' device.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
        if regions.shape != (len(target), *target.shape[2:]):
            raise ValueError(
                f"a label map of shape {tuple(regions.shape)} does not fit images of shape {tuple(target.shape)}: it "
                "must be (B, H, W)"
            )
        error = (prediction.float() - target.float()).abs()
        if not self.beta:
            return error.mean()
        return (error * (1 + self.beta * self.weights(error, regions))[:, None]).mean()


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a data range of 1: errors `(B, C, H, W)` -> `(B,)`, 100 at most."""
    return -10 * error.square().flatten(1).mean(dim=1).clamp(min=1e-10).log10()


class Restoration(nn.Module):
    """Denoising, synthesis or super-resolution from pairs of degraded and clean images.

    `beta` is that of the `FocalRegionLoss`.

    Raises:
        ValueError: a model that is no restoration network, or a negative beta.
    """

    task = "restoration"
    mirrored = False

    def __init__(self, model: RestorationNetwork, *, beta: float = 1.0) -> None:
        super().__init__()
        if not isinstance(model, RestorationNetwork):
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
