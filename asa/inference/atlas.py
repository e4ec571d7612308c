"""Label maps by registration: labelled scans (atlases) are aligned with a new scan, and their labels carried over.

Each atlas is registered by ANTs in the prepared space: an affine map, then SyN (Avants et al., Medical Image Analysis
2008), both of the first channel. The labels of several atlases are fused by majority vote or by joint label fusion
(Wang et al., IEEE TPAMI 2013). The latter gives an atlas weight where it matches the scan around a voxel, and less
where others are likely to make the same errors; as it searches around each voxel, it also corrects a single atlas.
Trained networks can vote beside the atlases.

Letters: prepared volume `C D H W`; K classes, of which 0 is the background; A atlases.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from asa.data.io.nifti import Volume, identity_of
from asa.data.preprocessing.resampling import Lengths, bounding_box
from asa.data.splits import select
from asa.data.store import Entry, Store
from asa.errors import require
from asa.inference.label_maps import Outputs, entropy_map, write_map
from asa.inference.preprocessing import ScanPreprocessor, prepared_alike, training_scan_metadata, voxel_size
from asa.inference.segmentation import Segmenter
from asa.ops.labels import IGNORED
from asa.settings import FUSIONS, check_choice

NETWORK_VOTES = 0.5  # of the mean of the networks, where each atlas has one vote; chosen in docs/evidence.md
PATCH, SEARCH = 2, 3  # of joint label fusion, radii in voxels: of the patches, and of the search for similar ones


@dataclass(frozen=True)
class Atlas:
    """A labelled scan of a store."""

    id: str
    image: np.ndarray  # (C, D, H, W), prepared
    label: np.ndarray  # (D, H, W) uint8, class indices as in the store; `IGNORED` where the label is unknown
    spacing: tuple[float, float, float]  # voxel size along D, H, W in mm
    classes: int  # K, the number of the store's labels, and the background


def labelled_records(store: Store, subjects: Sequence[str] | None = None) -> list[Entry]:
    """The records of a store's labelled scans, in its order; or those of some subjects, in their order."""
    records = store.records if subjects is None else select(store.records, subjects)
    return [record for record in records if "label" in record["arrays"]]


def read_atlases(store: Store, subjects: Sequence[str]) -> list[Atlas]:
    """All labelled scans of some subjects of a store, in the order of the subjects; the arrays are memory-mapped.

    A ValueError for a subject that is not in the store or has no labelled scan, or a damaged array.
    """
    records = labelled_records(store, subjects)
    if without := set(subjects) - {record["subject"] for record in records}:
        raise ValueError(f"{store.path}: subject {min(without)} has no label map, and an atlas needs one: leave it out")
    atlases = []
    for record in records:
        image, label = store.image(record["id"]), store.label(record["id"])
        assert label is not None
        d, h, w = map(float, voxel_size(record["chain"]["stored_affine"]))
        atlases.append(Atlas(record["id"], image, label[0], (d, h, w), len(store.labels) + 1))
    return atlases


def carry_over(
    scan: np.ndarray, spacing: Lengths, atlases: Sequence[Atlas], fusion: str = "joint", *, progress: bool = False
) -> np.ndarray:
    """Class probabilities of a prepared scan from the labels of atlases that are registered to it.

    Of several channels the first one that the scan and all atlases have is registered and compared. With one thread
    the same input gives the same bits. An ImportError without ANTs; a ValueError for no atlas, an unknown fusion, no
    common channel, or a registration that failed.

    Args:
        scan, spacing: `(C, D, H, W)`, and its voxel size along D, H, W in mm.
        atlases: one or more of one store, whose channels are those of the scan.
        fusion: "majority" for the fractions of votes, of one atlas 0 or 1; or "joint" for joint label fusion, which
            also corrects the labels of one atlas.
        progress: show a progress bar of atlases.

    Returns:
        `(K, D, H, W)` float32. Voxels that all atlases ignore are 0 in all classes, and others sum to 1.
    """
    check_choice("fusion", fusion, FUSIONS)
    if not atlases:
        raise ValueError("no atlas to register: give one or more labelled scans")
    ants = load_ants()
    channel = _common_channel(scan, atlases)
    fixed = _image(ants, scan[channel], spacing)
    bar = tqdm(atlases, unit="atlas", leave=False, disable=not progress)
    pairs = [_registered(ants, fixed, atlas, channel) for atlas in bar]
    images, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))  # A D H W
    votes = majority(labels, atlases[0].classes)
    return votes if fusion == "majority" else _joint(ants, scan[channel], spacing, images, labels, votes)


