"""asa-predict: label maps, asymmetry or classes of new scans, in their own space, or restored images."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.cli import restoration
from asa.cli.front import Config, run_command
from asa.config import typed
from asa.data.datasets import folder
from asa.data.io.files import write_whole
from asa.data.io.nifti import Volume, read_image
from asa.data.splits import read_split, select
from asa.data.store import MANIFEST, Store
from asa.inference.asymmetry import TABLE, AsymmetryRow, AsymmetryScorer, write_rows
from asa.inference.classification import ClassPredictor, predictions_csv
from asa.inference.preprocessing import ScanPreprocessor
from asa.inference.segmentation import PredictSettings, Segmenter
from asa.training.checkpoint import read_description

SETTINGS = {"predict": PredictSettings}
ENDINGS = (".nii.gz", ".nii")
Job = tuple[str, list[str], Callable[[], None]]  # id, the files it reads, what to do


@dataclass(frozen=True)
class Work:
    """What a checkpoint does with scans.

    Args:
        preprocessor: how scans come to it.
        of_file: from an id and channel files.
        of_stored: from an id, the prepared image, its chain, and the scan it was made of.
        finish: after all scans; says what was written.
    """

    preprocessor: ScanPreprocessor
    of_file: Callable[[str, Mapping[str, str | None]], None]
    of_stored: Callable[[str, np.ndarray, dict[str, Any], Volume], None]
    finish: Callable[[], str]


def predict(config: Config) -> None:
    """Predict a file, a folder or a store.

    Raises:
        ValueError: scans failed; they are listed before, and the others are done.
    """
    described = _description(config["checkpoint"])
    if described.get("data", {}).get("task") == restoration.TASK:
        part = config["part"]
        restoration.predict(config, None if part is None else _subjects(config["checkpoint"], part))
        return
    source, out = Path(str(config["input"])), Path(str(config["out"]))
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    for key in ("mirror", "probabilities"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={config[key]}: choose true or false")
    work = _work(config, out, str(described.get("model", {}).get("_target_")))
    jobs = _store_jobs if (source / MANIFEST).exists() else _file_jobs
    failures = 0
    for id, inputs, do in tqdm(jobs(work, source, config), desc="predict", unit="scan"):
        try:
            if (out / f"{id}.nii.gz").resolve() in {Path(path).resolve() for path in inputs}:
                raise ValueError(f"the result would replace the scan itself: choose another out= than {out}")
            do()
        except (ValueError, OSError) as error:
            failures += 1
            tqdm.write(f"{id}: failed: {error}")
    said = work.finish()
    if failures:
        raise ValueError(f"{failures} scans failed, listed above")
    print(said)


def _description(checkpoint: str | list[str]) -> dict[str, Any]:
    """What the checkpoint, or the first of several, says of itself; {} of none, which is refused later."""
    first = checkpoint if isinstance(checkpoint, str) else [*checkpoint, ""][0]
    return read_description(first) if first else {}


def _work(config: Config, out: Path, target: str) -> Work:
    """What a checkpoint is for, by what it makes its network with."""
    if target.startswith("asa.models.sa_swin."):
        return _asymmetry(config, out)
    if config["healthy"] is not None:
        raise ValueError("healthy= is what asymmetry is compared with, of a run of method=sa_swin: leave it out")
    if target.startswith("asa.models.classifier."):
        return _classification(config, out)
    return _segmentation(config, out)


def _segmentation(config: Config, out: Path) -> Work:
    segmenter = Segmenter(
        config["checkpoint"],
        typed(PredictSettings, config["predict"]),
        mirror=config["mirror"],
        strip=config["strip"],
        progress=True,
    )

    def of_file(id: str, images: Mapping[str, str | None]) -> None:
        segmenter.segment_file(images, out / f"{id}.nii.gz", probabilities=_shares(config, out, id))

    def of_stored(id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        target = out / f"{id}.nii.gz"
        segmenter.segment_prepared(image, chain, like, target, probabilities=_shares(config, out, id))

    return Work(segmenter.preprocessor, of_file, of_stored, lambda: f"wrote label maps to {out}")


def _asymmetry(config: Config, out: Path) -> Work:
    checkpoint = _only(config, "an asymmetry score")
    scorer = AsymmetryScorer(
        checkpoint, typed(PredictSettings, config["predict"]), strip=config["strip"], healthy=config["healthy"]
    )
    rows: list[AsymmetryRow] = []

    def of_file(id: str, images: Mapping[str, str | None]) -> None:
        rows.append(scorer.score_file(id, images, out / f"{id}.nii.gz"))

    def of_stored(id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        scorer.preprocessor.check_stored(chain)
        rows.append(scorer.score_prepared(id, image, chain, like, out / f"{id}.nii.gz"))

    def finish() -> str:
        write_rows(out / TABLE, rows)
        return f"wrote {out / TABLE}, and asymmetry maps beside it"

    return Work(scorer.preprocessor, of_file, of_stored, finish)


def _classification(config: Config, out: Path) -> Work:
    checkpoint = _only(config, "a classification")
    predictor = ClassPredictor(checkpoint, typed(PredictSettings, config["predict"]), strip=config["strip"])
    rows: list[tuple[str, str, str]] = []
    shares: list[np.ndarray] = []

    def of_image(id: str, image: np.ndarray) -> None:
        shares.append(predictor.probabilities(image))
        rows.append((id, "", ""))

    def of_stored(id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        predictor.preprocessor.check_stored(chain)
        of_image(id, image)

    def finish() -> str:
        write_whole(out / "predictions.csv", predictions_csv(predictor.classes, rows, np.array(shares)).encode())
        return f"wrote {out / 'predictions.csv'}"

    return Work(
        predictor.preprocessor,
        lambda id, images: of_image(id, predictor.preprocessor.prepare(images)[0].image),
        of_stored,
        finish,
    )


def _only(config: Config, what: str) -> str:
    """The one checkpoint, of a network that has neither an ensemble nor class maps."""
    checkpoints = [config["checkpoint"]] if isinstance(config["checkpoint"], str) else list(config["checkpoint"])
    if len(checkpoints) != 1 or config["mirror"] or config["probabilities"]:
        raise ValueError(f"{what} comes from one checkpoint, without mirror and probabilities: leave these out")
    return str(checkpoints[0])


def _file_jobs(work: Work, source: Path, config: Config) -> list[Job]:
    """What to do for a scan, or each scan of a folder."""
    if config["part"] is not None:
        raise ValueError("part= chooses scans of a store; leave it out for files")
    return [
        (id, [path for path in images.values() if path is not None], partial(work.of_file, id, images))
        for id, images in _cases(source, Path(str(config["out"])), config["images"], work.preprocessor)
    ]


def _shares(config: Config, out: Path, id: str) -> Path | None:
    """Where a scan's class probabilities go: a folder of their own, so that `out` holds label maps only."""
    return out / "probabilities" / id if config["probabilities"] else None


