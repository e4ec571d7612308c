"""Segmentation: label maps from labelled scans.

Data: crops of a prepared store with labels; the left and the right label of a pair are exchanged in mirrored crops, or
joined. Loss: the method's (Dice and cross-entropy with deep supervision, over classes or over regions). Validation:
Dice of whole volumes of the validation part, joined labels as one, and the loss of their central crops. A checkpoint
holds channels, labels, regions, preparation and voxel sizes. Prediction: label maps in each scan's own space, by a
sliding window, and their volumes. Evaluation: label maps against the truth under a named policy.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.config import build, typed
from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset, JoinedSides, VolumeSource
from asa.data.loading.loader import collate
from asa.data.store import Store
from asa.errors import counted, listed
from asa.evaluation.metrics import dice
from asa.inference.anomaly import LabelScorer
from asa.inference.label_maps import Outputs
from asa.inference.segmentation import sliding_window
from asa.inference.unlabelled import REST, UnlabelledScans
from asa.methods.segment import Segmentation as SegmentationMethod
from asa.ops.labels import IGNORED, joined_sides, pairs_by_name, side_of
from asa.ops.nested import painting_order
from asa.reporting.figures import central_slices, label_colours, overlay_panel, titled, with_legend
from asa.settings import Config, PredictSettings
from asa.tasks.evaluation import evaluate_label_maps
from asa.tasks.prediction import LABEL_MAPS_ONLY, SegmentationPredictor, networks_of, predict_anomalies, predict_scans
from asa.tasks.volumes import Records, VolumeTask, absolute, choose_split
from asa.training.device import on_device
from asa.training.distributed import map_over_ranks
from asa.training.loop import Validate, Validation

SIDED_SCANS = 5  # whose label maps are searched for exchanged sides


class Segmentation(VolumeTask):
    """Segmentation from a prepared store with labels."""

    command = "finetune"
    cross_validates = True
    anomalies = True
    targets = ("label",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.windows = typed(PredictSettings, config["predict"])
        store = self.store
        self.index = {store.labels[value]: k for k, value in enumerate(store.label_values, start=1)}
        self.regions = _regions(config["method"], store)
        declared = self.data.lateral_pairs
        self.pairs = pairs_by_name(list(self.index)) if declared is None else declared
        self.lateral_pairs = lateral_indices(self.pairs, self.index, self.augment)
        self.join_sides = self._joins_sides()
        for left, right in self.pairs if self.join_sides else []:
            if side_of(left) == "r" or side_of(right) == "l":
                why = "the left one has to be the first, as the plane separates them"
                raise ValueError(f"data.lateral_pairs: in [{left}, {right}] {why}: give [{right}, {left}]")
        if self.join_sides:
            check_sides(store, self.parts["train"], self.lateral_pairs)
        joined = joined_sides(len(self.index) + 1, self.lateral_pairs if self.join_sides else [])
        self.set_model(out_channels=len(self.regions) or max(joined) + 1)
        self.unlabelled = None if self.data.unlabelled is None else self._unlabelled(self.data.unlabelled)
        scans = self.unlabelled or self.store
        self.source = JoinedSides(scans, joined) if self.join_sides else scans
        names = Outputs.of(self.target_metadata()).channel_names[1:]
        self.classes = {name: k for k, name in enumerate(names, start=1)}
        self.scored = self.regions or {name: [k] for name, k in self.classes.items()}

    def usable(self, store: Store) -> Collection[str]:
        self.labelled = {record["id"] for record in store.records if "label" in record["arrays"]}
        if not self.labelled:
            raise ValueError(f"{store.path}: the store has no labels: prepare it with labels={{1: name, ...}}")
        return self.labelled

    def _joins_sides(self) -> bool:
        """Whether each pair of labels is one class: as asked for, or else where the network is symmetric."""
        asked = self.data.join_sides
        possible = bool(self.lateral_pairs) and not self.regions
        if asked and not possible:
            advice = "give data.lateral_pairs=[[left_x, right_x]], and a method without regions"
            raise ValueError(f"data.join_sides=true trains each pair of labels as one class: {advice}")
        if asked is not None or not possible:
            return bool(asked)
        node = {**self.config["model"], "in_channels": len(self.store.channels), "out_channels": 2}
        with torch.device("meta"):
            network: Any = build(node, plugins=self.config["plugins"])
        return network.mirrored or getattr(network.encoder, "symmetric", False)

    def _unlabelled(self, chosen: str) -> UnlabelledScans:
        run, data = Path(str(self.config["out"])), self.config["data"]
        if chosen != REST:
            absolute(data, "unlabelled")
        records, site, known = self.store.records, str(data["split"].get("site")), set().union(*self.split.values())
        drawn = choose_split([one for one in records if one["id"] in self.labelled], {**data, "labelled": None}, run)
        # Where no file says otherwise also those without any label map, but for the site that is tested.
        others = [] if data["split_file"] else [one["subject"] for one in records if one.get("site") != site]
        rest = [subject for subject in dict.fromkeys([*drawn["train"], *others]) if subject not in known]
        return UnlabelledScans(chosen, self.store, self.split, rest, run)

    def trained_on(self) -> Records:
        return [*self.parts["train"], *(self.unlabelled.records if self.unlabelled else [])]

    def explain_init(self, method: Any) -> str:
        if not self.config["init"]:
            raise ValueError("transfer=explain reports what would be loaded from a checkpoint: give init=")
        return self.init.load(method.model, explain=True)

    def dataset(self, method: Any) -> CropDataset:
        pairs = [] if self.join_sides else self.lateral_pairs
        labels: dict[str, Any] = {"labelled": True, "foreground": self.data.foreground, "lateral_pairs": pairs}
        return self.crops(method, self.trained_on(), crop=self.data.placement, augment=self.augment, **labels)

    def validation(self, method: Any) -> Validate | None:
        if not self.parts["validation"]:
            return None
        ids, scored = [record["id"] for record in self.parts["validation"]], self.scored
        centres = self.crops(method, self.parts["validation"], labelled=True)
        names = list(self.index if self.regions else self.classes)

        def validate(step: int) -> Validation:
            metrics, panels = validate_segmentation(method, self.source, ids, scored, self.windows, names)
            return {**metrics, "loss": mean_loss(method, centres)}, panels

        return validate

    def metrics(self, make: Any) -> list[str]:
        return ["dice", *(f"dice_{name}" for name in self.scored), "loss"]

    def target_metadata(self) -> dict[str, Any]:
        return {
            "labels": self.store.labels,
            **({"regions": list(self.store.regions.items())} if self.regions else {}),
            "lateral_pairs": [list(pair) for pair in self.pairs],
            **({"join_sides": True} if self.join_sides else {}),
            **({} if self.windows.overlap is None else {"overlap": self.windows.overlap}),
        }

    def begin(self, run: Path) -> None:
        self.init.write(run)
        start = f"the encoder of {self.config['init']}" if self.config["init"] else "scratch"
        train, validation = len(self.parts["train"]), len(self.parts["validation"])
        others = f" and {len(self.unlabelled.records)} unlabelled ones" if self.unlabelled else ""
        used = self.labelled | (self.unlabelled.ids if self.unlabelled else set())
        if without := [id for id in self.store.records.ids if id not in used]:
            print(f"left out, without a label map: {listed(without)}")
        print(f"fine-tuning from {start} on {counted(train, 'scan')}{others}, validated on {validation}, in {run}")
        if self.unlabelled:
            self.unlabelled.carry_labels()

    def finish(self, run: Path, method: Any, metrics: Mapping[str, float]) -> None:
        if "dice" in metrics:
            print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    @staticmethod
    def predict(config: Config) -> None:
        """Label maps; with `healthy` anomaly maps in their place: the probability of any label, above healthy scans."""
        if config["healthy"] is None:
            predictor = SegmentationPredictor(config)
            predict_scans(predictor, config, predictor.layout, predictor.add)
            return
        if given := [key for key in LABEL_MAPS_ONLY if config[key] and key != "mirror"]:
            raise ValueError(f"{given[0]}= is for label maps, healthy= gives anomaly maps: leave one of them out")
        predict_anomalies(LabelScorer(networks_of(config, progress=False)), config)

    @staticmethod
    def evaluate(config: Config) -> None:
        evaluate_label_maps(config)


def _regions(node: Config, store: Store) -> dict[str, list[int]]:
    """The store's regions as class indices, entered into the configuration of a method that learns them; else none."""
    if "regions" not in node:
        return {}
    if not store.regions:
        raise ValueError(f"{store.path}: the store has no regions: prepare it with regions={{NAME: [values], ...}}")
    painting_order(store.regions)
    index = {value: k for k, value in enumerate(store.label_values, start=1)}
    node["regions"] = {name: [index[value] for value in values] for name, values in store.regions.items()}
    return dict(node["regions"])


