"""Pretraining: an encoder learns from unlabelled scans.

Data: crops of a prepared store. Loss: the method's (masked reconstruction, the proxy tasks of SA-Swin, or puzzles).
Validation: the method's error on held-out crops beside that of a trivial prediction, feature statistics, and the Dice
of a linear probe. A checkpoint holds channels, preparation and digests of the training scans. Prediction: a SA-Swin
scores the asymmetry of new scans; other encoders are fine-tuned first.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from asa.config import typed
from asa.data.io.files import check_out
from asa.data.io.nifti import Volume
from asa.data.io.tables import check_health, check_own, read_column
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.data.store import Store
from asa.errors import counted
from asa.evaluation.tables import evaluate_asymmetry
from asa.inference.asymmetry import TABLE, AsymmetryRow, AsymmetryScorer, cells_of
from asa.inference.feature_health import FeatureHealth, open_labelled, predictor_of
from asa.inference.layout import Layout
from asa.inference.segmentation import PredictSettings
from asa.methods.base import Batch
from asa.methods.base import Pretraining as PretrainingMethod
from asa.reporting.figures import reconstruction_panel
from asa.tasks.base import Config
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import add_rows, only_checkpoint, predict_scans
from asa.tasks.volumes import Records, VolumeTask
from asa.training.device import on_device
from asa.training.distributed import map_over_ranks
from asa.training.loop import Validate, Validation
from asa.training.optim import warmup_steps
from asa.training.plan import logged, volume_batch

HEALTHY = "healthy"  # value of data.health for a cohort of healthy subjects
UNKNOWN = float("nan")


class Pretraining(VolumeTask):
    """Pretraining on a prepared store, without labels."""

    command = "pretrain"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "labelled_store", *([] if config["data"]["health"] == HEALTHY else ["health"]))
        self.warmup = warmup_steps(config["optim"]["warmup"], self.train.steps)
        self.augment = AugmentSettings(mirror_probability=self.data.mirror_probability)
        self.attached = read_health(self.data.health, self.store.records)
        self.set_model()

    def example(self, method: Any, count: int) -> Batch:
        batch, crops = volume_batch(method, count), self.dataset(method)
        if crops.air is not None:  # its amount decides how many tokens there are
            batch["air"] = torch.stack([crops[k % len(crops), 0]["air"] for k in range(count)])
        return batch

    def load_init(self, method: Any) -> None:
        if self.attached and not method.mirrored:
            raise ValueError("data.health is what method=sa_swin learns symmetry from: leave it out for this method")
        if method.mirrored and not self.attached:
            print("note: without data.health no subject is known to be healthy, and the symmetry loss has no samples")
        if self.excludes(method):
            print(f"patches with voxels of the values {self.store.ignored} in the label maps do not count in the loss")
        self.init.load_network(method.model)

    def crops(self, method: Any, part: Records, **options: Any) -> CropDataset:
        air = method.model.encoder.patch_size if getattr(method, "drops_air", False) else None
        excluded = method.model.encoder.patch_size if self.excludes(method) else None
        return super().crops(method, part, air=air, excluded=excluded, **options)

    def excludes(self, method: Any) -> bool:
        """Whether the loss leaves out voxels that the store marks, like those that a defacing removed.

        In a store with labels the ignored voxels lack a label, and not their image.
        """
        return bool(self.store.ignored and not self.store.labels) and getattr(method, "excludes", False)

    def validation(self, method: Any) -> Validate:
        # Without held-out subjects the error is computed on training scans, and the log says so.
        held_out = self.crops(method, self.parts["validation"] or self.parts["train"][:4])
        path, placement = self.data.labelled_store, self.data.placement
        labelled = open_labelled(path, self.store.channels, held_out.size, placement) if path else None
        health = FeatureHealth(method, held_out, labelled, self.warmup)

        def validate(step: int) -> Validation:
            metrics, panels = validate_pretraining(method, held_out)
            found, alarms = health.measure(step, metrics)
            for line in alarms:
                tqdm.write(line)  # does not break the progress bar
            return {**metrics, **found}, panels

        return validate

    def metrics(self, make: Callable[[], nn.Module]) -> list[str]:
        probe = [] if (path := self.data.labelled_store) is None else ["linear_dice", "linear_dice_first"]
        probe += [f"linear_dice_{name}" for name in Store(path).labels.values()] if path else []
        return [*logged(make, partial(self.example, count=1)), "effective_rank", "feature_variance", *probe]

    def begin(self, run: Path) -> None:
        held_out = len(self.parts["validation"])
        on = counted(held_out, "held-out scan") if held_out else "training scans"
        self.init.write(run)
        print(f"pretraining on {counted(len(self.parts['train']), 'scan')}, validated on {on}, in {run}")

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        name, trivial = method.error
        if name in metrics:
            ratio = metrics[name] / metrics[trivial]
            print(f"{name} {metrics[name]:.5f}, {ratio:.2f} of the {predictor_of(trivial)}'s {metrics[trivial]:.5f}")

    @staticmethod
    def predict(config: Config) -> None:
        predict_scans(AsymmetryPredictor(config), config, Layout(Path(str(config["out"])), table=TABLE))

    @staticmethod
    def evaluate(config: Config) -> None:
        results, counts = evaluate_asymmetry(*tables_of(config, TABLE))
        print(
            f"{counts['healthy']} healthy scans and {counts['patients']} of patients; left out are "
            f"{counts['without_health']} scans without health, and {counts['without_prediction']} rows of "
            f"{config['truth']} without a prediction"
        )
        for measure, row in results.items():
            print(f"AUC of {measure:<6} {row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f})")


def validate_pretraining(method: PretrainingMethod, dataset: CropDataset) -> Validation:
    """Means of what a method returns over all records, always under the same random draws; panels of the first record.

    The method is in evaluation mode, and crops are not augmented. Several processes divide the records between them;
    each returns the whole result, and the main one the panels.
    """
    assert isinstance(method, nn.Module)
    device = next(method.parameters()).device
    panels: dict[str, np.ndarray] = {}

    def errors(index: int) -> dict[str, float]:
        batch = on_device(collate([dataset[index, 0]]), device)
        if not panels:
            panels.update(reconstruction_panels(method, batch))
        return {name: float(value) for name, value in method(batch).items()}

    rows = map_over_ranks(range(len(dataset)), errors)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, panels


def reconstruction_panels(method: PretrainingMethod, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """A method's figures of a batch's first sample by name, RGB uint8, with a title above each column."""
    return {
        name: reconstruction_panel(
            *(volume[0, 0].float().cpu().numpy() for volume in volumes.values()), titles=list(volumes)
        )
        for name, volumes in method.pictures(batch).items()
    }


def read_health(source: str | None, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The health of each scan by record id, which batches hold as "health": 1 healthy, 0 patient, NaN unknown.

    The source is "healthy" for a cohort of healthy subjects, a table with the columns subject (or id) and health, or
    None where health is not known. A ValueError for a table that does not fit, or a health that is neither 0 nor 1.
    """
    if source is None:
        return {}
    if source == HEALTHY:
        return {record["id"]: {"health": 1.0} for record in records}
    values = read_column(source, "health", records)
    check_health(source, values.values())
    return {record["id"]: {"health": float(values.get(record["id"], UNKNOWN))} for record in records}


class AsymmetryPredictor:
    """Writes an asymmetry map `OUT/ID.nii.gz` of each scan, and the scores of all to `OUT/asymmetry.csv`."""

    def __init__(self, config: Config) -> None:
        checkpoint = only_checkpoint(config, "an asymmetry score")
        settings = typed(PredictSettings, config["predict"])
        self.out, self.source = Path(str(config["out"])), Path(str(config["input"]))
        check_out(self.out, TABLE, f"a folder of asymmetry maps (with {TABLE})")
        check_own(self.out / TABLE, "asa-predict", {"id"}, "|".join(["subject", *AsymmetryRow.__annotations__]))
        self.scorer = AsymmetryScorer(
            checkpoint, settings, strip=config["strip"], healthy=config["healthy"], plugins=config["plugins"]
        )
        self.preprocessor = self.scorer.preprocessor
        self.rows: dict[str, dict[str, str]] = {}

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> None:
        self.rows[id] = cells_of(self.scorer.score_prepared(id, image, chain, like, self.out / f"{id}.nii.gz"))

    def finish(self) -> str:
        add_rows(self.out / TABLE, self.rows, source=self.source)
        return f"wrote {self.out / TABLE}, and asymmetry maps beside it"