def load_ants(threads: int | None = None) -> Any:
    """ANTs for Python, with a seed of its random sampling; an ImportError if it is not installed.

    `threads` are those of a registration in this process, where ANTs has not been loaded; None: all cores.
    Environment variables that are given stay.
    """
    if threads is not None:
        os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", str(threads))
    os.environ.setdefault("ANTS_RANDOM_SEED", "1")
    return require("ants", "atlas", "registration of atlases")


def majority(labels: np.ndarray, classes: int) -> np.ndarray:
    """Fractions of the votes of atlases that do not ignore a voxel: `(A, D, H, W)` uint8 -> `(K, D, H, W)` float32."""
    votes = np.zeros((classes, labels[0].size), np.float32)
    for label in labels:
        (voting,) = np.nonzero(label.ravel() != IGNORED)
        votes[label.ravel()[voting], voting] += 1
    votes /= np.maximum(votes.sum(axis=0), 1)
    return votes.reshape(classes, *labels.shape[1:])


def _common_channel(scan: np.ndarray, atlases: Sequence[Atlas]) -> int:
    """The first channel that is missing (0) neither in the scan nor in any atlas."""
    volumes = [scan, *(atlas.image for atlas in atlases)]
    if len({len(volume) for volume in volumes}) > 1:
        raise ValueError(f"the scan has {len(scan)} channels, and the atlases have {len(atlases[0].image)}")
    for channel in range(len(scan)):
        if all(volume[channel].any() for volume in volumes):
            return channel
    raise ValueError("no channel that this scan and all atlases have: choose other labelled scans")


