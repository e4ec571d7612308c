"""Restoration of whole images, in tiles if they are large.

Letters: image `C H W` in [0, 1], label map `H W`, upscaling factor s.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.ndimage import find_objects
from torch import Tensor

from asa.inference.segmentation import PredictSettings
from asa.restoration.rat import RestorationNetwork
from asa.training.device import autocast, pick_precision

HALO = 32  # pixels of context around a tile, whose output is discarded

Box = tuple[slice, slice]


def restore_image(
    model: RestorationNetwork, image: Tensor, regions: Tensor, settings: PredictSettings, *, tile: int = 1024
) -> Tensor:
    """Restore an image of any size, in tiles if it is larger than one tile.

    The context of a tile is a halo and every region that overlaps the tile and is no larger than a tile. These regions
    are attended to as a whole; larger ones are cut at the edge of the context.

    Args:
        image: `(C, H, W)`.
        regions: label map `(H, W)`.
        settings: precision; the device is that of the model.
        tile: edge of a tile in pixels.

    Returns:
        `(C, s*H, s*W)` float32 on the CPU, not clipped to [0, 1].

    Raises:
        ValueError: an image and a label map that do not match, or a tile below one pixel.
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
