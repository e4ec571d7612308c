"""Zero-shot asymmetry: how much, and where, a pretrained SA-Swin finds a scan to differ from its mirror image."""

from typing import Any

import torch
from torch import Tensor, nn

from asa.inference.anomaly import AnomalyMap, AnomalyScorer
from asa.inference.preprocessing import ScanPreprocessor, check_finite
from asa.models.sa_swin import MAP_LEVEL
from asa.ops.symmetry import flip
from asa.settings import PredictSettings
from asa.training.device import autocast, pick_device, pick_precision

TABLE = "asymmetry.csv"


class AsymmetryScorer(AnomalyScorer):
    """A pretrained SA-Swin that scores the asymmetry of new scans without further training.

    `score` is (1 - cosine similarity) / 2 of the two sides in the symmetry head.

    Args:
        model, preprocessor: see `read_pretrained`; of method=sa_swin.
        settings: device and precision; the whole volume is one window.

    Raises:
        ValueError: not a SA-Swin.
    """

    table = TABLE
    level = MAP_LEVEL  # of the features that are compared, as in `asa.models.sa_swin.SASwin.asymmetry`

    def __init__(self, model: nn.Module, preprocessor: ScanPreprocessor, settings: PredictSettings) -> None:
        super().__init__(preprocessor)
        if not hasattr(model, "asymmetry"):
            raise ValueError(
                f"{preprocessor.path}: no SA-Swin, whose maps are of asymmetry: leave map= out, or fine-tune it"
            )
        self.device = pick_device(settings.device)
        self.precision = pick_precision(settings.precision, self.device)
        self.model: Any = model.to(self.device)
        preprocessor.warn_unless_centred()

    def compute(self, image: Tensor) -> AnomalyMap:
        with torch.inference_mode(), autocast(self.device, self.precision):
            score, difference = self.model.asymmetry(image[None].to(self.device, torch.float32), level=self.level)
        check_finite(score, "the network's output")
        check_finite(difference, "the network's output")
        inside = (image != 0).any(dim=0)
        inside = inside | flip(inside)
        return AnomalyMap(difference[0].cpu() * inside, inside, float(score))
