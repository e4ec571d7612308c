"""From YAML and the command line to objects.

`compose` reads a command's configuration (Hydra); `build` makes objects of its `_target_` nodes, from an allow-list
only; `typed` fills a dataclass.
"""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the YAML files are the package asa.configs; in a checkout they lie beside the package.
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())

T = TypeVar("T")


def build(node: Any, *, plugins: Sequence[str] = ()) -> Any:
    """Make the object that a node describes, innermost first.

    A mapping with `_target_: package.module.name` becomes a call of that name with the other keys as keywords; other
    mappings and lists are built item by item; anything else stays what it is.

    Args:
        node: plain data, as a composed configuration or a checkpoint holds it.
        plugins: packages that may be targets beside `asa`.

    Raises:
        ValueError: a target outside the allow-list or one that does not exist, or keywords that it does not take.
    """
    if isinstance(node, Mapping):
        items = {key: build(value, plugins=plugins) for key, value in node.items() if key != "_target_"}
        return _call(node["_target_"], items, plugins) if "_target_" in node else items
    if isinstance(node, (list, tuple)):
        return [build(item, plugins=plugins) for item in node]
    return node


def _call(target: Any, keywords: dict[str, Any], plugins: Sequence[str]) -> Any:
    module_name, _, name = str(target).rpartition(".")
    if not any(module_name == package or module_name.startswith(f"{package}.") for package in ("asa", *plugins)):
        raise ValueError(
            f"_target_={target} is not under asa.: a configuration may name code of this package only, "
            "or of a package listed in plugins"
        )
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"_target_={target} does not exist ({error})") from error
    # Only what the module itself defines: `asa.config.importlib.import_module` is not ours to call.
    if not callable(function) or not str(getattr(function, "__module__", "")).startswith(module_name.split(".")[0]):
        raise ValueError(f"_target_={target} is not a function or class of that module")
    try:
        return function(**keywords)
    except TypeError as error:
        raise ValueError(f"{target}: {error}") from error


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

    for group, cls in (settings or {}).items():
        ConfigStore.instance().store(group=group, name="defaults", node=cls)
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
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


def _explain(error: Exception, command: str, overrides: Sequence[str], search: Sequence[str]) -> str:
    """One line for the user: which key is wrong, and which one was probably meant."""
    text = " ".join(str(error).split()) if "Available options" in str(error) else _first_line(error)
    cause = _first_line(error.__cause__) if error.__cause__ else ""
    unknown = re.search(r"(?:Could not override|Key) '([^']+)'", text)
    if unknown is None:
        return f"{text} {cause}".strip() if cause and cause not in text else text
    key = unknown.group(1)
    if "is not in struct" not in cause + text and "Could not override" not in text:
        return text
    if cause and "is not in struct" not in cause and "not in" not in cause:
        return f"{key}: {cause}"
    near = difflib.get_close_matches(key, _keys(command, overrides, search), n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {key}{hint} (asa-{command} --help lists them; +{key}=... adds a keyword that a _target_ takes)"


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
