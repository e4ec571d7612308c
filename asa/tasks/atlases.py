"""Prediction by registration, without training: labelled scans of a store give their labels to new scans.

`asa-predict atlas=STORE`, with `checkpoint=` averaged with networks. Registration takes minutes per scan: scans that an
earlier call has done are not done again, and `OUT/atlas.json` says what they were made with.
"""

from collections.abc import Sequence
from pathlib import Path

from asa.config import typed
from asa.data.io.files import check_out, read_json, sha256_of, write_json
from asa.data.io.lock import in_turn
from asa.data.splits import read_split
from asa.data.store import MANIFEST, Store
from asa.errors import listed
from asa.inference.atlas import AtlasSegmenter, labelled_records
from asa.inference.layout import ATLASES
from asa.inference.scans import Scan, predict_each
from asa.settings import Config, PredictSettings
from asa.tasks.prediction import SegmentationPredictor, networks_of, scans_of

FOR_NETWORKS = ("mirror", "plugins")  # settings of asa-predict that atlases do not have
FOR_OTHER_TASKS = ("healthy", "map", "regions")
FOR_ATLASES = {"labelled": None, "split_file": None, "fusion": "joint", "workers": 1}  # and the others, with defaults


def check_network_settings(config: Config) -> None:
    """Raise a ValueError for settings of atlases that were given with networks alone."""
    if given := [key for key, default in FOR_ATLASES.items() if config[key] != default]:
        raise ValueError(f"{given[0]}= is for atlas=, which was not given: leave it out")


def predict_by_registration(config: Config) -> None:
    """Predict scans with atlases; those of the input that are atlases are left out."""
    predictor = AtlasPredictor(config)
    scans = predictor.without_atlases(scans_of(config, predictor.preprocessor))
    predict_each(
        predictor, scans, predictor.layout, workers=config["workers"], remaining=predictor.remaining, done=predictor.add
    )


class AtlasPredictor(SegmentationPredictor):
    """Writes the label map of each scan, and its row in `OUT/volumes.csv` as soon as it is done."""

    segmenter: AtlasSegmenter

    def __init__(self, config: Config) -> None:
        _check_settings(config)
        store = Store(str(config["atlas"]))
        subjects = _subjects(store, config)
        networks = None if config["checkpoint"] is None else networks_of(config)
        segmenter = AtlasSegmenter(
            store, subjects, networks, fusion=config["fusion"], strip=config["strip"], workers=config["workers"]
        )
        atlases = [record["id"] for record in segmenter.records]
        if len(atlases) == 1 and networks is None and (config["probabilities"] or config["uncertainty"]):
            advice = "leave them out, or choose more with labelled="
            given = "probabilities= and uncertainty= are of the votes of several atlases"
            raise ValueError(f"{given}, and there is one: {advice}")
        super().__init__(config, segmenter)
        self.input = Path(str(config["input"]))
        self._check_out()
        print(f"atlases, registered to each scan: {listed(atlases, 5)}, fusion {config['fusion']}")
        if networks is not None:
            print(f"averaged with the networks {listed(list(map(str, networks.paths)), 5)}")

    def without_atlases(self, scans: Sequence[Scan]) -> list[Scan]:
        """The scans that are no atlas, nor in the atlases' own store another scan of an atlas's subject."""
        records, store = self.segmenter.records, self.segmenter.store
        subjects = {record["subject"] for record in records}
        files = {Path(source["path"]).resolve() for record in records for source in record["sources"].values()}
        own = (self.input / MANIFEST).exists() and self.input.resolve() == store.path.resolve()

        def is_atlas(scan: Scan) -> bool:
            own_files = (Path(one).resolve() for one in scan.files.values())
            return (own and scan.subject in subjects) or not files.isdisjoint(own_files)

        left_out = [scan.id for scan in scans if is_atlas(scan)]
        kept = [scan for scan in scans if scan.id not in left_out]
        if not kept:
            raise ValueError(f"{self.input}: all {len(scans)} scans are atlases or of their subjects: choose labelled=")
        if left_out:
            print(f"left out, as atlases or other scans of their subjects: {listed(left_out)}")
        if named := listed([scan.id for scan in kept if scan.subject in subjects], 5):
            same = "if they are the same people, read their scores as optimistic"
            print(f"note: subjects of {named} are called as atlases are: {same}")
        return kept

    def remaining(self, scans: Sequence[Scan]) -> list[Scan]:
        """The scans that have no label map of these files, or no row in the table; `OUT/atlas.json` is written."""
        self.made = {"store": str(self.segmenter.store.path), **self.segmenter.record()}
        self.digests = {scan.id: _digests(scan) for scan in scans}
        done, rows = self._note({}), self.rows_before()

        def is_left(id: str) -> bool:
            return done.get(id) != self.digests[id] or id not in rows or not self._is_complete(id)

        left = [scan for scan in scans if is_left(scan.id)]
        if len(left) < len(scans):
            print(f"{len(scans) - len(left)} of {len(scans)} scans are done already")
        return left

    def add(self, id: str, row: dict[str, str]) -> None:
        super().add(id, row)
        self._note({id: self.digests[id]})

    def _note(self, scans: dict[str, list[str]]) -> dict[str, list[str]]:
        """Add the digests of scans' files to `OUT/atlas.json`; all that are there."""
        file = self.out / ATLASES
        with in_turn(self.out):
            before = read_json(file).get("scans", {}) if file.exists() else {}
            write_json(file, {**self.made, "scans": before | scans})
        return before

    def _is_complete(self, id: str) -> bool:
        probabilities, uncertainty = self.further_files(id)
        return all(file.is_file() for file in (self.layout.label_map(id), *probabilities, *uncertainty))

    def _check_out(self) -> None:
        """Raise a ValueError if the folder holds other files, or label maps that were made in another way."""
        file, now = self.out / ATLASES, self.segmenter.record()
        if not file.exists():
            check_out(self.out, ATLASES, f"a folder of asa-predict with these atlases ({ATLASES})")
            return
        before = read_json(file)
        same = before.items() if isinstance(before, dict) else ()
        if other := ", ".join(key for key, value in now.items() if (key, value) not in same):
            raise ValueError(f"{file}: the label maps here were made with other {other}: choose another out=")


