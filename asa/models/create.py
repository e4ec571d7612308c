"""Models by name."""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("asa.models", "asa.baselines", "asa.restoration")
SIZES = ("_base", "_small", "_tiny", "_l", "_m")  # the last two are nnU-Net's


def list_models() -> list[str]:
    """Names of all model functions, as FAMILY_SIZE, without importing torch."""
    return sorted(name for package in PACKAGES for name in _models_of(package))


def create_model(name: str, **overrides: Any) -> "nn.Module":
    """Make a model by name, with random weights.

    Args:
        name: one of `list_models()`.
        overrides: keywords of its function.

    Raises:
        ValueError: an unknown name; the nearest one is named.
    """
    for package in PACKAGES:
        if name in _models_of(package):
            model: nn.Module = getattr(importlib.import_module(package), name)(**overrides)
            return model
    (nearest,) = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.0)
    raise ValueError(f"unknown model {name!r}; did you mean {nearest}? asa.models.list_models() lists all")


def _models_of(package: str) -> list[str]:
    return [name for name in dir(importlib.import_module(package)) if name.endswith(SIZES)]
