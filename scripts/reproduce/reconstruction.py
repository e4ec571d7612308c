"""The figure of the README: python -m scripts.reproduce.reconstruction RUN STORE OUT.png

Input, masked input, prediction and importance of a validation scan of RUN, in three planes.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from asa import load_model
from asa.data.loading.crops import CropDataset
from asa.data.loading.loader import collate
from asa.data.splits import read_split, select
from asa.data.store import Store
from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import MaskedAutoencoder
from asa.tasks.pretraining import reconstruction_panels

SCALE = 2  # pixels per voxel


def draw(run: Path, path: Path, out: Path) -> None:
    """Draw the first scan of the run's validation part."""
    model, store = load_model(run), Store(path)
    assert isinstance(model, MaskedAutoencoder)
    records = select(store.records, read_split(run / "split.json")["validation"])
    batch = collate([CropDataset(store, records, model.encoder.img_size)[0, 0]])
    (picture,) = reconstruction_panels(MaskedPretraining(model=model), batch).values()
    imsave(out, np.kron(picture, np.ones((SCALE, SCALE, 1), dtype=np.uint8)))


if __name__ == "__main__":
    draw(*(Path(argument) for argument in sys.argv[1:4]))
