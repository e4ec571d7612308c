"""Losses of image restoration, and the PSNR.

Letters: image `B C H W`, label map `B H W` of regions r.
"""

import torch
from torch import Tensor, nn

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
        """The loss, a scalar in float32.

        Args:
            prediction, target: `(B, C, H, W)`.
            regions: label map `(B, H, W)`, any integers, on the host or the images' device.

        Raises:
            ValueError: inconsistent shapes.
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
