"""What asa-predict is asked for: which checkpoints and which scans; label and anomaly maps, and tables of scans."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asa.config import typed
from asa.data.io.files import check_out, make_below, write_whole
from asa.data.io.lock import in_turn
from asa.data.io.nifti import Volume
from asa.data.io.tables import NETWORK, PARQUET, TRAINED_ON, check_own, csv_text, read_rows, short, write_numbers
from asa.data.splits import read_split
from asa.data.store import MANIFEST, Store
from asa.inference.anomaly import COLUMNS, AnomalyScorer
from asa.inference.atlas import AtlasSegmenter
from asa.inference.layout import ATLASES, VOLUMES, BidsDerivative, Layout, probabilities_of
from asa.inference.preprocessing import ScanPreprocessor
from asa.inference.scans import Scan, ScanPredictor, predict_each, raw_scans, stored_scans
from asa.inference.segmentation import Segmenter
from asa.settings import Config, PredictSettings
from asa.training.checkpoint_files import is_shipped, on_hub

COLUMN = rf"file|.*_(ml|expected_dice)|{NETWORK}|{TRAINED_ON}"  # of a table of volumes
LABEL_MAPS_ONLY = ("mirror", "probabilities", "uncertainty", "layout")  # settings


def predict_scans(
    predictor: ScanPredictor,
    config: Config,
    layout: Layout | None = None,
    done: Callable[[str, Any], None] | None = None,
) -> None:
    """Predict a scan, a folder of scans, or a store; without a layout the predictor writes `OUT/ID.nii.gz`."""
    layout = layout or Layout(Path(str(config["out"])))
    predict_each(predictor, scans_of(config, predictor.preprocessor), layout, done=done)


def predict_anomalies(scorer: AnomalyScorer, config: Config) -> None:
    """Write an anomaly map `OUT/ID.nii.gz` of each scan, and the measures of all to the scorer's table in OUT."""
    predictor, layout = _AnomalyPredictor(scorer, config), Layout(Path(str(config["out"])), table=scorer.table)
    scans = scans_of(config, scorer.preprocessor)
    if config["healthy"] is not None:  # after the folders were checked, as it takes long
        scorer.compare_with(config["healthy"])
    predict_each(predictor, scans, layout)


class _AnomalyPredictor:
    def __init__(self, scorer: AnomalyScorer, config: Config) -> None:
        self.scorer, self.preprocessor = scorer, scorer.preprocessor
        self.out, self.source = Path(str(config["out"])), Path(str(config["input"]))
        self.table = self.out / scorer.table
        check_out(self.out, scorer.table, f"a folder of anomaly maps (with {scorer.table})")
        check_own(self.table, "asa-predict", {"id"}, "|".join(["subject", *COLUMNS, TRAINED_ON]))

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> dict[str, str]:
        return self.scorer.score_prepared(id, image, chain, like, self.out / f"{id}.nii.gz")

    def finish(self, found: Mapping[str, dict[str, str]]) -> str:
        add_rows(self.table, found, source=self.source)
        return f"wrote {self.table}, and a map of each scan beside it"


