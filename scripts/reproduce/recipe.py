"""What makes pretraining cheaper at equal quality: python -m scripts.reproduce.recipe DATA OUT

Pretrains the same encoder in several ways ("arms") on 9 OASIS-1 brains, with the same number of samples, and compares
what a linear probe reads from it on 6 others, against operations and seconds; the arms of `--finetune` also by the
Dice of the 6 after a fine-tuning on 1 and 3 of the 9 (experiment=structures_light). Writes OUT/recipe.md, the tables
of docs/evidence_details.md, and OUT/recipe.png. Finished runs are not repeated.

DATA: see scripts/reproduce/structures.py.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from asa.config import build, compose, typed
from asa.data.loading.loader import collate
from asa.data.splits import write_split
from asa.settings import OptimSettings, TrainSettings
from asa.tasks.pretraining import Pretraining
from asa.training.optim import make_optimizer
from asa.training.plan import make_plan
from scripts.benchmark.clock import step_seconds
from scripts.reproduce.commands import asa, brain_dice, interval, parser_of, quoted, validations
from scripts.reproduce.few_labels import DEEP, STORE, finetune, gains
from scripts.reproduce.structures import STRUCTURES, make_store, subjects

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HELD_OUT = 6  # brains, the last ones
# Four blocks of the encoder and three of the decoder: nearly the paper's ratio of 12 and 8.
BASE = (
    "model=asa_tiny", "+model.window=32", "model.decoder_depth=3", "crop=[64,64,160]", "data.placement=random",
    "data.mirror_probability=0.5", "train.steps=300", "train.batch_size=16", "train.validate_every=60",
    "train.save_every=100", "train.precision=fp32", "train.device=cpu", "loader.workers=0", "optim.lr=1.0e-3",
    "optim.reference_batch=null", "optim.warmup=30",
)  # fmt: skip
THREE = ("method.decode=0.25", "method.air=drop", "model.decoder_depth=1")
# The paper's depths, as experiment=asa_paper and experiment=asa_fast.
DEEP_SLOW = (*DEEP, "model.decoder_depth=8")
DEEP_FAST = (*DEEP, "method.air=drop", "model.decoder_depth=1")
# An encoding of three axes, and four times as many steps, with as many samples.
AXES = ("model.position=mirror_sincos",)
STEPS = ("train.batch_size=4", "train.steps=1200", "train.validate_every=240", "optim.warmup=120")
# Settings of each arm; each is ASA as published but for these.
ARMS: dict[str, tuple[str, ...]] = {
    "paper": (),
    "decode": ("method.decode=0.25",),
    "air": ("method.air=drop",),
    "decoder": ("model.decoder_depth=1",),
    "masks": ("method.masks=2", "train.batch_size=8"),
    "normalise": ("method.normalise=true",),
    "equal": ("method.importance=null",),
    # As experiment=asa_fast, with a narrower decoder too: about the share of one block in the paper's eight.
    "fast": ("method.air=drop", "model.decoder_depth=1", "model.decoder_dim=64"),
    "deep_slow": DEEP_SLOW,
    "deep": DEEP_FAST,
    "deep_slow_steps": (*DEEP_SLOW, *AXES, *STEPS),
    "deep_steps": (*DEEP_FAST, *AXES, *STEPS),
    "three": THREE,
    "three_normalise": (*THREE, "method.normalise=true"),
    "three_axes": (*THREE, *AXES),
    "three_axes_steps": (*THREE, *AXES, *STEPS),
}
SAMPLES = 4800  # of a run: steps times crops times masks


def prepare(data: Path, out: Path) -> None:
    """Two stores: all brains, and the held-out ones for the probe; and the split."""
    ids = subjects(data)
    held_out = ids[-HELD_OUT:]
    make_store(data, out, "brains", ids)
    make_store(data, out, "held_out", held_out)
    train = ids[:-HELD_OUT]
    write_split(out / "split.json", {"train": train, "validation": [], "test": held_out})
    write_split(out / "finetune.json", {"train": train[:-1], "validation": train[-1:], "test": held_out})


def pretrain_settings(out: Path, arm: str, seed: int) -> list[str]:
    """The settings of a pretraining run."""
    names = {"data.store": STORE, "data.labelled_store": "store_held_out", "data.split_file": "split.json"}
    paths = {key: out / name for key, name in names.items()} | {"out": run_folder(out, arm, seed)}
    return [*BASE, *ARMS[arm], f"train.seed={seed}", *quoted(**paths)]


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where one arm is pretrained with one seed."""
    return out / "pretrained" / f"{arm}_{seed}"


