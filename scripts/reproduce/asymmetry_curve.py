"""Does pretraining help a SA-Swin to find tumours? python -m scripts.reproduce.asymmetry_curve OUT

The data and the network of scripts/reproduce/asymmetry.py, scored along one pretraining: AUC of the released score, and
of the mean of the top 1 % of the asymmetry map from the features of each of the encoder's five levels, in standard
deviations above the healthy scans. Writes OUT/curve.md, a table of docs/asymmetry.md. An hour on one core.
"""

import numpy as np
import torch

from asa.config import build
from asa.data.store import Store
from asa.evaluation.scans import auc
from asa.inference.anomaly import AnomalyMap, AsymmetryScorer, HealthyReference, read_pretrained
from asa.settings import PredictSettings
from asa.training.checkpoint import read_description
from scripts.reproduce.asymmetry import make_stores, volumes
from scripts.reproduce.commands import asa, parser_of

LEVELS = 5


def line(scorer: AsymmetryScorer, parts: list[list[torch.Tensor]]) -> list[float]:
    """AUC of the score, and of each level's `top`; `parts`: healthy, lesioned and reference scans."""
    values = []
    for level in range(LEVELS):
        scorer.level = level
        found = [[scorer.measure(volume) for volume in part] for part in parts]
        if not level:
            values.append(separation(found[0], found[1], "score"))
        above = HealthyReference(found[2], found[2][0].map.shape).standardise
        healthy, lesioned = ([above(one) for one in part] for part in found[:2])
        values.append(separation(healthy, lesioned, "top"))
    return values


def separation(healthy: list[AnomalyMap], lesioned: list[AnomalyMap], name: str) -> float:
    """AUC of one number."""
    numbers = np.array([getattr(one, name) for one in (*healthy, *lesioned)])
    return auc(numbers, np.arange(len(numbers)) >= len(healthy))


def main() -> None:
    """Pretrain, and score the first weights and every checkpoint."""
    parser = parser_of(__doc__, "out")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--settings", nargs="*", default=[], help="of asa-pretrain")
    options = parser.parse_args()
    out, run = options.out, options.out / "curve"
    make_stores(out)
    kept = ("train.keep=1000", f"train.save_every={options.every}", f"train.steps={options.steps}")
    store = {"data.store": out / "train_store"}
    log = out / "logs" / "curve.txt"
    asa("pretrain", "experiment=sa_swin_demo", *kept, *options.settings, log=log, threads=1, **store, out=run)
    torch.set_num_threads(1)
    parts = [volumes(Store(out / f"{cohort}_store")) for cohort in ("healthy", "lesioned", "train")]

    heads = " | ".join(["score", *(f"top, 1/{2 ** (level + 1)}" for level in range(LEVELS))])
    lines = [f"| steps | {heads} |", "|---:|" + "---:|" * (LEVELS + 1)]
    print("\n".join(lines))
    for folder in [None, *sorted((run / "checkpoints").glob("step-*"))]:
        scorer = AsymmetryScorer(*read_pretrained(folder or run), PredictSettings())
        if folder is None:
            torch.manual_seed(0)
            scorer.model = build(read_description(run)["model"]).eval().to(scorer.device)
        step = int(folder.name.removeprefix("step-")) if folder else 0
        lines.append(f"| {step} | " + " | ".join(f"{value:.2f}" for value in line(scorer, parts)) + " |")
        print(lines[-1], flush=True)
    (out / "curve.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
