"""What a pretrained network would expect in a scan: each part predicted from the others, and the error of that.

Letters: image `C D H W`, L patches.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from asa.inference.anomaly import AnomalyMap, AnomalyScorer
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.inference.segmentation import sliding_window
from asa.methods.pretrain import denormalised
from asa.methods.sa_swin import unit_noise
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.models.sa_swin import SASwin
from asa.ops.patches import patchify, select_tokens, unpatchify
from asa.settings import PredictSettings
from asa.training.device import pick_device

GROUPS = 4  # of patches or boxes, one of which is hidden at a time
FEWEST = 20  # part of a window's patches, one in so many, that has tissue; with less of it nothing is predicted
BOXES = 8  # along each axis of a window
BLUR = 6.0  # full width of the blur at half its maximum, mm


class PredictedPatches(nn.Module):
    """Each patch of a window as a masked autoencoder predicts it from the patches of the other groups.

    The patches with tissue are dealt into four groups, in an order that is drawn once for each window.

    Args:
        model: the masked autoencoder.
        normalised: it predicts standardised patches, which get the mean and the variance of the patch itself: what
            is wrong with these is not in the error.
        masked: the number of groups that are masked at a time, 1 or 3.
    """

    def __init__(self, model: MaskedAutoencoder, *, normalised: bool = False, masked: int = 1) -> None:
        super().__init__()
        self.model, self.encoder = model, model.encoder
        self.normalised, self.masked = normalised, masked

    def forward(self, windows: Tensor) -> Tensor:
        """`(B, C, D, H, W)` -> the same shape; air stays as it is."""
        return torch.cat([self._predicted(window) for window in windows.split(1)])

    def _predicted(self, window: Tensor) -> Tensor:
        patches = patchify(window, self.encoder.patch_size)
        tissue = (patches != 0).any(dim=2)  # (1, L)
        if (count := int(tissue.sum())) < max(GROUPS, patches.shape[1] / FEWEST):
            return window
        group = torch.full_like(tissue, -1, dtype=torch.long)
        group[tissue] = _dealt(count).to(group.device)
        total, times = torch.zeros_like(patches), torch.zeros_like(patches[..., :1])
        for chosen in range(GROUPS):
            mask = tissue & ((group == chosen) if self.masked == 1 else (group != chosen))
            found = self.model(window, visible=select_tokens(tissue & ~mask), decoded=select_tokens(mask))[0]
            total[mask] += denormalised(found, patches[mask]).to(total) if self.normalised else found.to(total)
            times[mask] += 1
        predicted = torch.where(times > 0, total / times.clamp(min=1), patches)
        return unpatchify(predicted, self.encoder.grid, self.encoder.patch_size)


class InpaintedBoxes(nn.Module):
    """Each voxel of a window as a SA-Swin inpaints it, in boxes of noise, from the others and the mirror image."""

    mirrored = True

    def __init__(self, model: SASwin) -> None:
        super().__init__()
        self.model, self.encoder = model, model.encoder

    def forward(self, windows: Tensor, mirrored: Tensor) -> Tensor:
        """`(B, C, D, H, W)` with the mirror images -> the same shape."""
        group = _dealt(BOXES**3).view(1, 1, *(BOXES,) * 3).float()
        group = nn.functional.interpolate(group, windows.shape[2:]).to(windows.device)  # of the nearest box
        noise = unit_noise(windows.shape[1:], torch.Generator().manual_seed(0)).to(windows)
        found = windows
        for chosen in range(GROUPS):
            hidden = group == chosen
            found = found.where(~hidden, self.model(windows.where(~hidden, noise), mirrored).volume.to(found))
        return found


def _dealt(count: int) -> Tensor:
    """The group of each of so many patches or boxes, of equal size but for one, in a drawn order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)) % GROUPS


class PredictionErrorScorer(AnomalyScorer):
    """How far a scan is from what a pretrained network predicts of it, each part from the others.

    A masked autoencoder predicts the patches of a window, a quarter of them at a time; a SA-Swin inpaints boxes, with
    cross-attention to the mirror image. The map is the absolute error, the mean over channels, blurred by 6 mm for
    voxels of the mean size in training.

    Args:
        model, preprocessor: see `read_pretrained`; of method=asa, mae or sa_swin.
        settings: windows, device and precision.

    Raises:
        ValueError: a network of another method.
    """

    def __init__(self, model: nn.Module, preprocessor: ScanPreprocessor, settings: PredictSettings) -> None:
        super().__init__(preprocessor)
        if isinstance(model, MaskedAutoencoder):
            network: nn.Module = PredictedPatches(model, normalised=preprocessor.data.get("normalised", False))
        elif isinstance(model, SASwin):
            network = InpaintedBoxes(model)
        else:
            raise ValueError(
                f"{preprocessor.path}: its network predicts no hidden parts, as those of method=asa, mae and sa_swin "
                "do: fine-tune it, or pretrain one of these"
            )
        self.network, self.settings = network.to(pick_device(settings.device)), settings
        spacing = preprocessor.data.get("spacing", np.ones((2, 3)))  # an older checkpoint has none
        self.blur = BLUR / 2.355 / np.mean(spacing, axis=0)  # SD in voxels

    def compute(self, image: Tensor) -> AnomalyMap:
        predicted = sliding_window(self.network, image, self.settings).cpu()
        check_finite(predicted, "the network's output")
        inside = (image != 0).any(dim=0)
        error = ndimage.gaussian_filter((predicted - image).abs().mean(dim=0).numpy(), self.blur)
        return AnomalyMap(torch.from_numpy(error) * inside, inside)
