"""Features of a scan: the tokens of a pretrained encoder.

Letters: prepared volume `C D H W`; tokens `E d h w`, E their width and d, h, w the token grid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.data.store import read_box
from asa.inference.preprocessing import ScanPreprocessor
from asa.training.checkpoint import load_encoder, read_description
from asa.training.device import pick_device


def features(
    path: str | Path | Mapping[str, str | Path | None],
    checkpoint: str | Path,
    *,
    img_size: int | Sequence[int] | None = None,
    strip: str | None = None,
    device: str = "auto",
) -> np.ndarray:
    """The tokens of a raw scan in the encoder of a checkpoint.

    The scan is prepared as the training scans were, and cropped or padded about its centre, as pretraining does with
    `data.placement=centre`. The mean over the grid, `.mean(axis=(1, 2, 3))`, is one vector per scan.

    Args:
        path: a NIfTI file; for several channels a file per channel.
        checkpoint: run folder, checkpoint folder or `.safetensors` file of asa-pretrain or asa-finetune.
        img_size: input size in voxels, one number or (D, H, W); None: that of the training.
        strip: skull stripping, as in `PrepareSettings`; None: that of the training scans.
        device: "auto" (a GPU if there is one), "cpu", "cuda", ...

    Returns:
        `(E, d, h, w)` float32, in RAS+ order: inferior to superior, posterior to anterior, left to right.

    Raises:
        FileNotFoundError, ValueError: no checkpoint or scan there, a network without an encoder, a size that it cannot
            take, or a scan that cannot be prepared like the training scans.
    """
    preprocessor = ScanPreprocessor(str(checkpoint), read_description(checkpoint)["data"], strip)
    encoder: Any = load_encoder(checkpoint, img_size=img_size).to(pick_device(device))
    images = path if isinstance(path, Mapping) else {preprocessor.channels[0]: path}
    image = preprocessor.prepare(images)[0].image
    start = [(length - size) // 2 for length, size in zip(image.shape[1:], encoder.img_size, strict=True)]
    volume = torch.from_numpy(read_box(image, start, encoder.img_size))[None].to(pick_device(device), torch.float32)
    with torch.inference_mode():
        tokens = encoder(volume)[0].T.unflatten(1, encoder.token_grid(volume))
    return np.asarray(tokens.float().cpu().numpy())
