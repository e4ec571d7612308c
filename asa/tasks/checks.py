"""What is done with settings before torch is imported, which takes seconds: a network follows its encoder; checks.

Checked is what a user gets wrong most; the tasks check the rest.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from asa.config import METHODS, SETTINGS, given_settings, sized_models, typed, written
from asa.data.datasets.folder import has_wildcard
from asa.data.io.files import check_present
from asa.data.io.parallel import check_workers
from asa.data.io.tables import ENDINGS
from asa.data.splits import PARTS, read_split
from asa.data.store import check_is_store
from asa.settings import FUSIONS, PLACEMENTS, UNCERTAINTIES, Config, check_axes, check_backend, check_choice
from asa.training.checkpoint_files import find_weights, list_checkpoints, on_hub

OF_TASKS = ("classification", "regression", "restoration", "asymmetry", "probe")  # policies beside those of label maps
# Families of networks on ASA's encoder; those on SA-Swin's have its name.
ON_ASA = ("asa", "unet", "vit_seg", "vit_conv", "vit_linear", "asa_classifier", "asa_regressor")
# Keys of networks: of an encoder, which every network on it needs alike; and of the data, which no network passes on.
OF_ENCODERS = {
    *("embed_dim", "depth", "num_heads", "position", "mirror_patches", "order", "bias"),
    *("norm", "self_attention"),  # of SA-Swin
}
OF_DATA = ("_target_", "img_size", "in_channels", "out_channels", "classes", "mean", "sd", "checkpointing")


def follow_init(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The network for the encoder of `init=`, its size and how it treats positions, as settings by dotted key.

    {} where the `key=value` arguments give a network or an experiment, where the checkpoint is not of this package or
    not here, and where no network of the method has such an encoder. What the arguments give is not changed.
    """
    given = given_settings(overrides) if command in METHODS else {}
    if not given.get("init") or {"model", "experiment"} & given.keys():
        return {}
    trained = _trained_model(given["init"], planned=given.get("plan") is not None)
    package, _, name = str(trained.get("_target_")).rpartition(".")
    family, _, size = name.rpartition("_")
    method = given.get("method", next(iter(METHODS[command])))
    fitting = [name for name in METHODS[command].get(method, ()) if _encoder_of(name) == _encoder_of(family)]
    model = f"{family if family in fitting else next(iter(fitting), None)}_{size}"
    if model not in sized_models() or not package.startswith("asa."):
        return {}
    kept = trained.keys() - OF_DATA if family in fitting else trained.keys() & OF_ENCODERS
    keys = {f"model.{key}": trained[key] for key in trained if key in kept and _is_plain(key, trained[key])}
    return {"model": model} | {f"++{key}": value for key, value in keys.items() if key not in given}


def say_followed(settings: Mapping[str, Any]) -> None:
    """Print the settings of `follow_init`."""
    if settings:
        named = " ".join(f"{key.lstrip('+')}={written(value)}" for key, value in settings.items())
        print(f"as the encoder in init= was trained: {named}")


def _trained_model(init: Any, *, planned: bool) -> Mapping[str, Any]:
    """The network of a checkpoint of this package; {} of others, and of one that is not here."""
    if planned and on_hub(init):  # it is fetched when the run starts
        return {}
    try:
        with safe_open(find_weights(init), framework="np") as opened:
            model = json.loads(opened.metadata()["asa"])["model"]
    except (ImportError, OSError, SafetensorError, ValueError, LookupError, TypeError):  # said when it is read
        return {}
    return model if isinstance(model, dict) else {}


def _is_plain(key: str, value: Any) -> bool:
    """Whether a setting is a number or a word: a checkpoint may come from anybody, and could name an object to make."""
    words = [key, value] if isinstance(value, str) else [key]
    return isinstance(value, int | float | str) and all(re.fullmatch(r"\w+", word) for word in words)


def _encoder_of(family: str) -> str:
    """The family of the encoder that networks of a family have."""
    return "asa" if family in ON_ASA else "sa_swin" if family.startswith("sa_swin") else family


def check(command: str, config: Config) -> None:
    """Raise a ValueError or FileNotFoundError for a value, or what a path holds, that cannot be right."""
    check_settings(command, config)
    out = Path(str(config.get("out") or "."))
    folders = out.parents if command in ("export", "view") or out.suffix in ENDINGS else (out, *out.parents)
    if files := [path for path in folders if path.is_file()]:
        raise ValueError(f"{files[0]} is a file: out={out} names a folder")
    if command in CHECKS:
        CHECKS[command](config)