class SegmentationPredictor:
    """Writes the label map of each scan and `OUT/volumes.csv`; on request also probabilities and uncertainty.

    They are those of `segmenter`, or of the networks of the configuration. A folder is refused if it holds label maps
    that atlases made, which networks would mix with theirs, or other files that might be replaced.
    """

    def __init__(self, config: Config, segmenter: AtlasSegmenter | None = None) -> None:
        self.out, self.with_probabilities = Path(str(config["out"])), config["probabilities"]
        if (self.out / VOLUMES).exists():
            read_rows(self.out / VOLUMES)  # rows are added to it: refused before the work if it is no table
            check_own(self.out / VOLUMES, "asa-predict", {"id"}, COLUMN)
        if segmenter is None and (self.out / ATLASES).exists():
            raise ValueError(f"{self.out} holds label maps that atlases made ({ATLASES}): choose another out=")
        if config["layout"] != "bids" and self.out.is_dir():
            other = ".nii.gz" if config["layout"] == "mgz" else ".mgz"
            if found := sorted(self.out.glob(f"*{other}")):
                raise ValueError(f"{found[0]}: label maps of the other layout are here: choose another out=")
        if segmenter is None and config["layout"] != "bids":  # which has a mark of its own
            check_out(self.out, VOLUMES, f"a folder of asa-predict (with {VOLUMES})")
        self.with_uncertainty = config["uncertainty"] is not None
        self.segmenter: Segmenter | AtlasSegmenter = segmenter or networks_of(config)
        self.preprocessor = self.segmenter.preprocessor
        self.layout = Layout(self.out, ".mgz" if config["layout"] == "mgz" else ".nii.gz", VOLUMES)
        if config["layout"] == "bids":
            made_by = self.segmenter.described()
            self.layout = BidsDerivative(self.out, self.segmenter.outputs, made_by, self.with_probabilities)

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> dict[str, str]:
        """Predict a scan; its row in the table of volumes."""
        probabilities, uncertainty = self.further_files(id)
        out = self.layout.label_map(id)
        beside = {*probabilities_of(self.out, id, out).values(), self.layout.uncertainty(id)}
        for earlier in beside - {*probabilities, *uncertainty}:
            earlier.unlink(missing_ok=True)
            earlier.with_name(earlier.name.replace(".nii.gz", ".json")).unlink(missing_ok=True)
        make_below(self.out, out, *probabilities, *uncertainty)
        ml, expected = self.segmenter.segment_prepared(
            image, chain, like, out, probabilities=probabilities or None, uncertainty=next(iter(uncertainty), None)
        )
        row = {"id": id}
        if isinstance(self.layout, BidsDerivative):
            row["file"] = out.relative_to(self.out).as_posix()
        row |= {f"{name}_ml": f"{value:.3f}" for name, value in ml.items()}
        for name, value in expected.items():
            row[f"{name}_expected_dice"] = "" if math.isnan(value) else f"{value:.4f}"
        for step in chain.get("steps", ()):
            if step["stage"] == "strip" and "ml" in step:
                row["brain_mask_ml"] = str(step["ml"])
        if isinstance(self.segmenter, Segmenter):
            row[NETWORK] = short(*self.segmenter.digests)
        return row

    def further_files(self, id: str) -> tuple[list[Path], list[Path]]:
        """Where the probabilities of a scan and its uncertainty are written, if they are asked for."""
        probabilities = self.layout.probabilities(id) if self.with_probabilities else []
        if isinstance(probabilities, Path):
            probabilities = self.segmenter.outputs.files(probabilities)
        return probabilities, [self.layout.uncertainty(id)] if self.with_uncertainty else []

    def finish(self, found: Mapping[str, Any]) -> str:
        return f"wrote label maps and {VOLUMES} to {self.out}"

    def add(self, id: str, row: dict[str, str]) -> None:
        """Add a scan's row to the table of volumes, as soon as it has its label map."""
        add_rows(self.out / VOLUMES, {id: row}, before=self.rows_before)

    def rows_before(self) -> dict[str, dict[str, str]]:
        """Rows of an earlier table, of scans whose label maps are still here; another network's have other columns."""
        rows, end = rows_in(self.out / VOLUMES), self.layout.ending
        return {id: row for id, row in rows.items() if (self.out / (row.get("file") or f"{id}{end}")).is_file()}


def networks_of(config: Config, *, progress: bool = True) -> Segmenter:
    """The networks of asa-predict, with a progress bar of windows; raises as `Segmenter`."""
    settings, uncertainty = typed(PredictSettings, config["predict"]), config["uncertainty"] or "entropy"
    own = {key: config[key] for key in ("mirror", "strip", "plugins")}
    return Segmenter(checkpoints_of(config), settings, uncertainty=uncertainty, progress=progress, **own)


def scans_of(config: Config, preprocessor: ScanPreprocessor) -> list[Scan]:
    """The scans to predict: a scan, those of a folder, or those of a store or of a part of it."""
    if config.get("regions") is not None:
        raise ValueError(f"regions={config['regions']}: label maps for a network of method=restore: leave it out")
    source, out = Path(str(config["input"])), Path(str(config["out"]))
    if (source / MANIFEST).exists():
        return stored_scans(source, preprocessor, subjects_of_part(config))
    if config["part"] is not None:
        raise ValueError("part= chooses scans of a store; leave it out for files")
    in_bids = config.get("layout") == "bids"
    return raw_scans(source, preprocessor, images=config["images"], out=out, in_bids=in_bids)


