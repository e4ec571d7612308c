"""From YAML and the command line to objects.

`compose` reads a command's configuration (Hydra); `build` makes objects of its `_target_` nodes, from an allow-list
only; `typed` fills a dataclass.
"""

import difflib
import functools
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from asa.models import list_models
from asa.settings import AugmentSettings, LoaderSettings, OptimSettings, PredictSettings, TrainSettings

# In a wheel the YAML files are the package asa.configs; in a checkout they lie beside the package.
CONFIG_DIR = next(path for up in Path(__file__).resolve().parents[:2] if (path := up / "configs").is_dir())

T = TypeVar("T")
BLANKS = "\"input='my scans'\""

# Typed settings of each command, by their key.
_TRAINING: dict[str, type] = {"train": TrainSettings, "optim": OptimSettings, "loader": LoaderSettings}
SETTINGS: dict[str, dict[str, type]] = {
    "pretrain": _TRAINING,
    "finetune": {**_TRAINING, "augment": AugmentSettings, "predict": PredictSettings},
    "predict": {"predict": PredictSettings},
}
# The methods of each command, and the families of models (`model=FAMILY_SIZE`) that each of them trains.
_COMPARATORS = ("unetr", "swin_unetr", "nnformer", "transbts", "resenc", "primus")
_SEGMENTATION = ("unet", "vit_seg", "vit_conv", "vit_linear", "sa_swin_unet", *_COMPARATORS)
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": {"asa": ("asa",), "mae": ("asa",), "sa_swin": ("sa_swin",), "rpl": ("puzzle",), "jigsaw": ("puzzle",)},
    "finetune": {
        "segment": _SEGMENTATION,
        "regions": _SEGMENTATION,
        "classify": ("asa_classifier", "sa_swin_classifier"),
        "regress": ("asa_regressor", "sa_swin_regressor"),
        "restore": ("rat", "restormer"),
    },
}
# Settings of a command of which one or more have to be given.
ALTERNATIVES = {"predict": ("checkpoint", "atlas")}
# What a command's configuration may name. A checkpoint may name models only: it often comes from somebody else.
PACKAGES = ("asa.baselines", "asa.restoration")  # reached by name only
READERS = ("asa.data.datasets", "asa.data.phantom.reader")
CONFIG_TARGETS = ("asa.models", "asa.methods", *READERS, "asa.data.preprocessing.settings", *PACKAGES)
CHECKPOINT_TARGETS = ("asa.models", "asa.baselines", "asa.restoration.rat", "asa.restoration.restormer")


def build(node: Any, *, plugins: Sequence[str] = (), targets: Sequence[str] = CONFIG_TARGETS) -> Any:
    """Make the object that a node of plain data describes, innermost first.

    A mapping with `_target_: package.module.name` becomes a call of that name with the other keys as keywords; other
    mappings and lists are built item by item. Targets lie under `targets`, or under packages of the user's own,
    `plugins`; a ValueError for others, one that does not exist, or keywords that it does not take.
    """
    if isinstance(node, Mapping):
        items = {key: build(item, plugins=plugins, targets=targets) for key, item in node.items() if key != "_target_"}
        if "_target_" not in node:
            return items
        function = locate(node["_target_"], (*targets, *plugins))
        try:
            return function(**items)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            group = "method" if ".methods." in node["_target_"] else "model"
            advice = f": leave it out, or take it out of experiment= by ~{group}.{unknown[1]}" if unknown else ""
            raise ValueError(f"{node['_target_']}: {error}{advice}") from error
    if isinstance(node, (list, tuple)):
        return [build(item, plugins=plugins, targets=targets) for item in node]
    return node


def locate(target: Any, allowed: Sequence[str]) -> Any:
    """The function or class `package.module.name`; a ValueError if it is under none of the allowed packages."""
    target = " ".join(str(target).split())  # one line, whatever a checkpoint holds
    module_name, _, name = target.rpartition(".")
    if not _lies_under(module_name, allowed):
        only = f"only what lies under {', '.join(allowed)}; give a package of your own as plugins=[mine]"
        raise ValueError(f"_target_={target} is not allowed: {only}")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        top = module_name.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == top
        advice = f": install {top}, or give --config-dir, beside which it is searched" if absent else ""
        raise ValueError(f"_target_={target} does not exist ({error}){advice}") from error
    # Only what is defined there, not what is imported there.
    if not callable(function) or not _lies_under(str(getattr(function, "__module__", "")), allowed):
        raise ValueError(f"_target_={target} is not a function or class of that module")
    return function


