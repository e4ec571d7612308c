"""Where predicted label maps go: into one folder by id, or into a BIDS derivative.

https://bids-specification.readthedocs.io/en/stable/derivatives/imaging.html#segmentations
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from asa import __version__
from asa.data.datasets.bids import entities_of, scan_of
from asa.data.io.files import check_kept, check_out, matching_files, open_unlinked, read_json, write_json, write_whole
from asa.data.io.tables import read_rows
from asa.inference.label_maps import Outputs

VOLUMES, ATLASES = "volumes.csv", "atlas.json"
DESCRIPTION, LOOKUP = "dataset_description.json", "dseg.tsv"
BIDS_VERSION = "1.10.0"
RAW = "bids:raw:"  # before a path in the dataset of the scans
# Entities that BIDS allows in the name of an anatomical segmentation, in its order. Those that a network's channels
# differ in are left out, and so are others, like inv- of an MP2RAGE.
ENTITIES = (
    *("sub", "ses", "task", "acq", "ce", "rec", "run", "echo", "part", "space", "chunk", "atlas", "seg", "scale"),
    *("res", "label", "desc"),
)
STANDARD = {"background": "BG", "gm": "GM", "wm": "WM", "csf": "CSF"}  # abbreviations that BIDS defines
# Files beside those of the standard, for its validators.
BIDSIGNORE = f"{VOLUMES}\n{ATLASES}\n*_uncertainty.nii.gz\n"


class Layout:
    """The files of each scan's predictions, by the scan's id.

    `OUT/ID.nii.gz` (or `.mgz`), `OUT/probabilities/ID/CLASS.nii.gz`, `OUT/uncertainty/ID.nii.gz`. The table of scans is
    begun before the first image: by it the folder is known as one of asa-predict. It is None without any images.
    """

    def __init__(self, out: Path, ending: str = ".nii.gz", table: str | None = None) -> None:
        self.out, self.ending, self.table = out, ending, table

    def begin(self, scans: Mapping[str, Sequence[str]]) -> None:
        """Get the source files of all scans, before the first is predicted; a ValueError if they cannot be placed."""
        if self.table is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with open_unlinked(self.out / self.table, "a") as file:
            if file.tell() == 0:
                file.write("id\n")

    def check_kept(self) -> None:
        """Raise a FileNotFoundError if the folder of the images was removed meanwhile."""
        if self.table is not None:
            check_kept(self.out)

    def label_map(self, id: str) -> Path:
        return self.out / f"{id}{self.ending}"

    def probabilities(self, id: str) -> Path | list[Path]:
        """A folder, or a file for each class or region."""
        return self.out / "probabilities" / id

    def uncertainty(self, id: str) -> Path:
        return self.out / "uncertainty" / f"{id}.nii.gz"

    def describe(self, id: str) -> None:
        """Write what is written about a scan after its prediction."""


class BidsDerivative(Layout):
    """`OUT/sub-*/[ses-*/]anat/*_dseg.nii.gz` and `*_label-*_probseg.nii.gz`, with sidecars and what describes them all.

    The sidecars say what predicts, `made_by`. A ValueError for names of labels that BIDS cannot hold, or tell apart.
    """

    def __init__(self, out: Path, outputs: Outputs, made_by: Mapping[str, Any], probabilities: bool) -> None:
        super().__init__(out, table=VOLUMES)
        self.outputs = abbreviations(outputs.names)
        labels = {0: "background"} | dict(sorted(outputs.labels.items()))
        short = abbreviations(list(labels.values()))
        rows = [f"{value}\t{' '.join(name.split())}\t{short[name]}" for value, name in labels.items()]
        self.lookup = "\n".join(["index\tname\tabbreviation", *rows]) + "\n"  # dseg.tsv
        self.with_probabilities = probabilities
        self.software: dict[str, Any] = {"Name": "asa", "Version": __version__, **made_by}
        self.entities: dict[str, dict[str, str]] = {}
        self.sources: dict[str, list[str]] = {}

    def begin(self, scans: Mapping[str, Sequence[str]]) -> None:
        """Name the results of all scans, and write what is written once.

        A ValueError for files outside a BIDS dataset, of two datasets, or that would give one name; or a folder that
        holds anything but predictions of these labels for this dataset.
        """
        files = {id: [Path(os.path.abspath(path)) for path in paths] for id, paths in scans.items()}
        roots = {bids_root(path): path for paths in files.values() for path in paths}
        if len(roots) != 1:
            found = " and ".join(map(str, roots.values())) or "no scans"
            raise ValueError(f"layout=bids: {found}: give the scans of one dataset, and each dataset its own out=")
        (root,) = roots
        for id, paths in files.items():
            first, *others = [entities_of(path) for path in paths]
            shared = (key for key in ENTITIES if all(one.get(key) == first.get(key) for one in others))
            self.entities[id] = {key: first[key] for key in shared if key in first and key != "label"}
            self.sources[id] = [f"{RAW}{quote(path.relative_to(root).as_posix())}" for path in paths]
        places: dict[Path, str] = {}
        for id in files:
            if (other := places.setdefault(self.label_map(id), id)) != id:
                raise ValueError(
                    f"layout=bids: {files[other][0].name} and {files[id][0].name} would both give "
                    f"{self.label_map(id).name}: choose one with images="
                )
        self._write_about(root)

    def label_map(self, id: str) -> Path:
        return self._file(id, "dseg.nii.gz")

    def probabilities(self, id: str) -> list[Path]:
        return [self._file(id, "probseg.nii.gz", label=label) for label in self.outputs.values()]

    def uncertainty(self, id: str) -> Path:
        return self._file(id, "uncertainty.nii.gz")

    def describe(self, id: str) -> None:
        described = {self.label_map(id): "Label map: see dseg.tsv"}
        if self.with_probabilities:
            notes = (f"Probability of {name}, from 0 to 1" for name in self.outputs)
            described |= zip(self.probabilities(id), notes, strict=True)
        about = {"Manual": False, "Sources": self.sources[id], "SpatialReference": self.sources[id][0]}
        about |= {"Resolution": "that of the source image"} if "res" in self.entities[id] else {}
        for file, note in described.items():
            sidecar = file.with_name(file.name.replace(".nii.gz", ".json"))
            write_json(sidecar, {"Description": note, **about, "GeneratedBy": self.software})

    def _file(self, id: str, suffix: str, **entities: str) -> Path:
        named = self.entities[id] | entities
        folders = [f"{key}-{named[key]}" for key in ("sub", "ses") if key in named]
        stem = "_".join(f"{key}-{named[key]}" for key in ENTITIES if key in named)
        return self.out.joinpath(*folders, "anat", f"{stem}_{suffix}")

    def _write_about(self, root: Path) -> None:
        """dataset_description.json, dseg.tsv and .bidsignore, unless the folder holds something else."""
        raw = read_json(root / DESCRIPTION) if (root / DESCRIPTION).is_file() else {}
        doi = {"DOI": raw["DatasetDOI"]} if isinstance(raw, dict) and raw.get("DatasetDOI") else {}
        out = Path(os.path.abspath(self.out))
        link = quote(Path(os.path.relpath(root, out)).as_posix())
        about = {
            "Name": "Segmentations by asa",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "asa", "Version": __version__, "Description": "Label maps by asa-predict"}],
            "SourceDatasets": [{"URL": link, **doi}],
            "DatasetLinks": {"raw": link},
        }
        if out == root:
            raise ValueError(f"{self.out} is not empty and not a derivative of asa-predict: choose another out=")
        check_out(self.out, DESCRIPTION, "a derivative of asa-predict")
        if (self.out / DESCRIPTION).exists():
            before, lookup = read_json(self.out / DESCRIPTION), self.out / LOOKUP
            same = isinstance(before, dict) and all(before.get(key) == about[key] for key in ("Name", "DatasetLinks"))
            if not same or not lookup.is_file() or lookup.read_text(encoding="utf-8") != self.lookup:
                raise ValueError(
                    f"{self.out} holds another dataset, or predictions of other labels or of other scans: choose "
                    "another out="
                )
        write_json(self.out / DESCRIPTION, about)
        write_whole(self.out / LOOKUP, self.lookup.encode())
        write_whole(self.out / ".bidsignore", BIDSIGNORE.encode())


def bids_root(path: Path) -> Path:
    """ROOT of an image at `ROOT/sub-*/[ses-*/]DATATYPE/sub-*_SUFFIX`; a ValueError for another place or name."""
    entities = entities_of(path)
    folders = [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]
    above = path.parents[len(folders) + 1 :]
    if "sub" in entities and above and path.parent.parent == above[0].joinpath(*folders):
        return above[0]
    raise ValueError(
        f"layout=bids: {path} is not named and placed as BIDS has it, sub-01/[ses-1/]anat/sub-01_[ses-1_]T1w.nii.gz: "
        "leave layout= out, or predict the files of a BIDS dataset"
    )


def abbreviations(names: Sequence[str]) -> dict[str, str]:
    """Name -> what stands for it in names of files: letters and digits, and BIDS's own where it has one.

    A ValueError for a name without any letter or digit, or two that give the same.
    """
    short: dict[str, str] = {}
    for name in names:
        first, *rest = re.findall(r"[a-zA-Z0-9]+", name) or [""]
        found = STANDARD.get(name.lower(), first + "".join(word[:1].upper() + word[1:] for word in rest))
        if not found or found in short.values():
            other = next((f", as for {one!r}" for one, value in short.items() if found and value == found), "")
            raise ValueError(f"layout=bids: {name!r} would be {found!r} in names of files{other}: rename the label")
        short[name] = found
    return short


def label_maps_of(predictions: Path) -> dict[str, Path]:
    """The label maps that asa-predict wrote to a folder, in either layout, by the id of the scan.

    Those of a BIDS derivative of other software, which has no table of volumes, by the ids that `data=bids` gives; a
    ValueError where two have one.
    """
    if not (predictions / DESCRIPTION).is_file():
        return {
            path.name.removesuffix(end): path for end in (".mgz", ".nii.gz") for path in predictions.glob(f"*{end}")
        }
    paths = matching_files(predictions, "sub-*/**/*_dseg.nii.gz")
    if (predictions / VOLUMES).is_file():
        files = {path.relative_to(predictions).as_posix(): path for path in paths}
        rows = read_rows(predictions / VOLUMES)
        return {row["id"]: files[row["file"]] for row in rows if "id" in row and row.get("file") in files}
    found: dict[str, Path] = {}
    for path in paths:
        id = scan_of(entities_of(path))
        if found.setdefault(id, path) != path:
            raise ValueError(f"{predictions}: both {found[id].name} and {path.name} are of {id}: leave one there")
    return found


def source_of(label_map: Path) -> str:
    """The path, in its dataset, of the scan of a label map in a BIDS derivative, from its sidecar; "" without one."""
    sidecar = label_map.with_name(label_map.name.removesuffix(".nii.gz") + ".json")
    about = read_json(sidecar) if sidecar.is_file() else {}
    sources = about.get("Sources") if isinstance(about, dict) else None
    first = str(sources[0]) if isinstance(sources, list) and sources else ""
    return unquote(first.removeprefix(RAW)) if first.startswith(RAW) else ""


def probabilities_of(predictions: Path, id: str, label_map: Path) -> dict[str, Path]:
    """The probabilities that asa-predict wrote beside a label map of `label_maps_of`, by class or region."""
    if not (predictions / DESCRIPTION).is_file():
        files = sorted((predictions / "probabilities" / id).glob("*.nii.gz"))
        return {path.name.removesuffix(".nii.gz"): path for path in files}
    found = {}
    for path in sorted(label_map.parent.glob("*_probseg.nii.gz")):
        entities = entities_of(path)
        name = entities.pop("label", "")
        if entities == entities_of(label_map):
            found[name] = path
    return found
