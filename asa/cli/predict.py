"""asa-predict: label maps of new scans, in their own space."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asa.cli.front import Config, run_command
from asa.config import typed
from asa.data.cohort import Record
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
    source, out = Path(str(config["input"])), Path(str(config["out"]))
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    segmenter = Segmenter(config["checkpoint"], typed(PredictSettings, config["predict"]), strip=config["strip"])
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
    cases = _cases(source, config["images"], segmenter.channels)
    return [
        (id, list(images.values()), partial(segmenter.segment_file, images, out / f"{id}.nii.gz"))
        for id, images in cases
    ]


def _cases(source: Path, images: dict[str, str] | None, channels: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Id and channel files of a scan or a folder of scans."""
    if source.is_dir() and images:
        return [(record["id"], _complete(record)) for record in folder.records(source, images=images)]
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


def _complete(record: Record) -> dict[str, str]:
    found = {channel: path for channel, path in record["images"].items() if path is not None}
    if absent := sorted(set(record["images"]) - set(found)):
        raise ValueError(f"{record['id']}: has no {', '.join(absent)}; add the file, or take the scan out")
    return found


def _store_jobs(segmenter: Segmenter, source: Path, out: Path, config: Config) -> list[Job]:
    """What to do for the scans of a store, or for one part of the run's split."""
    store = Store(source)
    if store.channels != segmenter.channels or store.settings != segmenter.description["data"]["prepare"]:
        raise ValueError(
            f"{store.path} was prepared in another way than what this model was trained on: predict the raw scans"
        )
    records = store.records
    if config["part"] is not None:
        split = read_split(_run_of(Path(config["checkpoint"])) / "split.json")
        if not split.get(config["part"]):
            raise ValueError(f"part={config['part']}: the run's split has no subjects under that name")
        records = select(store.records, split[config["part"]])

    def work(record: dict[str, Any]) -> None:
        like = read_image(record["sources"][store.channels[0]]["path"])
        segmenter.segment_prepared(store.image(record["id"]), record["chain"], like, out / f"{record['id']}.nii.gz")

    return [
        (record["id"], [found["path"] for found in record["sources"].values()], partial(work, record))
        for record in records
    ]


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
