"""The pictures of docs/concepts.md: python -m scripts.reproduce.concepts [FILE.png]"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from asa.data.preprocessing.registration import load_map
from asa.losses.reconstruction import gradient_importance
from asa.ops.position import symmetric_position_encoding

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH, WINDOW = 8, 32
TOKEN = (9, 6)  # row and column of the token whose encoding is compared, of those in the slice


def main() -> None:
    """Draw the four pictures."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/concepts.png")
    volume = torch.from_numpy(np.array(load_map("t1")[0], dtype=np.float32))
    centre = [side // 2 for side in volume.shape]
    t, h, w = (side // 2 // PATCH for side in volume.shape)
    cut = tuple(slice(c - PATCH * n, c + PATCH * n) for c, n in zip(centre, (t, h, w), strict=True))
    volume, grid = volume[cut], (2 * t, 2 * h, 2 * w)
    level = t  # the slice of tokens
    brain = volume[level * PATCH + PATCH // 2].numpy()
    encodings = F.normalize(symmetric_position_encoding(grid, 96).reshape(*grid, -1)[level], dim=-1)
    alike = (encodings @ encodings[TOKEN]).numpy()
    weights = gradient_importance(volume[None, None]).reshape(grid)[level].numpy()
    windows = (torch.arange(grid[0] * grid[1] * grid[2]) // WINDOW % 4).reshape(grid)[level].numpy()

    figure, axes = plt.subplots(1, 4, figsize=(13, 4.2), layout="constrained")
    shown = (
        ("a slice and its patches", None),
        ("similarity of position encodings", alike),
        ("importance of a patch", weights),
        ("windows of 32 tokens", windows),
    )
    edges = (0, grid[2], 0, grid[1])
    for axis, (title, values) in zip(axes, shown, strict=True):
        axis.imshow(brain, cmap="gray", origin="lower", extent=edges)
        if values is None:
            axis.set_xticks(range(grid[2] + 1), [])
            axis.set_yticks(range(grid[1] + 1), [])
            axis.grid(color="white", linewidth=0.3)
        else:
            axis.imshow(values, cmap="gray" if values is windows else "magma", origin="lower", extent=edges, alpha=0.7)
        axis.set(title=title)
        axis.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes[1].plot(TOKEN[1] + 0.5, TOKEN[0] + 0.5, "+", color="white", markersize=12)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
