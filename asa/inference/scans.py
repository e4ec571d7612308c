"""The scans of a file, a folder or a store, predicted one by one by a trained network, or by what takes its place."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeAlias

import numpy as np
from tqdm import tqdm

from asa.data.datasets import bids, folder, nnunet
from asa.data.datasets.record import Record, check_distinct, is_label_map, make_record, sorted_records
from asa.data.io.files import IMAGE_ENDINGS, NOT_HERE, VOLUME_ENDINGS, failure_lines
from asa.data.io.nifti import Volume, identity_of, read_image
from asa.data.io.parallel import each_tried
from asa.data.io.tables import TRAINED_ON, notes_of
from asa.data.splits import select
from asa.data.store import Store
from asa.errors import counted
from asa.inference.layout import Layout
from asa.inference.preprocessing import ScanPreprocessor, check_finite

NNUNET = {images: part for part, (images, _) in nnunet.PARTS.items()}  # folder of images -> part
# Suffix in BIDS of the channels that are named as usual, also as T1 or T1w.
SUFFIXES = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"}
Prepared: TypeAlias = tuple[np.ndarray, dict[str, Any], Volume]  # volume `(C, D, H, W)`, its preparation, the raw scan


class ScanPredictor(Protocol):
    """What predicts scans one by one, like a trained network; `preprocessor` says how raw scans are prepared for it."""

    preprocessor: ScanPreprocessor

    def predict_stored(self, id: str, image: np.ndarray, chain: dict[str, Any], like: Volume) -> Any:
        """Predict a prepared volume `(C, D, H, W)`, and return what `predict_each` hands on: the cells of a table.

        To such a dict, by column, it adds a cell: whether the network was trained on the scan. `chain` are the volume's
        preprocessing steps, and `like` is the raw scan, of several channels the first one, for its grid and header.
        """

    def finish(self, found: Mapping[str, Any]) -> str:
        """Write what is written once for all scans, from what was found of each by its id; say what was written."""


@dataclass(frozen=True)
class Scan:
    """A scan to predict: its files by channel (and "label"), what reads and prepares it, and its subject in a store."""

    id: str
    files: Mapping[str, str]
    prepared: Callable[[], Prepared]
    subject: str | None = None


def predict_each(
    predictor: ScanPredictor,
    scans: Sequence[Scan],
    layout: Layout,
    *,
    workers: int = 1,
    remaining: Callable[[Sequence[Scan]], Sequence[Scan]] | None = None,
    done: Callable[[str, Any], None] | None = None,
) -> None:
    """Predict scans one by one; one that fails is named and stops no other, and a ValueError follows at the end.

    Several `workers`, processes, need a predictor that can be pickled. `remaining` is called before the first scan,
    when the layout knows all of them: those that are to be predicted. `done` is called in this process as soon as a
    scan is predicted, with its id and what was found of it. A FileNotFoundError if the results' folder was removed.
    """
    channels = predictor.preprocessor.channels
    layout.begin({scan.id: [scan.files[name] for name in channels if name in scan.files] for scan in scans})
    failures, found, seconds = dict[str, str](), dict[str, Any](), []
    predict = partial(_predict, predictor, layout)
    scans = scans if remaining is None else remaining(scans)
    for scan, predicted, reason in each_tried(predict, scans, workers, title="predict", unit="scan"):
        layout.check_kept()  # before the next scan, which takes its time
        if predicted is None:
            failures[scan.id] = reason
            if not reason.endswith(NOT_HERE):
                tqdm.write(f"{scan.id}: failed: {reason}")
            continue
        found[scan.id], cautions, took = predicted
        for caution in cautions:
            tqdm.write(f"{scan.id}: warning: {caution}")
        seconds.append(took)
        if done is not None:
            done(scan.id, found[scan.id])
    layout.check_kept()
    for line in failure_lines({id: reason for id, reason in failures.items() if reason.endswith(NOT_HERE)}):
        print(line)
    written = predictor.finish(found)
    for line in notes_of([{**cells, "id": id} for id, cells in found.items() if isinstance(cells, dict)]):
        print(line)
    if failures:
        raise ValueError(f"{counted(len(failures), 'scan')} failed, listed above")
    print(f"{written}; {median(seconds):.1f} s per scan (median of {len(seconds)})" if seconds else written)


def _predict(predictor: ScanPredictor, layout: Layout, scan: Scan) -> tuple[Any, list[str], float]:
    """What `predict_stored` returns for a scan, in any process; the warnings; and the seconds, reading included."""
    started, result = time.perf_counter(), layout.label_map(scan.id)
    if layout.table and result.resolve() in {Path(path).resolve() for path in scan.files.values()}:
        raise ValueError(f"the result would replace the scan itself: choose another out= than {result.parent}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        image, chain, like = scan.prepared()
        check_finite(image, "the prepared scan")
        found = predictor.predict_stored(scan.id, image, chain, like)
    if isinstance(found, dict) and predictor.preprocessor.networks:
        found[TRAINED_ON] = {True: "yes", False: "no", None: ""}[predictor.preprocessor.saw(like)]
    layout.describe(scan.id)
    return found, [str(warning.message) for warning in caught], time.perf_counter() - started


def stored_scans(source: Path, preprocessor: ScanPreprocessor, subjects: Iterable[str] | None = None) -> list[Scan]:
    """The scans of a store, or those of some subjects; a ValueError for a store that was prepared in another way."""
    store = Store(source)
    preprocessor.check_store(store, "predict the raw scans, or a store that was prepared as they were")
    scans = []
    for record in store.records if subjects is None else select(store.records, subjects):
        files = {name: found["path"] for name, found in record["sources"].items()}
        scans.append(Scan(record["id"], files, partial(_stored, store, preprocessor, record), record["subject"]))
    return scans


def _stored(store: Store, preprocessor: ScanPreprocessor, record: dict[str, Any]) -> Prepared:
    path = store.first_source(record)
    like = read_image(path, nan=store.settings.get("nan", "refuse"))
    known, now = [(one.get("size"), one.get("mtime_ns")) for one in record["sources"].values()], path.stat()
    same = np.allclose(like.affine, record["chain"]["affine"], atol=1e-4)
    if (now.st_size, now.st_mtime_ns) not in known and not (same and identity_of(like) in record["identity"].values()):
        raise ValueError(f"{path}: is not the scan that was prepared any more: run asa-prepare again")
    if missing := record.get("missing"):
        warnings.warn(f"has no {', '.join(missing)}: 0 stands in its place", stacklevel=2)
    preprocessor.check_stored(record["chain"])
    preprocessor.warn_outside_range(record["quality"], record["intensity"])
    return store.image(record["id"]), record["chain"], like


def raw_scans(
    source: Path, preprocessor: ScanPreprocessor, *, images: Any = None, out: Path, in_bids: bool = False
) -> list[Scan]:
    """A raw scan, or those of a folder; a FileNotFoundError or ValueError for none, or ones that are not unique.

    `images` are file patterns by channel (None: every file, one channel); `in_bids` finds the channels t1, t2, flair
    and pd without them, by their suffixes. Results in an `out` inside the folder are no scans.
    """
    scans = []
    for record in _raw_records(source, preprocessor, images, out, in_bids):
        files = {name: path for name, path in record["images"].items() if path is not None}
        scans.append(Scan(record["id"], files, partial(_raw, preprocessor, record)))
    return scans


def _raw(preprocessor: ScanPreprocessor, record: Record) -> Prepared:
    if "problem" in record:
        raise ValueError(record["problem"].removeprefix(f"{record['id']}: "))
    case, like = preprocessor.prepare(record["images"])
    return case.image, case.chain, like


def _raw_records(source: Path, preprocessor: ScanPreprocessor, images: Any, out: Path, in_bids: bool) -> list[Record]:
    channels = preprocessor.channels
    if source.is_dir() and not images and (cases := _nnunet_cases(source, channels)):
        return cases
    example = f"'images={{{', '.join(f'{channel}: *_{channel}.nii.gz' for channel in channels)}}}'"
    if images is not None and not isinstance(images, Mapping):
        raise ValueError(f"images={images}: give the file pattern of each channel by its name, like {example}")
    if source.is_dir() and images:
        preprocessor.check_channels(images)
        records = folder.records(source, images=images)
        return [one for one in records if not any(_lies_in(out, source, path) for path in one["images"].values())]
    usual = {channel: channel.lower().removesuffix("w") for channel in channels}
    named = SUFFIXES.keys() >= set(usual.values()) and len(set(usual.values())) == len(channels)
    if source.is_dir() and in_bids and named:
        suffixes = {channel: SUFFIXES[name] for channel, name in usual.items()}
        return bids.records(source, channels=suffixes)
    if len(channels) != 1:
        raise ValueError(
            f"{preprocessor.path} takes the channels {', '.join(channels)}: give a folder and which file is which, "
            f"like {example}"
        )
    found = _files_by_id(source, out, channels[0])
    scans = [make_record(id, id, {channels[0]: path}) for id, path in found.items()]
    return sorted_records(scans, source=str(source)) if source.is_dir() else scans


def scan_files(source: Path) -> dict[str, Path]:
    """The files of a folder, or of a path with wildcards, by the ids that `raw_scans` gives to scans; of any kind."""
    if folder.has_wildcard(str(source)):
        return folder.files_by_id(source)
    if (source / nnunet.DESCRIPTION).is_file() and (source / "imagesTs").is_dir():
        source /= "imagesTs"
    files = {id: path for path, id in _named(source)}
    scans = [path for path in files.values() if source.is_dir() and not _is_label_map(path, source)]
    files |= {id: path for path in scans if (id := bids.id_of(path, source))}
    return {id.removesuffix("_0000"): path for id, path in files.items()} | files


def _named(source: Path) -> list[tuple[Path, str]]:
    """The images of a folder and its subfolders, or an image, each with its id: the path in it, with _ for /."""
    if not source.is_dir():
        return [(source, source.name.removesuffix(end)) for end in IMAGE_ENDINGS if source.name.endswith(end)]
    return [
        (path, folder.join_texts(texts))
        for end in (*VOLUME_ENDINGS, ".hdr", ".hdr.gz")  # of a pair the header
        for texts, path in folder.find_files(source, f"**/*{end}").items()
    ]


def _is_label_map(path: Path, source: Path) -> bool:
    """Whether a file is named as a label map, or lies in a folder of them."""
    folders = path.absolute().relative_to(source.absolute().parent).parts[:-1]
    return is_label_map(path.name) or any(name in ("labelsTr", "labelsTs") for name in folders)


def _nnunet_cases(source: Path, channels: Sequence[str]) -> list[Record]:
    """The cases of nnU-Net's imagesTs or imagesTr, or of the imagesTs of its dataset; [] for any other folder."""
    root, part = source, "test"
    if source.name in NNUNET and (source.parent / nnunet.DESCRIPTION).is_file():
        root, part = source.parent, NNUNET[source.name]
    elif not any((source / folder).is_dir() for folder in NNUNET):
        return []
    elif not (source / "imagesTs").is_dir():
        raise ValueError(
            f"{source}: a dataset of nnU-Net without imagesTs, its new scans: give input={source / 'imagesTr'} to "
            "predict the training cases, or another folder"
        )
    elif not (source / nnunet.DESCRIPTION).is_file():
        raise ValueError(f"{source}: looks like a dataset of nnU-Net, without {nnunet.DESCRIPTION}: give its imagesTs")
    cases: list[Record] = []
    for record in nnunet.records(root, part=part):
        files = {name.casefold(): path for name, path in record["images"].items()}
        if len(channels) == len(files) == 1:
            files = {channels[0].casefold(): path for path in files.values()}
        if files.keys() != {name.casefold() for name in channels}:
            example = ", ".join(f"{name}: *_{number:04d}.nii.gz" for number, name in enumerate(channels))
            raise ValueError(
                f"{root / nnunet.DESCRIPTION}: has the channels {', '.join(record['images'])}, and the network takes "
                f"{', '.join(channels)}: give input={root / nnunet.PARTS[part][0]} and 'images={{{example}}}'"
            )
        cases.append({**record, "images": {name: files[name.casefold()] for name in channels}})
    return cases


