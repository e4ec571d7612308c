"""Models by name."""

import difflib
from typing import TYPE_CHECKING, Any

import asa.models

if TYPE_CHECKING:
    from torch import nn

SIZES = ("_base", "_small", "_tiny", "_l", "_m")  # the last two are nnU-Net's


def list_models() -> list[str]:
    """Names of all model functions of `asa.models`, as FAMILY_SIZE, without importing torch."""
    return [name for name in dir(asa.models) if name.endswith(SIZES)]


def create_model(name: str, **overrides: Any) -> "nn.Module":
    """Make a model by name, with random weights.

    Args:
        name: one of `list_models()`.
        overrides: keywords of its function.

    Raises:
        ValueError: an unknown name; the nearest one is named.
    """
    names = list_models()
    if name not in names:
        (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise ValueError(f"unknown model {name!r}; did you mean {nearest}? asa.models.list_models() lists all")
    model: nn.Module = getattr(asa.models, name)(**overrides)
    return model
