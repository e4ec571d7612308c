"""Pretraining: an encoder learns from unlabelled scans.

Data: crops of a prepared store, or of several with a modality each. Loss: the method's (masked reconstruction, the
proxy tasks of SA-Swin, or puzzles). Validation: the method's error on held-out crops beside that of a trivial
prediction, of each modality too; feature statistics, and the Dice of a linear probe. A checkpoint holds channels and
preparation of each modality, and digests of the training scans. Prediction: anomaly maps of new scans, by the asymmetry
that a SA-Swin finds, or by the errors of what the network predicts of hidden parts.
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
from asa.data.io.tables import check_health, read_column
from asa.data.joined import modality_of, records_by_modality
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.data.store import MANIFEST, Store
from asa.data.store import Records as StoredRecords
from asa.errors import counted
from asa.evaluation.statistics import in_interval
from asa.evaluation.tables import evaluate_asymmetry, evaluate_maps
from asa.inference.anomaly import ASYMMETRY_TABLE, AsymmetryScorer, PredictionErrorScorer, read_pretrained
from asa.inference.anomaly import TABLE as ANOMALY_TABLE
from asa.inference.feature_health import FeatureHealth, open_labelled, predictor_of
from asa.inference.preprocessing import training_scan_metadata
from asa.methods.base import MODALITY, Batch
from asa.methods.base import Pretraining as PretrainingMethod
from asa.reporting.figures import reconstruction_panel
from asa.settings import Config, PredictSettings
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import channels_of, only_checkpoint, predict_anomalies, subjects_in
from asa.tasks.volumes import Records, VolumeTask
from asa.training.device import on_device
from asa.training.distributed import map_over_ranks
from asa.training.loop import Validate, Validation
from asa.training.optim import warmup_steps
from asa.training.plan import logged, volume_batch

HEALTHY = "healthy"  # value of data.health for a cohort of healthy subjects
UNKNOWN = float("nan")
TABLE_SCORED = (
    "{healthy} healthy scans and {patients} of patients; left out are {without_health} scans without health, and "
    "{without_prediction} rows of {truth} without a prediction"
)
MAPS_SCORED = (
    "{with_lesion} scans with a lesion, {without} without; left out are {left_out} without a label, and "
    "{without_prediction} labelled ones without a map"
)


class Pretraining(VolumeTask):
    """Pretraining on a prepared store, without labels."""

    command = "pretrain"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "labelled_store", *([] if config["data"]["health"] == HEALTHY else ["health"]))
        self.warmup = warmup_steps(config["optim"]["warmup"], self.train.steps)
        self.augment = AugmentSettings(mirror_probability=self.data.mirror_probability)
        self.attached = read_health(self.data.health, self.store.records)
        for modality, scans in records_by_modality(self.store, self.store.records).items():
            own = {f"{MODALITY}{name}": float(name == modality) for name in self.store.modalities}
            self.attached |= {id: own | self.attached.get(id, {}) for id in scans.ids}
        self.trained = records_by_modality(self.store, self.parts["train"])
        if without := [modality for modality, scans in self.trained.items() if not scans]:
            raise ValueError(f"data.stores: the split has no {without[0]} scan in train: correct it")
        self.set_model()

    def example(self, method: Any, count: int) -> Batch:
        batch, crops = volume_batch(method, count), self.dataset(method)
        if crops.air is not None:  # its amount decides how many tokens there are
            batch["air"] = torch.stack([crops[k % len(crops), 0]["air"] for k in range(count)])
        return batch

    def load_init(self, method: Any) -> None:
        if self.data.health and not method.mirrored:
            raise ValueError("data.health is what method=sa_swin learns symmetry from: leave it out for this method")
        if method.mirrored and not self.data.health:
            print("note: without data.health no subject is known to be healthy, and the symmetry loss has no samples")
        if self.excludes(method):
            print(f"patches with voxels of the values {self.store.ignored} in the label maps do not count in the loss")
        self.init.load_network(method.model)

    def crops(self, method: Any, part: Records, **options: Any) -> CropDataset:
        air = method.model.encoder.patch_size if getattr(method, "drops_air", False) else None
        excluded = method.model.encoder.patch_size if self.excludes(method) else None
        return super().crops(method, part, air=air, excluded=excluded, **options)

    def excludes(self, method: Any) -> bool:
        """Whether the loss leaves out voxels that a store without labels marks, like those that a defacing removed."""
        return bool(self.store.ignored and not self.store.labels) and getattr(method, "excludes", False)

    def validation(self, method: Any) -> Validate:
        # Without held-out subjects: on training scans, as `begin` says.
        held_out = self.crops(method, self.parts["validation"] or self._first_scans())
        path, placement = self.data.labelled_store, self.data.placement
        labelled = open_labelled(path, self._channels_of(path), held_out.size, placement) if path else None
        health = FeatureHealth(method, held_out, labelled, self.warmup)

        def validate(step: int) -> Validation:
            metrics, panels = validate_pretraining(method, held_out)
            found, alarms = health.measure(step, metrics)
            for line in alarms:
                tqdm.write(line)  # does not break the progress bar
            return {**metrics, **found}, panels

        return validate

    def _first_scans(self) -> Records:
        """Four training scans; of several modalities as many of each as then fit, at least one."""
        train: Any = self.parts["train"]
        each = max(1, 4 // max(1, len(self.trained)))
        chosen = {id for scans in (self.trained or {"": train}).values() for id in scans.ids[:each]}
        return train.take(k for k, id in enumerate(train.ids) if id in chosen)

    def metrics(self, make: Callable[[], nn.Module]) -> list[str]:
        probe = [] if (path := self.data.labelled_store) is None else ["linear_dice", "linear_dice_first"]
        probe += [f"linear_dice_{name}" for name in Store(path).labels.values()] if path else []
        names = logged(make, partial(self.example, count=1))
        each = [f"{name}_{modality}" for name in names for modality in self.trained]
        return [*names, *each, "effective_rank", "feature_variance", *probe]

    def _channels_of(self, path: str) -> list[str]:
        """Those of the training scans that a store is compared with: of its modality, if it is one of several."""
        own = Store(path)
        return own.channels if modality_of(own) in self.trained else self.store.channels

    def target_metadata(self) -> dict[str, Any]:
        """Of several modalities the channels and the preparation of each; those of the first are that of the run."""
        found = {}
        for modality, scans in self.trained.items():
            store = self.store.modalities[modality]
            found[modality] = {"channels": store.channels, "prepare": store.settings, **training_scan_metadata(scans)}
        method = self.config["method"]
        of_method = {"normalised": method["normalise"]} if "normalise" in method else {}
        return of_method | ({**next(iter(found.values())), "modalities": found} if found else {})

    def begin(self, run: Path) -> None:
        held_out = len(self.parts["validation"])
        on = counted(held_out, "held-out scan") if held_out else "training scans"
        self.init.write(run)
        each = ", ".join(f"{len(scans)} {modality}" for modality, scans in self.trained.items())
        scans = f"{counted(len(self.parts['train']), 'scan')}{each and f' ({each})'}"
        print(f"pretraining on {scans}, validated on {on}, in {run}")

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        for modality in ("", *(f"_{modality}" for modality in self.trained)):
            name, trivial = (f"{error}{modality}" for error in method.error)
            if metrics.get(trivial):  # 0 where nothing was hidden
                ratio, said = metrics[name] / metrics[trivial], predictor_of(method.error[1])
                print(f"{name} {metrics[name]:.5f}, {ratio:.2f} of the {said}'s {metrics[trivial]:.5f}")

    @staticmethod
    def predict(config: Config) -> None:
        """Maps of asymmetry, or of the errors of a network's predictions; see `map` of asa-predict."""
        checkpoint = only_checkpoint(config, "an anomaly map")
        own = {key: config[key] for key in ("strip", "plugins")}
        model, preprocessor = read_pretrained(checkpoint, channels=channels_of(config), **own)
        asymmetry = config["map"] == "asymmetry" or (config["map"] is None and hasattr(model, "asymmetry"))
        scorer: Any = AsymmetryScorer if asymmetry else PredictionErrorScorer
        predict_anomalies(scorer(model, preprocessor, typed(PredictSettings, config["predict"])), config)

    @staticmethod
    def evaluate(config: Config) -> None:
        table, truth, out = tables_of(config, ASYMMETRY_TABLE, ANOMALY_TABLE)
        if (truth / MANIFEST).exists():
            if config["regions"] is not None:
                raise ValueError("regions= is for label maps; of anomaly maps every label is right: leave it out")
            split, part = config["split_file"], config["part"]
            summary = evaluate_maps(table, Store(truth), out, None if split is None else subjects_in(split, part))
            print(MAPS_SCORED.format(**summary["scans"]))
            for score, row in summary["voxels"].items():
                print(f"{score:<17} {in_interval(row['mean'], row['low'], row['high'])}")
            results, notes = summary["results"], summary["notes"]
        else:
            results, counts, notes = evaluate_asymmetry(table, truth, out)
            print(TABLE_SCORED.format(**counts, truth=truth))
        for measure, row in results.items():
            print(f"AUC of {measure:<6} {in_interval(row['auc'], row['auc_low'], row['auc_high'])}")
        for note in notes:
            print(note)


