"""What the tasks on prepared volumes share: the store and its split, the pretrained encoder, and leakage from it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from asa.config import build, typed, written
from asa.data.io.files import read_yaml, write_json
from asa.data.joined import open_stores, records_by_modality
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset, VolumeSource
from asa.data.splits import (
    LeakedSubject,
    TrainingDigests,
    find_leaks,
    keep_labelled,
    make_joint_split,
    make_split,
    read_split,
    select,
    stored_digests,
    subjects_of,
    training_digests,
)
from asa.data.store import Store
from asa.errors import counted, listed
from asa.inference.preprocessing import prepared_otherwise, training_scan_metadata
from asa.methods.base import Batch
from asa.models.transfer import POSITIONS, Source, other_position
from asa.settings import Config
from asa.training.checkpoint import load_weights
from asa.training.checkpoint_files import list_checkpoints
from asa.training.distributed import is_main
from asa.training.loop import TrainSettings
from asa.training.plan import volume_batch
from asa.training.pretrained import fitting_shipped, load_pretrained, read_source
from asa.training.run_folder import unfinished

Records = Sequence[dict[str, Any]]
MOSTLY_PADDING = 0.5  # fraction of a crop outside the volumes, above which a crop that fits is named
DIVISOR = 32  # of the crop of any of our networks
SMALLEST, LARGEST = 64, 128  # edges of a crop that is not given


@dataclass(frozen=True)
class VolumeData:
    """The settings `data` of a training on prepared scans; the YAML files of the commands say what each of them is."""

    store: str | None
    placement: str
    split: dict[str, Any]
    split_file: str | None
    # asa-pretrain
    stores: list[str] | None = None
    mirror_probability: float = 0.0
    labelled_store: str | None = None
    health: str | None = None
    # asa-finetune
    foreground: float = 0.0
    labelled: Any = None
    unlabelled: str | None = None
    classes: str | None = None
    table: str | None = None
    column: str | None = None
    lateral_pairs: Any = None
    join_sides: bool | None = None


class VolumeTask:
    """What the tasks on prepared scans share; each adds its targets, its validation, its prediction and evaluation."""

    units = ("volumes", "scans")
    cross_validates = False
    targets: tuple[str, ...] = ()  # what batches have beside the image: "label" or "target"

    def __init__(self, config: Config, *paths: str) -> None:  # keys of `data` beside `store` that name files
        absolute(config["data"], *paths)
        self.attached: Mapping[str, Mapping[str, float]] = {}  # numbers of each scan in its batches, by record id
        self.config, self.data = config, typed(VolumeData, config["data"], "data")
        self.store, self.split, self.parts = open_store(config["data"], Path(str(config["out"])), self.usable)
        if not self.parts["train"]:
            raise ValueError("the training part of the split has no scan that can be used: correct the split")
        if twice := find_leaks(self.store.records, self.split, training_digests(self.parts["train"])):
            held_out = f"{counted(len(twice), 'held-out subject')} ({_by_part(twice)})"
            advice = "leave one of each out, or read their scores as optimistic"
            print(f"warning: scans of {held_out} are trained on, too, under another subject: {advice}")
        if config["crop"] is None:
            crop = default_crop(Path(str(config["out"])), self.parts["train"])
            config["crop"] = crop
            set_model(config, img_size=crop)
            print(f"crop=[{','.join(map(str, crop))}] voxels, from the size of the training scans")
        self.source: VolumeSource = self.store
        self.train = typed(TrainSettings, config["train"])
        self.augment = typed(AugmentSettings, config.get("augment", {}))
        self.init = Initialisation(config, self.store, self.split)

    def usable(self, store: Store) -> Collection[str] | None:
        """Ids of the scans that can be used, by which subjects are divided; None: all."""
        return None

    def set_model(self, **values: Any) -> None:
        """Enter what follows from the data into the model's configuration; warn of a crop that is mostly padding."""
        set_model(self.config, in_channels=len(self.store.channels), **values)
        if advice := padding_advice(self.config["crop"], self.parts["train"], self.takes):
            print(advice)

    def takes(self, crop: Sequence[int]) -> bool:
        """Whether the network of the configuration takes volumes of this size."""
        try:
            build({**self.config["model"], "img_size": list(crop)}, plugins=self.config["plugins"])
        except ValueError:
            return False
        return True

    def example(self, method: Any, count: int) -> Batch:
        return volume_batch(method, count, **dict.fromkeys(self.targets, True))

    def load_init(self, method: Any) -> None:
        self.init.load_and_print(method.model)

    def explain_init(self, method: Any) -> str:
        raise ValueError("transfer=explain is for segmentation: leave it out with other methods")

    def crops(self, method: Any, part: Records, **options: Any) -> CropDataset:
        """Crops for a method from some records; `options` are of `CropDataset`."""
        fixed: dict[str, Any] = {"mirrored": method.mirrored, "attached": self.attached, "seed": self.train.seed}
        return CropDataset(self.source, part, method.model.encoder.img_size, **fixed, **options)

    def dataset(self, method: Any) -> CropDataset:
        return self.crops(method, self.trained_on(), crop=self.data.placement, augment=self.augment)

    def trained_on(self) -> Records:
        """The records of all training scans."""
        return self.parts["train"]

    def metadata(self) -> dict[str, Any]:
        train = self.trained_on()
        shared = {"channels": self.store.channels, "prepare": self.store.settings}
        return {**shared, **training_scan_metadata(train), **self.init.digests(train), **self.target_metadata()}

    def target_metadata(self) -> dict[str, Any]:
        """What the checkpoint has to hold about the targets."""
        return {}


