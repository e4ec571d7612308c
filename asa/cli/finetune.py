"""asa-finetune: learn a segmentation or a classification from labelled scans, or restoration from pairs of images."""

import sys
from pathlib import Path

from asa.cli import restoration
from asa.cli.classify import classify
from asa.cli.cohort import open_parts
from asa.cli.folds import finetune_folds, wants_folds
from asa.cli.front import Config, run_command
from asa.cli.job import Job
from asa.cli.start import loaded, start
from asa.config import typed
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import LoaderSettings
from asa.data.store import Store
from asa.inference.preprocessing import learnt_from
from asa.inference.segmentation import SIDE, PredictSettings
from asa.ops.nested import painting_order
from asa.tasks.validation import Shown, validate_segmentation
from asa.training.checkpoint import find_weights
from asa.training.loop import TrainSettings
from asa.training.optim import OptimSettings
from asa.training.pretrained import read_source

SETTINGS = {
    "train": TrainSettings,
    "optim": OptimSettings,
    "loader": LoaderSettings,
    "augment": AugmentSettings,
    "predict": PredictSettings,
}


def finetune(config: Config) -> None:
    """Fine-tune as the method says: segmentation, of one split or of all folds, classification or restoration."""
    target, every_fold = str(config["method"]["_target_"]), wants_folds(config)
    if target == restoration.METHOD or target.startswith("asa.methods.classify."):
        if every_fold:
            raise ValueError("data.split.fold=all is for segmentation: give data.split.fold=0, then 1, ...")
        (restoration.finetune if target == restoration.METHOD else classify)(config)
    elif every_fold:
        finetune_folds(config, segment)
    else:
        segment(config)


def segment(config: Config) -> None:
    """Fine-tune a segmentation on a prepared store with labels.

    Raises:
        ValueError: a store without labels, or a pretrained encoder that does not match.
    """
    job = Job(config)
    predict, augment = typed(PredictSettings, config["predict"]), typed(AugmentSettings, config["augment"])
    data = config["data"]
    explain = _explains(config)
    source = read_source(config["init"]) if config["init"] and not job.planning else None
    store, split, parts = open_parts(data, Path(str(config["out"])))
    if not store.labels:
        raise ValueError(f"{store.path}: the store has no labels: prepare it with labels={{1: name, ...}}")
    labels = {store.labels[value]: [k] for k, value in enumerate(store.label_values, start=1)}
    regions = _regions(config["method"], store)
    for node in (config["model"], config["method"]["model"]):
        node["in_channels"], node["out_channels"] = len(store.channels), len(regions) or len(labels) + 1
    method = job.method(len(parts["train"]), labelled=True)
    if method is None:
        return
    if explain and source is not None:
        print(loaded(config, source, method.model, explain=True))
        return
    trained, seen = start(config, source, method.model, parts["train"], store, split)
    dataset = CropDataset(
        store,
        parts["train"],
        method.model.encoder.img_size,
        crop=data["placement"],
        labelled=True,
        foreground=data["foreground"],
        mirrored=method.mirrored,
        augment=augment,
        lateral_pairs=_pairs(data["lateral_pairs"], store, augment),
        seed=job.settings.seed,
    )
    watched = [record["id"] for record in parts["validation"]]
    if unlabelled := [id for id in watched if store.label(id) is None]:
        raise ValueError(f"{unlabelled[0]}: has no label map; leave it out of the validation part of the split")
    beginning = f"the encoder of {config['init']}" if config["init"] else "scratch"
    known = {
        "channels": store.channels,
        "labels": store.labels,
        **({"regions": list(store.regions.items())} if regions else {}),
        "prepare": store.settings,
        **learnt_from(data["lateral_pairs"], parts["train"]),
        **(trained or {}),
    }

    def validate(step: int) -> Shown:
        return validate_segmentation(method, store, watched, regions or labels, predict)

    with job.run(split, seen) as run:
        print(f"fine-tuning from {beginning} on {len(parts['train'])} scans, watched on {len(watched)}, in {run}")
        last = job.train(run, method, dataset, known, validate if watched else None)
    if "dice" in last:
        print("  ".join(f"{name} {value:.4f}" for name, value in last.items()))
    print(f"wrote {find_weights(run)}")


def _regions(node: Config, store: Store) -> dict[str, list[int]]:
    """The store's regions as class indices, entered into the node of a method that learns them; else none."""
    if "regions" not in node:
        return {}
    if not store.regions:
        raise ValueError(f"{store.path}: the store has no regions: prepare it with regions={{NAME: [values], ...}}")
    painting_order(store.regions)
    index = {value: k for k, value in enumerate(store.label_values, start=1)}
    node["regions"] = {name: [index[value] for value in values] for name, values in store.regions.items()}
    return dict(node["regions"])


def _explains(config: Config) -> bool:
    """Whether the transfer is to be explained only; the key does not stay in the run's configuration."""
    chosen = config.pop("transfer")
    if chosen not in ("load", "explain"):
        raise ValueError(f"transfer={chosen}: choose load or explain")
    if chosen == "explain" and not config["init"]:
        raise ValueError("transfer=explain says what becomes of a checkpoint: give init=")
    return chosen == "explain"


def _pairs(names: list[list[str]], store: Store, augment: AugmentSettings) -> list[tuple[int, int]]:
    """Left/right pairs of label names -> stored class indices."""
    index = {store.labels[value]: k for k, value in enumerate(store.label_values, start=1)}
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in names):
        raise ValueError(f"data.lateral_pairs is a list of pairs, like [[left_x, right_x]], got {names}")
    paired = [name for pair in names for name in pair]
    for name in paired:
        if name not in index:
            raise ValueError(f"data.lateral_pairs names {name!r}; the store's labels are {', '.join(index)}")
    sided = [name for name in index if SIDE.search(name) and name not in paired]
    if sided and augment.mirror_probability > 0:
        raise ValueError(
            f"the label {sided[0]!r} has a side and no partner to change places with in mirrored crops: "
            "give data.lateral_pairs=[[left_x, right_x]], or augment.mirror_probability=0"
        )
    return [(index[left], index[right]) for left, right in names]


def main() -> int:
    """Entry point."""
    return run_command(
        "finetune",
        "Fine-tune a segmentation or classification network, from a pretrained encoder or from scratch.",
        finetune,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    sys.exit(main())
