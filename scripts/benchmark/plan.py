"""The rows of a run: their names, and the specs that `row.py` measures. Does not import torch: see `__main__.py`."""

import math
from collections.abc import Sequence
from typing import Any

PARTS = (
    "pretrain", "fast", "finetune", "importance", "loader", "fed", "window", "growth", "regions", "digests", "scale",
)  # fmt: skip
SCALES = (1_000, 10_000, 100_000)
# By what they do with a store, see `scale.py`.
OPERATIONS = ("make", "open", "split", "split by site", "duplicates", "leakage", "first batch", "resume")
OVERLAP = 0.5
AIR = 0.27  # of the patches of 15 stripped OASIS brains in centre crops of 128^3
CHANNELS = {"asa": 1, "fast": 1, "dense": 1, "written": 1, "unet": 4, "conv": 4, "light": 4, "unetr": 4, "swin": 4}
# Sizes of the other networks. Base is that of their papers and of MONAI's examples.
UNETR_SIZE = {"base": (768, 12, 16), "small": (384, 6, 16), "tiny": (96, 3, 8)}  # width, heads, features
SWIN_FEATURES = {"base": 48, "small": 24, "tiny": 12}

Spec = dict[str, Any]


def plan(
    parts: list[str], size: str, edge: int, batch: int, common: Spec, records: Sequence[int] = SCALES
) -> list[Spec]:
    """The rows of a run, in order. A step in two parts has the same spec in both, except for the part.

    Args:
        parts: some of `PARTS`.
        size: `"base"`, `"small"` or `"tiny"`.
        edge: of the training volumes, in voxels.
        batch: volumes per step.
        common: entries shared by all specs.
        records: numbers of scans in the stores of the part "scale".
    """

    rows: list[Spec] = []

    def add(part: str, name: str, kind: str = "", **own: Any) -> None:
        if part in parts:
            rows.append({"part": part, "name": name, "kind": kind or part, **own})

    def step(part: str, network: str, side: int) -> None:
        own = {"network": network, "size": size, "edge": side, "batch": batch}
        add(part, describe(network, size, side), "step", **own)

    # In the ratio of 160 x 192 x 160 to 128^3.
    whole = [8 * round(n * edge / 128 / 8) for n in (160, 192, 160)]
    shape = "x".join(map(str, whole))
    for network in ("asa", "dense", "written"):
        step("pretrain", network, edge)
    for network in ("asa", "fast"):
        step("fast", network, edge)
    for network in ("unet", "conv", "light", "unetr", "swin"):
        step("finetune", network, edge)
    for kind in ("orientation", "magnitude"):
        add("importance", f"{kind}, {edge}^3", importance=kind, edge=edge, batch=batch)
    for augment in (False, True):
        for workers in (0, 2, 4):
            varied = "fine-tuning augmentation" if augment else "no augmentation"
            name = f"4 x {edge}^3 crops of {shape}, {varied}, {workers} workers"
            add("loader", name, edge=edge, batch=batch, volume=whole, workers=workers, augment=augment)
    for workers in (0, 2, 4):
        name = f"{describe('asa', size, edge)} crops of {shape}, {workers} workers"
        add("fed", name, network="asa", size=size, edge=edge, batch=batch, volume=whole, workers=workers)
    windows = count_windows(whole, edge)
    for network in ("unet", "unetr", "swin"):
        name = f"{describe(network, size, edge)}, {windows} windows over {shape}"
        own: Spec = {"network": network, "size": size, "edge": edge, "volume": whole}
        add("window", name, windows=windows, overlap=OVERLAP, **own)
    sides = [edge * k // 4 for k in (2, 3, 4, 5, 6)]
    for network, measured in (("asa", sides), ("dense", sides[:-1])):
        for side in measured:
            step("growth", network, side)
    if "regions" in parts:
        rows += region_rows(size)
    for first in (False, True):
        when = "opened for the first time, with its SHA-256" if first else "opened before"
        name = f"a 1 x {edge}^3 crop of an array of {shape}, {when}"
        add("digests", name, edge=edge, volume=whole, first=first)
    for count in records:
        for operation in OPERATIONS:
            name = f"{count:,} scans: {operation}"
            add("scale", name, operation=operation, records=count, edge=edge, volume=whole)
    return [{**row, **common} for row in rows]


def region_rows(size: str) -> list[Spec]:
    """Attention inside 40 regions of 128 x 128 tokens by both backends, its growth, and the whole network."""
    rows: list[Spec] = []
    for backend, edge in (("segments", 128), ("dense", 128), ("segments", 64), ("segments", 256)):
        regions = edge**2 * 40 // 128**2  # of one size on average
        way = {"segments": "by segments", "dense": "by one masked product"}[backend]
        name = f"attention {way}, {edge}^2 tokens, {regions} regions"
        own = {"kind": "attention", "backend": backend, "edge": edge, "regions": regions, "tokens": edge**2}
        rows.append({"part": "regions", "name": name, "batch": 1, **own})
    own = {"kind": "restore", "size": size, "edge": 512, "regions": 40, "batch": 1}
    return [*rows, {"part": "regions", "name": f"rat_{size}, forward pass of 512^2 pixels, 40 regions", **own}]


def count_windows(volume: list[int], edge: int) -> int:
    """Number of windows of edge^3 voxels that cover a volume with the default overlap, as in MONAI."""
    stride = int(edge * (1 - OVERLAP))
    return math.prod(math.ceil(max(n - edge, 0) / stride) + 1 for n in volume)


def tokens(edge: int) -> int:
    """Tokens of a volume."""
    return (edge // 8) ** 3


def describe(network: str, size: str, edge: int) -> str:
    """Name of a network and its input."""
    voxels = f"{CHANNELS[network]} x {edge}^3"
    names = {
        "asa": f"asa_{size}",
        "fast": f"asa_{size} with the settings of asa_fast, {AIR:.0%} air",
        "dense": f"dense ViT-MAE twin of asa_{size}, fused attention",
        "written": f"dense ViT-MAE twin of asa_{size}, written-out attention",
        "unet": f"unet_{size}",
        "conv": f"vit_conv_{size}",
        "light": f"vit_seg_{size}",
        "unetr": f"MONAI UNETR (width {UNETR_SIZE[size][0]})",
        "swin": f"MONAI SwinUNETR (feature size {SWIN_FEATURES[size]})",
    }
    return f"{names[network]}, {voxels}"