def pretrain(out: Path, arm: str, seed: int) -> None:
    """Pretrain one arm with one seed."""
    folder = run_folder(out, arm, seed)
    asa("pretrain", *pretrain_settings(out, arm, seed), log=out / "logs" / f"pretrain_{folder.name}.txt", threads=1)
    last = validations(folder)[-1]
    print(f"pretrained {folder.name}: {last['linear_dice']:.4f}, first {last['linear_dice_first']:.4f}", flush=True)


def finetuned_name(arm: str, labelled: int, seed: int) -> str:
    """Name of the folders of a fine-tuning."""
    return f"{arm}_{labelled}_{seed}"


def finetune_arm(out: Path, arm: str, labelled: int, seed: int, steps: int) -> None:
    """Fine-tune the encoder of one arm and seed, and score it on the held-out brains."""
    encoding = [setting for setting in ("model.position=mirror", *ARMS[arm]) if setting.startswith("model.position=")]
    depth = [setting for setting in ARMS[arm] if setting in DEEP]
    published = ("model.mirror_patches=false", "model.order=raster", "model.bias=sequence", "model.window=32")
    settings = (*published, encoding[-1], *depth, f"data.labelled={labelled}", f"train.seed={seed}")
    name, init = finetuned_name(arm, labelled, seed), run_folder(out, arm, seed)
    finetune(out, name, "finetune.json", steps, *settings, init=init)


def cost(out: Path, arms: Sequence[str]) -> dict[str, tuple[float, float]]:
    """GFLOP and seconds of a sample in each arm's training step; seconds are medians of alternating steps."""
    torch.set_num_threads(1)
    steps, operations, counts = {}, {}, {}
    for arm in arms:
        config = compose("pretrain", pretrain_settings(out, arm, 0))
        settings, optim = typed(TrainSettings, config["train"]), typed(OptimSettings, config["optim"])
        task = Pretraining(config)
        counts[arm] = settings.batch_size * config["method"]["masks"]
        make = partial(build, config["method"])
        plan = make_plan(make, partial(task.example, count=settings.batch_size), settings=settings, optim=optim)
        operations[arm] = plan.step / counts[arm] / 1e9
        method: Any = make()
        crops = task.dataset(method)
        batch = collate([crops[k % len(crops), k] for k in range(settings.batch_size)])
        steps[arm] = (method, make_optimizer(method, optim), batch)
    return {arm: (operations[arm], seconds / counts[arm]) for arm, seconds in step_seconds(steps, 5).items()}


