"""Which scans asa-predict predicts, and where the results go: a file, a folder, or a store."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from asa.data.datasets import bids, folder
from asa.data.io.nifti import Volume, read_image
from asa.data.io.parallel import each_tried
from asa.data.splits import read_split, select
from asa.data.store import MANIFEST, Store
from asa.inference.layout import Layout
from asa.inference.preprocessing import ScanPreprocessor
from asa.tasks.base import Config
from asa.training.hub import on_hub

ENDINGS = (".nii.gz", ".nii")
LABEL_MAPS_ONLY = ("mirror", "probabilities", "uncertainty", "layout")  # settings
# Suffix in BIDS of the channels that are named as usual, also as T1 or T1w.
SUFFIXES = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"}
Job = tuple[str, dict[str, str], Callable[[], None]]  # scan id, file of each channel (and label), the work
Channels = Mapping[str, str | None]  # file of each channel; None for one that the scan lacks


class ScanPredictor(Protocol):
    """A trained network that predicts scans one by one.

    Attributes:
        preprocessor: how raw scans are prepared for it.
    """

    preprocessor: ScanPreprocessor

    def predict_file(self, id: str, images: Channels) -> None:
        """Predict a raw scan from its channel files."""

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        """Predict a prepared volume `(C, D, H, W)`, given its preparation and the scan that it was prepared from."""

    def finish(self) -> str:
        """Write what is written once for all scans; say what was written."""


def predict_scans(predictor: ScanPredictor, config: Config, layout: Layout | None = None) -> None:
    """Predict a scan, a folder of scans, or a store.

    Args:
        predictor: of the task.
        config: of asa-predict.
        layout: where the predictor writes; None: `OUT/ID.nii.gz`.

    Raises:
        FileNotFoundError: no such input.
        ValueError: scans failed; they are listed before, and the others are done.
    """
    source, out = Path(str(config["input"])), Path(str(config["out"]))
    make_jobs = _store_jobs if (source / MANIFEST).exists() else _file_jobs
    jobs, layout = make_jobs(predictor, source, config), layout or Layout(out)
    channels = predictor.preprocessor.channels
    layout.begin({id: [files[name] for name in channels if name in files] for id, files, _ in jobs})
    failures = 0

    def predict(job: Job) -> None:
        id, files, work = job
        if layout.label_map(id).resolve() in {Path(path).resolve() for path in files.values()}:
            raise ValueError(f"the result would replace the scan itself: choose another out= than {out}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            work()
        layout.describe(id)
        for warning in caught:
            tqdm.write(f"{id}: warning: {warning.message}")

    for (id, *_), _, reason in each_tried(predict, jobs, title="predict", unit="scan"):
        if reason:
            failures += 1
            tqdm.write(f"{id}: failed: {reason}")
    written = predictor.finish()
    if failures:
        raise ValueError(f"{failures} scans failed, listed above")
    print(written)


def checkpoints_of(config: Config) -> list[str]:
    """The checkpoints that are given, one or several."""
    chosen = config["checkpoint"]
    return [chosen] if isinstance(chosen, str) else [str(path) for path in chosen]


def only_checkpoint(config: Config, result: str) -> str:
    """The one checkpoint of a network that has neither an ensemble nor what belongs to label maps alone.

    Raises:
        ValueError: several checkpoints, or settings of segmentation.
    """
    checkpoints = checkpoints_of(config)
    if len(checkpoints) != 1 or any(config[key] for key in LABEL_MAPS_ONLY):
        raise ValueError(f"{result} comes from one checkpoint, without {', '.join(LABEL_MAPS_ONLY)}: leave these out")
    return checkpoints[0]


def refuse_healthy(config: Config) -> None:
    """Raise a ValueError where healthy scans are given to a task that does not compare with them."""
    if config["healthy"] is not None:
        raise ValueError("healthy= is for asymmetry maps of a run of method=sa_swin: leave it out")


def subjects_of_part(config: Config) -> list[str] | None:
    """Subjects of the part of the runs' split that is asked for; None: all.

    Raises:
        ValueError: no such part, or runs whose splits differ in it.
    """
    part, paths = config["part"], checkpoints_of(config)
    if part is None:
        return None
    if remote := [path for path in paths if on_hub(path)]:
        raise ValueError(f"part={part}: {remote[0]} has no split, which a run on this machine has: leave part= out")
    splits = [read_split(_run_of(Path(path)) / "split.json") for path in paths]
    subjects = splits[0].get(part)
    if not subjects:
        raise ValueError(f"part={part}: the run's split has no subjects under that name")
    for path, split in zip(paths, splits, strict=True):
        if split.get(part) != subjects:
            raise ValueError(f"part={part}: {path} has other subjects there than {paths[0]}: predict fold by fold")
    return subjects


def _run_of(checkpoint: Path) -> Path:
    """The run folder that a run, one of its checkpoints or its weights file belongs to."""
    above = (checkpoint, *checkpoint.resolve().parents[:3])
    return next((folder for folder in above if (folder / "split.json").exists()), checkpoint)


def _store_jobs(predictor: ScanPredictor, source: Path, config: Config) -> list[Job]:
    """The work for the scans of a store, or for one part of the run's split."""
    store = Store(source)
    if store.channels != predictor.preprocessor.channels or store.settings != predictor.preprocessor.data["prepare"]:
        raise ValueError(
            f"{store.path} was prepared in another way than what this model was trained on: predict the raw scans"
        )
    subjects = subjects_of_part(config)
    records = store.records if subjects is None else select(store.records, subjects)

    def predict(record: dict[str, Any]) -> None:
        like = read_image(store.first_source(record))
        predictor.preprocessor.check_stored(record["chain"])
        predictor.preprocessor.warn_outside_range(record["quality"], record["intensity"])
        predictor.predict_stored(record["id"], store.image(record["id"]), record["chain"], like)

    return [
        (record["id"], {name: found["path"] for name, found in record["sources"].items()}, partial(predict, record))
        for record in records
    ]


