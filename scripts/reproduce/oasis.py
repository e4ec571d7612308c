"""CSF, GM and WM of real brains, the table of docs/evidence.md: python -m scripts.reproduce.oasis DATA OUT

Segmentation from 1, 3 and 12 labelled brains, from a pretrained encoder and from scratch.

DATA: 15 skull-stripped OASIS-1 brains, ID_SS.nii.gz, with FAST tissue labels, ID_tissues.nii.gz (1 CSF, 2 GM, 3 WM);
the R package malf.templates carries such a set. The seconds of each stage are written to OUT/seconds.txt.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from asa.reporting.ablation import Trial, write_ablation
from asa.tasks.comparison import read_run
from scripts.reproduce.commands import asa

STEPS = {1: 200, 3: 200, 12: 300}  # of fine-tuning, by labelled brains
ARMS = ("scratch", "pretrained")


def main() -> None:
    """Run all stages, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)

    def timed(stage: str, command: str, *settings: str, **paths: Any) -> None:
        started = time.monotonic()
        asa(command, *settings, **paths)
        with (out / "seconds.txt").open("a") as file:
            file.write(f"{stage} {time.monotonic() - started:.0f}\n")

    files = ("data.images={t1: *_SS.nii.gz}", "data.label=*_tissues.nii.gz", "labels={1: csf, 2: gm, 3: wm}")
    timed("prepare", "prepare", "data=folder", *files, **{"data.root": options.data, "out": out / "store"})
    store = {"data.store": out / "store"}
    timed("pretrain", "pretrain", "experiment=oasis_pretrain", **store, out=out / "pretrained")
    split, trials = out / "pretrained" / "split.json", []
    for labelled, steps in STEPS.items():
        for start in ARMS:
            name = f"{start}_{labelled}"
            run, predictions, evaluation = out / name, out / f"predictions_{name}", out / f"evaluation_{name}"
            settings = ("experiment=oasis_finetune", f"data.labelled={labelled}", f"train.steps={steps}")
            init = {"init": out / "pretrained"} if start == "pretrained" else {}
            timed(f"finetune_{name}", "finetune", *settings, **store, **init, **{"data.split_file": split}, out=run)
            timed(f"predict_{name}", "predict", "part=test", checkpoint=run, input=out / "store", out=predictions)
            asa("evaluate", predictions=predictions, truth=out / "store", split_file=run / "split.json", out=evaluation)
            trials.append(Trial(start, str(labelled), 0, read_run(name, evaluation)))
    write_ablation(out, trials, ARMS)
    print((out / "ablation.md").read_text())


if __name__ == "__main__":
    main()
