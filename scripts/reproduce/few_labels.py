"""What pretraining is worth to a segmentation from few labels: python -m scripts.reproduce.few_labels DATA OUT

Eleven structures of real brains, from 1 and 3 labelled ones, from a pretrained encoder and from scratch. The encoder is
pretrained on brains that the network is not tested on (experiment=structures_pretrain), and fine-tuned on the first of
them (experiment=structures_finetune), each seed from its own encoder. Each arm has the best of its learning rates, by
the Dice of one more brain of the training part, with the first fold and seed. `--tested 3 --labelled 12 --rates 1e-2`
tests three brains in each of five folds, and labels all others: none is left to choose a rate by.
`--arms pretrained scratch atlas together` adds what registration of the same labelled brains gives, alone and averaged
with the pretrained network. Prints the tables of docs/evidence.md and docs/evidence_details.md, and draws
OUT/curve.png. Finished runs are not repeated, and interrupted ones are resumed: 20 to 50 minutes for an encoder, and
half an hour for a fine-tuning, on one core each.

DATA: see scripts/reproduce/structures.py.
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from asa.data.splits import write_split
from asa.evaluation.comparison import p_text
from asa.evaluation.statistics import wilcoxon_p
from scripts.reproduce.commands import asa, brain_dice, evaluate, interval, parser_of, score, validations
from scripts.reproduce.structures import STRUCTURES, make_store, subjects

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TESTED = ((9, 15), (4, 9), (0, 4))  # the brains of each fold, of the 15 in the order of their ids
Settings = tuple[str, ...]
LIGHT = "structures_light"
PLAIN = ("model.mirror_patches=false",)
DEEP = ("+model.depth=12",)
RASTER, SEQUENCE, NARROW = "model.order=raster", "model.bias=sequence", "model.window=32"
EVEN, SHORT = "method.background_weight=0.5", "train.steps=1500"
UNET = ("model=unet_tiny",)  # which also reads the image itself


class Arm(NamedTuple):
    """Settings of an arm for asa-pretrain and asa-finetune, and the experiment of the latter."""

    pretraining: Settings = ()
    finetuning: Settings = ()
    experiment: str = LIGHT


def in_raster_order(pretraining: Settings = (), finetuning: Settings = ()) -> Arm:
    """An arm with windows in raster order, a bias by the offset in the sequence, and the same window in fine-tuning."""
    return Arm((RASTER, SEQUENCE, *pretraining), (RASTER, SEQUENCE, NARROW, *finetuning))


ARMS: dict[str, Arm] = {
    "pretrained": Arm(experiment="structures_finetune"),
    "scratch": Arm(experiment="structures_finetune"),
    "constant": Arm((), ("method.background_weight=0.05",), "structures_finetune"),
    "constant_scratch": Arm((), ("method.background_weight=0.05",), "structures_finetune"),
    "shipped": Arm(experiment="structures_finetune"),  # from the encoder that the package brings, of other brains
    "deform": Arm((), ("augment.deform=3",), "structures_finetune"),
    # Labels are carried over to the other brains of the training part; of those, boundaries need no further weight.
    "unlabelled": Arm((), ("data.unlabelled=rest", EVEN, SHORT), "structures_finetune"),
    "even": Arm((), (EVEN, SHORT), "structures_finetune"),
    "shipped_unlabelled": Arm((), ("data.unlabelled=rest", EVEN), "structures_finetune"),
    # A head that reads nothing but the tokens.
    "light": Arm(),
    "light_scratch": Arm(),
    "unet": Arm((), UNET),
    "unet_scratch": Arm((), UNET),
    # Windows of 32 tokens in fine-tuning, too; one of the two differences from raster order alone.
    "narrow_windows": Arm((), (NARROW,)),
    "alternating": Arm((SEQUENCE,), (SEQUENCE, NARROW)),
    "grid": Arm((RASTER,), (RASTER, NARROW)),
    # Windows as in the paper, with which many figures of docs/evidence_details.md were made.
    "raster": in_raster_order(),
    "raster_scratch": in_raster_order(),
    "raster_unet": in_raster_order((), UNET),
    "raster_unet_scratch": in_raster_order((), UNET),
    # Patches as they are, as in the paper.
    "plain_patches": in_raster_order(PLAIN, PLAIN),
    "plain_scratch": in_raster_order((), PLAIN),
    # A plain masked autoencoder of the same size.
    "mae": in_raster_order(("method=mae", "model.position=sincos", *PLAIN), ("model.position=sincos", *PLAIN)),
    # ASA's encoding, which mirrored positions share: differs from "plain_patches" by the weights of the loss alone.
    "mae_mirror": in_raster_order(("method=mae", *PLAIN), PLAIN),
    # The plain autoencoder whose patches of the right half are read mirrored, too.
    "mae_mirror_patches": in_raster_order(("method=mae", "model.position=sincos"), ("model.position=sincos",)),
    # Without the savings of structures_pretrain: the background, too, and a decoder of three blocks.
    "slow": in_raster_order(("method.air=keep", "model.decoder_depth=3")),
    # The paper's depths, 12 blocks and 8: as experiment=asa_paper and experiment=asa_fast, of width 96.
    "deep_slow": in_raster_order((*DEEP, "method.air=keep", "model.decoder_depth=8"), DEEP),
    "deep": in_raster_order(DEEP, DEEP),
    # With further savings: a narrower decoder, or a quarter of the masked patches decoded.
    "narrow": in_raster_order(("model.decoder_dim=64",)),
    "quarter": in_raster_order(("method.decode=0.25",)),
    "quarter_air": in_raster_order(("method.decode=0.25", "method.air=keep")),
    "quarter_blocks": in_raster_order(("method.decode=0.25", "model.decoder_depth=3")),
}
SCRATCH = (
    "scratch",
    "constant_scratch",
    "light_scratch",
    "unet_scratch",
    "raster_scratch",
    "raster_unet_scratch",
    "plain_scratch",
)
# What a user would do without a network: the same labelled scans are registered to each new one. Fusion of several.
ATLASES = {"atlas": "joint", "atlas_majority": "majority"}
# The networks of another arm, which has to be run too, averaged with the joint label fusion of the same scans.
TOGETHER = {"together": "pretrained", "together_scratch": "scratch", "together_shipped": "shipped"}
SHIPPED = dict.fromkeys(["shipped", "shipped_unlabelled"], "asa://tiny-t1")
NAMES = {  # in the figure
    "pretrained": "pretrained on the cohort",
    "shipped": "the encoder of the package",
    "scratch": "from scratch",
    "unlabelled": "with labels carried to unlabelled scans",
    "shipped_unlabelled": "that encoder, with labels carried to unlabelled scans",
    "together": "pretrained and registration",
    "atlas": "registration, joint label fusion",
    "atlas_majority": "registration (SyN), majority",
}
STORE = "store_brains"
CPU = ("train.device=cpu", "train.precision=fp32", "loader.workers=0")


class Run(NamedTuple):
    """A fine-tuning."""

    fold: int
    labelled: int
    seed: int
    arm: str
    rate: str

    def name(self) -> str:
        """Name of its folders."""
        chance = "" if self.arm in ATLASES else f"_{self.rate}_seed{self.seed}"
        return f"fold{self.fold}_{self.labelled}_{self.arm}{chance}"


def prepare(data: Path, out: Path, tested: Mapping[int, tuple[int, int]], validating: bool) -> None:
    """A store of all brains, and each fold's split, where the last brain of the training part may validate."""
    ids = subjects(data)
    make_store(data, out, "brains", ids)
    for fold, (first, last) in tested.items():
        train, test = ids[:first] + ids[last:], ids[first:last]
        labelled = train[:-1] if validating else train
        write_split(out / f"pretrain{fold}.json", {"train": train, "validation": [], "test": test})
        parts = {"train": labelled, "validation": train[len(labelled) :], "test": test}
        write_split(out / f"finetune{fold}.json", parts)


