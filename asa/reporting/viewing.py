"""Looking at a store, at predictions, or at the reconstructions of a pretraining run, in one page for a browser.

NiiVue draws the page: linked slices, and a slider of opacity for each layer.
"""

import base64
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.data.io.files import read_yaml
from asa.data.io.nifti import check_same_geometry, read_image, read_label, write_image
from asa.data.joined import open_stores
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.data.splits import read_split, select
from asa.data.store import MANIFEST, Records, Store
from asa.errors import require
from asa.evaluation.comparison import Run, read_run
from asa.evaluation.policies import get_policy
from asa.evaluation.summary import Row, Summary, number_text
from asa.inference.layout import label_maps_of, probabilities_of, source_of
from asa.inference.scans import scan_files
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.ops.labels import IGNORED
from asa.reporting.evaluation import DIFFERENCES, case_scores, differences_of
from asa.reporting.figures import label_colours
from asa.reporting.pages import check_page, require_report_extra, write_page
from asa.settings import Config
from asa.training.checkpoint import load_model

OPACITY = {"gray": 1.0, "labels": 0.5, "plasma": 0.0}  # at first, by the kind of a layer
NIIVUE = "niivue.umd.js"
HOW = "asa-view --help says how to get it"


@dataclass(frozen=True)
class Layer:
    """A volume of a case."""

    name: str
    nifti: bytes  # a compressed NIfTI file
    kind: str = "gray"  # for images; "labels" for label maps, "plasma" for values such as probabilities
    labels: Mapping[int, str] | None = None  # name of each value of a label map
    colours: Sequence[Sequence[int]] | None = None  # RGB of each of them; None: those of the reports
    shown: bool = True  # at first; a layer of "plasma" is not
    range: tuple[float, float] | None = None  # of values, from the first to the last colour; None: NiiVue's choice

    def as_json(self) -> dict[str, Any]:
        """The layer as the page's script reads it."""
        table: dict[str, list[Any]] | None = None
        if self.labels is not None:  # NiiVue's colour table, with a transparent background
            names, count = self.labels.values(), len(self.labels)
            colours = label_colours(count) if self.colours is None else np.array(self.colours)
            table = {name: [0, *channel] for name, channel in zip("RGB", colours.T.tolist(), strict=True)}
            table |= {"A": [0, *[255] * count], "I": [0, *self.labels], "labels": ["", *names]}
        return {
            "name": self.name,
            "file": f"{self.name}.nii.gz",
            "data": base64.b64encode(self.nifti).decode("ascii"),
            "colormap": self.kind if self.labels is None else "gray",
            "opacity": OPACITY[self.kind] if self.shown else 0.0,
            "labels": table,
            "range": self.range,
        }


Cases = Mapping[str, Sequence[Layer]]  # the layers of each case, the lowest first


def view_task(config: Config) -> None:
    """Write the page that asa-view is asked for."""
    source, out = Path(str(config["input"])), Path(str(config["out"]))
    check_page(out)
    if not isinstance(config["count"], int) or config["count"] < 1:
        raise ValueError(f"count={config['count']}: give a number of scans from 1")
    kind = "store" if (source / MANIFEST).is_file() else "run" if (source / "checkpoints").is_dir() else None
    if kind and (given := [key for key in ("images", "evaluation") if config[key] is not None]):
        raise ValueError(f"{given[0]}= is for label maps, and {source} is a {kind}: leave it out")
    scores = None if config["evaluation"] is None else read_scores(Path(str(config["evaluation"])))
    if kind == "store":
        cases, what = stored(Store(source), config), "prepared scans"
    elif kind == "run":
        cases, what = reconstructed(source, config), "reconstructions"
    else:
        cases, what = predicted(source, config, scores), "label maps"
    write_viewer(out, config["viewer"] and Path(str(config["viewer"])), f"{what}: {source.name}", cases, scores)
    print(f"wrote {len(cases)} scans to {out}")