def _lies_in(out: Path, source: Path, path: str | Path | None) -> bool:
    """Whether a file is a result, as it lies in the folder of the results, and this inside that of the scans."""
    inside = source.resolve() in out.resolve().parents
    return inside and path is not None and Path(path).resolve().is_relative_to(out.resolve())


def _files_by_id(source: Path, out: Path, channel: str) -> dict[str, Path]:
    """The scans of `_named`: no label maps or results; ids without _0000, and in BIDS those of its reader if unique."""
    found = [(path, id) for path, id in _named(source) if not _lies_in(out, source, path)]
    label_maps = dict.fromkeys(path for path, _ in found if _is_label_map(path, source))
    found = [(path, id) for path, id in found if path not in label_maps]
    like = next(iter(label_maps), None)
    if not found:
        only = f", only label maps, like {like.name}" if like else ""
        raise ValueError(f"{source}: no image ({', '.join(IMAGE_ENDINGS)}) of a scan here{only}")
    if label_maps:
        print(f"left out: {len(label_maps)} files that are label maps by their names, like {like}")
    if all(id.endswith("_0000") for _, id in found):
        found = [(path, id.removesuffix("_0000")) for path, id in found]
    scans: dict[str, Path] = {}
    for path, id in sorted(found):
        if scans.setdefault(id, path) != path:
            raise ValueError(f"{scans[id]} and {path} would both give {id}.nii.gz: leave one, or rename it")
    check_distinct(scans)
    kinds = {id.rpartition("_")[2] for id, path in scans.items() if path.name.startswith("sub-")}
    if len(kinds) > 1 and any(path.parent != source.absolute() for path in scans.values()):
        raise ValueError(
            f"{source}: scans of several kinds ({', '.join(sorted(kinds))}): say which, like "
            f"'images={{{channel}: **/*_{max(kinds)}.nii.gz}}'"
        )
    in_bids = {bids.id_of(path, source) or id: path for id, path in scans.items()} if source.is_dir() else scans
    return in_bids if len(in_bids) == len(scans) else scans