def _lies_under(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def typed(cls: type[T], node: Mapping[str, Any], group: str = "") -> T:
    """A settings dataclass of what the key `group` holds; a ValueError for an unknown key or a wrong type."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(dict(node)))
    except OmegaConfBaseException as error:
        raise ValueError(_wrong_type(error, cls, group) or _first_line(error)) from error
    result = OmegaConf.to_object(merged)
    assert isinstance(result, cls)
    return result


def _wrong_type(error: BaseException, cls: type | None, group: str) -> str:
    """A line about a field of a settings dataclass that was given another type; "" for any other error."""
    key = str(getattr(error, "full_key", None) or "").removeprefix(f"{group}.")  # with an index, in a list
    hint = get_type_hints(cls).get(key.partition("[")[0]) if cls else None
    if hint is None or not isinstance(error, ValidationError):
        return ""
    (kind,) = (each for each in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if each is not NoneType)
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values"}
    kinds |= {list[float]: "a list of numbers", list[str]: "a list of names"}
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(cls))
    default = defaults[key.partition("[")[0]]
    given = OmegaConf.to_container(error.value) if OmegaConf.is_config(error.value) else error.value
    like = f", like {written(default)}" if default and default != "???" else ""
    null = ", or null" if NoneType in get_args(hint) else ""
    return f"{group and f'{group}.'}{key}={written(given)}: give {kinds.get(kind, kind)}{like}{null}"


def compose(command: str, overrides: Sequence[str], *, config_dir: str | Path | None = None) -> dict[str, Any]:
    """The resolved configuration of a command as plain data.

    Args:
        command: name of a file in the configuration folder, without `.yaml`.
        overrides: `key=value` arguments, in Hydra's grammar.
        config_dir: a folder of the user's own groups, searched too. The folder that it is in is searched for modules.

    Raises:
        ValueError: an unknown key, a value that is missing or of a wrong type, a model that the method does not train.
    """
    _offer_models()
    for group, target in SETTINGS.get(command, {}).items():
        ConfigStore.instance().store(group=group, name="defaults", node=target)
    search = []
    if config_dir:
        if not (folder := Path(config_dir).expanduser().resolve()).is_dir():
            raise ValueError(f"--config-dir {config_dir}: no such folder")
        search = [f"hydra.searchpath=[{written(f'file://{folder}')}]"]
        if str(folder.parent) not in sys.path:  # where `plugins=[mine]` is found; last, so that it hides no package
            sys.path.append(str(folder.parent))
    either = ALTERNATIVES.get(command, ())
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra_compose(command, [*search, *overrides], return_hydra_config=True)
            chosen = dict(config.hydra.runtime.choices)
            with open_dict(config):
                del config.hydra
            given = [key for key in either if not OmegaConf.is_missing(config, key) and config[key] is not None]
            missing = [*either[: not given], *sorted(OmegaConf.missing_keys(config))]
            plain = {} if missing else OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # Hydra raises ValueErrors of its own too
        raise ValueError(_explain(error, command, overrides, search)) from error
    if missing:
        others = "".join(f" or {key}=..." for key in either[1:] if not given)
        raise ValueError(f"{', '.join(missing)} has to be given: add {missing[0]}=...{others}")
    _check_mappings(yaml.safe_load((CONFIG_DIR / f"{command}.yaml").read_text()), plain)
    _check_model(command, chosen.get("method"), chosen.get("model"))
    assert isinstance(plain, dict)
    return {str(key): at_home(value) for key, value in plain.items()}


def at_home(node: Any) -> Any:
    """Plain data with `~/` in its values replaced by the home folder."""
    if isinstance(node, dict):
        return {key: at_home(value) for key, value in node.items()}
    if isinstance(node, list):
        return [at_home(value) for value in node]
    return str(Path(node).expanduser()) if isinstance(node, str) and node.startswith("~/") else node


def given_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value` arguments by their key; {} where they cannot be read, which `compose` says."""
    try:
        return {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(list(overrides))}
    except HydraException:
        return {}


def _check_mappings(shipped: Mapping[str, Any], plain: Any, prefix: str = "") -> None:
    """Raise a ValueError for a single value, or null but in an arm, in the place of a group of settings."""
    for key, node in shipped.items():
        value = plain.get(key)
        if not isinstance(node, Mapping) or key not in plain or (value is None and prefix.startswith("arms.")):
            continue
        if not isinstance(value, Mapping):
            given, like = f"{prefix}{key}={written(value)}", f"{prefix}{key}.{next(iter(node))}="
            raise ValueError(f"{given}: it is a group of settings: give them one by one, like {like}")
        _check_mappings(node, value, f"{prefix}{key}.")


def _check_model(command: str, method: str | None, model: str | None) -> None:
    """Raise a ValueError for one of our models that one of our methods does not train."""
    families = METHODS.get(command, {}).get(str(method))
    family, _, size = str(model).rpartition("_")
    if families is not None and model in sized_models() and family not in families:
        offered = [name for family in families for name in sized_models() if name.rpartition("_")[0] == family]
        fitting = [name for name in offered if name.endswith(f"_{size}")] or offered
        raise ValueError(f"model={model} is not for asa-{command} with method={method}: choose {' or '.join(fitting)}")


def choices(command: str, group: str) -> list[str]:
    """The values of a group that come with the package and fit a command: of `data=`, `model=`, `experiment=`, ..."""
    methods = METHODS.get(command, {})
    if group == "method":
        return sorted(methods)
    if group == "model":
        return [name for name in sized_models() if any(name.rpartition("_")[0] in f for f in methods.values())]
    folder = CONFIG_DIR / group
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    if group == "experiment":  # for the command that the comment at its beginning has
        usage = rf"^# *asa-{command} .*experiment="
        files = [file for file in files if re.search(rf"{usage}{file.stem}\b", file.read_text(), re.M)]
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]


