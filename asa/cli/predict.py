"""asa-predict: label maps of new scans, in their own space, or restored images."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asa.cli import restoration
from asa.cli.front import Config, run_command
from asa.config import typed
from asa.data.datasets import folder
from asa.data.splits import read_split, select
from asa.data.store import MANIFEST, Store
from asa.data.volume import read_image
from asa.engine.predict import PredictSettings, Segmenter

SETTINGS = {"predict": PredictSettings}
ENDINGS = (".nii.gz", ".nii")
Job = tuple[str, list[str], Callable[[], None]]  # id, the files it reads, what to do


def predict(config: Config) -> None:
    """Predict a file, a folder or a store.

    Raises:
        ValueError: scans failed; they are listed before, and the others are done.
    """
    if restoration.restores(config["checkpoint"]):
        part = config["part"]
        restoration.predict(config, None if part is None else _subjects(config["checkpoint"], part))
        return
    source, out = Path(str(config["input"])), Path(str(config["out"]))
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    for key in ("mirror", "probabilities"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={config[key]}: choose true or false")
    segmenter = Segmenter(
        config["checkpoint"],
        typed(PredictSettings, config["predict"]),
        mirror=config["mirror"],
        strip=config["strip"],
        progress=True,
    )
    jobs = _store_jobs if (source / MANIFEST).exists() else _file_jobs
    failures = 0
    for id, inputs, work in tqdm(jobs(segmenter, source, out, config), desc="predict", unit="scan"):
        try:
            if (out / f"{id}.nii.gz").resolve() in {Path(path).resolve() for path in inputs}:
                raise ValueError(f"the label map would replace the scan itself: choose another out= than {out}")
            work()
        except (ValueError, OSError) as error:
            failures += 1
            tqdm.write(f"{id}: failed: {error}")
    if failures:
        raise ValueError(f"{failures} scans failed, listed above")
    print(f"wrote label maps to {out}")


def _file_jobs(segmenter: Segmenter, source: Path, out: Path, config: Config) -> list[Job]:
    """What to do for a scan, or each scan of a folder."""
    if config["part"] is not None:
        raise ValueError("part= chooses scans of a store; leave it out for files")
    cases = _cases(source, config["images"], segmenter)
    return [
        (
            id,
            [path for path in images.values() if path is not None],
            partial(segmenter.segment_file, images, out / f"{id}.nii.gz", probabilities=_shares(config, out, id)),
        )
        for id, images in cases
    ]


def _shares(config: Config, out: Path, id: str) -> Path | None:
    """Where a scan's class probabilities go: a folder of their own, so that `out` holds label maps only."""
    return out / "probabilities" / id if config["probabilities"] else None


def _cases(
    source: Path, images: dict[str, str] | None, segmenter: Segmenter
) -> list[tuple[str, Mapping[str, str | None]]]:
    """Id and channel files of a scan or a folder of scans; None for a channel that a scan lacks."""
    channels = segmenter.channels
    if source.is_dir() and images:
        segmenter.check_channels(images)
        return [(record["id"], record["images"]) for record in folder.records(source, images=images)]
    if len(channels) != 1:
        raise ValueError(
            f"this model takes the channels {', '.join(channels)}: give a folder and which file is which, like "
            f"images={{{', '.join(f'{channel}: *_{channel}.nii.gz' for channel in channels)}}}"
        )
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    found = [(path.name.removesuffix(end), path) for path in files for end in ENDINGS if path.name.endswith(end)]
    if not found:
        raise ValueError(f"{source}: no .nii or .nii.gz here")
    if len({id for id, _ in found}) < len(found):
        raise ValueError(f"{source}: a scan is there as .nii and as .nii.gz: leave one")
    return [(id, {channels[0]: str(path)}) for id, path in found]


def _store_jobs(segmenter: Segmenter, source: Path, out: Path, config: Config) -> list[Job]:
    """What to do for the scans of a store, or for one part of the run's split."""
    store = Store(source)
    if store.channels != segmenter.channels or store.settings != segmenter.data["prepare"]:
        raise ValueError(
            f"{store.path} was prepared in another way than what this model was trained on: predict the raw scans"
        )
    records = store.records
    if config["part"] is not None:
        records = select(store.records, _subjects(config["checkpoint"], config["part"]))

    def work(record: dict[str, Any]) -> None:
        like = read_image(record["sources"][store.channels[0]]["path"])
        id = record["id"]
        segmenter.segment_prepared(
            store.image(id), record["chain"], like, out / f"{id}.nii.gz", probabilities=_shares(config, out, id)
        )

    return [
        (record["id"], [found["path"] for found in record["sources"].values()], partial(work, record))
        for record in records
    ]


def _subjects(checkpoint: str | list[str], part: str) -> list[str]:
    """Subjects of a part of the runs' split."""
    paths = [checkpoint] if isinstance(checkpoint, str) else checkpoint
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


def main() -> int:
    """Entry point."""
    return run_command(
        "predict",
        "Segment new scans with a trained network; the label maps have each scan's own space and header.",
        predict,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    sys.exit(main())
