"""Classes and numbers of whole volumes: the mean token of an encoder, then one linear layer.

Letters: volume `B C D H W`, tokens `B L E`, K classes.
"""

import math
from typing import Any

from torch import Tensor, nn

from asa.models import sa_swin, sw_vit
from asa.models.saca import SymmetryAwareBlock, with_mirror
from asa.models.sw_vit import SWViT
from asa.models.swin import Swin


class Classifier(nn.Module):
    """Logits from the mean token, of the volume alone or after cross-attention to its mirror image.

    Args:
        encoder: volumes to tokens.
        classes: K.
        saca: cross-attention from the volume's tokens to those of its mirror image; None: the volume alone.

    Raises:
        ValueError: less than two classes.
    """

    def __init__(self, encoder: SWViT | Swin, classes: int, saca: SymmetryAwareBlock | None = None) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classification needs at least two classes, got {classes}")
        self.encoder, self.saca = encoder, saca
        self.head = nn.Linear(encoder.embed_dim, classes)

    @property
    def mirrored(self) -> bool:
        """Whether the network also takes the mirror image."""
        return self.saca is not None

    def forward(self, volume: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Classify volumes.

        Args:
            volume: `(B, C, D, H, W)`.
            mirrored: with SACA, their mirror images, of the same shape.

        Returns:
            Logits `(B, K)`.

        Raises:
            ValueError: the mirror images are missing.
        """
        return self.head(_mean_token(self.encoder, self.saca, volume, mirrored))


class Regressor(nn.Module):
    """One number per volume, like the age, from the mean token: `mean + sd * head`, so that the head is standardised.

    Args:
        encoder: volumes to tokens.
        mean, sd: of the number over the training scans, in its own units.
        saca: as in `Classifier`.

    Raises:
        ValueError: a mean or an SD that is not finite, or an SD of 0 or less.
    """

    def __init__(self, encoder: SWViT | Swin, mean: float, sd: float, saca: SymmetryAwareBlock | None = None) -> None:
        super().__init__()
        if not (math.isfinite(mean) and math.isfinite(sd) and sd > 0):
            raise ValueError(f"regression needs the mean and the SD of the training scans, got {mean} and {sd}")
        self.encoder, self.saca = encoder, saca
        self.mean, self.sd = float(mean), float(sd)
        self.head = nn.Linear(encoder.embed_dim, 1)

    @property
    def mirrored(self) -> bool:
        """Whether the network also takes the mirror image."""
        return self.saca is not None

    def forward(self, volume: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Predict the number of each volume.

        Args:
            volume: `(B, C, D, H, W)`.
            mirrored: with SACA, their mirror images, of the same shape.

        Returns:
            `(B,)`, float32 in the number's units, also under autocast: bfloat16 would round an age of 70 to a quarter.

        Raises:
            ValueError: the mirror images are missing.
        """
        standardised = self.head(_mean_token(self.encoder, self.saca, volume, mirrored))[:, 0]
        return self.mean + self.sd * standardised.float()


def _mean_token(
    encoder: SWViT | Swin, saca: SymmetryAwareBlock | None, volume: Tensor, mirrored: Tensor | None
) -> Tensor:
    """The mean token `(B, E)`, of the volume alone or after cross-attention to its mirror image."""
    if saca is None:
        return encoder(volume).mean(dim=1)
    f, counterpart = encoder(with_mirror(volume, mirrored)).chunk(2)
    return saca(f, counterpart, encoder.token_grid(volume)).mean(dim=1)


def asa_classifier_base(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On ASA's encoder `sw_vit_base`, which takes `overrides`. `symmetry`: cross-attention to the mirror image."""
    encoder = sw_vit.sw_vit_base(**overrides)
    return Classifier(encoder, classes, _saca(encoder, symmetry))


def asa_classifier_small(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_small`: for a single workstation GPU."""
    encoder = sw_vit.sw_vit_small(**overrides)
    return Classifier(encoder, classes, _saca(encoder, symmetry))


def asa_classifier_tiny(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    encoder = sw_vit.sw_vit_tiny(**overrides)
    return Classifier(encoder, classes, _saca(encoder, symmetry))


def sa_swin_classifier_base(classes: int, **overrides: Any) -> Classifier:
    """With the released encoder and SACA of SA-Swin; `overrides` are keywords of `asa.models.sa_swin.SASwin`."""
    encoder, saca = sa_swin.swin_with_saca(**{**sa_swin.BASE, **overrides})
    return Classifier(encoder, classes, saca)


def sa_swin_classifier_small(classes: int, **overrides: Any) -> Classifier:
    """With those of `sa_swin_small`: for a single workstation GPU."""
    encoder, saca = sa_swin.swin_with_saca(**{**sa_swin.SMALL, **overrides})
    return Classifier(encoder, classes, saca)


def sa_swin_classifier_tiny(classes: int, **overrides: Any) -> Classifier:
    """With those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    encoder, saca = sa_swin.swin_with_saca(**{**sa_swin.TINY, **overrides})
    return Classifier(encoder, classes, saca)


def asa_regressor_base(mean: float, sd: float, symmetry: bool = False, **overrides: Any) -> Regressor:
    """On ASA's encoder `sw_vit_base`, which takes `overrides`. `symmetry`: cross-attention to the mirror image."""
    encoder = sw_vit.sw_vit_base(**overrides)
    return Regressor(encoder, mean, sd, _saca(encoder, symmetry))


def asa_regressor_small(mean: float, sd: float, symmetry: bool = False, **overrides: Any) -> Regressor:
    """On `sw_vit_small`: for a single workstation GPU."""
    encoder = sw_vit.sw_vit_small(**overrides)
    return Regressor(encoder, mean, sd, _saca(encoder, symmetry))


def asa_regressor_tiny(mean: float, sd: float, symmetry: bool = False, **overrides: Any) -> Regressor:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    encoder = sw_vit.sw_vit_tiny(**overrides)
    return Regressor(encoder, mean, sd, _saca(encoder, symmetry))


def sa_swin_regressor_base(mean: float, sd: float, **overrides: Any) -> Regressor:
    """With the released encoder and SACA of SA-Swin; `overrides` are keywords of `asa.models.sa_swin.SASwin`."""
    encoder, saca = sa_swin.swin_with_saca(**{**sa_swin.BASE, **overrides})
    return Regressor(encoder, mean, sd, saca)


def sa_swin_regressor_small(mean: float, sd: float, **overrides: Any) -> Regressor:
    """With those of `sa_swin_small`: for a single workstation GPU."""
    encoder, saca = sa_swin.swin_with_saca(**{**sa_swin.SMALL, **overrides})
    return Regressor(encoder, mean, sd, saca)


def sa_swin_regressor_tiny(mean: float, sd: float, **overrides: Any) -> Regressor:
    """With those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    encoder, saca = sa_swin.swin_with_saca(**{**sa_swin.TINY, **overrides})
    return Regressor(encoder, mean, sd, saca)


def _saca(encoder: SWViT, symmetry: bool) -> SymmetryAwareBlock | None:
    return SymmetryAwareBlock(encoder.embed_dim, encoder.num_heads) if symmetry else None