def check_settings(command: str, config: Config) -> None:
    """Raise a ValueError for a setting that is wrong whatever the paths hold."""
    for group, settings in SETTINGS.get(command, {}).items():
        typed(settings, config[group], group)
    if "workers" in config:
        check_workers(config["workers"])
    if command == "prepare":
        from asa.tasks.preparation import cohort_of  # imports nibabel and scipy

        cohort_of(config)


def _check_prepare(config: Config) -> None:
    check_choice("check", config["check"], ("only", "also"), "null")
    check_choice("failed", config["failed"], ("refuse", "skip"))


def _check_run(config: Config) -> None:
    check_choice("plan", config["plan"], ("only",), "null")


def _check_training(config: Config) -> None:
    data = config["data"]
    if data.get("root") is not None:  # images of restoration
        _exists(data["root"], kind="folder")
    elif data.get("store") is not None or data.get("stores") is not None:
        _stores(data)
    elif "root" not in data and config["method"]["_target_"].startswith("asa."):  # others may need no store
        raise ValueError("data.store has to be given: a folder made by asa-prepare")
    for key, word in (("labelled_store", None), ("unlabelled", "rest")):
        if data.get(key) not in (None, word):
            _store(data[key])
    if "placement" in data:
        check_choice("data.placement", data["placement"], PLACEMENTS)
    if data.get("split_file") and not list_checkpoints(Path(str(config["out"]))):  # a run that goes on has its own
        fold = data["split"].get("fold")
        read_split(data["split_file"], fold if isinstance(fold, int) else None)
    for key, word in (("health", "healthy"), ("classes", None), ("table", None)):
        if data.get(key) not in (None, word):
            _exists(data[key], f"data.{key}= is a table (CSV)")
    if config["init"] and config["plan"] is None:
        _checkpoint(config["init"])
    crop = config["crop"] if isinstance(config["crop"], list) else [config["crop"]] * 3
    in_voxels = len(crop) == 3 and all(type(edge) is int and edge > 0 for edge in crop)
    if (data.get("store") or data.get("stores")) and config["crop"] is not None and not in_voxels:
        raise ValueError(f"crop={written(config['crop'])}: give the edge in voxels, like 64, or three, [D, H, W]")
    check_choice("plan", config["plan"], ("only",), "null")
    if (rate := config["plan_rate"]) is not None and not (isinstance(rate, int | float) and rate > 0):
        raise ValueError(f"plan_rate={rate}: give the TFLOP/s that the run will reach, like 40")
    if "transfer" in config:
        check_choice("transfer", config["transfer"], ("load", "explain"))
    if data["split"].get("fold") == "all" and data["split"].get("folds") is None:
        raise ValueError("data.split.fold=all needs the number of folds: add data.split.folds=5")
    if data["split"].get("fold") == "all" and data["split_file"] is not None:
        raise ValueError("data.split.fold=all makes the split of each fold: leave out data.split_file")
    if "policy" in config:  # last, as it imports scipy
        _policy(config)


def _check_predict(config: Config) -> None:
    _exists(config["input"])
    check_choice("layout", config["layout"], ("bids", "mgz"), "null for OUT/ID.nii.gz")
    check_choice("map", config["map"], ("asymmetry", "prediction"), "null for that of the network")
    _scans(config)
    if not isinstance(config["mirror"], bool):
        check_axes(config["mirror"], "mirror")
    check_choice("uncertainty", config["uncertainty"], UNCERTAINTIES, "null for none")
    check_choice("fusion", config["fusion"], FUSIONS)
    if config["atlas"] is not None:
        _store(config["atlas"])
    given = config["checkpoint"] or []
    for path in [given] if isinstance(given, str) else given:
        _checkpoint(path)
    if config["split_file"]:
        read_split(config["split_file"])


def _check_embed(config: Config) -> None:
    _exists(config["input"])
    check_choice("of", config["of"], ("whole", "sides", "labels"))
    check_backend(config["device"], "auto", "")
    _scans(config)
    _checkpoint(config["checkpoint"])


def _check_evaluate(config: Config) -> None:
    if config["compare"] is not None:
        runs = config["compare"]
        for folder in runs.values() if isinstance(runs, dict) else runs if isinstance(runs, list) else ():
            _exists(Path(str(folder)) / "summary.json", "give folders that asa-evaluate wrote")
        return
    _policy(config, OF_TASKS)
    predictions, truth, probe = config["predictions"], config["truth"], config["policy"] == "probe"
    if probe and config["column"] is None:
        raise ValueError("column= has to be given: the column of the table to predict, like age or diagnosis")
    for key in ("group", "site"):
        if config[key] is not None and not probe:
            raise ValueError(f"{key}= is for policy=probe: leave it out")
    if predictions and not has_wildcard(str(predictions)):
        _exists(predictions, f"give the one that asa-{'embed' if probe else 'predict'} wrote", "folder")
    if truth:
        _exists(truth, "truth= is a store, a folder, or for tables of scores a table", "file or folder")
    if config["split_file"]:
        read_split(config["split_file"])


