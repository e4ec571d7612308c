"""Restoration in the commands: what asa-finetune, asa-predict and asa-evaluate do for it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from asa.cli.cohort import choose_split
from asa.cli.front import Config
from asa.cli.job import Job
from asa.config import typed
from asa.data.datasets.folder import subject_of
from asa.data.io.images2d import list_pictures, read_picture, write_picture
from asa.data.loading.loader import collate
from asa.data.restoration.pairs import Pair, PairDataset, check_channels, find_pairs, regions_of
from asa.data.splits import select
from asa.inference.restoration import restore_image
from asa.inference.segmentation import PredictSettings
from asa.models.rat import RegionAttentionTransformer
from asa.tasks.image_evaluation import evaluate_pictures
from asa.tasks.validation import validate_restoration
from asa.training.checkpoint import find_weights, load_weights, read_model, read_weights
from asa.training.device import pick_device
from asa.training.plan import micro_batch

METHOD = "asa.methods.restore.Restoration"
TASK = "restoration"  # in a checkpoint's description, and the policy of asa-evaluate


def finetune(config: Config) -> None:
    """Train on pairs of images.

    Raises:
        ValueError: pairs that do not fit each other or the network, or settings that mean nothing here.
    """
    job, predict = Job(config), typed(PredictSettings, config["predict"])
    if config["transfer"] != "load":
        raise ValueError(
            "transfer=explain is not for method=restore: init= takes the weights of the same network whole"
        )
    if "upscale" not in config["model"]:
        raise ValueError("method=restore takes a region attention transformer: model=rat_base, rat_small or rat_tiny")
    if not isinstance(config["crop"], int):
        raise ValueError(f"crop={config['crop']}: crops of images are square, give one number")
    data = config["data"]
    if data["root"] is None:
        raise ValueError("data.root has to be given: a folder with low/, high/ and regions/")
    data["root"] = str(Path(str(data["root"])).resolve())  # the run goes on from any directory
    pairs = find_pairs(data["root"], **{key: data[key] for key in ("low", "high", "regions", "subject")})
    split = choose_split(pairs, data, Path(str(config["out"])))
    channels = len(read_picture(pairs[0]["low"], data["window"]))
    for node in (config["model"], config["method"]["model"]):
        node["in_channels"] = node["in_channels"] or channels
    parts = _datasets(config, pairs, split)
    # Images that do not fit are found before the run folder is made.
    example = collate([parts["train"][k % len(parts["train"]), 0] for k in range(micro_batch(job.settings))])
    method = job.method(len(parts["train"]), labelled=False, example=example, names=("crops", "pairs"))
    if method is None:
        return
    if config["init"] is not None:
        _start_from(config["init"], method.model)
    watched = parts.get("validation")
    known = {"task": TASK, **{key: data[key] for key in ("window", "regions", "subject")}}
    with job.run(split) as run:
        print(f"training on {len(parts['train'])} pairs, watched on {len(watched or ())}, in {run}")
        validate = None if watched is None else lambda step: validate_restoration(method, watched, predict)
        last = job.train(run, method, parts["train"], known, validate)
    print("  ".join(f"{name} {last[name]:.4f}" for name in ("psnr", "ssim") if name in last))
    print(f"wrote {find_weights(run)}")


def _datasets(config: Config, pairs: list[Pair], split: Mapping[str, Sequence[str]]) -> dict[str, PairDataset]:
    """The pairs of each part of the split that has some, as the network takes them."""
    return {
        name: PairDataset(
            chosen,
            config["crop"],
            channels=config["model"]["in_channels"],
            upscale=config["model"]["upscale"],
            window=config["data"]["window"],
            seed=config["train"]["seed"],
        )
        for name, subjects in split.items()
        if (chosen := select(pairs, subjects)) or name == "train"
    }


def _start_from(init: str, model: RegionAttentionTransformer) -> None:
    """Take the weights of an earlier run of the same network."""
    weights, _ = read_weights(init)
    load_weights(model, {name.removeprefix("model."): tensor for name, tensor in weights.items()}, init)


def predict(config: Config, subjects: Collection[str] | None) -> None:
    """Restore an image or the images of a folder, as PNG in the training images' window.

    Args:
        config: the command's.
        subjects: whose images; None: everybody's.

    Raises:
        ValueError: images failed; they are listed before, and the others are done.
    """
    if isinstance(config["checkpoint"], list) or config["mirror"] or config["probabilities"]:
        raise ValueError("restoration takes one checkpoint, and neither mirror=true nor probabilities=true")
    settings = typed(PredictSettings, config["predict"])
    model, description = read_model(config["checkpoint"])
    assert isinstance(model, RegionAttentionTransformer)
    model.to(pick_device(settings.device))
    data, out = description["data"], Path(str(config["out"]))
    pictures, maps = _inputs(config, data, subjects)
    failures = 0
    for id, path in tqdm(pictures.items(), desc="restore", unit="image"):
        try:
            if (out / f"{id}.png").resolve() == path.resolve():
                raise ValueError(f"the result would replace the image itself: choose another out= than {out}")
            image = torch.from_numpy(read_picture(path, data["window"]))
            check_channels(str(path), image, model.in_channels)
            if maps is not None and id not in maps:
                raise ValueError(f"no label map of this image in {config['regions']}")
            labels = regions_of(None if maps is None else str(maps[id]), image)
            restored = restore_image(model, image, labels, settings, tile=config["tile"]).numpy()
            write_picture(out / f"{id}.png", restored, data["window"])
        except (ValueError, OSError) as error:
            failures += 1
            tqdm.write(f"{id}: failed: {error}")
    if failures:
        raise ValueError(f"{failures} images failed, listed above")
    print(f"wrote restored images to {out}" + (f": 0 to 1 is {data['window']}" if data["window"] else ""))


def _inputs(
    config: Config, data: Config, subjects: Collection[str] | None
) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Images of some subjects, and label maps or None, by id."""
    source = Path(str(config["input"]))
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    pictures = list_pictures(source if source.is_dir() else source.parent)
    if not source.is_dir():
        pictures = {id: path for id, path in pictures.items() if path.name == source.name}
    if subjects is not None:
        pictures = {id: path for id, path in pictures.items() if subject_of(id, data["subject"]) in subjects}
    if not pictures:
        raise ValueError(f"{source}: no image to restore (.png, .nii, .nii.gz, .dcm), or none of the part asked for")
    if data["regions"] is None:
        return pictures, None
    if config["regions"] is None:
        raise ValueError(f"this network attends inside regions: asa-regions input={source} out=..., and give regions=")
    return pictures, list_pictures(config["regions"])


def evaluate(config: Config) -> None:
    """Score restored images; print the table, write the results."""
    for key in ("predictions", "truth"):
        if config[key] is None:
            raise ValueError(f"{key}= has to be given: a folder of images")
    table = evaluate_pictures(
        config["predictions"],
        config["truth"],
        config["out"],
        inputs=config["inputs"],
        window=config["window"],
        allow_missing=config["allow_missing"],
    )
    print(f"{table}\nwrote cases.csv, summary.json and report.html to {config['out']}")