def _registered(ants: Any, fixed: Any, atlas: Atlas, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `(D, H, W)` float32 and label `(D, H, W)` uint8 of an atlas on the grid of the scan."""
    moving, label = (_image(ants, array, atlas.spacing) for array in (atlas.image[channel], atlas.label))
    with TemporaryDirectory() as folder:  # ANTs leaves its transforms in files
        try:
            found = ants.registration(fixed=fixed, moving=moving, type_of_transform="SyN", outprefix=f"{folder}/")
            if not found["fwdtransforms"]:  # it searches for them by a pattern
                raise ValueError(f"ANTs found no transforms in {folder}: set TMPDIR to a folder without [ ] * ?")
            carried = ants.apply_transforms(
                fixed=fixed, moving=label, transformlist=found["fwdtransforms"], interpolator="genericLabel"
            )
        except RuntimeError as error:  # ITK prints the reason
            raise ValueError(
                f"the atlas {atlas.id} could not be registered ({error}): is this a whole brain, prepared as the atlas?"
            ) from error
    return _array(found["warpedmovout"]), np.rint(_array(carried)).astype(np.uint8)


def _joint(
    ants: Any, scan: np.ndarray, spacing: Lengths, images: np.ndarray, labels: np.ndarray, votes: np.ndarray
) -> np.ndarray:
    """Joint label fusion within `SEARCH` voxels of any label's boundary; elsewhere there is one label to choose from.

    At each voxel of a mask ANTs weighs the patch of each atlas, within the search, that is most like the scan's, and
    adds its votes to all voxels of the patch. So that voxels near boundaries get what fusion of the whole volume would
    give them, the mask is these dilated by the patch, and the volume a box around all patches that are compared.
    The scan is `(D, H, W)`, images and labels `(A, D, H, W)` on its grid; the votes `(K, D, H, W)` are changed.
    """
    window = 2 * SEARCH + 1
    near = ndimage.maximum_filter(labels.max(axis=0), window) > ndimage.minimum_filter(labels.min(axis=0), window)
    near &= votes.any(axis=0)  # what all atlases ignore stays without a class
    if not near.any():
        return votes
    if len(labels) == 1:  # ANTs takes two or more; the search alone corrects it
        images, labels = images.repeat(2, axis=0), labels.repeat(2, axis=0)
    mask = ndimage.maximum_filter(near, size=2 * PATCH + 1)
    margin = PATCH + SEARCH
    box = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in bounding_box(mask))

    def cropped(array: np.ndarray) -> Any:
        return _image(ants, array[box], spacing)

    with TemporaryDirectory() as folder:  # it writes a file per label, and reads them by a pattern
        found = ants.joint_label_fusion(
            cropped(scan),
            cropped(mask),
            [cropped(image) for image in images],
            rad=PATCH,
            r_search=SEARCH,
            label_list=[cropped(label.astype(np.float32) + 1) for label in labels],  # it gives no probability of 0
            output_prefix=f"{folder}/",
        )
    fused = np.zeros((len(votes), int(near.sum())), np.float32)
    for value, image in zip(found["segmentation_numbers"], found["probabilityimages"], strict=True):
        if value <= len(votes):  # and not IGNORED
            fused[value - 1] = _array(image)[near[box]].clip(min=0)
    total = fused.sum(axis=0)
    if not total.any():
        raise ValueError("joint label fusion by ANTs failed, which says above why; fusion=majority does without it")
    votes[:, near] = np.where(total > 0, fused / np.where(total > 0, total, 1), votes[:, near])
    return votes


def _image(ants: Any, array: np.ndarray, spacing: Lengths) -> Any:
    """An image of ANTs (x, y, z) from an array `(D, H, W)`; all prepared volumes have the same directions."""
    return ants.from_numpy(array.T.astype(np.float32), spacing=tuple(map(float, spacing[::-1])))


def _array(image: Any) -> np.ndarray:
    """The array `(D, H, W)` of an image of ANTs."""
    return np.ascontiguousarray(image.numpy().T)


def average(votes: Tensor, probabilities: Tensor, atlases: int, channels: Sequence[int]) -> Tensor:
    """The mean of the votes of A atlases and the probabilities of networks, which count as `NETWORK_VOTES` atlases.

    Where the votes `(K, D, H, W)` are 0 in all classes, the networks decide. Their probabilities `(K', D, H, W)` and
    the result count a pair of joined sides once; `channels` are those of each of the K classes.
    """
    joined = torch.zeros_like(probabilities).index_add_(0, torch.tensor(channels), votes)
    share = atlases / (atlases + NETWORK_VOTES)
    return torch.where(joined.any(dim=0), share * joined + (1 - share) * probabilities, probabilities)


class AtlasSegmenter:
    """Labelled scans of a store as atlases, which label new scans as a `Segmenter` does.

    An ImportError without ANTs; a ValueError for a store without labels, subjects without a labelled scan, an unknown
    fusion, damaged arrays, a skull stripping command and no `strip`, or networks of other labels or preparation.

    Args:
        subjects: whose labelled scans are the atlases.
        networks: trained on scans that were prepared as the store's, with its labels; see `average`.
        fusion: of several atlases, see `carry_over`.
        strip: skull stripping of raw scans, as in `PrepareSettings`; None: that of the store.
        workers: processes that segment scans at the same time; each of several has one thread.
    """

    def __init__(
        self,
        store: Store,
        subjects: Sequence[str],
        networks: Segmenter | None = None,
        *,
        fusion: str = "joint",
        strip: str | None = None,
        workers: int = 1,
    ) -> None:
        check_choice("fusion", fusion, FUSIONS)
        if not store.labels:
            raise ValueError(f"{store.path}: the store has no labels: prepare it with labels={{1: name, ...}}")
        self.store, self.subjects, self.fusion, self.workers = store, subjects, fusion, workers
        read_atlases(store, subjects)  # fails here and not at the first scan
        self.records = labelled_records(store, subjects)
        self.identities = {digest: record["id"] for record in self.records for digest in record["identity"].values()}
        self.version: str = load_ants().__version__
        data = {"channels": store.channels, "labels": store.labels, "prepare": store.settings}
        data |= training_scan_metadata(store.records)
        del data["spacing"]  # a scan is registered with voxels of any size, which networks do not take
        if networks is not None and "spacing" in networks.data:
            data["spacing"] = networks.data["spacing"]
        self.outputs, self.networks = Outputs.of(data), networks
        trained = [] if networks is None else networks.preprocessor.networks
        self.preprocessor = ScanPreprocessor(str(store.path), data, strip, scans="the scans", networks=trained)
        if networks is not None:
            self._check_networks(networks)
            self.outputs = networks.outputs

    def _check_networks(self, networks: Segmenter) -> None:
        """Raise a ValueError if networks cannot vote beside the atlases."""
        if self.workers > 1 and any(next(model.parameters()).is_cuda for model in networks.models):
            raise ValueError("workers= are for atlases alone, or for networks on a CPU: give workers=1")
        own_way, way = (one.preprocessor.settings.as_json() for one in (self, networks))
        for key, own, other in (
            ("channels", self.store.channels, networks.data["channels"]),
            ("labels", self.outputs.labels, networks.outputs.labels),
            ("regions", {}, networks.outputs.regions),
            ("preparation", own_way, own_way if prepared_alike(own_way, way) else way),
        ):
            if own != other:
                raise ValueError(
                    f"{networks.paths[0]}: its {key}, {other}, are not those of the atlases' store {self.store.path}, "
                    f"{own}: leave checkpoint= or atlas= out"
                )

    def segment_prepared(
        self,
        image: np.ndarray,
        chain: dict[str, Any],
        like: Volume,
        out: Path,
        *,
        probabilities: Sequence[Path] | None = None,
        uncertainty: Path | None = None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """See `Segmenter` and `carry_over`; no Dice is expected of votes. A ValueError if the scan is an atlas."""
        if (atlas := self.identities.get(identity_of(like))) is not None:
            raise ValueError(f"its voxels are those of the atlas {atlas}, which has a label map: leave the scan out")
        self.preprocessor.check_stored(chain)
        load_ants(1 if self.workers > 1 else None)
        atlases, spacing = read_atlases(self.store, self.subjects), voxel_size(chain["stored_affine"])
        found = torch.from_numpy(carry_over(image, spacing, atlases, self.fusion, progress=self.workers == 1))
        if self.networks is not None:
            if self.workers > 1:
                torch.set_num_threads(1)  # of this process; the others have theirs
            predicted = self.networks.probabilities(torch.from_numpy(np.array(image, dtype=np.float32)))
            found = average(found, predicted, len(atlases), self.outputs.channels)
        ml = self.outputs.write(out, found, chain, like, probabilities)
        if uncertainty is not None:
            write_map(uncertainty, entropy_map(found, regions=False), chain, like)
        return ml, {}

    def described(self) -> dict[str, Any]:
        """The atlases, for sidecars in BIDS."""
        atlases = [{"Name": record["id"], "SHA256": record["arrays"]["label"]} for record in self.records]
        return {
            "Atlases": atlases,
            "Registration": f"SyN of ANTs (antspyx {self.version})",
            "Fusion": self.fusion,
            **({} if self.networks is None else self.networks.described()),
        }

    def record(self) -> dict[str, Any]:
        """What label maps depend on beside the scan, as plain data."""
        of_networks: dict[str, Any] = {}
        if (networks := self.networks) is not None:
            used = {"votes": NETWORK_VOTES, "overlap": networks.overlap, "precision": networks.settings.precision}
            of_networks = {"networks": networks.described() | used}
        return {
            "atlases": {record["id"]: {"subject": record["subject"], **record["arrays"]} for record in self.records},
            "fusion": self.fusion,
            "antspyx": self.version,
            "labels": {str(value): name for value, name in self.store.labels.items()},
            "prepare": self.preprocessor.settings.as_json(),
            **of_networks,
        }