def stored(store: Store, config: Config) -> Cases:
    """The prepared images of a store, channel by channel, and their labels."""
    cases = {}
    for id in select_ids(store.records.ids, config):
        affine = np.array(store.record(id)["chain"]["stored_affine"], dtype=float)
        image, label = store.image(id), store.label(id)
        layers = [Layer(name, nifti(volume, affine)) for name, volume in zip(store.channels, image, strict=True)]
        if label is not None:
            shown = np.where(label[0] == IGNORED, 0, label[0])
            names = dict(enumerate(store.labels.values(), start=1))
            layers.append(Layer("labels", nifti(shown, affine, np.uint8), "labels", names))
        cases[id] = layers
    return cases


@dataclass(frozen=True)
class Scores:
    """An evaluation of label maps as a table."""

    run: Run  # with the names of the labels, and the files of each case
    heads: Sequence[str]
    cells: Mapping[str, Sequence[str]]  # by case, the worst first


def read_scores(folder: Path) -> Scores:
    """An evaluation of label maps: of each case the first metric, its mean over the regions and the worst of these."""
    run = read_run(folder.name, folder)
    policy = get_policy(run.setting["policy"])
    metric = policy.metrics[0]
    worst = min if metric.higher_is_better else max
    rows = [Row(id, region, values) for (id, region), values in run.values.items()]
    cells = {}
    for id, mean in case_scores(Summary(policy=policy, rows=rows, results={}, subjects={})).items():
        found = [(row.values[metric.name], row.label) for row in rows if row.case_id == id]
        value, region = worst(pair for pair in found if not math.isnan(pair[0]))
        cells[id] = [number_text(mean, metric.digits), f"{region} {number_text(value, metric.digits)}"]
    return Scores(run, ["scan", f"mean {metric.heading}", "worst region"], cells)


def predicted(folder: Path, config: Config, scores: Scores | None) -> Cases:
    """Label maps on the grids of their scans; scans, true label maps, differences and probabilities where there are."""
    files = dict(sorted(label_maps_of(folder).items()))
    if not files:
        raise ValueError(f"{folder}: neither a store nor a run, and no label map of asa-predict in it")
    images = None if config["images"] is None else Path(str(config["images"]))
    store = Store(images) if images is not None and (images / MANIFEST).is_file() else None
    scans = {} if images is None or store is not None else scan_files(images)
    labels, ignored = ({}, []) if store is None else (store.labels, store.ignored)
    if scores is not None:
        files = {id: files[id] for id in scores.cells if id in files} | files
        labels = {int(value): name for value, name in scores.run.setting["labels"].items()}
        ignored = scores.run.setting["ignored labels"]
    cases = {}
    for id in select_ids(list(files), config):
        known = {} if scores is None else scores.run.files.get(id, {})
        truth = known.get("truth") if store is None else store.record(id)["sources"].get("label", {}).get("path")
        image: str | Path | None
        if images is None:
            image = known.get("image")
        elif store is not None:
            image = store.first_source(store.record(id))
        else:
            place = (images / source_of(files[id])).absolute()
            image = place if place in scans.values() else scans.get(id)
        if images is not None and image is None:
            raise FileNotFoundError(
                f"images={images}: no scan of {id} there: give the folder that was predicted, or if images= chose its "
                "scans, a path like 'new/**/*_T1w.nii.gz', whose wildcards give the same ids"
            )
        cases[id] = [] if image is None else [_layer("image", Path(image))]
        cases[id] += _label_layers(files[id], truth, labels, ignored)
        for name, path in probabilities_of(folder, id, files[id]).items():
            cases[id].append(_layer(f"p({name})", path, "plasma", (0.05, 1.0)))
    return cases


def _label_layers(file: Path, truth: str | None, names: Mapping[int, str], ignored: Sequence[int]) -> list[Layer]:
    """A predicted label map; where the true one is known, also that and where the two differ, both hidden at first."""
    label = read_label(file)
    names = names or {int(k): str(k) for k in np.unique(label.data) if k}
    layers = [Layer("prediction", nifti(label.data.T, label.affine, label.data.dtype), "labels", names)]
    if truth is None:
        return layers
    true = read_label(Path(truth))
    check_same_geometry(label, true, f"{file} and {truth}")
    different = differences_of(true.data, label.data, ignored)
    kinds, colours = dict(enumerate(DIFFERENCES, start=1)), list(DIFFERENCES.values())
    return [
        Layer("truth", nifti(true.data.T, true.affine, true.data.dtype), "labels", names, shown=False),
        *layers,
        Layer("difference", nifti(different.T, label.affine, np.uint8), "labels", kinds, colours, shown=False),
    ]


