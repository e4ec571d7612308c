"""asa-pretrain: learn an encoder from unlabelled scans."""

import sys
from pathlib import Path

from asa.cli.cohort import open_parts
from asa.cli.front import Config, run_command
from asa.cli.job import Job
from asa.data.leakage import training_digests
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.data.loading.health import HEALTHY, read_health
from asa.data.loading.loader import LoaderSettings
from asa.inference.preprocessing import learnt_from
from asa.tasks.feature_health import FeatureHealth, open_probe
from asa.tasks.validation import validate_pretraining
from asa.training.checkpoint import find_weights
from asa.training.loop import TrainSettings
from asa.training.optim import OptimSettings

SETTINGS = {"train": TrainSettings, "optim": OptimSettings, "loader": LoaderSettings}


def pretrain(config: Config) -> None:
    """Pretrain from a prepared store."""
    job = Job(config)
    data = config["data"]
    if data["probe"]:
        data["probe"] = str(Path(str(data["probe"])).resolve())  # the run goes on from any directory
    if data["health"] not in (None, HEALTHY):
        data["health"] = str(Path(str(data["health"])).resolve())
    store, split, parts = open_parts(data, Path(str(config["out"])))
    for node in (config["model"], config["method"]["model"]):
        node["in_channels"] = len(store.channels)
    method = job.method(len(parts["train"]), labelled=False)
    if method is None:
        return
    size = method.model.encoder.img_size
    augment = AugmentSettings(mirror_probability=data["mirror_probability"])
    health = read_health(data["health"], store.records)
    if health and not method.mirrored:
        raise ValueError("data.health is what method=sa_swin learns symmetry from: leave it out for this method")
    dataset = CropDataset(
        store,
        parts["train"],
        size,
        crop=data["placement"],
        augment=augment,
        mirrored=method.mirrored,
        attached=health,
        seed=job.settings.seed,
    )
    if method.mirrored and not health:
        print("note: data.health does not say who is healthy, and without it the symmetry loss counts nobody")
    # Without held-out subjects the error is watched on the training scans, and the log says so.
    watched = parts["validation"] or parts["train"][:4]
    fixed = CropDataset(store, watched, size, mirrored=method.mirrored, attached=health, seed=job.settings.seed)
    probe, names = open_probe(data["probe"], store.channels, size) if data["probe"] else (None, [])
    features = FeatureHealth(method, fixed, probe, names, job.optim.warmup)
    held_out = f"{len(parts['validation'])} held-out scans" if parts["validation"] else "training scans"
    known = {
        "channels": store.channels,
        "prepare": store.settings,
        **learnt_from([], parts["train"]),
        **training_digests(parts["train"]),
    }
    with job.run(split) as run:
        print(f"pretraining on {len(parts['train'])} scans, watched on {held_out}, in {run}")
        last = job.train(
            run, method, dataset, known, lambda step: features.watch(step, validate_pretraining(method, fixed))
        )
    name, mean = method.error
    if name in last:
        print(f"{name} {last[name]:.5f}, {last[name] / last[mean]:.2f} of the mean predictor's {last[mean]:.5f}")
    print(f"wrote {find_weights(run)}")


def main() -> int:
    """Entry point."""
    return run_command(
        "pretrain",
        "Pretrain an encoder on unlabelled scans: masked reconstruction (ASA, plain MAE), or symmetry (SA-Swin).",
        pretrain,
        settings=SETTINGS,
    )


if __name__ == "__main__":
    sys.exit(main())
