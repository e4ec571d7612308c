"""Unlabelled scans in the training of a segmentation: labels are carried over to them by registration.

What a registration carries over to a brain is wrong in places, and in other places for every brain. A network that is
trained on many such label maps cannot learn errors that do not repeat, and becomes better than each of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asa.data.io.files import read_json, whole_file, write_json
from asa.data.preprocessing.settings import differences
from asa.data.splits import select
from asa.data.store import Store
from asa.inference.atlas import Atlas, carry_over, load_ants, read_atlases
from asa.inference.preprocessing import prepared_alike, voxel_size
from asa.ops.labels import IGNORED
from asa.training.checkpoint_files import list_checkpoints
from asa.training.distributed import map_over_ranks, on_main, world_size

REST = "rest"
FOLDER = "carried"  # in the run: a label map of each scan, as in a store
CONTENT = "carried.json"  # and whose labels these are, with the digests of what they depend on


class UnlabelledScans:
    """Labelled and unlabelled scans of a run as one source of crops; the label maps of the latter lie in its folder.

    Chosen are the "rest", the scans of the training part that `data.labelled` leaves out, whose labels are not read; or
    all scans of a store but those whose subject or voxels `labelled` has. In a run that is resumed they stay the same.
    """

    def __init__(
        self, chosen: str, labelled: Store, split: Mapping[str, Sequence[str]], rest: Sequence[str], run: Path
    ) -> None:
        load_ants(1 if world_size() > 1 else None)  # fails here and not after the run has begun
        self.labelled, self.store, self.run = labelled, labelled if chosen == REST else Store(chosen), run
        self.subjects = split["train"]
        alike = prepared_alike(self.store.settings, labelled.settings)
        if self.store.channels != labelled.channels or not alike:
            how = differences(labelled.settings, self.store.settings) or f"channels: {', '.join(self.store.channels)}"
            raise ValueError(
                f"data.unlabelled={chosen} was prepared in another way than {labelled.path} ({how}): prepare both alike"
            )
        file = run / CONTENT
        self.before: dict[str, dict[str, Any]] = {"atlases": {}, "digests": {}}
        self.before |= read_json(file) if file.exists() else {}
        resumed = self.before["atlases"] if list_checkpoints(run) else {}
        if resumed and set(self.store.records.ids) >= resumed.keys():  # otherwise the run has other settings
            records = [self.store.record(id) for id in resumed]
        elif chosen == REST:
            records = list(select(labelled.records, rest))
        else:
            known = set(labelled.records.subjects)
            voxels = {digest for record in labelled.records for digest in record["identity"].values()}
            records = [
                record
                for record in self.store.records
                if record["subject"] not in known and voxels.isdisjoint(record["identity"].values())
            ]
        if not records:
            why = "data.labelled leaves out no scans" if chosen == REST else "the labelled store has all of its scans"
            raise ValueError(f"data.unlabelled={chosen}: there are no unlabelled scans, as {why}")
        self.records = [{**record, "arrays": {**record["arrays"], "label": FOLDER}} for record in records]
        self.ids = {record["id"] for record in records}
        if chosen != REST and (both := self.ids.intersection(record["id"] for record in labelled.records)):
            raise ValueError(f"data.unlabelled={chosen}: {min(both)} is another scan in {labelled.path}: rename one")

    def carry_labels(self) -> None:
        """Register a labelled scan, in turn, to each unlabelled one and write its label map; what is there stays."""
        labelled = {atlas.id: atlas for atlas in read_atlases(self.labelled, self.subjects)}
        in_turn, before = list(labelled.values()), self.before
        turns = {
            record["id"]: labelled.get(before["atlases"].get(record["id"], ""), in_turn[k % len(in_turn)])
            for k, record in enumerate(self.records)
        }
        arrays = {id: self.labelled.record(id)["arrays"] for id in labelled}
        digests = {
            record["id"]: {"image": record["arrays"]["image"], "atlas": arrays[turns[record["id"]].id]}
            for record in self.records
        }

        def begin() -> None:
            for id in self.ids:
                if before["digests"].get(id) != digests[id]:
                    self._file(id).unlink(missing_ok=True)
            (self.run / FOLDER).mkdir(exist_ok=True)
            whose = {id: atlas.id for id, atlas in turns.items()}
            write_json(self.run / CONTENT, {"atlases": whose, "digests": digests})

        on_main(begin)
        missing = [record for record in self.records if not self._file(record["id"]).exists()]
        with tqdm(total=-(-len(missing) // world_size()), desc="carry labels over", unit="scan") as bar:
            map_over_ranks(missing, lambda record: self._carry(record, turns[record["id"]], bar))

    def _carry(self, record: Mapping[str, Any], atlas: Atlas, bar: "tqdm[Any]") -> None:
        spacing = voxel_size(record["chain"]["stored_affine"]).tolist()
        try:
            probabilities = carry_over(self.store.image(record["id"]), spacing, [atlas])
        except ValueError as error:
            raise ValueError(
                f"data.unlabelled: no labels for {record['id']} ({error}): leave this scan out; what is done is kept"
            ) from error
        label = np.where(probabilities.any(axis=0), probabilities.argmax(axis=0), IGNORED).astype(np.uint8)
        with whole_file(self._file(record["id"])) as file:
            np.save(file, label[None])
        bar.update()

    def image(self, id: str) -> np.ndarray:
        """Memory-mapped image `(C, D, H, W)`."""
        return (self.store if id in self.ids else self.labelled).image(id)

    def label(self, id: str) -> np.ndarray | None:
        """Memory-mapped class indices `(1, D, H, W)` uint8."""
        return np.load(self._file(id), mmap_mode="r") if id in self.ids else self.labelled.label(id)

    def _file(self, id: str) -> Path:
        return self.run / FOLDER / f"{id}.npy"