def lateral_indices(
    pairs: Sequence[Sequence[str]], index: Mapping[str, int], augment: AugmentSettings
) -> list[tuple[int, int]]:
    """Class indices of left/right pairs of names; a ValueError if a label with a side has none in mirrored crops."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"data.lateral_pairs is a list of pairs, like [[left_x, right_x]], got {pairs}")
    paired = [name for pair in pairs for name in pair]
    for name in paired:
        if name not in index:
            raise ValueError(f"data.lateral_pairs names {name!r}; the store's labels are {', '.join(index)}")
    unpaired = [name for name in index if side_of(name) and name not in paired]
    if unpaired and augment.mirror_probability > 0 and "W" in augment.mirror_axes:
        alone = f"the label {unpaired[0]!r} has a side and no partner to be exchanged with in mirrored crops"
        raise ValueError(f"{alone}: give data.lateral_pairs=[[left_x, right_x]], or augment.mirror_axes=DH")
    return [(index[left], index[right]) for left, right in pairs]


def check_sides(store: Store, records: Records, pairs: Sequence[tuple[int, int]]) -> None:
    """Raise a ValueError if in most of a few label maps the left one of `pairs` of class indices lies to the right."""
    side = np.zeros(256, np.int8)
    for left, right in pairs:
        side[left], side[right] = -1, 1
    exchanged = 0
    labels = [store.label(record["id"]) for record in records[:SIDED_SCANS] if "label" in record["arrays"]]
    for label in labels:
        assert label is not None
        sides = side[label[0]]
        left, right = (np.flatnonzero(sides == one) % sides.shape[2] for one in (-1, 1))  # W, from left to right
        if left.size and right.size:  # clearly: a pair may have no side in fact
            exchanged += bool(left.mean() - right.mean() > (left.std() + right.std()) / 2)
    if exchanged > len(labels) / 2:
        names = [store.labels[store.label_values[index - 1]] for index in pairs[0]]
        raise ValueError(
            f"{store.path}: voxels named {names[0]} lie on the right, by the header, and those named {names[1]} on the "
            "left, and so in other pairs: exchange the names, or correct the orientation of the files "
            "(data.join_sides=false trains with them as they are)"
        )


def validate_segmentation(
    method: SegmentationMethod,
    source: VolumeSource,
    ids: Sequence[str],
    parts: Mapping[str, Sequence[int]],
    settings: PredictSettings,
    names: Sequence[str],
) -> Validation:
    """Dice of whole prepared volumes, ignored voxels left out, and an overlay of the first volume with its truth.

    Several processes divide the scans between them; each returns the whole result, and the main one the overlay.

    Args:
        method, source, ids: the method, in evaluation mode, and the labelled scans.
        parts: name -> class indices that are scored as one: labels, or regions.
        settings, names: of the sliding window; and of the classes from 1, for the legend.

    Returns:
        "dice_NAME" of each part (1 for a scan where neither map holds it) and "dice", their mean; and a panel of
        image, truth and prediction in three planes, through the middle of what is labelled.
    """
    panels: dict[str, np.ndarray] = {}

    def scores(id: str) -> list[float]:
        image, truth = source.image(id), source.label(id)
        assert truth is not None
        volume = torch.from_numpy(np.array(image, dtype=np.float32))
        prediction = method.label_map(sliding_window(method.model, volume, settings)).cpu().numpy()
        counted = truth[0] != IGNORED
        truth, prediction = truth[0] * counted, prediction * counted
        if not panels:
            columns = ["image", "truth", "prediction"]
            panel = overlay_panel(volume[0].numpy(), [truth, prediction], at=central_slices(truth > 0))
            panel = with_legend(panel, names, label_colours(len(names)))
            panels[", ".join(columns)] = titled(panel, columns)
        found = [dice(np.isin(prediction, values), np.isin(truth, values)) for values in parts.values()]
        return [1.0 if math.isnan(score) else score for score in found]  # in neither map: right

    columns = zip(*map_over_ranks(ids, scores), strict=True)
    metrics = {f"dice_{name}": float(np.mean(column)) for name, column in zip(parts, columns, strict=True)}
    return {"dice": float(np.mean(list(metrics.values()))), **metrics}, panels


def mean_loss(method: SegmentationMethod, dataset: CropDataset) -> float:
    """Mean loss over labelled crops; several processes divide them, and each returns the mean of all."""
    device = next(method.parameters()).device

    def loss(index: int) -> float:
        return float(method(on_device(collate([dataset[index]]), device))["loss"])

    return float(np.mean(map_over_ranks(range(len(dataset)), loss)))
