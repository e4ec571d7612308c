"""asa: self-supervised learning on brain MRI.

The names below are stable and load when they are first used, so that `import asa` costs little.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AttentiveReconstructionLoss": "asa.losses.reconstruction",
    "FocalRegionLoss": "asa.losses.restoration",
    "LinearWindowAttention": "asa.models.sw_vit",
    "MaskedAutoencoder": "asa.models.masked_autoencoder",
    "RegionAttention": "asa.models.rat",
    "RegionAttentionTransformer": "asa.models.rat",
    "SASwin": "asa.models.sa_swin",
    "SWViT": "asa.models.sw_vit",
    "SegmentationUNet": "asa.models.unet",
    "SymmetryAwareCrossAttention": "asa.models.saca",
    "asa_base": "asa.models.masked_autoencoder",
    "asa_small": "asa.models.masked_autoencoder",
    "asa_tiny": "asa.models.masked_autoencoder",
    "gradient_importance": "asa.ops.gradients",
    "load_encoder": "asa.training.checkpoint",
    "load_model": "asa.training.checkpoint",
    "patchify": "asa.ops.patches",
    "random_mask": "asa.ops.masking",
    "rat_base": "asa.models.rat",
    "rat_small": "asa.models.rat",
    "rat_tiny": "asa.models.rat",
    "region_attention": "asa.ops.regions",
    "sa_swin_base": "asa.models.sa_swin",
    "sa_swin_small": "asa.models.sa_swin",
    "sa_swin_tiny": "asa.models.sa_swin",
    "symmetric_position_encoding": "asa.ops.position",
    "unpatchify": "asa.ops.patches",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'asa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
