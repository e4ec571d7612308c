"""CSF, GM and WM of real brains, the table of docs/evidence_details.md: python -m scripts.reproduce.oasis DATA OUT

Segmentation from 1, 3 and 12 labelled brains, from a pretrained encoder and from scratch.

DATA: 15 skull-stripped OASIS-1 brains, ID_SS.nii.gz, with FAST tissue labels, ID_tissues.nii.gz (1 CSF, 2 GM, 3 WM);
the R package malf.templates carries such a set. Finished runs are not repeated.
"""

from asa.evaluation.comparison import read_run
from asa.reporting.ablation import Trial, write_ablation
from scripts.reproduce.commands import asa, parser_of, score

STEPS = {1: 200, 3: 200, 12: 300}  # of fine-tuning, by labelled brains
ARMS = ("scratch", "pretrained")


def main() -> None:
    """Run all stages, and print the table."""
    options = parser_of(__doc__, "data", "out").parse_args()
    out = options.out
    files = ("data.images={t1: *_SS.nii.gz}", "data.label=*_tissues.nii.gz", "labels={1: csf, 2: gm, 3: wm}")
    asa("prepare", "data=folder", *files, **{"data.root": options.data, "out": out / "store"})
    paths = {"data.store": out / "store"}
    asa("pretrain", "experiment=oasis_pretrain", **paths, out=out / "pretrained")
    paths["data.split_file"], trials = out / "pretrained" / "split.json", []
    for labelled, steps in STEPS.items():
        for start in ARMS:
            name = f"{start}_{labelled}"
            settings = ("experiment=oasis_finetune", f"data.labelled={labelled}", f"train.steps={steps}")
            init = {"init": out / "pretrained"} if start == "pretrained" else {}
            asa("finetune", *settings, **paths, **init, out=out / "finetuned" / name)
            score(out, name, out / "store")
            trials.append(Trial(start, str(labelled), 0, read_run(name, out / "evaluated" / name)))
    write_ablation(out, trials, ARMS)
    print((out / "ablation.md").read_text())


if __name__ == "__main__":
    main()
