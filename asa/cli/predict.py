"""asa-predict: label maps of new scans, in their own space."""

import sys
from pathlib import Path

from tqdm import tqdm

from asa.cli.front import Config, run_command
from asa.config import typed
from asa.data.cohort import read_split, select
from asa.data.datasets import folder
from asa.data.store import MANIFEST, Store
from asa.data.volume import read_image
from asa.engine.predict import PredictSettings, Segmenter

SETTINGS = {"predict": PredictSettings}
ENDINGS = (".nii.gz", ".nii")


def predict(config: Config) -> None:
    """Predict a file, a folder or a store."""
    segmenter = Segmenter(config["checkpoint"], typed(PredictSettings, config["predict"]))
    source, out = Path(config["input"]).expanduser(), Path(config["out"]).expanduser()
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if (source / MANIFEST).exists():
        _predict_store(segmenter, Store(source), config, out)
    else:
        for id, images in tqdm(_cases(source, config["images"], segmenter.channels), desc="predict", unit="scan"):
            segmenter.segment_file(images, out / f"{id}.nii.gz")
    print(f"wrote label maps to {out}")


def _cases(source: Path, images: dict[str, str] | None, channels: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Id and channel files of a scan or a folder of scans."""
    if source.is_dir() and images:
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


def _predict_store(segmenter: Segmenter, store: Store, config: Config, out: Path) -> None:
    """Predict the scans of a store, or one part of the run's split."""
    if store.channels != segmenter.channels or store.settings != segmenter.description["data"]["prepare"]:
        raise ValueError(
            f"{store.path} was prepared in another way than what this model was trained on: predict the raw scans"
        )
    records = store.records
    if config["part"] is not None:
        split = read_split(Path(config["checkpoint"]) / "split.json")
        if config["part"] not in split:
            raise ValueError(f"part is one of {', '.join(split)}, not {config['part']!r}")
        records = select(store.records, split[config["part"]])
        if not records:
            raise ValueError(f"the run's split has no subjects under {config['part']}")
    for record in tqdm(records, desc="predict", unit="scan"):
        like = read_image(record["sources"][store.channels[0]]["path"])
        segmenter.segment_prepared(store.image(record["id"]), record["chain"], like, out / f"{record['id']}.nii.gz")


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