def _layer(name: str, path: Path, kind: str = "gray", range: tuple[float, float] | None = None) -> Layer:
    """An image as a layer. Its voxels alone get into the page: a store, or a link, may name any file of the user's."""
    image = read_image(path, nan="zero")
    return Layer(name, nifti(image.data.T, image.affine), kind, range=range)


def reconstructed(run: Path, config: Config) -> Cases:
    """Image, masked image, reconstruction and importance of scans that a run has not been trained on, or else has."""
    model = load_model(run)
    if not isinstance(model, MaskedAutoencoder):
        raise ValueError(f"{run}: not a run of asa-pretrain method=asa or mae: give what asa-predict wrote with it")
    settings = read_yaml(run / "config.yaml")
    data, split = settings["data"], read_split(run / "split.json")
    store = open_stores(data.get("stores") or [data["store"]])
    held_out = select(store.records, split["validation"] or split["train"])
    assert isinstance(held_out, Records)
    ids = select_ids(held_out.ids, config)
    records = held_out.take(held_out.ids.index(id) for id in ids)
    dataset, method = CropDataset(store, records, model.encoder.img_size), MaskedPretraining(model=model.eval())
    cases = {}
    for k, id in enumerate(ids):
        volumes = method.pictures(collate([dataset[k]]))["reconstruction"]
        cases[id] = [
            Layer(name, nifti(torch.nan_to_num(volume)[0, 0].float().numpy(), np.eye(4)), kind)
            for (name, volume), kind in zip(volumes.items(), ("gray", "gray", "gray", "plasma"), strict=True)
        ]
    return cases


def select_ids(ids: Sequence[str], config: Config) -> list[str]:
    """The scans that are asked for; a ValueError for ids that do not exist."""
    if config["ids"] is None:
        return list(ids[: config["count"]])
    chosen = [str(id) for id in config["ids"]]
    if unknown := [id for id in chosen if id not in ids]:
        raise ValueError(f"ids: no {unknown[0]!r}; there are {', '.join(ids[:8])}, ...")
    return chosen


def nifti(volume: np.ndarray, affine: np.ndarray, dtype: Any = np.float32) -> bytes:
    """A volume `(D, H, W)` as the bytes of a compressed NIfTI file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nii.gz"
        write_image(path, np.asarray(volume).transpose(2, 1, 0), affine, dtype=dtype)
        return path.read_bytes()


def write_viewer(path: Path, viewer: Path | None, title: str, cases: Cases, scores: Scores | None = None) -> None:
    """Write the page: one HTML file that fetches nothing, with a table of the scores of the cases that are shown.

    `viewer` is NiiVue's `niivue.umd.js`, copied into the page; None: that of the package nilearn.
    """
    require_report_extra("asa-view")
    viewer = _niivue_of_nilearn() if viewer is None else viewer
    if not viewer.is_file():
        raise FileNotFoundError(f"{viewer}: no such file; viewer= is NiiVue's {NIIVUE}: {HOW}")
    code = viewer.read_text(errors="replace")
    if ".niivue={}" not in code or "</script" in code.lower():
        raise ValueError(f"{viewer}: not NiiVue's {NIIVUE}: {HOW}")
    shown = {id: [layer.as_json() for layer in layers] for id, layers in cases.items()}
    heads = [] if scores is None else scores.heads
    table = {} if scores is None else {id: cells for id, cells in scores.cells.items() if id in cases}
    write_page(path, "viewer.html.j2", title=title, cases=shown, code=code, heads=heads, scores=table)


def _niivue_of_nilearn() -> Path:
    package = require("nilearn", "view", "asa-view without viewer=")
    found = next(Path(package.__path__[0]).rglob(NIIVUE), None)
    if found is None:
        raise ValueError(f"nilearn {package.__version__} comes without NiiVue: run pip install 'nilearn>=0.14'")
    return found
