"""From YAML and the command line to objects.

`compose` reads a command's configuration (Hydra); `build` makes objects of its `_target_` nodes, from an allow-list
only; `typed` fills a dataclass.
"""

import dataclasses
import difflib
import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from asa.models import list_models

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the YAML files are the package asa.configs; in a checkout they lie beside the package.
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())

T = TypeVar("T")


# What a command's configuration may name. A checkpoint may name models only: it often comes from somebody else.
CONFIG_TARGETS = ("asa.models", "asa.methods", "asa.data.datasets", "asa.data.preprocessing.steps")
CHECKPOINT_TARGETS = ("asa.models",)


def build(node: Any, *, plugins: Sequence[str] = (), targets: Sequence[str] = CONFIG_TARGETS) -> Any:
    """Make the object that a node describes, innermost first.

    A mapping with `_target_: package.module.name` becomes a call of that name with the other keys as keywords; other
    mappings and lists are built item by item; anything else stays what it is.

    Args:
        node: plain data, as a composed configuration or a checkpoint holds it.
        plugins: packages of the user's own that may be targets too.
        targets: modules and packages of this one that may be targets.

    Raises:
        ValueError: a target outside the allow-list or one that does not exist, or keywords that it does not take.
    """
    if isinstance(node, Mapping):
        items = {
            key: build(value, plugins=plugins, targets=targets) for key, value in node.items() if key != "_target_"
        }
        return _call(node["_target_"], items, (*targets, *plugins)) if "_target_" in node else items
    if isinstance(node, (list, tuple)):
        return [build(item, plugins=plugins, targets=targets) for item in node]
    return node


def _call(target: Any, keywords: dict[str, Any], allowed: Sequence[str]) -> Any:
    module_name, _, name = str(target).rpartition(".")
    if not _lies_under(module_name, allowed):
        raise ValueError(
            f"_target_={target} is not allowed: only what lies under {', '.join(allowed)}; packages of your own go "
            "into plugins"
        )
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_={target} does not exist ({error})") from error
    # Only what is defined there, not what is imported there.
    if not callable(function) or not _lies_under(str(getattr(function, "__module__", "")), allowed):
        raise ValueError(f"_target_={target} is not a function or class of that module")
    try:
        return function(**keywords)
    except TypeError as error:
        raise ValueError(f"{target}: {error}") from error


def _lies_under(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def typed(cls: type[T], node: Mapping[str, Any]) -> T:
    """Fill a settings dataclass from plain data, checking names and types.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(node)))
    except OmegaConfBaseException as error:
        raise ValueError(_first_line(error)) from error
    result = OmegaConf.to_object(merged)
    assert isinstance(result, cls)
    return result


def compose(
    command: str,
    overrides: Sequence[str],
    *,
    settings: Mapping[str, type] | None = None,
    config_dir: str | Path | None = None,
) -> dict[str, Any]:
    """The resolved configuration of a command as plain data.

    Args:
        command: name of a file in the configuration folder, without `.yaml`.
        overrides: `key=value` arguments, in Hydra's grammar.
        settings: dataclasses whose fields and defaults stand under the given keys.
        config_dir: a folder of the user's own groups, searched too.

    Returns:
        Nested dicts, lists and scalars, interpolations resolved.

    Raises:
        ValueError: an unknown key (its nearest neighbour is named), a value of the wrong type, or a value that is
            missing.
    """
    # Imported here: notebooks that only load a model do without.
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _offer_models()
    for group, cls in (settings or {}).items():
        ConfigStore.instance().store(group=group, name="defaults", node=cls)
    if config_dir and not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir {config_dir}: no such folder")
    search = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"] if config_dir else []
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra_compose(command, [*search, *overrides])
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise ValueError(f"{', '.join(missing)} has to be given: add {missing[0]}=...")
            plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, command, overrides, search)) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@functools.cache
def _offer_models() -> None:
    """Offer Hydra the group `model`: each FAMILY_SIZE of `asa.models` whose family has a YAML file.

    The node is that file with the size appended to its `_target_`, so that no size needs a file of its own.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for name in sized_models():
        family, _, size = name.rpartition("_")
        node = OmegaConf.load(CONFIG_DIR / "model" / "family" / f"{family}.yaml")
        node._target_ += f"_{size}"
        ConfigStore.instance().store(group="model", name=name, node=node)


def sized_models() -> list[str]:
    """The values of `model=` that have no YAML file of their own: those whose family has one."""
    families = {path.stem for path in (CONFIG_DIR / "model" / "family").glob("*.yaml")}
    return [name for name in list_models() if name.rpartition("_")[0] in families]


def _explain(error: Exception, command: str, overrides: Sequence[str], search: Sequence[str]) -> str:
    """One line for the user: which key is wrong, and which one was probably meant."""
    if type(error).__name__ == "OverrideParseException" or "Ambiguous value" in str(error):
        return f"cannot read a setting ({_first_line(error)}): quote a value with special signs, as in \"out='a,b'\""
    text = " ".join(str(error).split()) if "Available options" in str(error) else _first_line(error)
    text = text.split(" Config search path")[0]
    cause = _first_line(error.__cause__) if error.__cause__ else ""
    unknown = re.search(r"(?:Could not override|Key) '([^']+)'", text)
    if unknown is None:
        return f"{text} {cause}".strip() if cause and cause not in text else text
    key = unknown.group(1)
    if "is not in struct" not in cause + text and "Could not override" not in text:
        return text
    if cause and "is not in struct" not in cause and "not in" not in cause:
        return f"{key}: {cause}"
    keys = _keys(command, overrides, search)
    if key in keys:
        return f"{key} was given a key that it does not have (asa-{command} --help lists them)"
    last = key.rpartition(".")[2]
    near = [other for other in keys if other.rpartition(".")[2] == last]  # lr=1 means optim.lr=1
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]}?" if near else ""
    extra = (
        f"; +{key}=... adds a keyword that its _target_ takes" if key.startswith(("model.", "method.", "data.")) else ""
    )
    return f"unknown key {key}{hint} (asa-{command} --help lists them{extra})"


def _keys(command: str, overrides: Sequence[str], search: Sequence[str]) -> list[str]:
    """All dotted keys of the command with the overrides that choose groups."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    groups = [override for override in overrides if re.fullmatch(r"\+?[a-z_]+=[\w/]+", override)]
    for chosen in (groups, []):
        try:
            with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                return list(_flatten(hydra_compose(command, [*search, *chosen])))
        except HydraException:
            continue
    return []


def _flatten(node: Any, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += _flatten(child, f"{prefix}{key}.")
    return keys


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def describe(cls: type) -> list[tuple[str, Any, str]]:
    """Fields of a settings dataclass: (name, default, the string literal below it)."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            notes[statement.target.id] = str(following.value.value)
    return [
        (
            field.name,
            field.default_factory() if callable(field.default_factory) else field.default,
            notes.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
    ]
