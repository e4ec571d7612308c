"""Classes and numbers of whole volumes: the mean token of an encoder, then one linear layer.

Letters: volume `B C D H W`, tokens `B L E`, K classes.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from asa.models import sa_swin, sw_vit
from asa.models.sa_swin import SymmetryAwareBlock, with_mirror
from asa.models.sw_vit import SWViT
from asa.models.swin import Swin


class WholeVolumeNetwork(nn.Module):
    """A linear layer on the mean token, of the volume alone or after cross-attention to its mirror image."""

    def __init__(self, encoder: SWViT | Swin, saca: SymmetryAwareBlock | None, outputs: int) -> None:
        super().__init__()
        self.encoder, self.saca = encoder, saca
        self.mirrored = saca is not None  # whether the network also takes the mirror image
        self.head = nn.Linear(encoder.embed_dim, outputs)

    def forward(self, volume: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """The outputs of the linear layer, `(B, outputs)`, for volumes `(B, C, D, H, W)` and, with SACA, mirror images.

        A ValueError if those are missing.
        """
        if self.saca is None:
            return self.head(self.encoder(volume).mean(dim=1))
        f, counterpart = self.encoder(with_mirror(volume, mirrored)).chunk(2)
        return self.head(self.saca(f, counterpart, self.encoder.token_grid(volume)).mean(dim=1))


class Classifier(WholeVolumeNetwork):
    """Logits `(B, K)` from the mean token; a ValueError for less than two classes."""

    def __init__(self, encoder: SWViT | Swin, classes: int, saca: SymmetryAwareBlock | None = None) -> None:
        if classes < 2:
            raise ValueError(f"classification needs at least two classes, got {classes}")
        super().__init__(encoder, saca, classes)


class Regressor(WholeVolumeNetwork):
    """One number per volume, like the age, from the mean token: `mean + sd * head`, so that the head is standardised.

    `mean` and `sd` are those of the number over the training scans, finite and `sd` > 0, else a ValueError.
    """

    def __init__(self, encoder: SWViT | Swin, mean: float, sd: float, saca: SymmetryAwareBlock | None = None) -> None:
        if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
            raise ValueError(f"regression needs the mean and the SD of the training scans, got {mean} and {sd}")
        super().__init__(encoder, saca, 1)
        self.mean, self.sd = float(mean), float(sd)

    def forward(self, volume: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """The number of each volume, `(B,)` float32 also under autocast: bfloat16 would round 70 to a quarter."""
        return self.mean + self.sd * super().forward(volume, mirrored)[:, 0].float()


def _on_sw_vit(size: Mapping[str, Any], symmetry: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
    encoder = SWViT(**{**size, **overrides})
    return {"encoder": encoder, "saca": SymmetryAwareBlock(encoder.embed_dim, encoder.num_heads) if symmetry else None}


def _on_swin(size: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(("encoder", "saca"), sa_swin.swin_with_saca(**{**size, **overrides}), strict=True))


def asa_classifier_base(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On ASA's encoder `sw_vit_base`, which takes `overrides`. `symmetry`: cross-attention to the mirror image."""
    return Classifier(classes=classes, **_on_sw_vit(sw_vit.BASE, symmetry, overrides))


def asa_classifier_small(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_small`: for a single workstation GPU."""
    return Classifier(classes=classes, **_on_sw_vit(sw_vit.SMALL, symmetry, overrides))


def asa_classifier_tiny(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    return Classifier(classes=classes, **_on_sw_vit(sw_vit.TINY, symmetry, overrides))


def sa_swin_classifier_base(classes: int, **overrides: Any) -> Classifier:
    """With the released encoder and SACA of SA-Swin; `overrides` are keywords of `asa.models.sa_swin.SASwin`."""
    return Classifier(classes=classes, **_on_swin(sa_swin.BASE, overrides))


def sa_swin_classifier_small(classes: int, **overrides: Any) -> Classifier:
    """With those of `sa_swin_small`: for a single workstation GPU."""
    return Classifier(classes=classes, **_on_swin(sa_swin.SMALL, overrides))


def sa_swin_classifier_tiny(classes: int, **overrides: Any) -> Classifier:
    """With those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    return Classifier(classes=classes, **_on_swin(sa_swin.TINY, overrides))


def asa_regressor_base(mean: float, sd: float, symmetry: bool = False, **overrides: Any) -> Regressor:
    """On ASA's encoder `sw_vit_base`, which takes `overrides`. `symmetry`: cross-attention to the mirror image."""
    return Regressor(mean=mean, sd=sd, **_on_sw_vit(sw_vit.BASE, symmetry, overrides))


def asa_regressor_small(mean: float, sd: float, symmetry: bool = False, **overrides: Any) -> Regressor:
    """On `sw_vit_small`: for a single workstation GPU."""
    return Regressor(mean=mean, sd=sd, **_on_sw_vit(sw_vit.SMALL, symmetry, overrides))


def asa_regressor_tiny(mean: float, sd: float, symmetry: bool = False, **overrides: Any) -> Regressor:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    return Regressor(mean=mean, sd=sd, **_on_sw_vit(sw_vit.TINY, symmetry, overrides))


def sa_swin_regressor_base(mean: float, sd: float, **overrides: Any) -> Regressor:
    """With the released encoder and SACA of SA-Swin; `overrides` are keywords of `asa.models.sa_swin.SASwin`."""
    return Regressor(mean=mean, sd=sd, **_on_swin(sa_swin.BASE, overrides))


def sa_swin_regressor_small(mean: float, sd: float, **overrides: Any) -> Regressor:
    """With those of `sa_swin_small`: for a single workstation GPU."""
    return Regressor(mean=mean, sd=sd, **_on_swin(sa_swin.SMALL, overrides))


def sa_swin_regressor_tiny(mean: float, sd: float, **overrides: Any) -> Regressor:
    """With those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    return Regressor(mean=mean, sd=sd, **_on_swin(sa_swin.TINY, overrides))
