"""Compare the memory that `plan=only` reports with the memory that a run takes: python -m scripts.plan_check [NAME ...]

Each row trains for a few steps on synthetic volumes in its own process. It is started from this one, which does not
import torch, as the peak memory of a child process starts at its parent's. The measured memory is the peak of the
process minus its memory after a first run of a tiny network (Python, libraries). By default the heap returns freed
memory (MALLOC_MMAP_THRESHOLD_), so that only memory in use is measured; `--heap` measures as in a real run, where
glibc's heap takes more. Fails if plan and peak differ by more than 15 % (not with --heap).
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.15
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A network and its training settings."""

    network: str
    size: tuple[int, ...]
    batch: int = 1
    train: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False


ROWS = {
    "tiny": Row("asa_tiny", (64, 64, 64), batch=8),
    "unet_tiny": Row("unet_tiny", (96, 96, 96)),
    "small": Row("asa_small", (128, 128, 128), batch=2),
    "small_bf16": Row("asa_small", (128, 128, 128), batch=2, train={"precision": "bf16"}),
    "small_accumulate": Row("asa_small", (128, 128, 128), batch=4, train={"accumulate": 2}),
    "unet_small": Row("unet_small", (96, 96, 96)),
    "base": Row("asa_base", (128, 128, 128)),
    "base_checkpointing": Row("asa_base", (128, 128, 128), checkpointing=True),
    "unet_base": Row("unet_base", (96, 96, 96)),
    "unet_base_checkpointing": Row("unet_base", (96, 96, 96), checkpointing=True),
    "rat_tiny": Row("rat_tiny", (128, 128), batch=8),
    "rat_small": Row("rat_small", (64, 64), batch=8),
    "rat_base": Row("rat_base", (64, 64), batch=2),
}
CHANNELS = {"asa": 1, "unet": 4}
FIRST = {"asa": (64, 32, 32), "unet": (64, 32, 32), "rat": (32, 32)}  # sizes of the first run
REGIONS = 40  # per image, for rat


def make(row: Row) -> Any:
    """The row's method."""
    from asa.methods.pretrain import MaskedPretraining
    from asa.methods.segment import Segmentation
    from asa.models import masked_autoencoder as asa
    from asa.models import unet
    from asa.restoration import rat
    from asa.restoration.method import Restoration

    kind = row.network.partition("_")[0]
    if kind == "rat":
        return Restoration(model=getattr(rat, row.network)())
    sizes = dict(img_size=row.size, in_channels=CHANNELS[kind], checkpointing=row.checkpointing)
    if kind == "asa":
        return MaskedPretraining(model=getattr(asa, row.network)(**sizes))
    return Segmentation(model=getattr(unet, row.network)(out_channels=4, **sizes))


def run(row: Row, folder: Path) -> None:
    """Train for a few steps as the commands do."""
    from asa.data.loading.loader import LoaderSettings
    from asa.training.loop import TrainSettings, train
    from asa.training.optim import OptimSettings

    (folder / "run").mkdir(parents=True)
    settings = TrainSettings(steps=3, batch_size=row.batch, device="cpu", log_every=1, **row.train)
    optim, loader = OptimSettings(), LoaderSettings(workers=0)
    dataset = samples(row, folder)
    train(make(row), dataset, folder / "run", settings=settings, optim=optim, loader=loader, description={"model": {}})


def samples(row: Row, folder: Path) -> Any:
    """Synthetic volumes, or image pairs with regions of unequal sizes, in a folder."""
    import numpy as np

    from asa.data.loading.crops import CropDataset
    from asa.restoration.images import write_picture, write_regions
    from asa.restoration.pairs import PairDataset, find_pairs
    from scripts.benchmark.crops import RandomVolumes

    kind = row.network.partition("_")[0]
    if kind != "rat":
        source = RandomVolumes.write(folder, row.size, channels=CHANNELS[kind], count=2)
        return CropDataset(source, source.records, row.size, labelled=kind == "unet")
    generator = np.random.default_rng(0)
    for k in range(2):
        pixels = np.arange(row.size[0] * row.size[1]) / (row.size[0] * row.size[1])
        write_regions(folder / "regions" / f"{k}.png", (REGIONS * pixels**2).astype(int).reshape(row.size))
        for name in ("low", "high"):
            write_picture(folder / name / f"{k}.png", generator.random((1, *row.size)))
    return PairDataset(find_pairs(folder), row.size[0])


def measured(name: str) -> int:
    """Bytes that a row takes in addition to Python and libraries."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as scratch:
        kind = row.network.partition("_")[0]
        run(Row(f"{kind}_tiny", FIRST[kind], checkpointing=row.checkpointing), Path(scratch) / "first")
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        run(row, Path(scratch) / "second")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def planned(name: str) -> int:
    """Bytes that the plan reports for a row."""
    from asa.data.loading.loader import collate
    from asa.training.loop import TrainSettings
    from asa.training.optim import OptimSettings
    from asa.training.plan import make_plan, micro_batch, volume_batch

    row = ROWS[name]
    settings = TrainSettings(steps=3, batch_size=row.batch, **{"precision": "fp32", **row.train})
    if row.network.startswith("rat"):
        with tempfile.TemporaryDirectory() as scratch:
            dataset = samples(row, Path(scratch))
            batch: Any = collate([dataset[k % 2, 0] for k in range(row.batch)])
    else:
        batch = partial(volume_batch, count=micro_batch(settings), label=row.network.startswith("unet"))
    plan = make_plan(lambda: make(row), batch, settings=settings, optim=OptimSettings())
    return next(memory.peak for place, memory in plan.memory.items() if place.startswith("CPU"))


def main() -> int:
    """Print a table; 1 if the memory of a row differs."""
    parser = argparse.ArgumentParser(prog="python -m scripts.plan_check", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--heap", action="store_true", help="measure with the heap of a real run")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.names) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}")
    if options.one:
        (name,) = options.names
        if not options.heap:  # training keeps freed memory
            from asa.training import loop as train

            train.keep_freed_memory = lambda: False
        print(json.dumps([measured(name), planned(name)]))
        return 0
    # Above the smallest tensors; set explicitly, as the first large tensor that is freed would raise it otherwise.
    environment = {**os.environ} if options.heap else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    wrong = []
    print(f"{'row':<26}{'planned':>12}{'measured':>12}{'planned / measured':>20}")
    for name in options.names or ROWS:
        command = [sys.executable, "-m", "scripts.plan_check", "--one", name, *(["--heap"] if options.heap else [])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 1
        found, expected = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<26}{expected / MIB:>8.0f} MiB{found / MIB:>8.0f} MiB{expected / found:>20.2f}", flush=True)
        wrong += [name] * (abs(expected / found - 1) > TOLERANCE and not options.heap)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
