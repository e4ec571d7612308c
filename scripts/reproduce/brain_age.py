"""The age of IXI's heads by fine-tuning at 2 mm: python -m scripts.reproduce.brain_age IXI FEATURES OUT

experiment=brain_age from the encoder that the package brings (pretrained at 1 mm) and from scratch, with the same
settings; beside both a ridge on the volumes of the regions, of the same heads. One fold of five is tested.
IXI: as for scripts.reproduce.frozen_features, whose OUT is FEATURES: its brains are resampled to 2 mm. About 20 minutes
of one core.
"""

from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import read_json
from asa.data.io.nifti import write_image
from asa.data.io.tables import read_column, read_rows
from asa.data.store import Store
from asa.evaluation.probe import predict_by_folds, ridge
from scripts.reproduce.commands import asa, interval, parser_of
from scripts.reproduce.shipped_encoder import NAME

ARMS: dict[str, dict[str, str]] = {"pretrained": {"init": f"asa://{NAME}"}, "scratch": {}}
ENCODER = ("+model.window=32", "model.order=alternating", "model.bias=grid", "model.position=mirror_sincos")
# Whole volumes keep their middle, which is the mid-sagittal plane.
PREPARED = ("data=folder", "data.images={t1: '*.nii.gz'}", "prepare.spacing=2", "prepare.crop=none")
SETTINGS = (
    "experiment=brain_age",
    "model=asa_regressor_tiny",
    *ENCODER,
    "+model.mirror_patches=true",
    "crop=[80,96,80]",
    "data.column=age",
    "data.split={folds: 5, fold: 0, validation: 0}",
    "train.best=null",
    "train.steps=200",
    "train.batch_size=8",
    "train.validate_every=200",
    "train.device=cpu",
    "train.precision=fp32",
    "loader.workers=0",
    "optim.lr=1.0e-3",
    "optim.reference_batch=null",
)


def write_brains(store: Store, out: Path) -> None:
    """The prepared brains as NIfTI files."""
    out.mkdir(parents=True, exist_ok=True)
    for record in store.records:
        volume = np.asarray(store.image(record["id"])[0], dtype=np.float32).transpose(2, 1, 0)
        write_image(out / f"{record['id']}.nii.gz", volume, np.array(record["chain"]["stored_affine"]))


def volumes_errors(table: Path, truth: dict[str, float], tested: list[str]) -> dict[str, float]:
    """The absolute error of a ridge on volumes, of the tested heads."""
    rows = {row.pop("id"): [float(value) for value in row.values()] for row in read_rows(table)}
    ids = sorted(truth)
    features, ages = np.array([rows[id] for id in ids]), np.array([truth[id] for id in ids])
    own = np.isin(ids, tested)
    predicted = predict_by_folds(features, ages[:, None], ids, own.astype(int), ridge)[own, 0]
    return dict(zip(np.array(ids)[own].tolist(), np.abs(predicted - ages[own]).tolist(), strict=True))


def main() -> None:
    """Prepare, fine-tune, and print the errors."""
    options = parser_of(__doc__, "ixi", "features", "out").parse_args()
    features, out = options.features.resolve() / "ixi", options.out.resolve()
    log, store, table = out / "log.txt", out / "store", options.ixi.resolve() / "ages.csv"
    write_brains(Store(features / "store"), out / "brains")
    asa("prepare", *PREPARED, log=log, threads=1, **{"data.root": out / "brains", "out": store})
    truth = {id: float(age) for id, age in read_column(table, "age", Store(store).records).items()}
    errors: dict[str, dict[str, float]] = {}
    for name, init in ARMS.items():
        paths: dict[str, Any] = {"data.store": store, "data.table": table, "out": out / name, **init}
        asa("finetune", *SETTINGS, log=log, threads=1, **paths)
        rows = read_rows(out / name / "predictions_test.csv")
        errors[f"fine-tuned, {name}"] = {row["id"]: abs(float(row["predicted"]) - truth[row["id"]]) for row in rows}
    guess = read_json(out / "scratch" / "scores_test.json")["mean_predictor_mae"]
    scratch = errors["fine-tuned, scratch"]
    errors["ridge on the volumes of the regions"] = volumes_errors(features / "volumes.csv", truth, list(scratch))
    print(f"{len(scratch)} heads\n\n| | mean absolute error (years) | less that from scratch |\n|---|---|---|")
    for arm, found in errors.items():
        own, less = np.array([found[id] for id in scratch]), np.array([found[id] - scratch[id] for id in scratch])
        print(f"| {arm} | {interval(own, digits=1)} | {interval(less, '+', 1) if less.any() else ''} |")
    print(f"| nothing: the mean age | {guess:.1f} | |")


if __name__ == "__main__":
    main()
