"""Several prepared stores as one, for a pretraining on more than one modality, like MR and CT.

A store holds scans that were prepared in one way, and its modality is the name of its channel: `t1`, `ct`; of several
channels `t1+flair`. Stores of one modality are joined, too. A scan keeps its id where all stores have one modality, so
that a cohort in two stores is the same as in one; otherwise it is called MODALITY/ID.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.nifti import spacing_of
from asa.data.preprocessing.settings import differences
from asa.data.store import Entry, Records, Store

SPACING_TOLERANCE = 0.1  # relative difference of two modalities' voxel sizes, along each axis


@dataclass(eq=False, repr=False)
class JoinedRecords(Records):
    """Entries of several stores, whose `spans` are the number of a store and the index there.

    `ids` are those of the joined stores, while an entry has that of its own.
    """

    parts: Sequence[Records] = ()

    def _read(self, indices: Iterable[int]) -> Iterator[Entry]:
        for part, index in self.spans[list(indices)].tolist():
            yield self.parts[part][index]


class JoinedStores(Store):
    """Several stores, read as one without labels; their voxels with an ignored value count in no loss.

    Attributes:
        modalities: modality -> the first of its stores, where there are several modalities; else {}.

    Raises:
        ValueError: no store, or ones that do not fit together; the message says what to do.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        stores = [Store(path) for path in paths]
        first = stores[0]
        self.path, self.channels, self.settings, self.regions = first.path, first.channels, first.settings, {}
        found: dict[str, Store] = {}
        for store in stores:
            one = found.setdefault(modality_of(store), store)
            if one.settings != store.settings:
                raise ValueError(
                    f"data.stores: {store.path} has {modality_of(store)} scans prepared in another way than those of "
                    f"{one.path} ({differences(one.settings, store.settings)}): prepare both alike"
                )
        for store in found.values():
            _check_fits(store, first)
        self.modalities = found if len(found) > 1 else {}
        self.labels = {}
        # In a store with labels the ignored voxels lack a label, and not their image.
        self.ignored = sorted({value for store in stores if not store.labels for value in store.ignored})
        self._stores: dict[str, Store] = {}
        places = []
        for number, store in enumerate(stores):
            for index, id in enumerate(store.records.ids):
                name = f"{modality_of(store)}/{id}" if self.modalities else id
                if name in self._stores:
                    raise ValueError(
                        f"data.stores: {id} is in {self._stores[name].path} and in {store.path}: leave one out, or "
                        "prepare one of them with dataset=NAME"
                    )
                self._stores[name] = store
                places.append((name, store.records.subjects[index], (number, index)))
        ids, subjects, spans = zip(*sorted(places), strict=True)
        file, parts = first.records.file, [store.records for store in stores]
        self.records = JoinedRecords(file, list(ids), list(subjects), np.array(spans), (), parts=parts)

    def record(self, id: str) -> dict[str, Any]:
        return self._stores[id].record(_own(id))

    def image(self, id: str) -> np.ndarray:
        return self._stores[id].image(_own(id))

    def label(self, id: str) -> np.ndarray | None:
        """Memory-mapped `(1, D, H, W)` uint8 whose voxels are only ignored or not; None where none are marked."""
        store = self._stores[id]
        return None if store.labels else store.label(_own(id))


def open_stores(paths: Sequence[str | Path]) -> Store:
    """One store as it is, or several as one."""
    return Store(paths[0]) if len(paths) == 1 else JoinedStores(paths)


def records_by_modality(store: Store, records: Any) -> dict[str, Records]:
    """The records, or some of them, of each of a store's `modalities`; {} where it has none."""
    found: dict[str, list[int]] = {modality: [] for modality in store.modalities}
    for k, id in enumerate(records.ids if found else ()):
        found[id.rpartition("/")[0]].append(k)
    return {modality: records.take(indices) for modality, indices in found.items()}


def modality_of(store: Store) -> str:
    """The name of a store's channel, of several `t1+flair`."""
    return "+".join(store.channels)


def _own(id: str) -> str:
    """The id of a scan in its own store: ids have no slash."""
    return id.rpartition("/")[2]


def _check_fits(store: Store, first: Store) -> None:
    """Raise a ValueError for stores of two modalities that one network cannot be trained on together."""
    if len(store.channels) != len(first.channels):
        raise ValueError(
            f"data.stores: {first.path} has the channels {', '.join(first.channels)} and {store.path} "
            f"{', '.join(store.channels)}: one network takes as many of each, so prepare one channel of either"
        )
    aligned = [one for one in (first, store) if one.settings.get("midway") or one.settings.get("register")]
    if len(aligned) == 1:
        other = first if aligned[0] is store else store
        raise ValueError(
            f"data.stores: the mid-sagittal plane is the middle of the volumes of {aligned[0].path} and not of "
            f"{other.path}: prepare that one with prepare.midway=true"
        )
    sizes = [_voxel_size(one) for one in (first, store)]
    if (np.abs(sizes[1] / sizes[0] - 1) > SPACING_TOLERANCE).any():  # a patch would be of more, or less, anatomy
        shown = [" x ".join(f"{edge:.3g}" for edge in size) for size in sizes]
        raise ValueError(
            f"data.stores: voxels of {shown[0]} mm in {first.path} and of {shown[1]} mm in {store.path}: prepare both "
            "with the same prepare.spacing, like 1"
        )


def _voxel_size(store: Store) -> np.ndarray:
    """Median voxel size in mm along the axes of the scans."""
    sizes = [spacing_of(np.array(record["chain"]["stored_affine"])) for record in store.records]
    return np.asarray(np.median(sizes, axis=0))