def channels_of(config: Config) -> list[str] | None:
    """The channels of the scans to predict: of a store, or those that `images` names; None where neither says."""
    source, images = Path(str(config["input"])), config["images"]
    return Store(source).channels if (source / MANIFEST).exists() else list(images) if images else None


def rows_in(table: Path) -> dict[str, dict[str, str]]:
    """The rows of a table of scans, by id; none if there is no table."""
    return {row.get("id", ""): row for row in read_rows(table)} if table.exists() else {}


def add_rows(
    table: Path,
    rows: Mapping[str, dict[str, str]],
    *,
    source: Path | None = None,
    before: Callable[[], dict[str, dict[str, str]]] | None = None,
) -> None:
    """Add rows of scans to a table, in place of its rows of the same scans; without rows nothing is written.

    Args:
        table, rows: in a folder that exists; cells by column, "id" among them, by id; in a Parquet others are numbers.
        source: what was predicted: subjects of a store are added, where they are not called as the scan.
        before: reads the rows that the table keeps; None: all of them.
    """
    if not rows:
        return
    records = Store(source).records if source is not None and (source / MANIFEST).exists() else ()
    others = {one["id"]: {"subject": one["subject"]} for one in records if one["subject"] != one["id"]}
    if table.suffix != PARQUET:
        rows = {id: row | others.get(id, {}) for id, row in rows.items()}
    with in_turn(table.parent):  # another process may add its scans at the same moment
        rows = dict(sorted(((before() if before else rows_in(table)) | dict(rows)).items()))
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        header = sorted(columns, key=lambda name: {"id": 0, "subject": 1}.get(name, 2))  # the others in their order
        cells = [[row.get(column, "") for column in header] for row in rows.values()]
        if table.suffix == PARQUET:
            write_numbers(table, header[1:], {id: [float(cell or "nan") for cell in row] for id, *row in cells})
        else:
            write_whole(table, csv_text(header, cells, "\t" if table.suffix == ".tsv" else ",").encode())


def checkpoints_of(config: Config) -> list[str]:
    """The checkpoints that are given, one or several."""
    chosen = config["checkpoint"]
    return [chosen] if isinstance(chosen, str) else [str(path) for path in chosen]


def only_checkpoint(config: Config, result: str) -> str:
    """The one checkpoint of a task without ensembles; a ValueError for several, or for settings of segmentation."""
    checkpoints = checkpoints_of(config)
    if len(checkpoints) != 1 or any(config[key] for key in LABEL_MAPS_ONLY):
        raise ValueError(f"{result} comes from one checkpoint, without {', '.join(LABEL_MAPS_ONLY)}: leave these out")
    return checkpoints[0]


def subjects_of_part(config: Config) -> list[str] | None:
    """Subjects of the part that is asked for, of the runs' one split or with atlases of `split_file`; None: all."""
    part = config["part"]
    if part is None:
        return None
    paths = [] if config["checkpoint"] is None else checkpoints_of(config)
    splits = {path: _run_of(Path(path)) / "split.json" for path in paths if not (on_hub(path) or is_shipped(path))}
    if config.get("atlas") is not None:
        if config["split_file"] is None:
            raise ValueError(f"part={part}: atlases have no split as a run has: give split_file=, or leave part= out")
        own = {path: file for path, file in splits.items() if file.exists()}  # networks of others have none
        splits = {config["split_file"]: Path(config["split_file"])} | own
    elif remote := [path for path in paths if path not in splits]:
        raise ValueError(f"part={part}: {remote[0]} has no split, which a run on this machine has: leave part= out")
    (first, subjects), *others = [(path, subjects_in(file, part)) for path, file in splits.items()]
    for path, other in others:
        if set(other) != set(subjects):
            raise ValueError(f"part={part}: {path} has other subjects there than {first}: predict fold by fold")
    return subjects


def subjects_in(split_file: str | Path, part: str) -> list[str]:
    """The subjects of a part of a split; a ValueError if there are none."""
    if not (subjects := read_split(split_file).get(part)):
        raise ValueError(f"part={part}: {split_file} has no subjects under that name")
    return subjects


def _run_of(checkpoint: Path) -> Path:
    """The run folder that a run, one of its checkpoints or its weights file belongs to."""
    above = (checkpoint, *checkpoint.resolve().parents[:3])
    return next((folder for folder in above if (folder / "split.json").exists()), checkpoint)