@functools.cache
def _offer_models() -> None:
    """Offer Hydra the group `model`: a family's YAML file for each size, which is appended to its `_target_`."""
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
    """One line for the user: which setting is wrong, and which one was probably meant."""
    parsed = []
    for given in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([given])
        except HydraException:
            key, equals, text = given.partition("=")
            if key.strip() != key or not key or not (equals or key.startswith("~")):
                return f"{given}: settings are key=value, without blanks; quote values with blanks, as in {BLANKS}"
            shapes = {"{": "a mapping is {name: value, other: value}", "[": "a list is [one, other]"}
            advice = "quote a value with special characters, as in \"out='a,b'\""
            return f"cannot read {given}: {shapes.get(text[:1], advice)}"
    for override in parsed:
        key, line = override.key_or_group, str(override.input_line)
        if override.is_sweep_override():
            name, _, text = line.partition("=")
            advice = f"quote a value with commas, as in \"{name}='{text}'\"; a list is {name}=[{text}]"
            return f"cannot read a setting ({line} has several values): {advice}"
        if key in SETTINGS.get(command, {}) and not isinstance(override.value(), str):
            like = f"{key}.{fields(SETTINGS[command][key])[0].name}="
            return f"{line}: {key} is a group of settings: give them one by one, like {like}"
    groups, single = list(search), []
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for override in parsed:
            key = override.key_or_group
            known = loader.get_group_options(key, overrides=list(search))
            if not known:
                single.append(override)
                continue
            value = override.value()
            folder, _, name = f"{key}/{value}".rpartition("/")
            if value is not None and name not in loader.get_group_options(folder, overrides=list(search)):
                own = set(known) - {file.stem for file in (CONFIG_DIR / key).rglob("*.yaml")} - set(sized_models())
                fitting = [*choices(command, key), *sorted(own - {"family", "phantom"})]
                near = difflib.get_close_matches(str(value), fitting, n=1)
                hint = f"; did you mean {near[0]}?" if near else ";"
                return f"{key}={value}: there is no such choice{hint} choose one of {', '.join(fitting)}"
            groups.append(str(override.input_line))
        keys: list[str] = []
        try:
            keys = _keys(hydra_compose(command, groups))
            for override in single:
                hydra_compose(command, [*groups, str(override.input_line)])
        except (HydraException, OmegaConfBaseException) as found:
            return _explain_one(found, command, override.key_or_group if keys else None, keys)
    names = [override.key_or_group for override in single]
    if several := [name for name in names if names.count(name) > 1]:  # each is right by itself
        return f"{several[0]}= is given {names.count(several[0])} times: give it once"
    return _typed_message(error, command)


