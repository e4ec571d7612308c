"""The figure of docs/restoration.md: python -m scripts.reproduce.rat_figure OUT PICTURE.png

Input, its regions, the output of a network of `scripts.reproduce.rat` (true regions, seed 0, 200 steps), the truth and
the error, for a held-out tile of the denoising task and one of super-resolution. OUT is the folder of that script, or a
new one: missing networks are trained, in about a minute. The pictures are from scikit-image: parts of its astronaut
(NASA, public domain) and of its immunohistochemistry (no known copyright restrictions).
"""

import sys
from pathlib import Path

import numpy as np
import torch

from asa.data.io.files import write_whole
from asa.reporting.figures import GAP, encode_png
from asa.restoration.evaluation import ImageFiles, error_map, error_scale, image_panel, read_case
from asa.restoration.images import read_picture, read_regions
from asa.restoration.region_maps import outlined
from scripts.reproduce.rat import factor, run, write_task

SHOWN = {"denoise": ("test_astronaut_3", 96), "super": ("test_26", 64)}  # task -> case, pixels shown
STEPS = 200


def pictures_of(task: str, case: str, edge: int, out: Path) -> dict[str, np.ndarray]:
    """Pictures of a case by title, resized to the clean one and cropped to the square at the top left."""
    root, trained = out / task, out / f"{task}_true_0"
    if not (root / "low").is_dir():
        write_task(task, root)
    run(task, "true", 0, STEPS, root, trained)
    low, high, restored = (folder / f"{case}.png" for folder in (root / "low", root / "high", trained / "restored"))
    pictures = read_case(ImageFiles(case, restored, high, low), None)
    regions = outlined(read_picture(low), read_regions(root / "regions" / f"{case}.png"))
    regions = regions.repeat(factor(task), axis=1).repeat(factor(task), axis=2)
    pictures = {"Input": pictures.pop("Input"), "Regions": regions, **pictures}
    return {title: picture[:, :edge, :edge] for title, picture in pictures.items()}


def main() -> None:
    """Entry point."""
    out, picture = (Path(argument) for argument in sys.argv[1:3])
    torch.set_num_threads(1)
    rows = []
    for task, (case, edge) in SHOWN.items():
        pictures = pictures_of(task, case, edge, out)
        top = error_scale([pictures])
        rows.append(image_panel(pictures, top))
        mean = {name: float(np.square(pictures[name] - pictures["Truth"]).mean()) for name in ("Input", "Output")}
        decibels = " -> ".join(f"{-10 * np.log10(value):.2f}" for value in mean.values())
        print(f"{task}, {case}: {decibels} dB; error 0 to {top:.2g}, mean {error_map(pictures).mean():.3f}")
    gap = np.zeros((GAP, rows[0].shape[1], 3), dtype=np.uint8)
    write_whole(picture, encode_png(np.concatenate([rows[0], gap, rows[1]])))
    print(f"wrote {picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