def validate_pretraining(method: PretrainingMethod, dataset: CropDataset) -> Validation:
    """Means of what a method in evaluation mode returns over all records, and panels of the first record.

    Where records are of several modalities, "NAME_MODALITY" are the means over those of each. Several processes divide
    the records between them; each returns the whole result, and the main one the panels. The random draws are always
    the same, and crops are not augmented.
    """
    assert isinstance(method, nn.Module)
    device = next(method.parameters()).device
    panels: dict[str, np.ndarray] = {}

    def errors(index: int) -> dict[str, float]:
        batch = on_device(collate([dataset[index, 0]]), device)
        if not panels:
            panels.update(reconstruction_panels(method, batch))
        return {name: float(value) for name, value in method(batch).items() if not value.dim()}

    rows = map_over_ranks(range(len(dataset)), errors)
    groups = {"": rows}
    for id, row in zip(dataset.ids, rows, strict=True):
        for key, own in (dataset.attached or {}).get(id, {}).items():
            if key.startswith(MODALITY) and own:
                groups.setdefault(f"_{key.removeprefix(MODALITY)}", []).append(row)
    means: dict[str, float] = {}
    for of, part in groups.items():
        means |= {f"{name}{of}": sum(row[name] for row in part) / len(part) for name in rows[0]}
    return means, panels


def reconstruction_panels(method: PretrainingMethod, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """A method's figures of a batch's first sample by name, RGB uint8, with a title above each column."""
    panels = {}
    for name, volumes in method.pictures(batch).items():
        first = [volume[0, 0].float().cpu().numpy() for volume in volumes.values()]
        panels[name] = reconstruction_panel(*first, titles=list(volumes))
    return panels


def read_health(source: str | None, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The health of each scan by record id, which batches hold as "health": 1 healthy, 0 patient, NaN unknown.

    The source is "healthy" for a cohort of healthy subjects, a table with subject (or id) and health, or None where it
    is not known. A ValueError for a table that does not fit, or a health that is neither 0 nor 1.
    """
    if source is None:
        return {}
    ids = records.ids if isinstance(records, StoredRecords) else [record["id"] for record in records]
    if source == HEALTHY:
        return {id: {"health": 1.0} for id in ids}
    values = read_column(source, "health", records)
    check_health(source, values.values())
    each = ({"health": float(values.get(record["id"], UNKNOWN))} for record in records)
    return dict(zip(ids, each, strict=True))