def _explain_one(error: Exception, command: str, key: str | None, keys: Sequence[str]) -> str:
    """What is wrong with the setting `key`, or with a file of a group where it is None."""
    if key is None or not isinstance(_cause(error), ConfigAttributeError | ConfigKeyError):
        message = _typed_message(error, command)
        return message if key is None or key in message else f"{key}: {message}"
    if key in keys:
        return f"{key} was given a key that it does not have (asa-{command} --help lists them)"
    whole, _, rest = key.partition(".")
    if whole in keys and not any(other.startswith(f"{whole}.") for other in keys):
        return f"{key}: {whole} is given whole, as in '{whole}={{{rest}: VALUE}}'"
    names: dict[str, list[str]] = {}  # by their last part: lr=1 means optim.lr=1
    for other in keys:
        if not (name := other.rpartition(".")[2]).startswith("_"):
            names.setdefault(name, []).append(other)
    near = [other for name in difflib.get_close_matches(key.rpartition(".")[2], names, n=1) for other in names[name]]
    hint = "".join(f"; did you mean {other}?" for other in difflib.get_close_matches(key, near, n=1, cutoff=0.0))
    taker = {"model": "network", "method": "method", "data": "reader"}.get(key.partition(".")[0])
    extra = f"; +{key}=... adds a keyword that the {taker} takes" if taker else ""
    return f"unknown key {key}{hint} (asa-{command} --help lists them{extra})"


def _cause(error: Exception) -> BaseException:
    """OmegaConf's error inside an error of Hydra, else the error itself."""
    return error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error


def _typed_message(error: Exception, command: str) -> str:
    cause = _cause(error)
    key = str(getattr(cause, "full_key", None) or "")
    group = key.partition(".")[0]
    text = _wrong_type(cause, SETTINGS.get(command, {}).get(group), group) or _first_line(cause)
    return text if key in text else f"{key}: {text}"


def _keys(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys of a configuration, those of inner nodes too."""
    keys = []
    for key in node:
        keys.append(f"{prefix}{key}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += _keys(child, f"{prefix}{key}.")
    return keys


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def flatten(node: Mapping[str, Any], prefix: str = "", *, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Dotted key -> value, for nested mappings, with `like` those that are mappings there. An empty one is a value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        inner = isinstance(value, Mapping) and value and (like is None or isinstance(like.get(key), Mapping))
        flat |= flatten(value, f"{prefix}{key}.", like=like and like[key]) if inner else {f"{prefix}{key}": value}
    return flat


def as_overrides(command: str, *settings: Mapping[str, Any]) -> list[str]:
    """Settings, nested or by dotted key, as `key=value` arguments of a command; later mappings win, key by key."""
    own = yaml.safe_load((CONFIG_DIR / f"{command}.yaml").read_text())
    chosen: dict[str, Any] = {}
    for node in settings:
        for key, value in node.items():  # mappings of the user's own keys, like labels or data.images, are given whole
            like = own if "." in key else {key: {}, **own}
            for name, each in flatten({key: value}, like=like).items():
                chosen.pop(name, None)  # so that the later one is the later argument
                chosen[name] = each
    return [f"{key}={written(value)}" for key, value in chosen.items()]


def written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(written(item) for item in value)}]"
    if isinstance(value, Mapping):
        keys = {key: re.sub(r"[\\()\[\]{}:=,]", r"\\\g<0>", str(key)) for key in value}
        return "{" + ",".join(f"{keys[key]}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    if re.fullmatch(r"[A-Za-z/][\w./:@-]*", text) and text.lower() not in ("true", "false", "null", "nan", "inf"):
        return text
    # A backslash is itself, but for those before a quote, which are escaped as the quote is.
    quoted = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{quoted}'"