def _digests(scan: Scan) -> list[str]:
    """SHA-256 of a scan's files; none where one cannot be read, which its prediction will say."""
    try:
        return sorted(map(sha256_of, scan.files.values()))
    except OSError:
        return []


def _check_settings(config: Config) -> None:
    """Raise a ValueError for settings of networks where there are none, and for values that atlases do not have."""
    alone = config["checkpoint"] is None
    given = [f"{key}=" for key in (*FOR_OTHER_TASKS, *(FOR_NETWORKS if alone else ())) if config[key]]
    if alone and typed(PredictSettings, config["predict"]) != PredictSettings():
        given.append("predict.*")
    if given:
        raise ValueError(f"{given[0]} is for networks, and atlas= was given: leave it out")
    if config["uncertainty"] not in (None, "entropy"):
        raise ValueError(f"uncertainty={config['uncertainty']}: with atlases choose entropy, or null for none")


def _subjects(store: Store, config: Config) -> list[str]:
    """The subjects whose labelled scans are atlases, of the training part of the split if there is one."""
    labelled, chosen = dict.fromkeys(record["subject"] for record in labelled_records(store)), config["labelled"]
    if not labelled:
        raise ValueError(f"{store.path}: none of the scans has a label map: prepare it with data.label and labels")
    if isinstance(chosen, list):
        subjects = list(dict.fromkeys(map(str, chosen)))
        if not subjects or (unknown := [subject for subject in subjects if subject not in labelled]):
            wrong, these = unknown[0] if subjects else "nobody", listed(list(labelled), 10)
            known = f"no subject of {store.path} with a label map; these are {these}"
            raise ValueError(f"labelled={chosen}: {wrong} is {known}")
        return subjects
    where, subjects = str(store.path), list(labelled)
    if config["split_file"] is not None:
        where = f"the training part of {config['split_file']}"
        subjects = [subject for subject in read_split(str(config["split_file"]))["train"] if subject in labelled]
    if not subjects:
        raise ValueError(f"{where} has no subject of {store.path} with a label map: choose labelled=[SUBJECT]")
    count = len(subjects) if chosen is None else chosen
    if type(count) is not int or not 1 <= count <= len(subjects):
        advice = f"give a number from 1 to {len(subjects)}, or a list of subjects, like [{subjects[0]}]"
        raise ValueError(f"labelled={chosen}: {where} has {len(subjects)} labelled subjects: {advice}")
    return subjects[:count]