def folds_of(tested: int) -> list[tuple[int, int]]:
    """The brains of each fold, where each has so many of the 15, the last one perhaps fewer."""
    brains = max(last for _, last in TESTED)
    return [(first, min(first + tested, brains)) for first in range(0, brains, tested)]


def pretrain(out: Path, arm: str, fold: int, seed: int) -> None:
    """Pretrain an arm's encoder on the training part of a fold."""
    name = encoder(arm, fold, seed)
    paths = {"data.store": out / STORE, "data.split_file": out / f"pretrain{fold}.json", "out": out / name}
    settings = ("experiment=structures_pretrain", f"train.seed={seed}", *CPU, *ARMS[arm].pretraining)
    asa("pretrain", *settings, log=log(out, name), threads=1, **paths)
    print(f"{name}: done", flush=True)


def pretrained_as(arm: str) -> str:
    """The first arm with the same settings of the pretraining: they share their encoders."""
    return next(name for name, other in ARMS.items() if other.pretraining == ARMS[arm].pretraining)


def encoder(arm: str, fold: int, seed: int) -> str:
    """Name of the folder of an encoder."""
    return f"{pretrained_as(arm)}{fold}_seed{seed}"


def score_run(out: Path, run: Run, steps: int | None) -> None:
    """Fine-tune an arm and score it, or score the labels that atlases give."""
    split = f"finetune{run.fold}.json"
    if run.arm in ATLASES:
        score_atlases(out, run.name(), split, run.labelled, ATLASES[run.arm])
        return
    if run.arm in TOGETHER:
        network = out / "finetuned" / run._replace(arm=TOGETHER[run.arm]).name()
        score_atlases(out, run.name(), split, run.labelled, "joint", checkpoint=network)
        return
    arm = ARMS[run.arm]
    settings = (f"data.labelled={run.labelled}", f"train.seed={run.seed}", f"optim.lr={run.rate}", *arm.finetuning)
    own = SHIPPED.get(run.arm) or out / encoder(run.arm, run.fold, run.seed)
    init = None if run.arm in SCRATCH else own
    finetune(out, run.name(), split, steps, *settings, init=init, experiment=arm.experiment)