def _cases(
    source: Path, out: Path, images: dict[str, str] | None, preprocessor: ScanPreprocessor
) -> list[tuple[str, Mapping[str, str | None]]]:
    """Id and channel files of a scan or a folder of scans; None for a channel that a scan lacks."""
    channels = preprocessor.channels
    if source.is_dir() and images:
        preprocessor.check_channels(images)
        return [(record["id"], record["images"]) for record in folder.records(source, images=images)]
    if len(channels) != 1:
        raise ValueError(
            f"this model takes the channels {', '.join(channels)}: give a folder and which file is which, like "
            f"images={{{', '.join(f'{channel}: *_{channel}.nii.gz' for channel in channels)}}}"
        )
    return [(id, {channels[0]: str(path)}) for id, path in _scans(source, out, channels[0]).items()]


def _scans(source: Path, out: Path, channel: str) -> dict[str, Path]:
    """A scan, or those of a folder and its subfolders, by id: the path inside the folder, with _ for /.

    What is hidden, or lies in an `out` inside the folder, is left out.
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


def _store_jobs(work: Work, source: Path, config: Config) -> list[Job]:
    """What to do for the scans of a store, or for one part of the run's split."""
    store = Store(source)
    if store.channels != work.preprocessor.channels or store.settings != work.preprocessor.data["prepare"]:
        raise ValueError(
            f"{store.path} was prepared in another way than what this model was trained on: predict the raw scans"
        )
    records = store.records
    if config["part"] is not None:
        records = select(store.records, _subjects(config["checkpoint"], config["part"]))

    def do(record: dict[str, Any]) -> None:
        like = read_image(record["sources"][store.channels[0]]["path"])
        work.of_stored(record["id"], store.image(record["id"]), record["chain"], like)

    return [
        (record["id"], [found["path"] for found in record["sources"].values()], partial(do, record))
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
        "Label maps of new scans from a trained network, or their asymmetry from a SA-Swin, in each scan's own space.",
        predict,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    sys.exit(main())
