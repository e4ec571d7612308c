"""Features of whole scans as a table, and what a simple model reads from such a table.

asa-embed                   OUT/features.csv      id, subject, and PART_0, PART_1, ... of each part; or OUT, a table
                            OUT/ID.npy            arrays=true: the same numbers, float32 (E,)
asa-evaluate policy=probe   OUT/summary.json      the scores
                            OUT/predictions.csv   of each scan, by folds that have not seen its subject
                            OUT/report.html       both for reading, with a figure (needs the `report` extra)
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import whole_file, write_json, write_whole
from asa.data.io.nifti import Volume
from asa.data.io.tables import PARQUET, as_number, check_own, check_table, csv_text, read_column
from asa.data.store import MANIFEST, Store
from asa.errors import counted
from asa.evaluation.probe import FITS, probe_classes, probe_numbers
from asa.evaluation.statistics import in_interval, nullable
from asa.evaluation.summary import check_summary
from asa.evaluation.tables import matched, numbers, table_in, unpredicted, without_prediction
from asa.inference.features import FeatureExtractor, pooled
from asa.reporting.pages import check_page
from asa.reporting.plots import write_probe
from asa.settings import Config, check_choice
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import add_rows, channels_of, predict_scans, rows_in

TABLE = "features.csv"
COLUMN = r"subject|.*_\d+"  # of a table of features
LEAK = 0.5  # the AUC of guessing
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
MOST_CLASSES = 10  # of a column of numbers that a logistic regression takes


class Embedder:
    def __init__(self, config: Config) -> None:
        self.parts, self.arrays = config["of"], config["arrays"]
        self.table = table_in(Path(str(config["out"])), TABLE)
        check_table(self.table)
        check_own(self.table, "asa-embed", {"id"}, COLUMN)
        listed = rows_in(self.table)
        arrays = sorted(self.table.parent.glob("*.npy")) if self.arrays else ()
        if others := [path for path in arrays if path.stem not in listed]:
            raise ValueError(f"{others[0]}: exists and is of no scan in {self.table.name}: choose another out=")
        self.source = source = Path(str(config["input"]))
        self.store = Store(source) if self.parts == "labels" and (source / MANIFEST).exists() else None
        if self.parts == "labels" and (self.store is None or not self.store.labels):
            raise ValueError("of=labels: needs the labels of a store, input=STORE")
        self.extractor = FeatureExtractor(
            str(config["checkpoint"]),
            **{key: config[key] for key in ("img_size", "strip", "device", "plugins")},
            channels=channels_of(config),
        )
        self.preprocessor = self.extractor.preprocessor
        if self.parts == "sides":
            self.preprocessor.warn_unless_centred()

    def finish(self, found: Mapping[str, list[tuple[str, np.ndarray]]]) -> str:
        digits = 9 if self.table.suffix == PARQUET else 6  # of a float32
        rows = {}
        for id, parts in found.items():
            named = ((f"{part}_{k}", value) for part, values in parts for k, value in enumerate(values))
            rows[id] = {"id": id, **{name: "" if math.isnan(x) else f"{x:.{digits}g}" for name, x in named}}
        self.table.parent.mkdir(parents=True, exist_ok=True)
        add_rows(self.table, rows, source=self.source)
        for id, parts in found.items() if self.arrays else ():
            with whole_file(self.table.parent / f"{id}.npy") as file:
                np.save(file, np.concatenate([values for _, values in parts]).astype(np.float32))
        return f"wrote {self.table}: {counted(len(rows), 'scan')}"

    def predict_stored(
        self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume
    ) -> list[tuple[str, np.ndarray]]:
        """The features of each part of a scan."""
        volume = np.array(image, dtype=np.float32)  # that of a store is read-only, of which PyTorch warns
        tokens, head = self.extractor.tokens(volume), (volume != 0).any(axis=0)
        if not head.any():
            raise ValueError("every voxel is 0")
        if self.parts == "labels":
            assert self.store is not None
            label = self.store.label(id)
            if label is None:
                raise ValueError("of=labels: this scan has no labels")
            masks = {name: label[0] == k for k, name in enumerate(self.store.labels.values(), start=1)}
            return [(name, pooled(tokens, self.extractor.fractions(mask))) for name, mask in masks.items()]
        weights = self.extractor.fractions(head)
        if self.parts == "whole":
            return [("whole", pooled(tokens, weights))]
        half = weights.shape[2] // 2
        left, right = pooled(tokens[..., :half], weights[..., :half]), pooled(tokens[..., -half:], weights[..., -half:])
        return [("left", left), ("right", right), ("difference", left - right)]


def embed_task(config: Config) -> None:
    """Write the features of a scan, a folder of scans or a store."""
    predict_scans(Embedder(config), config)


def evaluate_probe(config: Config) -> None:
    """Score what a simple model reads from features about a column of a table, and how well they tell the site.

    An ImportError without the extra `probe`; without `report` only the page is missing.
    """
    table, truth, out = tables_of(config, TABLE)
    check_page(out / "report.html")
    check_own(out / "predictions.csv", "asa-evaluate", {"id", "predicted"}, "(?!subject$).*")  # no asa-predict's
    check_summary(out, "probe", "folds")
    column, folds, probe = config["column"], config["folds"], config["probe"]
    rows, values, subjects = matched(table, truth, column)
    names = [name for name in rows[0] if name not in ("id", "subject") and any(row[name] for row in rows)]
    if empty := {name.rpartition("_")[0] for name in rows[0].keys() - {"id", "subject", *names}}:
        print(f"left out, as no scan has their features: {', '.join(sorted(empty))}")
    if not names:
        raise ValueError(f"{table}: has no features of the scans in {truth}")
    features = np.array([numbers(table, row, names) for row in rows])
    scans = [{"id": row["id"], "subject": subject} for row, subject in zip(rows, subjects, strict=True)]
    check_choice("probe", probe, FITS)
    if numeric := any(map(_is_number, values)):  # then all have to be
        for row, text in zip(rows, values, strict=True):
            as_number(truth, row["id"], column, text)
    elif wrong := next((value for value in values if DECIMAL_COMMA.fullmatch(value)), None):
        raise ValueError(f"{truth}: {column} is {wrong!r}: write decimals with a point")
    elif max(Counter(value for value, _ in {*zip(values, subjects, strict=True)}).values()) < 2:
        raise ValueError(f"{truth}: each {column} is of one subject, like {values[0]!r}: classes have to repeat")
    if numeric and probe == "logistic" and (different := len(set(values))) > MOST_CLASSES:
        raise ValueError(f"probe=logistic is for classes, and {column} has {different} values: choose ridge or knn")
    predict = probe_numbers if numeric and probe != "logistic" else probe_classes
    found = predict(features, values, subjects, folds, FITS[probe])
    left_out = without_prediction(truth, column, rows, subjects)
    written: dict[str, Any] = {"column": column, "probe": probe, "folds": folds, "scans": len(rows)}
    written |= nullable(found.scores) | {"without_prediction": left_out}
    lines = [f"{column}: {found.text()}, {counted(len(rows), 'scan')} of {len(set(subjects))} subjects, {folds} folds"]
    lines += unpredicted(left_out)
    if (group := config["group"]) is not None:
        groups, written["groups"] = _complete(truth, group, scans), {}
        for name in sorted(set(groups)):
            part, gap = found.only(groups == name), found.gap(groups == name)
            written["groups"][name] = nullable(part.scores) | {"gap": nullable(gap)}
            less = in_interval(gap["gap"], gap["low"], gap["high"], "+.3g")
            lines.append(
                f"  {group} {name}: {part.text()}, {counted(len(part.truth), 'scan')}, less the others' {less}"
            )
    sites = None
    if (site := config["site"]) is not None:
        sites = site, list(_complete(truth, site, scans))
        leak = probe_classes(features, sites[1], subjects, folds, FITS[probe])
        written["site"] = nullable(leak.scores)
        lines.append(f"{site}: {leak.text()}")
        if leak.scores["low"] > LEAK:
            lines.append(
                f"ALARM: the features tell {site}s apart: what they say about {column} may be the {site}, unless it is "
                "as frequent in each"
            )
    print("\n".join(lines))
    write_json(out / "summary.json", written)
    text = csv_text(["id", column, "predicted"], zip((row["id"] for row in rows), values, found.predicted, strict=True))
    write_whole(out / "predictions.csv", text.encode())
    write_probe(out / "report.html", column, lines, values, found.predicted, sites)
    print(f"wrote summary.json, predictions.csv and report.html to {out}")


def _complete(table: Path, column: str, scans: list[dict[str, str]]) -> np.ndarray:
    """A column of a table for all scans; a ValueError if it is empty for some."""
    found = read_column(table, column, scans)
    if empty := len(scans) - len(found):
        raise ValueError(f"{table}: no {column} of {counted(empty, 'scan')}: fill it in, or leave the setting out")
    return np.array([found[scan["id"]] for scan in scans])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
