"""asa-finetune method=classify: learn classes of whole volumes from a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asa.cli.cohort import Records, open_parts
from asa.cli.front import Config, open_run
from asa.cli.planning import preflight, show_plan, wants_plan
from asa.cli.seen import seen_report
from asa.config import build, typed
from asa.data.augment import AugmentSettings
from asa.data.files import write_json, write_whole
from asa.data.identity import known_trained, seen_subjects, trained_on
from asa.data.loader import CropDataset, LoaderSettings
from asa.data.tables import read_column
from asa.engine.checkpoint import find_weights, load_model
from asa.engine.classification import ClassScores, class_table, predict_classes, score_classes
from asa.engine.distributed import is_main
from asa.engine.intake import learnt_from
from asa.engine.optim import OptimSettings
from asa.engine.source import read_source, start_from, start_sides
from asa.engine.train import TrainSettings, check_settings, pick_device, train


def classify(config: Config) -> None:
    """Fine-tune a classifier, and score the test part of the split.

    Raises:
        ValueError: no table, no class in a part of the split, or a pretrained encoder that does not match.
    """
    settings, optim = typed(TrainSettings, config["train"]), typed(OptimSettings, config["optim"])
    augment, loader = typed(AugmentSettings, config["augment"]), typed(LoaderSettings, config["loader"])
    planning, explain = wants_plan(config), config.pop("transfer") == "explain"
    if not planning:
        check_settings(settings, optim)
    if explain:
        raise ValueError("transfer=explain is of segmentation: leave it out with method=classify")
    data = config["data"]
    if data["classes"] is None:
        raise ValueError("data.classes has to be given with method=classify: a table with subject (or id) and class")
    data["store"], data["classes"] = (str(Path(str(data[key])).resolve()) for key in ("store", "classes"))
    source = read_source(config["init"]) if config["init"] and not planning else None
    store, split, parts = open_parts(data, Path(str(config["out"])))
    said = read_column(data["classes"], "class", store.records)
    names = sorted(set(said.values()))
    parts = {name: [record for record in part if record["id"] in said] for name, part in parts.items()}
    targets = {id: {"target": names.index(name)} for id, name in said.items()}
    config["method"]["weights"] = _weights(config["method"]["weights"], parts["train"], targets, len(names))
    for node in (config["model"], config["method"]["model"]):
        node["in_channels"], node["classes"] = len(store.channels), len(names)

    def make() -> Any:
        return build(config["method"], plugins=config["plugins"])

    if planning:
        show_plan(config, make, len(parts["train"]), settings, optim, labelled=False)
        return
    preflight(make, settings, optim, labelled=False)
    torch.manual_seed(settings.seed)
    method = make()
    trained, seen = trained_on(parts["train"]), None
    if source is not None:
        weights, origin = source
        if method.mirrored:
            print(start_sides(config["init"], weights, origin, method.model, config["model"]))
        else:
            print(start_from(config["init"], weights, origin, method.model.encoder, config["model"], explain=False))
        if before := known_trained(origin.get("data", {})):
            trained, seen = trained_on(parts["train"], before), seen_subjects(store.records, split, before)
        print("\n".join(seen_report(seen, config["init"])))

    def crops(records: Records) -> CropDataset:
        size = method.model.encoder.img_size
        return CropDataset(store, records, size, mirrored=method.mirrored, attached=targets, seed=settings.seed)

    dataset = crops(parts["train"])
    dataset.crop, dataset.augment = data["placement"], augment
    description = {
        "model": config["model"],
        "data": {
            "channels": store.channels,
            "classes": names,
            "prepare": store.settings,
            **learnt_from([], parts["train"]),
            **trained,
        },
    }

    def scored(model: nn.Module, records: Records) -> tuple[ClassScores, np.ndarray]:
        shares = predict_classes(model, crops(records))
        truth = np.array([targets[record["id"]]["target"] for record in records])
        return score_classes(shares, truth, [str(record["subject"]) for record in records]), shares

    def validate(step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        scores = scored(method.model, parts["validation"])[0]
        return {name: getattr(scores, name) for name in ("auc", "balanced_accuracy", "ece")}, {}

    with open_run(config, split, settings) as run:
        if seen is not None and is_main():
            write_json(run / "seen.json", {"init": config["init"], "seen": [asdict(one) for one in seen]})
        counts = ", ".join(f"{count} {names[k]}" for k, count in sorted(_counts(parts["train"], targets).items()))
        print(f"classifying {', '.join(names)}: {len(parts['train'])} scans ({counts}), in {run}")
        train(
            method,
            dataset,
            run,
            settings=settings,
            optim=optim,
            loader=loader,
            description=description,
            validate=validate if parts["validation"] else None,
        )
        if parts["test"]:
            scores, shares = scored(load_model(run).to(pick_device(settings.device)), parts["test"])
            if is_main():
                _write(run, names, parts["test"], said, shares, scores)
    print(f"wrote {find_weights(run)}")


def _counts(records: Records, targets: Mapping[str, Mapping[str, int]]) -> Counter[int]:
    return Counter(targets[record["id"]]["target"] for record in records)


def _weights(
    chosen: Any, records: Records, targets: Mapping[str, Mapping[str, int]], classes: int
) -> list[float] | None:
    """The classes' weights; balanced ones have the mean 1 over the training scans."""
    if chosen != "balanced":
        return chosen
    counts = _counts(records, targets)
    if missing := [k for k in range(classes) if not counts[k]]:
        raise ValueError(f"data.classes: class number {missing[0]} has no scan in the training part of the split")
    return [len(records) / (classes * counts[k]) for k in range(classes)]


def _write(
    run: Path,
    names: Sequence[str],
    records: Records,
    said: Mapping[str, str],
    shares: np.ndarray,
    scores: ClassScores,
) -> None:
    """The test part's probabilities as a table, its scores as JSON and in words."""
    rows = [(record["id"], str(record["subject"]), said[record["id"]]) for record in records]
    write_whole(run / "predictions_test.csv", class_table(names, rows, shares).encode())
    write_json(run / "scores_test.json", {"classes": list(names), **asdict(scores)})
    print(
        f"test: AUC {scores.auc:.3f} ({scores.auc_low:.3f} to {scores.auc_high:.3f}), balanced accuracy "
        f"{scores.balanced_accuracy:.3f}, ECE {scores.ece:.3f}, {scores.scans} scans of {scores.subjects} subjects"
    )
    for name, row in zip(names, scores.confusion, strict=True):
        print(f"  {name}: {', '.join(f'{count} as {other}' for count, other in zip(row, names, strict=True) if count)}")
