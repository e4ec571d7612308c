"""The pictures of docs/concepts.md: python -m scripts.reproduce.concepts [FOLDER]

concepts.png: patches, encodings, importance and windows; reach.png: the tokens that one token's output depends on.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from asa.data.preprocessing.registration import load_map
from asa.losses.reconstruction import gradient_importance
from asa.models.sw_vit import ORDERS, sw_vit_tiny
from asa.ops.patches import patchify
from asa.ops.position import symmetric_position_encoding

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATCH, WINDOW = 8, 32
TOKEN = (9, 6)  # row and column of the token whose encoding is compared, of those in the slice


GRID, SEEN_FROM = (8, 8, 20), (4, 4, 6)  # tokens of a crop of experiment=structures_pretrain, and one of them


def reach(order: str, depth: int) -> np.ndarray:
    """Which tokens the output of one token depends on after `depth` blocks, bool (T, H, W), by gradients."""
    torch.manual_seed(0)
    sizes = tuple(PATCH * n for n in GRID)
    encoder = sw_vit_tiny(img_size=sizes, depth=depth, window=WINDOW, order=order, position="mirror_sincos").double()
    volume = torch.rand(1, 1, *sizes, dtype=torch.float64, requires_grad=True)
    output = encoder(volume).unflatten(1, GRID)[0][SEEN_FROM]
    (gradient,) = torch.autograd.grad(output @ torch.randn_like(output), volume)  # the sum of a layer norm is constant
    return (patchify(gradient, PATCH)[0].abs().sum(dim=1) > 0).unflatten(0, GRID).numpy()


def draw_reach(file: Path) -> None:
    """Draw, by order and number of blocks, how many tokens of each axial plane are seen, and print the planes."""
    depths = (1, 2, 3, 4)
    figure, axes = plt.subplots(2, len(depths), figsize=(13, 3.6), layout="constrained")
    for row, order in zip(axes, ORDERS, strict=True):
        for axis, depth in zip(row, depths, strict=True):
            seen = reach(order, depth)
            planes, columns = int(seen.any(axis=(1, 2)).sum()), seen.any(axis=1)  # projected along posterior-anterior
            print(f"{order}, {depth} blocks: {seen.sum()} of {seen.size} tokens, in {planes} of {GRID[0]} axial planes")
            axis.imshow(columns, cmap="Greys", origin="lower", vmin=0, vmax=1.5, extent=(0, GRID[2], 0, GRID[0]))
            axis.plot(SEEN_FROM[2] + 0.5, SEEN_FROM[0] + 0.5, "+", color="tab:orange", markersize=12)
            axis.set_xticks(range(GRID[2] + 1), [])
            axis.set_yticks(range(GRID[0] + 1), [])
            axis.grid(color="black", linewidth=0.2)
            axis.tick_params(length=0)
            axis.set_title(f"{order}, {depth} block{'s' * (depth > 1)}: {seen.mean():.0%} of the tokens", fontsize=10)
        row[0].set(ylabel="axial planes")
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main() -> None:
    """Draw the pictures."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    draw_reach(folder / "reach.png")
    draw_concepts(folder / "concepts.png")


def draw_concepts(file: Path) -> None:
    """Draw the four pictures of one slice."""
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
