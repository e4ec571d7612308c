"""Restoration of 2-D images: denoising, synthesis and super-resolution.

Data: pairs of degraded and clean images, and label maps of their regions. Loss: the method's (focal region loss).
Validation: PSNR, SSIM and loss of whole images. A checkpoint holds the intensity window, and how subjects and regions
are found. Prediction: restored images as PNG. Evaluation: PSNR, SSIM and RMSE against clean images.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from asa.config import typed
from asa.data.datasets.record import subject_of
from asa.data.io.files import check_kept
from asa.data.io.parallel import each_tried
from asa.data.loading.loader import collate
from asa.data.splits import select
from asa.errors import reason_of
from asa.inference.preprocessing import check_finite
from asa.inference.segmentation import PredictSettings
from asa.methods.base import Batch
from asa.restoration.evaluation import evaluate_pictures, score_image
from asa.restoration.images import (
    checked_window,
    common_window,
    list_pictures,
    read_picture,
    stored_window,
    write_picture,
)
from asa.restoration.method import Restoration as RestorationMethod
from asa.restoration.method import restore_image
from asa.restoration.pairs import PairDataset, check_channels, find_pairs, regions_of
from asa.settings import Config
from asa.tasks.evaluation import check_no_split
from asa.tasks.prediction import only_checkpoint, subjects_of_part
from asa.tasks.volumes import absolute, choose_split, set_model
from asa.training.checkpoint import load_weights, read_model, read_weights
from asa.training.device import pick_device
from asa.training.distributed import map_over_ranks
from asa.training.loop import TrainSettings, Validate, Validation
from asa.training.plan import micro_batch

CROP = 128  # pixels, where it is not given
ENDS: tuple[Literal["low", "high"], ...] = ("low", "high")


class Restoration:
    """Restoration from pairs of images."""

    command = "finetune"
    units = ("crops", "pairs")
    cross_validates = False

    def __init__(self, config: Config) -> None:
        self.config, self.windows = config, typed(PredictSettings, config["predict"])
        if "upscale" not in config["model"]:
            raise ValueError(
                "method=restore takes a restoration network: model=rat_base, rat_small or rat_tiny, or restormer_..."
            )
        config["crop"] = CROP if config["crop"] is None else config["crop"]
        if not isinstance(config["crop"], int):
            raise ValueError(f"crop={config['crop']}: crops of images are square, give one number")
        data = self.data = config["data"]
        if data["root"] is None:
            raise ValueError("data.root has to be given: a folder with low/, high/ and regions/")
        absolute(data, "root")
        pairs = find_pairs(data["root"], **{key: data[key] for key in ("low", "high", "regions", "subject")})
        if data["window"] is None and (stored := common_window(pair[end] for pair in pairs for end in ENDS)):
            data["window"] = list(stored)
        self.split = choose_split(pairs, data, Path(str(config["out"])))
        channels = len(read_picture(pairs[0]["low"], data["window"]))
        set_model(config, in_channels=config["model"]["in_channels"] or channels)
        options = dict(channels=config["model"]["in_channels"], upscale=config["model"]["upscale"])
        options |= dict(window=data["window"], seed=config["train"]["seed"])
        self.parts = {
            name: PairDataset(chosen, config["crop"], **options)
            for name, subjects in self.split.items()
            if (chosen := select(pairs, subjects)) or name == "train"
        }
        for name, part in self.parts.items():  # what does not fit is found before anything is made
            part.check_sizes(crops=name == "train")
        # Real images, as operations depend on their regions.
        train, count = self.parts["train"], micro_batch(typed(TrainSettings, config["train"]))
        self.batch = collate([train[k % len(train), 0] for k in range(count)])

    def example(self, method: Any, count: int) -> Batch:
        return self.batch

    def load_init(self, method: Any) -> None:
        if (init := self.config["init"]) is not None:
            weights, _ = read_weights(init)
            load_weights(method.model, {name.removeprefix("model."): each for name, each in weights.items()}, init)

    def explain_init(self, method: Any) -> str:
        raise ValueError(
            "transfer=explain is not for method=restore: init= takes the weights of the same network whole"
        )

    def dataset(self, method: Any) -> PairDataset:
        return self.parts["train"]

    def validation(self, method: Any) -> Validate | None:
        pairs = self.parts.get("validation")
        return None if pairs is None else lambda step: validate_restoration(method, pairs, self.windows)

    def metrics(self, make: Any) -> list[str]:
        return ["psnr", "ssim", "input_psnr", "input_ssim", "loss"]

    def metadata(self) -> dict[str, Any]:
        return {key: self.data[key] for key in ("window", "regions", "subject")}

    def begin(self, run: Path) -> None:
        validation = len(self.parts.get("validation", ()))
        print(f"training on {len(self.parts['train'])} pairs, validated on {validation}, in {run}")

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        print("  ".join(f"{name} {metrics[name]:.4f}" for name in ("psnr", "ssim") if name in metrics))

    @staticmethod
    def predict(config: Config) -> None:
        """Restore an image or the images of a folder, as PNG in the training images' window."""
        checkpoint = only_checkpoint(config, "a restored image")
        settings, out = typed(PredictSettings, config["predict"]), Path(str(config["out"]))
        network, description = read_model(checkpoint, plugins=config["plugins"])
        model: Any = network.to(pick_device(settings.device))
        data = _checked_metadata(checkpoint, description["data"])
        data = data if model.regional else {**data, "regions": None}
        images, maps = _inputs(config, data)
        failures = 0

        def restore(job: tuple[str, Path]) -> None:
            id, path = job
            if (out / f"{id}.png").resolve() == path.resolve():
                raise ValueError(f"the result would replace the image itself: choose another out= than {out}")
            image = torch.from_numpy(read_picture(path, data["window"]))
            check_channels(str(path), image, model.in_channels)
            if maps is not None and id not in maps:
                raise ValueError(f"no label map of this image in {config['regions']}")
            labels = regions_of(None if maps is None else str(maps[id]), image)
            restored = restore_image(model, image, labels, settings, tile=config["tile"])
            check_finite(restored, "the network's output")
            window = data["window"] or stored_window(path)
            write_picture(out / f"{id}.png", restored.numpy(), window, make_folder=False)

        out.mkdir(parents=True, exist_ok=True)
        for (id, _), _, reason in each_tried(restore, list(images.items()), title="restore", unit="image"):
            check_kept(out)
            if reason:
                failures += 1
                tqdm.write(f"{id}: failed: {reason}")
        if failures:
            raise ValueError(f"{failures} images failed, listed above")
        print(f"wrote restored images to {out}" + (f": 0 to 1 is {data['window']}" if data["window"] else ""))

    @staticmethod
    def evaluate(config: Config) -> None:
        for key in ("predictions", "truth"):
            if config[key] is None:
                raise ValueError(f"{key}= has to be given: a folder of images")
        check_no_split(config)
        keys = ("predictions", "truth", "out", "inputs", "window", "allow_missing", "subject")
        table = evaluate_pictures(**{key: config[key] for key in keys})
        print(f"{table}\nwrote cases.csv, summary.json and report.html to {config['out']}")


