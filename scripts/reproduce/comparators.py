"""Published networks beside ASA's U-Net, all from scratch: python -m scripts.reproduce.comparators DATA OUT

Fine-tunes each network for CSF, GM and WM of real brains with the same crops, samples and steps, and scores the same
held-out brains. Writes OUT/comparators.md: parameters, Dice, the time of a step relative to that of the first network,
measured by steps in turn in one process and thread, and the memory that a step is planned to need (plan=only). Finished
runs are not repeated, and interrupted ones are resumed.

DATA: skull-stripped OASIS-1 brains, ID_SS.nii.gz, with FAST tissue labels, ID_tissues.nii.gz (1 CSF, 2 GM, 3 WM); the R
package malf.templates carries such a set.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.config import build, compose, typed
from asa.data.loading.loader import collate
from asa.data.splits import write_split
from asa.settings import OptimSettings, TrainSettings
from asa.tasks.segmentation import Segmentation
from asa.training.optim import make_optimizer
from scripts.benchmark.clock import step_seconds
from scripts.benchmark.memory import step_memory
from scripts.reproduce.commands import asa, brain_dice, declared, interval, parser_of, quoted, score

TISSUES = {1: "csf", 2: "gm", 3: "wm"}
NETWORKS = (
    "unet_tiny", "unetr_tiny", "swin_unetr_tiny", "nnformer_tiny", "transbts_tiny", "resenc_tiny", "primus_tiny",
)  # fmt: skip
TIMED = 5  # steps of each network
CPU = ("train.device=cpu", "train.precision=fp32", "loader.workers=0")


def prepare(data: Path, out: Path, spacing: float, tested: int) -> None:
    """A store of all brains, and its split: the last ones are tested, all others train.

    Raises:
        FileNotFoundError: fewer brains than are tested.
    """
    ids = sorted(path.name.removesuffix("_tissues.nii.gz") for path in data.glob("*_tissues.nii.gz"))
    if len(ids) <= tested:
        raise FileNotFoundError(f"{data}: holds {len(ids)} ID_tissues.nii.gz, of which {tested} are to be tested")
    labels = declared(TISSUES)
    files = ("data=folder", "data.images={t1: *_SS.nii.gz}", "data.label=*_tissues.nii.gz", labels)
    paths = {"data.root": data.resolve(), "out": out / "store"}
    asa("prepare", *files, f"prepare.spacing={spacing}", *quoted(**paths), log=out / "logs" / "prepare.txt")
    write_split(out / "split.json", {"train": ids[:-tested], "validation": [], "test": ids[-tested:]})


def settings(out: Path, network: str, options: argparse.Namespace) -> list[str]:
    """The settings of a fine-tuning."""
    crop = ",".join(map(str, options.crop))
    paths = {"data.store": out / "store", "data.split_file": out / "split.json", "out": out / "finetuned" / network}
    return [
        f"model={network}", f"crop=[{crop}]", f"train.steps={options.steps}", "train.batch_size=1", *CPU,
        f"optim.lr={options.rate}", f"optim.warmup={options.steps // 10}", "optim.weight_decay=0.01", *quoted(**paths),
    ]  # fmt: skip


def finetune(out: Path, network: str, options: argparse.Namespace) -> None:
    """Fine-tune, predict the test brains, and score them."""
    log = out / "logs" / f"{network}.txt"
    asa("finetune", *settings(out, network, options), log=log, threads=1)
    score(out, network, out / "store", log=log, threads=1)
    print(f"{network}: {interval(mean_dice(out, network))}", flush=True)


def mean_dice(out: Path, network: str) -> np.ndarray:
    """Mean Dice of the tissues of each test brain."""
    return brain_dice(out, network, TISSUES.values()).mean(axis=1)


def costs(out: Path, options: argparse.Namespace) -> dict[str, tuple[int, int, float]]:
    """Parameters, traced bytes of a training step and its median seconds on one thread, all networks in turn."""
    torch.set_num_threads(1)
    sizes, ready = {}, {}
    for network in options.networks:
        config = compose("finetune", settings(out, network, options))
        train, optim = typed(TrainSettings, config["train"]), typed(OptimSettings, config["optim"])
        task = Segmentation(config)
        make = partial(build, config["method"])
        memory = step_memory(make, partial(task.example, count=1), settings=train, optim=optim)
        method: Any = make()
        sizes[network] = (sum(weight.numel() for weight in method.parameters()), memory)
        crops = task.dataset(method)
        ready[network] = (method, make_optimizer(method, optim), collate([crops[0, 0]]))
    return {network: (*sizes[network], seconds) for network, seconds in step_seconds(ready, TIMED).items()}


def report(out: Path, networks: Sequence[str], cost: dict[str, tuple[int, int, float]]) -> str:
    """The table."""
    lines = [
        f"| `model=` | million parameters | Dice of {', '.join(TISSUES.values())} (95 % interval) | "
        f"time of a step, of `{networks[0]}` | memory of a step, GiB |",
        "|---|---:|---|---:|---:|",
    ]
    for network in networks:
        parameters, memory, seconds = cost[network]
        lines.append(
            f"| `{network}` | {parameters / 1e6:.2f} | {interval(mean_dice(out, network))} | "
            f"{seconds / cost[networks[0]][2]:.1f} | {memory / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not done, and write the table."""
    parser = parser_of(__doc__, "data", "out")
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), help="the first is what the others are timed by"
    )
    parser.add_argument("--spacing", type=float, default=2.0, help="of the prepared brains, in mm")
    parser.add_argument("--crop", nargs=3, type=int, default=[64, 96, 64], help="voxels, divisible by 32")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", default="1e-3", help="learning rate of all networks")
    parser.add_argument("--tested", type=int, default=6, help="brains, the last ones")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args()
    out = options.out.resolve()
    prepare(options.data, out, options.spacing, options.tested)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda network: finetune(out, network, options), options.networks))
    text = report(out, options.networks, costs(out, options))
    (out / "comparators.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