def report(out: Path, arms: Sequence[str], seeds: Sequence[int], tuned: Sequence[str], labelled: Sequence[int]) -> str:
    """The tables of all runs; draws the figure beside them."""
    costs = cost(out, arms)
    probes = {arm: {seed: validations(run_folder(out, arm, seed)) for seed in seeds} for arm in arms}
    first = arms[0]
    base = costs[first]
    lines = [
        f"| arm | GFLOP a sample | of `{first}` | seconds, of `{first}` | probe | less `{first}` | "
        "less first weights |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in arms:
        ends = [probes[arm][seed][-1] for seed in seeds]
        last = [line["linear_dice"] for line in ends]
        paired = [value - probes[first][seed][-1]["linear_dice"] for value, seed in zip(last, seeds, strict=True)]
        gained = [line["linear_dice"] - line["linear_dice_first"] for line in ends]
        operations, seconds = costs[arm]
        lines.append(
            f"| `{arm}` | {operations:.2f} | {operations / base[0]:.2f} | {seconds / base[1]:.2f} | "
            f"{interval(last)} | {interval(paired) if arm != first else ''} | {interval(gained)} |"
        )
    dice = {
        (count, arm): np.stack(
            [brain_dice(out, finetuned_name(arm, count, seed), STRUCTURES).mean(axis=1) for seed in seeds]
        )
        for count in labelled
        for arm in tuned
    }
    if dice:
        lines += ["", *gains(dice, seeds)]
    draw(out / "recipe.png", probes, costs, dice)
    return "\n".join(lines) + "\n"


def draw(
    file: Path,
    probes: dict[str, dict[int, list[dict[str, Any]]]],
    costs: dict[str, tuple[float, float]],
    dice: dict[tuple[int, str], np.ndarray],
) -> None:
    """Against operations and against seconds: the probe from the first weights on, and the Dice after a fine-tuning.

    Args:
        file: the picture.
        probes: validations of each arm and seed; the mean over seeds is drawn.
        costs: operations and seconds of a sample.
        dice: of each number of labelled brains and arm, `(seeds, brains)`; the mean and each seed's are drawn.
    """
    rows = 2 if dice else 1
    figure, grid = plt.subplots(
        rows, 2, figsize=(10, 4 * rows), sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    colours = {arm: f"C{k}" for k, arm in enumerate(probes)}
    markers = dict(zip(sorted({count for count, _ in dice}), itertools.cycle("os^D"), strict=False))
    for arm, runs in probes.items():
        steps = np.array([0, *(line["step"] for line in next(iter(runs.values())))])
        samples = SAMPLES * steps / steps[-1]
        curves = [
            [logged[0]["linear_dice_first"], *(line["linear_dice"] for line in logged)] for logged in runs.values()
        ]
        mean = np.mean(curves, axis=0)
        for axis, unit, scale in zip(grid[0], costs[arm], (1e-3, 1.0), strict=True):
            axis.plot(samples * unit * scale, mean, marker="o", markersize=3, label=arm, color=colours[arm])
    for (count, arm), values in dice.items():
        marker, seeds = markers[count], values.mean(axis=1)
        for axis, unit, scale in zip(grid[1], costs[arm], (1e-3, 1.0), strict=True):
            x, colour = SAMPLES * unit * scale, colours[arm]
            axis.plot([x] * len(seeds), seeds, linestyle="none", marker=marker, markersize=3, color=colour, alpha=0.5)
            axis.plot(x, seeds.mean(), linestyle="none", marker=marker, color=colour, label=f"{arm}, {count} labelled")
    for row, label in zip(grid, ("probe, soft Dice", "Dice after fine-tuning"), strict=False):
        row[0].set(ylabel=label)
        row[1].legend(fontsize=8)
    grid[-1, 0].set(xlabel="TFLOP")
    grid[-1, 1].set(xlabel="seconds on one core")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is not done, and write the table."""
    parser = parser_of(__doc__, "data", "out")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="compared with the first of them")
    parser.add_argument("--finetune", nargs="*", choices=ARMS, default=[], help="arms that are fine-tuned, too")
    parser.add_argument("--labelled", nargs="+", type=int, default=[1, 3], help="brains of a fine-tuning")
    parser.add_argument("--steps", type=int, default=1200, help="of a fine-tuning")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    out, seeds, arms = options.out.resolve(), options.seeds, options.arms
    tuned = [arm for arm in options.finetune if arm in arms]
    prepare(options.data, out)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: pretrain(out, *run), [(arm, seed) for seed in seeds for arm in arms]))
        runs = [(arm, count, seed) for seed in seeds for count in options.labelled for arm in tuned]
        list(pool.map(lambda run: finetune_arm(out, run[0], run[1], run[2], options.steps), runs))
    text = report(out, arms, seeds, tuned, options.labelled)
    (out / "recipe.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
