"""Zero-shot asymmetry: how much, and where, a pretrained SA-Swin finds a scan to differ from its mirror image."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asa.inference.anomaly import AnomalyMap, AnomalyScorer
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.models.sa_swin import MAP_LEVEL
from asa.ops.symmetry import flip
from asa.settings import PredictSettings
from asa.training.checkpoint import read_model
from asa.training.device import autocast, pick_device, pick_precision

TABLE = "asymmetry.csv"


class AsymmetryScorer(AnomalyScorer):
    """A pretrained SA-Swin that scores the asymmetry of new scans without further training.

    `score` is (1 - cosine similarity) / 2 of the two sides in the symmetry head.

    Args:
        checkpoint: run folder, checkpoint folder or file of a pretraining with method=sa_swin.
        settings: device and precision; the whole volume is one window.
        strip, plugins: as for `Segmenter`.
        channels: of the scans, which say their modality where the training scans are of several.
        healthy: see `AnomalyScorer`.
        level: of the features that are compared, as in `asa.models.sa_swin.SASwin.asymmetry`.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, or not of a SA-Swin; healthy scans that do not match it.
    """

    table = TABLE

    def __init__(
        self,
        checkpoint: str | Path,
        settings: PredictSettings,
        *,
        strip: str | None = None,
        healthy: str | Path | None = None,
        plugins: Sequence[str] = (),
        channels: Collection[str] | None = None,
        level: int = MAP_LEVEL,
    ) -> None:
        model, description = read_model(checkpoint, plugins=plugins)
        if not hasattr(model, "asymmetry"):
            raise ValueError(f"{checkpoint}: no SA-Swin, whose maps are of asymmetry: leave map= out, or fine-tune it")
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.model: Any = model.to(self.device)
        self.level = level
        preprocessor = ScanPreprocessor(str(checkpoint), description["data"], strip, channels=channels)
        preprocessor.warn_unless_centred()
        super().__init__(preprocessor, healthy)

    def compute(self, image: Tensor) -> AnomalyMap:
        with torch.inference_mode(), autocast(self.device, self.precision):
            score, difference = self.model.asymmetry(image[None].to(self.device, torch.float32), level=self.level)
        check_finite(score, "the network's output")
        check_finite(difference, "the network's output")
        inside = (image != 0).any(dim=0)
        inside = inside | flip(inside)
        return AnomalyMap(difference[0].cpu() * inside, inside, float(score))