def absolute(data: dict[str, Any], *keys: str) -> None:
    """Make paths in a configuration absolute, so that the run can be resumed from any directory."""
    for key in keys:
        if data[key]:
            data[key] = str(Path(str(data[key])).resolve())


def open_store(
    data: dict[str, Any], run: Path, usable: Callable[[Store], Collection[str] | None] = lambda store: None
) -> tuple[Store, dict[str, list[str]], dict[str, Records]]:
    """The store, and the subjects and their records of "train", "validation" and "test".

    Args:
        data: `store` or `stores`, `split_file` or `split`, and optionally `labelled`, see the YAML of the commands.
        run: the run folder, whose `split.json` holds if the run is resumed.
        usable: ids of the scans that can be used; None: all. Subjects without one are in no part.
    """
    if stores := data.get("stores"):
        data["stores"] = [str(Path(str(path)).resolve()) for path in stores]
    elif data["store"] is None:
        raise ValueError("data.store has to be given: a folder made by asa-prepare")
    absolute(data, "store", "split_file")
    store = open_stores(stores or [data["store"]])
    records: Any = store.records
    if (ids := usable(store)) is not None:
        records = records.take(k for k, id in enumerate(records.ids) if id in ids)
    left_out = {*subjects_of(store.records)} - {*subjects_of(records)}
    split = choose_split(records, data, run, records_by_modality(store, records).values(), left_out)
    return store, split, {name: select(records, subjects) for name, subjects in split.items()}


