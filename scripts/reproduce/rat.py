"""The benefit of regions, the tables of docs/restoration.md: python -m scripts.reproduce.rat OUT

Five arms of one small network. windows: no region attention. global: every image is one region. true: Felzenszwalb's
regions of the degraded image. shuffled: the pixels of these regions permuted at random, which keeps their sizes and not
their shapes. majority: the true regions, downsampled to the attention's resolution by majority instead of nearest
neighbour.

The images are pictures that ship with scikit-image, in grey, and CT slices that ship with pydicom. The degradation is
simulated.
denoise: Gaussian noise of 0.1 of the range; 8 pictures for training, 16 tiles of 4 other pictures for test.
super: twice smaller by blur and decimation; 48 tiles of one immunohistochemistry picture for training, 16 for test.
ct: low-dose noise of about 60 HU; 9 tiles of 128 x 128 pixels of one head for training, and for test no more than 4 of
64 x 64 of another person's spine (CT_small.dcm): the intervals cover only the differences between these tiles.

One thread, no GPU, about twenty minutes. A finished run is not repeated.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from asa.data.io.files import write_json
from asa.errors import require
from asa.evaluation.statistics import bootstrap_interval
from asa.restoration.evaluation import score_image
from asa.restoration.images import in_window, read_values, write_picture, write_regions
from asa.restoration.method import Restoration, restore_image
from asa.restoration.pairs import Pair, PairDataset, find_pairs
from asa.restoration.rat import rat_tiny
from asa.restoration.region_maps import make_provider
from asa.restoration.simulation import decimated, make_degradation
from asa.settings import LoaderSettings, OptimSettings, PredictSettings, TrainSettings
from asa.training.loop import train
from scripts.reproduce.commands import parser_of

TRAINING = ("camera.png", "coins.png", "moon.png", "cell.png", "chelsea.png", "coffee.png", "rocket.jpg", "gravel.png")
HELD_OUT = ("astronaut.png", "retina.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
# Slice, photons per ray, mm per pixel, first row and column, edge of a tile. The doses give both slices similar noise.
SLICES = {"train": ("J2K_pixelrep_mismatch.dcm", 1e5, 0.431, 64, 128), "test": ("CT_small.dcm", 1e4, 0.661, 0, 64)}
HU = (-1000.0, 1500.0)  # 0 and 1 of the CT task, its data range
ARMS = {"windows": None, "global": None, "true": "regions", "shuffled": "shuffled", "majority": "regions"}  # label maps
CROPS = {"denoise": 48, "super": 24, "ct": 48}

Sample = tuple[str, np.ndarray, np.ndarray]  # id, degraded and clean image; ids begin with train or test


def grey(name: str) -> np.ndarray:
    """A picture of scikit-image, `(1, H, W)` in [0, 1]."""
    path = Path(require("skimage", "restore", "this script").__file__).parent / "data" / name
    with require("PIL.Image", "restore", "this script").open(path) as opened:
        return np.asarray(opened.convert("L"), dtype=np.float32)[None] / 255


def denoising() -> Iterator[Sample]:
    """Pictures under Gaussian noise."""
    clean = {f"train_{Path(name).stem}": grey(name)[:, :256, :256] for name in TRAINING}
    for name in HELD_OUT:
        picture = grey(name)
        top, left = ((n - 256) // 2 for n in picture.shape[1:])
        for k in range(4):
            i, j = top + 128 * (k // 2), left + 128 * (k % 2)
            clean[f"test_{Path(name).stem}_{k}"] = picture[:, i : i + 128, j : j + 128]
    for k, (id, image) in enumerate(clean.items()):
        yield id, image + np.random.default_rng(k).normal(0, 0.1, image.shape), image


def decimation() -> Iterator[Sample]:
    """Tiles of a micrograph and the same at half size; the two columns on the right are held out."""
    picture, edge = grey("ihc.png"), 64
    for i in range(8):
        for j in range(8):
            tile = picture[:, edge * i : edge * (i + 1), edge * j : edge * (j + 1)]
            yield f"{'train' if j < 6 else 'test'}_{i}{j}", decimated(tile, 2), tile


def low_dose() -> Iterator[Sample]:
    """Tiles of CT slices, with noise simulated in the projections of the whole slice."""
    for k, (part, (name, photons, pixel, first, edge)) in enumerate(SLICES.items()):
        file = require("pydicom.data", "restore", "this script").get_testdata_file(name, download=False)
        hu = read_values(file, HU)[0].clip(*HU)
        noisy = make_degradation("ct", photons=photons, pixel=pixel)(hu, np.random.default_rng(k))
        clean, low = in_window(hu, HU), (noisy - HU[0]) / (HU[1] - HU[0])
        starts = range(first, clean.shape[1] - first, edge)
        for i in starts:
            for j in starts:
                yield f"{part}_{i}_{j}", low[:, i : i + edge, j : j + edge], clean[:, i : i + edge, j : j + edge]


TASKS = {"denoise": denoising, "super": decimation, "ct": low_dose}


def write_task(task: str, root: Path) -> None:
    """Write the pairs and label maps of a task."""
    provider = make_provider("felzenszwalb")
    for k, (id, low, clean) in enumerate(TASKS[task]()):
        low = low.clip(0, 1)
        labels = provider(id, low)
        shuffled = np.random.default_rng([k, 1]).permutation(labels.ravel()).reshape(labels.shape)
        write_picture(root / "low" / f"{id}.png", low)
        write_picture(root / "high" / f"{id}.png", clean)
        write_regions(root / "regions" / f"{id}.png", labels)
        write_regions(root / "shuffled" / f"{id}.png", shuffled)


def run(task: str, arm: str, seed: int, steps: int, root: Path, out: Path) -> dict[str, dict[str, float]]:
    """Train an arm, and return the scores of each test image."""
    file = out / "scores.json"
    if file.is_file():
        return json.loads(file.read_text())
    parts = {part: pairs_of(root, part, ARMS[arm]) for part in ("train", "test")}
    upscale = factor(task)
    torch.manual_seed(seed)
    network = rat_tiny(upscale=upscale, dim=8, groups=1, depth=3, num_heads=2, majority=arm == "majority")
    method = Restoration(model=network)
    torch.nn.init.zeros_(network.head.weight)  # with few steps: start from the identity
    if arm == "windows":
        for name, parameter in method.named_parameters():
            if name.endswith("region_scale"):
                parameter.requires_grad_(False)  # stays 0
    train(
        method,
        PairDataset(parts["train"], CROPS[task], upscale=upscale, seed=seed),
        out,
        settings=TrainSettings(steps=steps, batch_size=2, device="cpu", seed=seed, log_every=100, save_every=steps),
        optim=OptimSettings(lr=2e-3, weight_decay=0.0, warmup=20),
        loader=LoaderSettings(workers=0),
        description={},
    )
    method.eval()
    dataset, found = PairDataset(parts["test"], CROPS[task], upscale=upscale), {}
    for k, pair in enumerate(dataset.pairs):
        views = dataset.whole(k)
        restored = restore_image(network, views["image"], views["regions"], PredictSettings(device="cpu"))
        write_picture(out / "restored" / f"{pair['id']}.png", restored.numpy())
        found[pair["id"]] = score_image(restored, views["target"], width(task))
    write_json(file, found)
    return found


def pairs_of(root: Path, part: str, regions: str | None) -> list[Pair]:
    """The pairs for training or test."""
    return [pair for pair in find_pairs(root, regions=regions) if pair["id"].startswith(part)]


def factor(task: str) -> int:
    """How many times larger the clean images are."""
    return 2 if task == "super" else 1


def width(task: str) -> float:
    """Width of the data range: in HU for CT."""
    return HU[1] - HU[0] if task == "ct" else 1.0


def input_scores(task: str, root: Path) -> dict[str, dict[str, float]]:
    """Scores of the degraded test images, upscaled bilinearly."""
    dataset, found = PairDataset(pairs_of(root, "test", None), 1, upscale=factor(task)), {}
    for k, pair in enumerate(dataset.pairs):
        views = dataset.whole(k)
        plain = torch.nn.functional.interpolate(views["image"][None], views["target"].shape[1:], mode="bilinear")[0]
        found[pair["id"]] = score_image(plain, views["target"], width(task))
    return found


def table(results: dict[str, dict[int, dict[str, dict[str, float]]]], digits: int) -> list[str]:
    """Scores of each arm as means over test images and seeds, and the difference of the true regions in dB."""

    def by_image(arm: str, metric: str = "psnr") -> np.ndarray:
        return np.array([[row[metric] for row in found.values()] for found in results[arm].values()]).mean(axis=0)

    lines = ["| arm | PSNR, dB | 95 % interval | seeds | true minus arm, dB | 95 % interval | SSIM | RMSE |"]
    lines.append("|---|--:|--:|---|--:|--:|--:|--:|")
    for arm in results:
        seeds = ", ".join(f"{np.mean([row['psnr'] for row in found.values()]):.2f}" for found in results[arm].values())
        mean, (low, high) = by_image(arm).mean(), bootstrap_interval(by_image(arm))
        against = " | "
        if arm != "true" and "true" in results:
            difference = by_image("true") - by_image(arm)
            ends = bootstrap_interval(difference)
            against = f"{difference.mean():+.3f} | {ends[0]:+.3f} to {ends[1]:+.3f}"
        others = f"{by_image(arm, 'ssim').mean():.3f} | {by_image(arm, 'rmse').mean():.{digits}f}"
        lines.append(f"| {arm} | {mean:.2f} | {low:.2f} to {high:.2f} | {seeds} | {against} | {others} |")
    return lines


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__, "out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.tasks:
        root = options.out / task
        if not (root / "low").is_dir():
            write_task(task, root)
        results: dict[str, dict[int, dict[str, dict[str, float]]]] = {"the input": {0: input_scores(task, root)}}
        results |= {arm: {} for arm in ARMS}
        for seed in range(options.seeds):  # all arms of a seed first: an interrupted run has complete seeds
            for arm in ARMS:
                results[arm][seed] = run(task, arm, seed, options.steps, root, options.out / f"{task}_{arm}_{seed}")
        print(f"\n{task}: {options.steps} steps, data range {f'{HU} HU' if task == 'ct' else '0 to 1'}")
        print("\n".join(table(results, 1 if task == "ct" else 4)), flush=True)


if __name__ == "__main__":
    main()
