"""The patches of a crop with voxels of its label map that are ignored."""

import numpy as np
import torch

from asa.data.loading.augment import AugmentSettings
from asa.data.loading.crops import CropDataset
from asa.ops.labels import IGNORED
from asa.ops.patches import patchify

SIZE = (16, 16, 16)
FACE = 77.0  # intensity of the voxels that are ignored


class Source:
    """Two scans, of which "a" has a map of ignored voxels; they have an intensity of their own."""

    def __init__(self) -> None:
        self.mask = np.zeros((1, 24, 20, 28), np.uint8)
        self.mask[0, 3:9, 11:, :13] = IGNORED
        self.volume = np.where(self.mask == IGNORED, np.float16(FACE), np.float16(1.0))

    def image(self, record_id: str) -> np.ndarray:
        return self.volume

    def label(self, record_id: str) -> np.ndarray | None:
        return self.mask if record_id == "a" else None


def test_excluded_patches_are_those_with_an_ignored_voxel_wherever_the_crop_lies() -> None:
    augment = AugmentSettings(mirror_probability=0.5)
    records = [{"id": "a"}, {"id": "b"}]
    crops = CropDataset(Source(), records, SIZE, crop="random", excluded=4, augment=augment, seed=1)
    plain = CropDataset(Source(), records, SIZE, crop="random", augment=augment, seed=1)
    counts = set()
    for epoch in range(8):
        sample, without = crops[0, epoch], crops[1, epoch]
        expected = (patchify(sample["image"][None], 4) == FACE).any(dim=2)[0]
        assert torch.equal(sample["excluded"], expected) and "label" not in sample
        assert not without["excluded"].any() and without["excluded"].shape == (64,)
        assert torch.equal(sample["image"], plain[0, epoch]["image"]) and "excluded" not in plain[0, epoch]
        counts.add(int(expected.sum()))
    assert len(counts) > 1
