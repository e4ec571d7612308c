"""asa-pretrain: learn an encoder from unlabelled scans."""

import sys
from pathlib import Path
from typing import Any

import torch

from asa.cli.cohort import open_parts
from asa.cli.front import Config, open_run, run_command
from asa.cli.planning import preflight, show_plan, wants_plan
from asa.config import build, typed
from asa.data.augment import AugmentSettings
from asa.data.identity import trained_on
from asa.data.loader import CropDataset, LoaderSettings
from asa.engine.checkpoint import find_weights
from asa.engine.health import FeatureHealth, open_probe
from asa.engine.optim import OptimSettings
from asa.engine.train import TrainSettings, check_settings, train
from asa.engine.validate import validate_reconstruction

SETTINGS = {"train": TrainSettings, "optim": OptimSettings, "loader": LoaderSettings}


def pretrain(config: Config) -> None:
    """Pretrain from a prepared store."""
    settings, optim = typed(TrainSettings, config["train"]), typed(OptimSettings, config["optim"])
    loader = typed(LoaderSettings, config["loader"])
    planning = wants_plan(config)
    if not planning:  # a plan may be for another machine
        check_settings(settings, optim)
    data = config["data"]
    data["store"] = str(Path(str(data["store"])).resolve())  # the run goes on from any directory
    if data["probe"]:
        data["probe"] = str(Path(str(data["probe"])).resolve())
    store, split, parts = open_parts(data, Path(str(config["out"])))
    for node in (config["model"], config["method"]["model"]):
        node["in_channels"] = len(store.channels)

    def make() -> Any:
        return build(config["method"], plugins=config["plugins"])

    if planning:
        show_plan(config, make, len(parts["train"]), settings, optim, labelled=False)
        return
    preflight(make, settings, optim, labelled=False)
    torch.manual_seed(settings.seed)
    method = make()
    size = method.model.encoder.img_size
    augment = AugmentSettings(mirror_probability=data["mirror_probability"])
    dataset = CropDataset(store, parts["train"], size, crop=data["placement"], augment=augment, seed=settings.seed)
    # Without held-out subjects the error is watched on the training scans, and the log says so.
    watched = parts["validation"] or parts["train"][:4]
    fixed = CropDataset(store, watched, size, crop="centre", seed=settings.seed)
    probe, names = open_probe(data["probe"], store.channels, size) if data["probe"] else (None, [])
    health = FeatureHealth(method.model.encoder, fixed, probe, names, optim.warmup)
    held_out = f"{len(parts['validation'])} held-out scans" if parts["validation"] else "training scans"
    description: dict[str, Any] = {
        "model": config["model"],
        "data": {"channels": store.channels, "prepare": store.settings, **trained_on(parts["train"])},
    }
    with open_run(config, split, settings) as run:
        print(f"pretraining on {len(parts['train'])} scans, watched on {held_out}, in {run}")
        last = train(
            method,
            dataset,
            run,
            settings=settings,
            optim=optim,
            loader=loader,
            description=description,
            validate=lambda step: health.watch(step, validate_reconstruction(method, fixed)),
        )
    if "masked_mse" in last:
        ratio = last["masked_mse"] / last["mean_predictor_mse"]
        mean = last["mean_predictor_mse"]
        print(f"masked error {last['masked_mse']:.5f}, {ratio:.2f} of the mean predictor's {mean:.5f}")
    print(f"wrote {find_weights(run)}")


def main() -> int:
    """Entry point."""
    return run_command(
        "pretrain",
        "Pretrain an encoder on unlabelled scans by masked reconstruction (ASA, or a plain MAE).",
        pretrain,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    sys.exit(main())