def choose_split(
    records: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    run: Path,
    modalities: Collection[Sequence[Mapping[str, Any]]] = (),
    left_out: Collection[str] = (),
) -> dict[str, list[str]]:
    """The subjects of each part: see `open_store`. Of several `modalities` each is divided by itself.

    `left_out`: subjects that a split file may list although none of their scans can be used.
    """

    def usable(split: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        return {name: [one for one in part if one not in left_out] for name, part in split.items()}

    if list_checkpoints(run):  # in a run that is resumed no subject changes its part, whatever the options are now
        return usable(read_split(run / "split.json"))
    if data["split_file"] is not None:
        split = usable(read_split(data["split_file"], data["split"].get("fold"), records))
    elif modalities:
        split = make_joint_split(modalities, **data["split"])
    else:
        split = make_split(records, **data["split"])
    return split if data.get("labelled") is None else keep_labelled(split, data["labelled"])


def default_crop(run: Path, records: Records) -> list[int]:
    """The smallest crop of 64 to 128 voxels along each axis that holds all volumes; that of a run that is resumed."""
    if list_checkpoints(run):
        crop: list[int] = np.broadcast_to(read_yaml(run / "config.yaml")["crop"], 3).tolist()
        return crop
    return np.clip(_whole_crop(records), SMALLEST, LARGEST).tolist()


def _whole_crop(records: Records) -> Any:
    """The smallest crop of the networks that holds all volumes of some records, `(D, H, W)`."""
    return -(-np.array([record["shape"][1:] for record in records]).max(axis=0) // DIVISOR) * DIVISOR


def set_model(config: Config, **values: Any) -> None:
    """Enter what follows from the data into the model's configuration, which stands in two places."""
    for node in (config["model"], config["method"]["model"]):
        node.update(values)


def padding_advice(
    crop: int | Sequence[int], records: Records, takes: Callable[[Sequence[int]], bool] = lambda crop: True
) -> str | None:
    """A line about a crop that is mostly padding, with one that fits and the network `takes`; None for any other."""
    shapes = np.array([record["shape"][1:] for record in records])
    size = np.broadcast_to(crop, 3)
    padding = 1 - float((np.minimum(shapes, size) / size).prod(axis=1).mean())
    fitting = np.minimum(_whole_crop(records), size)
    if padding <= MOSTLY_PADDING:
        return None
    while (fitting != size).any() and not takes(fitting.tolist()):
        edge = int(np.argmin(np.where(fitting < size, fitting, fitting.max() + size.max())))
        fitting[edge] = min(fitting[edge] + DIVISOR, size[edge])
    if (fitting == size).all():
        return None
    median = "x".join(f"{edge:g}" for edge in np.median(shapes, axis=0))
    return (
        f"warning: a crop of {'x'.join(map(str, size))} voxels is {padding:.0%} padding, as the volumes have {median}: "
        f"crop=[{','.join(map(str, fitting))}] fits them and has {size.prod() / fitting.prod():.1f} times fewer voxels"
    )


class Initialisation:
    """The checkpoint of `init` that a training starts from, and the held-out subjects that it was trained on."""

    def __init__(self, config: Config, store: Store, split: Mapping[str, Sequence[str]]) -> None:
        self.init = config["init"]
        self.model_config = config["model"]
        self.source: Source | None = None  # without `init`
        self.description: dict[str, Any] = {}
        if self.init:
            self.source, self.description = read_source(self.init, shapes=config["plan"] is not None)
        before, self.otherwise = self.description.get("data", {}), list[str]()
        if isinstance(before.get("prepare"), dict) and "modalities" not in before:
            own = training_scan_metadata(select(store.records, split["train"]))
            self.otherwise = prepared_otherwise(before, {"prepare": store.settings, **own})
        self.before: TrainingDigests | None = stored_digests(before)
        self.seen: list[LeakedSubject] | None = find_leaks(store.records, split, self.before) if self.before else None

    def load(self, model: Any, *, explain: bool = False) -> str:
        """Load the encoder into a network: see `load_pretrained`."""
        assert self.source is not None
        return load_pretrained(self.init, self.source, self.description, model, self.model_config, explain=explain)

    def load_and_print(self, model: Any) -> None:
        """Load the encoder and print what was loaded; without `init`, which one of the package could be loaded."""
        if self.init:
            print(self.load(model))
            self.print_notes()
        elif fitting := fitting_shipped(model, self.model_config):
            print(f"from scratch; a pretrained encoder of this size is in the package: init={fitting[0]}")

    def load_network(self, model: nn.Module) -> None:
        """Load all weights of the same network, which may have been trained on volumes of another size."""
        if not self.init:
            return
        assert self.source is not None
        if not self.description:
            others = "asa-finetune takes encoders of other packages"
            raise ValueError(f"init={self.init}: pretraining continues from a run of asa-pretrain; {others}")
        before, now = self.description["model"], self.model_config
        shared = before.keys() & now.keys() - {"_target_", "img_size", "checkpointing", *POSITIONS}
        reasons = [differs] if (differs := other_position(before, now)) else []
        if differing := sorted(key for key in shared if before[key] != now[key]):
            had, has = (", ".join(f"model.{key}={written(node[key])}" for key in differing) for node in (before, now))
            reasons.append(f"{self.init} was trained with {had}, this run has {has}: add {had.replace(', ', ' ')}")
        if reasons:
            raise ValueError("; ".join(reasons))
        load_weights(model, self.source.weights, self.init)
        print(f"all {len(self.source.weights)} tensors of the network from {self.init}")
        self.print_notes()

    def digests(self, records: Records) -> TrainingDigests:
        """Digests of the scans and subjects that the network is trained on in the end; {} where that is not known."""
        if self.init and self.before is None:
            return {}
        return training_digests(records, self.before)

    def write(self, run: Path) -> None:
        """Write the held-out subjects that the encoder was pretrained on into the run, if they are known."""
        if self.seen is not None and is_main():
            write_json(run / "seen.json", {"init": self.init, "seen": [asdict(one) for one in self.seen]})

    def print_notes(self) -> None:
        """Print what the scans that the encoder was trained on have to do with those of the run."""
        init, advice = self.init, "pretrain with them held out (data.split_file)"
        if self.seen is None:
            unknown = "whether held-out subjects are among them is not checked"
            print(f"{init} does not hold its training subjects: {unknown}")
        elif not self.seen:
            print(f"{init} was not trained on any held-out subject")
        elif scans := [one for one in self.seen if one.match == "scan"]:
            held_out = f"{counted(len(scans), 'held-out subject')} ({_by_part(scans)})"
            print(f"warning: {init} was trained on scans of {held_out}: {advice}, or read their scores as optimistic")
        if names := [one for one in self.seen or () if one.match == "name"]:
            held_out = f"{len(names)} subjects with names of held-out ones ({_by_part(names)})"
            print(f"note: {init} was trained on other scans of {held_out}: if they are the same people, {advice}")
        if note := unfinished(init):
            print(note)
        if otherwise := ", ".join(self.otherwise):
            worth = "it is worth most on scans prepared like its own"
            print(f"note: {init} was trained on scans that are otherwise: {otherwise}: {worth}")


def _by_part(seen: list[LeakedSubject]) -> str:
    parts = dict.fromkeys(one.part for one in seen)
    return "; ".join(f"{part}: {listed([one.subject for one in seen if one.part == part], 5)}" for part in parts)