def _file_jobs(predictor: ScanPredictor, source: Path, config: Config) -> list[Job]:
    """The work for a scan, or for each scan of a folder."""
    if config["part"] is not None:
        raise ValueError("part= chooses scans of a store; leave it out for files")
    return [
        (
            id,
            {name: path for name, path in images.items() if path is not None},
            partial(predictor.predict_file, id, images),
        )
        for id, images in _cases(source, config, predictor.preprocessor)
    ]


def _cases(source: Path, config: Config, preprocessor: ScanPreprocessor) -> list[tuple[str, Channels]]:
    """Id and channel files of a scan or a folder of scans."""
    channels, images = preprocessor.channels, config["images"]
    example = f"'images={{{', '.join(f'{channel}: *_{channel}.nii.gz' for channel in channels)}}}'"
    if images is not None and not isinstance(images, Mapping):
        raise ValueError(f"images={images}: give the file pattern of each channel by its name, like {example}")
    if source.is_dir() and images:
        preprocessor.check_channels(images)
        return [(record["id"], record["images"]) for record in folder.records(source, images=images)]
    usual = {channel: channel.lower().removesuffix("w") for channel in channels}
    named = SUFFIXES.keys() >= set(usual.values()) and len(set(usual.values())) == len(channels)
    if source.is_dir() and config.get("layout") == "bids" and named:
        suffixes = {channel: SUFFIXES[name] for channel, name in usual.items()}
        return [(record["id"], record["images"]) for record in bids.records(source, channels=suffixes)]
    if len(channels) != 1:
        raise ValueError(
            f"this model takes the channels {', '.join(channels)}: give a folder and which file is which, like "
            f"{example}"
        )
    return [
        (id, {channels[0]: str(path)}) for id, path in _scans(source, Path(str(config["out"])), channels[0]).items()
    ]


def _scans(source: Path, out: Path, channel: str) -> dict[str, Path]:
    """A scan, or those of a folder and its subfolders, by id: the path inside the folder, with _ for /.

    Hidden files, and files in an `out` inside the folder, are left out.
    """
    if source.is_dir():
        found = [
            (path, folder.join_texts(texts))
            for end in ENDINGS
            for texts, path in folder.find_files(source, f"**/*{end}").items()
            if not (source.resolve() in out.resolve().parents and path.resolve().is_relative_to(out.resolve()))
        ]
    else:
        found = [(source, source.name.removesuffix(end)) for end in ENDINGS if source.name.endswith(end)]
    if not found:
        raise ValueError(f"{source}: no .nii or .nii.gz here")
    scans: dict[str, Path] = {}
    for path, id in sorted(found):
        if id in scans:
            raise ValueError(f"{scans[id]} and {path} would both give {id}.nii.gz: leave one, or rename it")
        scans[id] = path
    kinds = {id.rpartition("_")[2] for id, path in scans.items() if path.name.startswith("sub-")}
    if len(kinds) > 1 and any(path.parent != source.absolute() for path in scans.values()):
        raise ValueError(
            f"{source}: scans of several kinds ({', '.join(sorted(kinds))}): say which, like "
            f"'images={{{channel}: **/*_{max(kinds)}.nii.gz}}'"
        )
    return scans
