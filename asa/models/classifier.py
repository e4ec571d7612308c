"""Classification of whole volumes: the mean of an encoder's tokens, then one linear layer.

Letters: volume `B C D H W`, tokens `B L E`, K classes.
"""

from typing import Any

from torch import Tensor, nn

from asa.models import sa_swin, sw_vit
from asa.models.saca import SymmetryAwareBlock, look_across
from asa.models.sw_vit import SWViT
from asa.models.swin import Swin


class Classifier(nn.Module):
    """Logits from the mean token, of the volume alone or after it has looked at its mirror image.

    Args:
        encoder: volumes to tokens.
        classes: K.
        saca: looks from the volume's tokens to those of its mirror image; None: the volume alone.
        position: add the places' codes before that, as in `asa.models.sa_swin.SASwin`.

    Raises:
        ValueError: less than two classes.
    """

    def __init__(
        self, encoder: SWViT | Swin, classes: int, saca: SymmetryAwareBlock | None = None, position: bool = False
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a classification has two classes or more, got {classes}")
        self.encoder, self.saca, self.position = encoder, saca, position
        self.head = nn.Linear(encoder.embed_dim, classes)

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image is looked at."""
        return self.saca is not None

    def forward(self, volume: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Classify volumes.

        Args:
            volume: `(B, C, D, H, W)`.
            mirrored: their mirror images, of the same shape, where the network looks at them.

        Returns:
            Logits `(B, K)`.

        Raises:
            ValueError: the mirror images are missing.
        """
        if self.saca is None:
            tokens = self.encoder(volume)
        elif mirrored is None:
            raise ValueError("this network compares a volume with its mirror image: give both")
        else:
            code = self.encoder.code(volume) if self.position and isinstance(self.encoder, Swin) else None
            tokens = look_across(self.encoder, self.saca, volume, mirrored, code)[2]
        return self.head(tokens.mean(dim=1))


def asa_classifier_base(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On the paper's encoder of ASA; `overrides` go to it. `symmetry`: its tokens look at those of the mirror image."""
    return _on_asa(sw_vit.sw_vit_base(**overrides), classes, symmetry)


def asa_classifier_small(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_small`: for a workstation, or a CPU with patience."""
    return _on_asa(sw_vit.sw_vit_small(**overrides), classes, symmetry)


def asa_classifier_tiny(classes: int, symmetry: bool = False, **overrides: Any) -> Classifier:
    """On `sw_vit_tiny`: for tests and demonstrations on a CPU."""
    return _on_asa(sw_vit.sw_vit_tiny(**overrides), classes, symmetry)


def sa_swin_classifier_base(classes: int, **overrides: Any) -> Classifier:
    """On the released encoder and cross-attention of SA-Swin; `overrides` as for `asa.models.sa_swin.SASwin`."""
    return _from_sa_swin(classes, **{**sa_swin.BASE, **overrides})


def sa_swin_classifier_small(classes: int, **overrides: Any) -> Classifier:
    """On those of `sa_swin_small`: for a workstation, or a CPU with patience."""
    return _from_sa_swin(classes, **{**sa_swin.SMALL, **overrides})


def sa_swin_classifier_tiny(classes: int, **overrides: Any) -> Classifier:
    """On those of `sa_swin_tiny`: for tests and demonstrations on a CPU."""
    return _from_sa_swin(classes, **{**sa_swin.TINY, **overrides})


def _on_asa(encoder: SWViT, classes: int, symmetry: bool) -> Classifier:
    saca = SymmetryAwareBlock(encoder.embed_dim, encoder.num_heads) if symmetry else None
    return Classifier(encoder, classes, saca)


def _from_sa_swin(
    classes: int,
    cross_heads: int,
    norm: str = "pre",
    self_attention: bool = True,
    position: bool = False,
    **encoder: Any,
) -> Classifier:
    swin = Swin(**encoder)
    saca = SymmetryAwareBlock(swin.embed_dim, cross_heads, norm=norm, self_attention=self_attention)
    return Classifier(swin, classes, saca, position)
