"""Classification of whole volumes: the mean token of an encoder, then one linear layer.

Letters: volume `B C D H W`, tokens `B L E`, K classes.
"""

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
        if self.saca is None:
            tokens = self.encoder(volume)
        else:
            f, counterpart = self.encoder(with_mirror(volume, mirrored)).chunk(2)
            tokens = self.saca(f, counterpart, self.encoder.token_grid(volume))
        return self.head(tokens.mean(dim=1))


def asa_classifier_base(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On ASA's encoder `sw_vit_base`, which takes `overrides`. `symmetry`: cross-attention to the mirror image."""
    return _on_asa(sw_vit.sw_vit_base(**overrides), classes, symmetry)


def asa_classifier_small(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_small`: for a single workstation GPU."""
    return _on_asa(sw_vit.sw_vit_small(**overrides), classes, symmetry)


def asa_classifier_tiny(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    return _on_asa(sw_vit.sw_vit_tiny(**overrides), classes, symmetry)


def _on_asa(encoder: SWViT, classes: int, symmetry: bool) -> Classifier:
    saca = SymmetryAwareBlock(encoder.embed_dim, encoder.num_heads) if symmetry else None
    return Classifier(encoder, classes, saca)


def sa_swin_classifier_base(classes: int, **overrides: Any) -> Classifier:
    """With the released encoder and SACA of SA-Swin; `overrides` are keywords of `asa.models.sa_swin.SASwin`."""
    return _on_sa_swin(classes, **{**sa_swin.BASE, **overrides})


def sa_swin_classifier_small(classes: int, **overrides: Any) -> Classifier:
    """With those of `sa_swin_small`: for a single workstation GPU."""
    return _on_sa_swin(classes, **{**sa_swin.SMALL, **overrides})


def sa_swin_classifier_tiny(classes: int, **overrides: Any) -> Classifier:
    """With those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    return _on_sa_swin(classes, **{**sa_swin.TINY, **overrides})


def _on_sa_swin(classes: int, **overrides: Any) -> Classifier:
    encoder, saca = sa_swin.swin_with_saca(**overrides)
    return Classifier(encoder, classes, saca)