def _check_ablate(config: Config) -> None:
    if not config["store"] and not config["prepare"]:
        raise ValueError("store has to be given, or prepare: settings of asa-prepare that make one")
    for key in ("store", "unlabelled"):
        if config[key]:
            _store(config[key])
    chosen_arms(config)
    _policy(config, ("classification",))


def chosen_arms(config: Config) -> dict[str, dict[str, Any]]:
    """The chosen arms of asa-ablate in order; raises a ValueError for one that does not exist, or is incomplete."""
    arms, chosen = config["arms"], config["only"]
    if not isinstance(chosen, list | None) or chosen == []:
        raise ValueError(f"only={chosen}: give a list of arms, like [scratch, asa]")
    names = list(arms) if chosen is None else chosen
    for name in names:
        if name not in arms:
            raise ValueError(f"only: no arm {name!r}; there are {', '.join(arms)}")
        if not isinstance(arms[name], dict) or arms[name].keys() != {"pretrain", "finetune"}:
            raise ValueError(f"arms.{name} needs pretrain (settings, or null) and finetune (settings)")
    return {name: arms[name] for name in names}


def _check_export(config: Config) -> None:
    kinds = {"onnx": "checkpoint", "bundle": "checkpoint", "hub": "checkpoint", "nnunet": "store"}
    check_choice("format", config["format"], kinds)
    source = kinds[config["format"]]
    for key in ("checkpoint", "store"):
        if (config[key] is None) == (key == source):
            raise ValueError(f"format={config['format']} writes a {source}: give {source}=, and no other source")
    (_checkpoint if source == "checkpoint" else _store)(config[source])


def _check_images(config: Config) -> None:
    _exists(config["input"], "give the folder that holds images (.png, .nii, .nii.gz or .dcm)", "folder")


def _check_view(config: Config) -> None:
    _exists(config["input"], "give a store, a folder of asa-predict, or a run", "folder")
    if Path(str(config["out"])).suffix != ".html":
        raise ValueError(f"out={config['out']}: the page is one file, give a name that ends with .html")
    if config["evaluation"]:
        _exists(Path(str(config["evaluation"])) / "summary.json", "give the folder that asa-evaluate wrote", "file")


CHECKS: dict[str, Callable[[Config], None]] = {
    "prepare": _check_prepare,
    "run": _check_run,
    "pretrain": _check_training,
    "finetune": _check_training,
    "predict": _check_predict,
    "embed": _check_embed,
    "evaluate": _check_evaluate,
    "ablate": _check_ablate,
    "export": _check_export,
    "view": _check_view,
    "regions": _check_images,
    "simulate": _check_images,
}


def _policy(config: Config, others: Collection[str] = ()) -> None:
    """Raise a ValueError for a policy that is not of label maps, one of `others`, or a task of the user's own."""
    from asa.evaluation.policies import POLICIES  # imports scipy, which takes half a second

    if config["policy"] not in (*POLICIES, *others) and "." not in str(config["policy"]):
        raise ValueError(f"policy={config['policy']}: choose {', '.join((*POLICIES, *others))}")


def _scans(config: Config) -> None:
    """Check which scans are read, and how raw ones are stripped."""
    check_choice("part", config["part"], PARTS, "null for every scan")
    if config["strip"] is not None:
        from asa.data.preprocessing.settings import check_strip  # imports scipy

        check_strip(config["strip"], "strip")


def _stores(data: Mapping[str, Any]) -> None:
    """Check `store`, or the list `stores` that is given in its place."""
    stores = data.get("stores")
    if stores is not None and data["store"] is not None:
        raise ValueError("data.store and data.stores exclude each other: list all of them in data.stores")
    if stores is not None and (not isinstance(stores, list) or not stores):
        raise ValueError(f"data.stores={written(stores)}: give a list of stores, like [stores/mr,stores/ct]")
    for path in stores or [data["store"]]:
        _store(path)


def _store(path: Any) -> None:
    check_is_store(Path(str(path)).absolute())


def _checkpoint(path: Any) -> None:
    if not on_hub(path):
        find_weights(path)


def _exists(path: Any, advice: str = "", kind: str = "file or folder") -> None:
    if not Path(str(path)).exists():
        if Path(str(path)).is_symlink():  # of git-annex
            check_present(Path(str(path)), "")
        raise FileNotFoundError(f"{path}: no such {kind}{advice and '; ' + advice}")
