"""Models by name."""

import difflib
import fnmatch
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("asa.models", "asa.baselines", "asa.restoration")
SIZES = ("_base", "_small", "_tiny", "_l", "_m")  # the last two are nnU-Net's


def list_models(pattern: str = "*") -> list[str]:
    """Names of the model functions, as FAMILY_SIZE, that fit a pattern like `"unet_*"`, without importing torch."""
    return fnmatch.filter(sorted(name for package in PACKAGES for name in _models_of(package)), pattern)


def create_model(name: str, **overrides: Any) -> "nn.Module":
    """Make a model, one of `list_models()`, with random weights; `overrides` are keywords of its function.

    A ValueError names the nearest of an unknown name or keyword, or a keyword that is missing.
    """
    for package in PACKAGES:
        if name in _models_of(package):
            function = getattr(importlib.import_module(package), name)
            try:
                return cast("nn.Module", function(**overrides))
            except TypeError as error:
                raise ValueError(f"{name}: {_wrong_keyword(function, overrides) or error}") from error
    (nearest,) = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.0)
    raise ValueError(f"unknown model {name!r}; did you mean {nearest}? asa.models.list_models() lists all")


def _wrong_keyword(function: Callable[..., Any], given: Mapping[str, Any]) -> str | None:
    """A keyword that is spelt almost as one that is missing: Python's message names only the latter."""
    known = inspect.signature(function).parameters.values()
    missing = [key.name for key in known if key.default is key.empty and key.kind is not key.VAR_KEYWORD]
    for key in given.keys() - {each.name for each in known}:
        if near := difflib.get_close_matches(key, [name for name in missing if name not in given], n=1):
            return f"no keyword {key!r}; did you mean {near[0]}?"
    return None


def _models_of(package: str) -> list[str]:
    return [name for name in dir(importlib.import_module(package)) if name.endswith(SIZES)]
