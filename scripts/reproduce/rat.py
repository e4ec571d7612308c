"""Do regions help? Four arms of one small network on real images: `python -m scripts.reproduce.rat OUT`.

windows: no region attention. global: every image is one region. true: Felzenszwalb's regions of the degraded image.
shuffled: their pixels in random places, so that sizes are kept and shapes are not.

Tasks, on photographs and micrographs that ship in scikit-image, in grey. The degraded images are simulated.
denoise: Gaussian noise of 0.1 of the range; 8 pictures for training, 16 tiles of 4 other pictures for test.
super: twice smaller by blur and decimation; 48 tiles of one immunohistochemistry picture for training, 16 for test.

One thread, no GPU, about ten minutes. A run that is there is not repeated. What it gave is in docs/restoration.md.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from asa.data.files import write_json
from asa.data.loader import LoaderSettings
from asa.data.pairs import Pair, PairDataset, find_pairs
from asa.data.picture import needed, write_picture, write_regions
from asa.data.providers import make_provider
from asa.data.simulate import decimated
from asa.engine.optim import OptimSettings
from asa.engine.predict import PredictSettings
from asa.engine.quality import score_image
from asa.engine.restore import restore_image
from asa.engine.statistics import bootstrap_interval
from asa.engine.train import TrainSettings, train
from asa.methods.restore import Restoration
from asa.models.rat import rat_tiny

LEARNT = ("camera.png", "coins.png", "moon.png", "cell.png", "chelsea.png", "coffee.png", "rocket.jpg", "gravel.png")
HELD_OUT = ("astronaut.png", "retina.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
ARMS = {"windows": None, "global": None, "true": "regions", "shuffled": "shuffled"}  # folder of label maps
CROPS = {"denoise": 48, "super": 24}


def grey(name: str) -> np.ndarray:
    """A picture of scikit-image, `(1, H, W)` in [0, 1]."""
    path = Path(needed("skimage").__file__).parent / "data" / name
    with needed("PIL.Image").open(path) as opened:
        return np.asarray(opened.convert("L"), dtype=np.float32)[None] / 255


def clean_images(task: str) -> Iterator[tuple[str, np.ndarray]]:
    """Id and image; ids begin with train or test."""
    if task == "super":
        picture, edge = grey("ihc.png"), 64
        for i in range(8):
            for j in range(8):
                part = "train" if j < 6 else "test"  # the two columns at the right are held out
                yield f"{part}_{i}{j}", picture[:, edge * i : edge * (i + 1), edge * j : edge * (j + 1)]
        return
    for name in LEARNT:
        yield f"train_{Path(name).stem}", grey(name)[:, :256, :256]
    for name in HELD_OUT:
        picture = grey(name)
        top, left = ((n - 256) // 2 for n in picture.shape[1:])
        for k in range(4):
            i, j = top + 128 * (k // 2), left + 128 * (k % 2)
            yield f"test_{Path(name).stem}_{k}", picture[:, i : i + 128, j : j + 128]


def write_task(task: str, root: Path) -> None:
    """Pairs and label maps of a task."""
    provider = make_provider("felzenszwalb")
    for k, (id, clean) in enumerate(clean_images(task)):
        generator = np.random.default_rng(k)
        low = decimated(clean, 2) if task == "super" else clean + generator.normal(0, 0.1, clean.shape)
        low = low.clip(0, 1)
        labels = provider(id, low)
        write_picture(root / "low" / f"{id}.png", low)
        write_picture(root / "high" / f"{id}.png", clean)
        write_regions(root / "regions" / f"{id}.png", labels)
        write_regions(root / "shuffled" / f"{id}.png", generator.permutation(labels.ravel()).reshape(labels.shape))


def run(task: str, arm: str, seed: int, steps: int, root: Path, out: Path) -> dict[str, float]:
    """Train an arm, and give the PSNR of each test image."""
    file = out / "psnr.json"
    if file.is_file():
        return json.loads(file.read_text())
    pairs = find_pairs(root, regions=ARMS[arm])
    parts: dict[str, list[Pair]] = {
        part: [pair for pair in pairs if pair["id"].startswith(part)] for part in ("train", "test")
    }
    upscale = 2 if task == "super" else 1
    torch.manual_seed(seed)
    method = Restoration(model=rat_tiny(upscale=upscale, dim=8, groups=1, depth=3, num_heads=2))
    torch.nn.init.zeros_(method.model.head.weight)  # the steps are few: they start from the input as it is
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
        restored = restore_image(method.model, views["image"], views["regions"], PredictSettings(device="cpu"))
        found[pair["id"]] = score_image(restored, views["target"])["psnr"]
    write_json(file, found)
    return found


def input_psnr(task: str, root: Path) -> float:
    """Mean PSNR of the degraded test images, upscaled bilinearly."""
    pairs = [pair for pair in find_pairs(root) if pair["id"].startswith("test")]
    dataset, values = PairDataset(pairs, 1, upscale=2 if task == "super" else 1), []
    for k in range(len(pairs)):
        views = dataset.whole(k)
        plain = torch.nn.functional.interpolate(views["image"][None], views["target"].shape[1:], mode="bilinear")[0]
        values.append(score_image(plain, views["target"])["psnr"])
    return float(np.mean(values))


def table(results: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """PSNR of each arm, and how much more the true regions give."""

    def by_image(arm: str) -> np.ndarray:
        return np.array([list(found.values()) for found in results[arm].values()]).mean(axis=0)

    lines = ["| arm | PSNR, dB | seeds | true minus arm | 95 % interval |", "|---|--:|---|--:|--:|"]
    for arm in results:
        seeds = ", ".join(f"{np.mean(list(found.values())):.2f}" for found in results[arm].values())
        difference = by_image("true") - by_image(arm)
        low, high = bootstrap_interval(difference)
        against = f"{difference.mean():+.3f} | {low:+.3f} to {high:+.3f}" if arm != "true" else " | "
        lines.append(f"| {arm} | {by_image(arm).mean():.2f} | {seeds} | {against} |")
    return lines


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(CROPS), default=list(CROPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.tasks:
        root = options.out / task
        if not (root / "low").is_dir():
            write_task(task, root)
        results: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in ARMS}
        for seed in range(options.seeds):  # all arms of a seed first: a run that is stopped has whole seeds
            for arm in ARMS:
                results[arm][seed] = run(task, arm, seed, options.steps, root, options.out / f"{task}_{arm}_{seed}")
        print(f"\n{task}: {options.steps} steps; the input itself {input_psnr(task, root):.2f} dB")
        print("\n".join(table(results)), flush=True)


if __name__ == "__main__":
    main()
