"""Files of random volumes, for the loader."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from asa.config import CONFIG_DIR
from asa.settings import AugmentSettings


@dataclass
class RandomVolumes:
    """A stand-in for the prepared store: float16 images and uint8 labels, memory-mapped."""

    folder: Path
    records: list[dict[str, str]]

    @classmethod
    def write(cls, folder: Path, size: Sequence[int], channels: int = 4, count: int = 4) -> "RandomVolumes":
        """Write `count` volumes of `channels` x (D, H, W) voxels."""
        rng = np.random.default_rng(0)
        records = [{"id": f"volume-{k}"} for k in range(count)]
        for record in records:
            image = rng.random((channels, *size), dtype=np.float32).astype(np.float16)
            np.save(folder / f"{record['id']}-image.npy", image)
            np.save(folder / f"{record['id']}-label.npy", rng.integers(0, 4, (1, *size), dtype=np.uint8))
        return cls(folder, records)

    def image(self, record_id: str) -> np.ndarray:
        """`(C, D, H, W)`."""
        return np.load(self.folder / f"{record_id}-image.npy", mmap_mode="r")

    def label(self, record_id: str) -> np.ndarray:
        """`(1, D, H, W)`."""
        return np.load(self.folder / f"{record_id}-label.npy", mmap_mode="r")


def finetuning_augmentation() -> AugmentSettings:
    """The default augmentation of `asa-finetune`."""
    return AugmentSettings(**yaml.safe_load((CONFIG_DIR / "finetune.yaml").read_text())["augment"])
