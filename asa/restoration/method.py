"""Restoration of images: the focal region loss, the PSNR, the method that trains a network, and whole images in tiles.

Letters: image `B C H W` and target `B C sH sW` in [0, 1], label map `B H W` of regions r, upscaling factor s.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.ndimage import find_objects
from torch import Tensor, nn

from asa.methods.base import Batch
from asa.restoration.rat import RestorationNetwork
from asa.restoration.regions import region_keys
from asa.settings import PredictSettings
from asa.training.device import autocast, pick_precision

HALO = 32  # pixels of context around a tile, whose output is discarded

Box = tuple[slice, slice]


class FocalRegionLoss(nn.Module):
    """Absolute error with larger weights for regions that are restored badly (RAT, MICCAI 2024).

    e = |prediction - target|, a_r = mean of e over region r, w = a_r / the largest a_r of the image, and
    L = mean of e * (1 + beta * w). The weights have no gradient; they are 0 in an image that is restored perfectly.
    beta, the additional weight of the worst region, is 0 or more; 0 is the plain absolute error (L1).
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
        """The loss, a scalar in float32, of images `(B, C, H, W)`; a ValueError for inconsistent shapes.

        `regions` is a label map `(B, H, W)`, any integers, on the host or the images' device.
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
    """Denoising, synthesis or super-resolution from pairs of degraded and clean images, by `FocalRegionLoss(beta)`."""

    task = "restoration"
    mirrored = False

    def __init__(self, model: RestorationNetwork, *, beta: float = 1.0) -> None:
        super().__init__()
        if not isinstance(model, RestorationNetwork):
            raise ValueError(f"restoration needs model=rat_... or model=restormer_..., got {type(model).__name__}")
        self.model = model
        self.loss = FocalRegionLoss(beta)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The "loss" of a batch with "image", "target" and "regions" (see `asa.restoration.pairs`).

        For the log also "mae", the mean absolute error, and "psnr" in dB for a data range of 1, the images' mean.
        """
        target, regions, s = batch["target"].float(), batch["regions"], self.model.upscale
        prediction = self.model(batch["image"], regions).float()
        fine = regions.repeat_interleave(s, dim=1).repeat_interleave(s, dim=2)
        loss = self.loss(prediction, target, fine)
        with torch.no_grad():
            error = prediction - target
            return {"loss": loss, "mae": error.abs().mean(), "psnr": psnr(error).mean()}


def restore_image(
    model: RestorationNetwork, image: Tensor, regions: Tensor, settings: PredictSettings, *, tile: int = 1024
) -> Tensor:
    """Restore an image `(C, H, W)` of any size, in tiles if it is larger than one tile.

    The context of a tile is a halo and every region that overlaps the tile and is no larger than a tile. These regions
    are attended to as a whole; larger ones are cut at the edge of the context.

    Args:
        regions: label map `(H, W)`; a ValueError if it does not match the image.
        settings: precision; the device is that of the model.
        tile: edge of a tile in pixels, 1 or more.

    Returns `(C, s*H, s*W)` float32 on the CPU, not clipped to [0, 1].
    """
    if tile < 1:
        raise ValueError(f"tile={tile}: give 1 or more pixels")
    model.check(image[None], regions[None])
    device, s = next(model.parameters()).device, model.upscale
    out = torch.empty(len(image), s * image.shape[1], s * image.shape[2])
    with torch.inference_mode(), autocast(device, pick_precision(settings.precision, device)):
        for core, context in tiles(regions.numpy(), tile, model.multiple):
            restored = model(image[:, *context][None].to(device), regions[context][None])[0].float().cpu()
            inner = (slice(s * (c.start - x.start), s * (c.stop - x.start)) for c, x in zip(core, context, strict=True))
            out[:, *(slice(s * c.start, s * c.stop) for c in core)] = restored[:, *inner]
    return out


def tiles(regions: np.ndarray, tile: int, multiple: int = 1) -> Iterator[tuple[Box, Box]]:
    """Tiles that cover a label map `(H, W)` once, each with the box of its context. A small image is one tile.

    A context starts at a multiple of `multiple` pixels, so that its windows coincide with those of the whole image.
    """
    h, w = regions.shape
    if max(h, w) <= tile:
        yield (slice(0, h), slice(0, w)), (slice(0, h), slice(0, w))
        return
    numbers = np.unique(regions, return_inverse=True)[1].reshape(regions.shape)
    boxes: list[Any] = find_objects(numbers + 1)
    for top in range(0, h, tile):
        for left in range(0, w, tile):
            core = (slice(top, min(top + tile, h)), slice(left, min(left + tile, w)))
            halo = tuple(
                slice(max(0, s.start - HALO), min(n, s.stop + HALO)) for s, n in zip(core, (h, w), strict=True)
            )
            overlapping = [boxes[number] for number in np.unique(numbers[core])]
            held = [halo, *(box for box in overlapping if max(side.stop - side.start for side in box) <= tile)]
            first = [min(box[axis].start for box in held) // multiple * multiple for axis in (0, 1)]
            last = [max(box[axis].stop for box in held) for axis in (0, 1)]
            yield core, (slice(first[0], last[0]), slice(first[1], last[1]))
