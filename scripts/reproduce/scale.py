"""Do more unlabelled heads help? python -m scripts.reproduce.scale IXI OUT

Encoders from 5, 15, 40 and 80 heads at 2 mm, at equal steps and at equal epochs, each fine-tuned on the same three
labelled heads (experiment=structures_finetune) and tested on 30 others. Beside them a fine-tuning from scratch, and the
linear probe of the tokens. Prints a table, and the change of the Dice per doubling of the heads with its interval over
the tested heads; draws OUT/scale.png. What is done is not done again. Two hours of one core for each seed.

IXI: see scripts/reproduce/ixi.py.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from scripts.reproduce.commands import interval, validations
from scripts.reproduce.ixi import HEADS, LABELLED, STEPS, dice_of, finetune, make_stores, pretrain, read_options

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEAD = "structures_finetune"


class Encoder(NamedTuple):
    """A pretraining."""

    heads: int
    steps: int
    seed: int

    def name(self) -> str:
        """Name of its folders."""
        return f"heads{self.heads}_steps{self.steps}_seed{self.seed}"


def run(out: Path, encoder: Encoder, device: str) -> None:
    """An encoder and its fine-tuning."""
    name = encoder.name()
    pretrain(out, name, seed=encoder.seed, device=device, split=f"split{encoder.heads}", steps=encoder.steps)
    finetune(out, name, seed=encoder.seed, device=device, experiment=HEAD, init=out / "pretrained" / name)


def slopes(dice: np.ndarray) -> np.ndarray:
    """The change per doubling of the heads of each tested head, from its Dice by number of heads `(N, tested)`."""
    doublings = np.log2(HEADS)
    centred = doublings - doublings.mean()
    return np.asarray(centred @ dice / (centred**2).sum())


def report(out: Path, kinds: Mapping[str, Mapping[int, int]], seeds: Sequence[int]) -> None:
    """Print the table and the slopes, and draw them."""
    scratch = dice_of(out, [f"scratch_seed{seed}" for seed in seeds])
    print("\n| heads | steps | linear probe | Dice | minus scratch, 95 % interval over heads |")
    print("|---:|---:|---:|---:|---|")
    print(f"| from scratch | | | {scratch.mean():.3f} | |")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes.axhline(scratch.mean(), linestyle="--", color="grey", label="from scratch")
    said = []
    for kind, steps in kinds.items():
        rows = []
        for heads, count in steps.items():
            names = [Encoder(heads, count, seed).name() for seed in seeds]
            probes = [validations(out / "pretrained" / name)[-1]["linear_dice"] for name in names]
            rows.append(dice_of(out, names))
            if kind == next(iter(kinds)) or heads < max(HEADS):  # the largest set is in both
                gain = interval(rows[-1] - scratch, sign="+")
                print(f"| {heads} | {count} | {np.mean(probes):.3f} | {rows[-1].mean():.3f} | {gain} |")
        axes.plot(HEADS, np.mean(rows, axis=1), marker="o", label=f"pretrained, {kind}")
        said.append(f"{kind}: {interval(slopes(np.array(rows)), sign='+')} per doubling of the heads")
    print("\n" + "\n".join(said))
    axes.set_xscale("log")
    axes.set_xticks(HEADS, [str(heads) for heads in HEADS])
    axes.minorticks_off()
    axes.set_xlabel("unlabelled heads")
    axes.set_ylabel(f"mean Dice of eleven structures, {LABELLED} labelled heads")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out / "scale.png")


def main() -> None:
    """Run what has not been run, and print the table."""
    options = read_options(__doc__)
    out = options.out
    make_stores(options.data, out, options.jobs)
    kinds = {
        "equal steps": dict.fromkeys(HEADS, STEPS),
        "equal epochs": {heads: round(STEPS * heads / max(HEADS)) for heads in HEADS},
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        tasks = []
        for seed in options.seeds:
            encoders = {Encoder(heads, steps, seed) for kind in kinds.values() for heads, steps in kind.items()}
            own: dict[str, Any] = {"seed": seed, "device": options.device}
            tasks.append(pool.submit(finetune, out, f"scratch_seed{seed}", experiment=HEAD, **own))
            tasks += [pool.submit(run, out, encoder, options.device) for encoder in sorted(encoders)]
        for task in tasks:
            task.result()
    report(out, kinds, options.seeds)


if __name__ == "__main__":
    main()