def finetune(
    out: Path,
    name: str,
    split: str,
    steps: int | None,
    *settings: str,
    init: Path | str | None,
    experiment: str = LIGHT,
) -> None:
    """Fine-tune on the brains of OUT/store_brains, predict those of the test part, and score them.

    Args:
        steps: None: those of the experiment.
    """
    paths = {"data.store": out / STORE, "data.split_file": out / split, "out": out / "finetuned" / name}
    start = {} if init is None else {"init": init}
    length = () if steps is None else (f"train.steps={steps}", f"train.validate_every={steps}")
    first = (f"experiment={experiment}", *length, *CPU)
    asa("finetune", *first, *settings, log=log(out, name), threads=1, **paths, **start)
    score(out, name, out / STORE, log=log(out, name), threads=1)
    validated = f"validation {validation_dice(out, name):.3f}, " if validations(out / "finetuned" / name) else ""
    print(f"{name}: {validated}test {brain_dice(out, name, STRUCTURES).mean():.3f}", flush=True)


def score_atlases(out: Path, name: str, split: str, labelled: int, fusion: str, **networks: Path) -> None:
    """Register the first labelled brains to those of the test part, and score the labels that they give these.

    Args:
        networks: `checkpoint`, whose probabilities are averaged with the votes.
    """
    settings = (f"labelled={labelled}", f"fusion={fusion}", "part=test")
    paths = {"atlas": out / STORE, "input": out / STORE, "split_file": out / split, "out": out / "predicted" / name}
    asa("predict", *settings, log=log(out, name), threads=1, **paths, **networks)
    evaluate(out, name, out / STORE, out / split, log=log(out, name), threads=1)
    print(f"{name}: test {brain_dice(out, name, STRUCTURES).mean():.3f}", flush=True)


def log(out: Path, name: str) -> Path:
    """The file with a command's output."""
    return out / "logs" / f"{name}.txt"


def validation_dice(out: Path, name: str) -> float:
    """Mean Dice of the validation brain after the last step."""
    return float(validations(out / "finetuned" / name)[-1]["dice"])


def chosen(out: Path, runs: Sequence[Run]) -> Run:
    """The run with the best validation, or the only one."""
    return runs[0] if len(runs) == 1 else max(runs, key=lambda run: validation_dice(out, run.name()))


def read_dice(
    out: Path, folds: list[int], seeds: list[int], best: Mapping[tuple[int, str], str]
) -> dict[tuple[int, str], np.ndarray]:
    """The Dice of each number of labels and arm, `(seeds, brains, structures)`."""
    dice = {}
    for (count, arm), rate in best.items():
        runs = [[Run(fold, count, seed, arm, rate) for fold in folds] for seed in seeds]
        rows = [[brain_dice(out, run.name(), STRUCTURES) for run in row] for row in runs]
        dice[count, arm] = np.stack([np.concatenate(row) for row in rows])
    return dice


def report(dice: Mapping[tuple[int, str], np.ndarray], seeds: list[int], best: Mapping[tuple[int, str], str]) -> str:
    """The tables: Dice and differences by seed, and Dice by structure, for each number of labels."""
    lines = gains({key: values.mean(axis=2) for key, values in dice.items()}, seeds)
    lines += [
        "",
        f"| labelled | arm | rate | {' | '.join(STRUCTURES)} |",
        "|---:|---|---:|" + "---:|" * len(STRUCTURES),
    ]
    for (count, arm), values in dice.items():
        means = " | ".join(f"{value:.2f}" for value in values.mean(axis=(0, 1)))
        lines.append(f"| {count} | {arm} | {best[count, arm]} | {means} |")
    return "\n".join(lines) + "\n"