def _checked_metadata(path: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata of a checkpoint, which may come from anybody; a ValueError names it if this is no restoration's."""
    try:
        if data["window"] is not None:
            checked_window(data["window"])
        re.compile(data["subject"] or "")
        if not isinstance(data["regions"], str | None):
            raise ValueError(f"regions={data['regions']}")
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{path}: its metadata of the training images is not usable ({reason_of(error)})") from None
    return data


def _inputs(config: Config, data: Mapping[str, Any]) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Images that are asked for, and label maps or None, by id."""
    source, subjects = Path(str(config["input"])), subjects_of_part(config)
    images = list_pictures(source if source.is_dir() else source.parent)
    if not source.is_dir():
        images = {id: path for id, path in images.items() if path.name == source.name}
    if subjects is not None:
        images = {id: path for id, path in images.items() if subject_of(id, data["subject"]) in subjects}
    if not images:
        raise ValueError(f"{source}: no image to restore (.png, .nii, .nii.gz, .dcm), or none of the part asked for")
    if data["regions"] is None:
        if config["regions"] is not None:
            raise ValueError(f"regions={config['regions']}: this network does not attend inside regions: leave it out")
        return images, None
    if config["regions"] is None:
        raise ValueError(f"this network attends inside regions: asa-regions input={source} out=..., and give regions=")
    return images, list_pictures(config["regions"])


def validate_restoration(method: RestorationMethod, dataset: PairDataset, settings: PredictSettings) -> Validation:
    """PSNR and SSIM of whole images, those of the bilinearly upscaled input, the loss, and a panel of the first image.

    Several processes divide the images between them; each returns the whole result, and the main one the panel.
    """
    panels: dict[str, np.ndarray] = {}

    def scores(index: int) -> dict[str, float]:
        views = dataset.whole(index)
        target = views["target"]
        upscaled = F.interpolate(views["image"][None], target.shape[1:], mode="bilinear")[0]
        restored = restore_image(method.model, views["image"], views["regions"], settings)
        if not panels:
            panel = torch.cat([upscaled, restored.clamp(0, 1), target], dim=2).expand(3, -1, -1)
            panels["input, prediction, target"] = (255 * panel).byte().permute(1, 2, 0).numpy()
        found, before = (score_image(image, target) for image in (restored, upscaled))
        fine = views["regions"].repeat_interleave(dataset.upscale, dim=0).repeat_interleave(dataset.upscale, dim=1)
        return {
            "psnr": found["psnr"],
            "ssim": found["ssim"],
            "input_psnr": before["psnr"],
            "input_ssim": before["ssim"],
            "loss": float(method.loss(restored[None], target[None], fine[None])),
        }

    rows = map_over_ranks(range(len(dataset)), scores)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}, panels
