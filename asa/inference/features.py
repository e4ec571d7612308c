"""Features of a scan: the tokens of a pretrained encoder.

Letters: prepared volume `C D H W`; tokens `E d h w`, E their width and d, h, w the token grid.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from asa.data.store import read_box
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.training.checkpoint import load_encoder, read_description
from asa.training.device import pick_device

MOST_LOST = 0.1  # fraction of a head outside the encoder's crop, above which a warning says so


class FeatureExtractor:
    """The encoder of a checkpoint, with the preparation of its training scans; arguments as of `features`.

    `channels` of the new scans say their modality, where the training scans are of several.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        img_size: int | Sequence[int] | None = None,
        strip: str | None = None,
        device: str = "auto",
        plugins: Sequence[str] = (),
        channels: Collection[str] | None = None,
    ) -> None:
        data = read_description(checkpoint)["data"]
        self.preprocessor = ScanPreprocessor(str(checkpoint), data, strip, channels=channels)
        self.device = pick_device(device)
        self.encoder: Any = load_encoder(checkpoint, img_size=img_size, plugins=plugins).to(self.device)

    def crop(self, volume: np.ndarray) -> np.ndarray:
        """A prepared volume `(C, D, H, W)`, cropped or padded about its centre to the encoder's size."""
        sizes = zip(volume.shape[1:], self.encoder.img_size, strict=True)
        return read_box(volume, [(length - size) // 2 for length, size in sizes], self.encoder.img_size)

    def tokens(self, volume: np.ndarray) -> np.ndarray:
        """The tokens of a prepared volume `(C, D, H, W)`, cropped: `(E, d, h, w)` float32, or a ValueError for NaN.

        A warning says if much of the head is not in the crop.
        """
        cropped = self.crop(volume)
        inside, held = (int(np.count_nonzero(part)) for part in (cropped, volume))
        if held and (lost := 1 - inside / held) > MOST_LOST:
            whole = ",".join(str(math.ceil(n / 32) * 32) for n in volume.shape[1:])
            size = " x ".join(map(str, self.encoder.img_size))
            warnings.warn(
                f"{lost:.0%} of the head is outside the {size} voxels that are read: img_size=[{whole}] holds all",
                stacklevel=2,
            )
        image = torch.from_numpy(cropped)[None].to(self.device, torch.float32)
        with torch.inference_mode():
            tokens = self.encoder(image)[0].T.unflatten(1, self.encoder.token_grid(image))
        check_finite(tokens, "the network's output")
        return np.asarray(tokens.float().cpu().numpy())

    def fractions(self, mask: np.ndarray) -> np.ndarray:
        """The fraction of each token's patch that a mask `(D, H, W)` of a prepared volume covers: `(d, h, w)`."""
        inside = torch.from_numpy(self.crop(mask[None].astype(np.float32)))[None]
        grid = self.encoder.token_grid(inside.expand(-1, self.encoder.in_channels, -1, -1, -1))
        return np.asarray(F.interpolate(inside, grid, mode="area")[0, 0].numpy())


def pooled(tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of tokens `(E, d, h, w)`; NaN where all weights `(d, h, w)` are 0."""
    total = float(weights.sum())
    return (tokens * weights).sum(axis=(1, 2, 3)) / total if total else np.full(len(tokens), np.nan)


def features(
    path: str | Path | Mapping[str, str | Path | None],
    checkpoint: str | Path,
    *,
    img_size: int | Sequence[int] | None = None,
    strip: str | None = None,
    device: str = "auto",
    plugins: Sequence[str] = (),
) -> np.ndarray:
    """The tokens of a raw scan in the encoder of a checkpoint.

    The scan is prepared as the training scans were, and cropped or padded about its centre, as pretraining does with
    `data.placement=centre`. The mean over the grid, `.mean(axis=(1, 2, 3))`, is one vector per scan.

    Args:
        path: a NIfTI file; for several channels a file per channel; for an encoder of several modalities, too, like
            `{"ct": FILE}`.
        checkpoint: run folder, checkpoint folder or `.safetensors` file of asa-pretrain or asa-finetune.
        img_size: input size in voxels, one number or (D, H, W); None: that of the training.
        strip, plugins: as for `asa.Segmenter`.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...

    Returns:
        `(E, d, h, w)` float32, in RAS+ order: inferior to superior, posterior to anterior, left to right.

    Raises:
        FileNotFoundError, ValueError: no checkpoint or scan there, a network without an encoder, a size that it cannot
            take, or a scan that cannot be prepared like the training scans.
    """
    channels = list(path) if isinstance(path, Mapping) else None
    extractor = FeatureExtractor(
        checkpoint, img_size=img_size, strip=strip, device=device, plugins=plugins, channels=channels
    )
    images = path if isinstance(path, Mapping) else {extractor.preprocessor.channels[0]: path}
    return extractor.tokens(extractor.preprocessor.prepare(images)[0].image)