def gains(dice: Mapping[tuple[int, str], np.ndarray], seeds: Sequence[int]) -> list[str]:
    """A table of the Dice of each number of labels and arm, `(seeds, brains)`, and of what the first arm gains."""
    lines = [
        "| labelled | seed | arm | Dice | first arm minus this one, 95 % interval over brains | p |",
        "|---:|---|---|---:|---|---:|",
    ]
    for count in sorted({count for count, _ in dice}):
        means = {arm: values for (labelled, arm), values in dice.items() if labelled == count}
        rows = {str(seed): {arm: values[k] for arm, values in means.items()} for k, seed in enumerate(seeds)}
        if len(seeds) > 1:
            rows["all"] = {arm: values.mean(axis=0) for arm, values in means.items()}
        first = next(iter(means))
        for name, row in rows.items():
            for arm in means:
                gain = row[first] - row[arm]
                against = " | " if arm == first else f"{interval(gain, sign='+')} | {p_text(wilcoxon_p(gain))}"
                lines.append(f"| {count} | {name} | {arm} | {row[arm].mean():.3f} | {against} |")
    return lines


def draw_curve(dice: Mapping[tuple[int, str], np.ndarray], file: Path) -> None:
    """Mean Dice against the number of labelled scans, a line an arm, each brain of the first seed as a point."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    arms = list(dict.fromkeys(arm for _, arm in dice))
    for k, arm in enumerate(arms):
        counts = sorted(count for count, other in dice if other == arm)
        places = [count * 1.03 ** (k - (len(arms) - 1) / 2) for count in counts]
        brains = [dice[count, arm].mean(axis=2) for count in counts]  # (seeds, brains)
        style = "--" if arm in ATLASES else "-"
        (line,) = axes.plot(places, [b.mean() for b in brains], style, marker="o", label=NAMES.get(arm, arm))
        for place, values in zip(places, brains, strict=True):
            axes.plot([place] * values.shape[1], values[0], ".", color=line.get_color(), alpha=0.35, markersize=4)
    ticks = sorted({count for count, _ in dice})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labelled scans")
    axes.set_ylabel("mean Dice of eleven structures")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Run what has not been run, and print the tables."""
    parser = parser_of(__doc__, "data", "out")
    parser.add_argument("--labelled", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--arms", nargs="+", default=["pretrained", "scratch"], choices=[*ARMS, *ATLASES, *TOGETHER])
    parser.add_argument("--tested", type=int, help="brains of a fold, where all others are labelled; none validates")
    parser.add_argument("--folds", nargs="+", type=int, help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=["1e-3", "3e-3", "1e-2"], help="learning rates to choose from")
    parser.add_argument("--steps", type=int, help="of a fine-tuning; those of the experiment by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    tested = options.tested
    if tested and len(options.rates) > 1:
        parser.error("with --tested no brain is left to choose a rate by: give one of --rates")
    ranges = dict(enumerate(TESTED if tested is None else folds_of(tested)))
    folds = list(ranges) if options.folds is None else options.folds
    if not ranges.keys() >= set(folds):
        parser.error(f"--folds: there are {', '.join(map(str, ranges))}")
    alone = [arm for arm in options.arms if arm not in TOGETHER]
    if lacking := {TOGETHER[arm] for arm in options.arms if arm in TOGETHER} - {*alone}:
        parser.error(f"--arms: add {', '.join(sorted(lacking))}, whose networks are averaged with registration")
    out, seeds, labelled = options.out.resolve(), options.seeds, options.labelled
    prepare(options.data, out, {fold: ranges[fold] for fold in folds}, validating=tested is None)
    with ThreadPoolExecutor(options.jobs) as pool:
        arms = dict.fromkeys(pretrained_as(arm) for arm in alone if arm not in (*SCRATCH, *SHIPPED, *ATLASES))
        list(pool.map(lambda which: pretrain(out, *which), itertools.product(arms, folds, seeds)))

        def run_all(runs: list[Run]) -> None:
            list(pool.map(lambda run: score_run(out, run, options.steps), runs))

        choices = {
            (count, arm): [
                Run(folds[0], count, seeds[0], arm, rate) for rate in (["-"] if arm in ATLASES else options.rates)
            ]
            for count, arm in itertools.product(labelled, alone)
        }
        first = [run for runs in choices.values() for run in runs]
        run_all(first)
        best = {key: chosen(out, runs).rate for key, runs in choices.items()}
        best |= {
            (count, arm): best[count, TOGETHER[arm]]
            for count, arm in itertools.product(labelled, options.arms)
            if arm in TOGETHER
        }
        wanted = [
            Run(fold, count, seed, arm, best[count, arm]) for fold in folds for seed in seeds for count, arm in best
        ]
        left = {run.name(): run for run in wanted if run not in first}.values()
        for last in (False, True):  # networks before what is averaged with them
            run_all([run for run in left if (run.arm in TOGETHER) == last])
    dice = read_dice(out, folds, seeds, best)
    draw_curve(dice, out / "curve.png")
    table = report(dice, seeds, best)
    (out / "structures.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
