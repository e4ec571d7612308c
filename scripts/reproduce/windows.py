"""Windows along one axis or along three, on IXI at 2 mm: python -m scripts.reproduce.windows IXI OUT

Each order of the tokens with each bias: an encoder from 80 heads and a head that reads nothing but its tokens
(experiment=structures_light), fine-tuned on the same three labelled heads and tested on 30 others. Prints the Dice,
what the first arm gains over the others, and the linear probe of the tokens. What is done is not done again; OUT can be
that of scripts.reproduce.scale, whose stores it then shares.

IXI: see scripts/reproduce/ixi.py.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from scripts.reproduce.commands import brain_dice, validations
from scripts.reproduce.few_labels import ARMS, gains
from scripts.reproduce.ixi import LABELLED, finetune, make_stores, pretrain, read_options
from scripts.reproduce.structures import STRUCTURES

KINDS = ("alternating", "light", "grid", "raster", "light_scratch")  # of few_labels.ARMS


def run(out: Path, kind: str, seed: int, device: str) -> None:
    """An encoder, but for what starts from scratch, and its fine-tuning."""
    arm, name, init = ARMS[kind], f"{kind}_seed{seed}", None
    if not kind.endswith("scratch"):
        pretrain(out, name, *arm.pretraining, seed=seed, device=device)
        init = out / "pretrained" / name
    finetune(out, name, *arm.finetuning, seed=seed, device=device, experiment=arm.experiment, init=init)


def main() -> None:
    """Run what has not been run, and print the table."""
    options = read_options(__doc__)
    out, seeds = options.out, options.seeds
    make_stores(options.data, out, options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        for task in [pool.submit(run, out, kind, seed, options.device) for seed in seeds for kind in KINDS]:
            task.result()
    dice = {
        (LABELLED, kind): np.stack([brain_dice(out, f"{kind}_seed{seed}", STRUCTURES).mean(axis=1) for seed in seeds])
        for kind in KINDS
    }
    print("\n" + "\n".join(gains(dice, seeds)))
    for kind in KINDS[:-1]:
        probes = [validations(out / "pretrained" / f"{kind}_seed{seed}")[-1]["linear_dice"] for seed in seeds]
        print(f"linear probe, {kind}: {' '.join(f'{value:.3f}' for value in probes)}")


if __name__ == "__main__":
    main()
