"""Left and right on real brains: do networks learn labels that have a side, and does asymmetry know none?

sides.py labels DATA OUT                    cortex, white and deep grey matter, left and right apart, of manual regions
sides.py score OUT PREDICTIONS...           Dice, and the rate of voxels that were given the other side's label
sides.py flip RUN STORE                     scores and maps of scans and of their mirror images

DATA holds skull-stripped brains ID_SS.nii.gz and the manual regions ID_glm.nii.gz of the MICCAI 2012 multi-atlas
challenge; OUT gets links to the brains and ID_sides.nii.gz.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from asa.data.io.nifti import read_image, write_label
from asa.data.store import Store
from asa.evaluation.metrics import dice
from asa.inference.asymmetry import AsymmetryScorer
from asa.inference.segmentation import PredictSettings

# Values of that challenge, (left, right): accumbens, amygdala, caudate, hippocampus, pallidum, putamen, thalamus.
DEEP = ((30, 23), (32, 31), (37, 36), (48, 47), (56, 55), (58, 57), (60, 59))
WHITE = (45, 44)
CORTEX = range(100, 208)  # odd: left, even: right
NAMES = ("cortex", "white", "deep")  # labels 1 and 2, 3 and 4, 5 and 6: left is odd


def side_table() -> np.ndarray:
    """Value of a manual region -> label, uint8 `(256,)`; other regions are background."""
    table = np.zeros(256, dtype=np.uint8)
    for value in CORTEX:
        table[value] = 1 if value % 2 else 2
    for k, label in enumerate((3, 4)):
        table[WHITE[k]] = label
    for pair in DEEP:
        table[list(pair)] = 5, 6
    return table


def make_labels(data: Path, out: Path) -> None:
    """Write the labels of all scans, and link their images beside these."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(data.glob("*_glm.nii.gz")):
        id, regions = path.name.removesuffix("_glm.nii.gz"), read_image(path)
        write_label(out / f"{id}_sides.nii.gz", side_table()[regions.data.astype(np.uint8)], regions)
        link = out / f"{id}_SS.nii.gz"
        link.unlink(missing_ok=True)
        link.symlink_to((data / link.name).resolve())


def confusion(truth: np.ndarray, found: np.ndarray) -> list[float]:
    """Rate of the other side's label, mean Dice of the six labels, and Dice of each tissue with its sides joined.

    The rate is that among the voxels which have a label in the truth and were given one.
    """
    both = (truth > 0) & (found > 0)
    wrong = float((truth[both] % 2 != found[both] % 2).mean())
    sided = float(np.mean([dice(truth == label, found == label) for label in range(1, 7)]))
    joined = [(truth + 1) // 2, (found + 1) // 2]
    return [wrong, sided, *(dice(joined[0] == k, joined[1] == k) for k in (1, 2, 3))]


def score(truths: Path, folders: list[Path]) -> None:
    """Print a row for each folder of predictions: means over its scans, and the largest rate."""
    head = ("wrong side", "worst scan", "Dice, sided", *(f"{name}, joined" for name in NAMES))
    print(f"{'':<20}" + "".join(f"{name:>15}" for name in head))
    for folder in folders:
        rows = []
        for path in sorted(folder.glob("*.nii.gz")):
            id = path.name.removesuffix(".nii.gz")
            truth = read_image(truths / f"{id}_sides.nii.gz")
            rows.append(confusion(truth.data.astype(np.uint8), read_image(path).data.astype(np.uint8)))
        mean = np.mean(rows, axis=0)
        shown = [mean[0], max(row[0] for row in rows), *mean[1:]]
        print(f"{folder.name:<20}" + "".join(f"{value:>15.4f}" for value in shown))


def compare_flipped(run: Path, store: Store) -> None:
    """Print the largest differences between a scan's score and map and those of its mirror image, and their sizes."""
    scorer = AsymmetryScorer(run, PredictSettings())
    scores, differences = [], []
    for record in store.records:
        image = torch.from_numpy(np.array(store.image(record["id"]), dtype=np.float32))
        one, other = scorer.measure(image), scorer.measure(image.flip(-1))
        scores.append((one.score, one.top))
        differences.append((abs(one.score - other.score), float((one.map.flip(-1) - other.map).abs().max())))
    (score, top), (apart, unlike) = np.median(scores, axis=0), np.max(differences, axis=0)
    print(f"{len(scores)} scans, median score {score:.3g}, median top of the map {top:.3g}")
    print(f"flipped: scores differ by {apart:.1e} at most, maps from the flipped map by {unlike:.1e}")


def main() -> int:
    """Entry point."""
    command, paths = sys.argv[1] if len(sys.argv) > 1 else "", [Path(path) for path in sys.argv[2:]]
    if command == "labels" and len(paths) == 2:
        make_labels(paths[0], paths[1])
    elif command == "score" and len(paths) > 1:
        score(paths[0], paths[1:])
    elif command == "flip" and len(paths) == 2:
        compare_flipped(paths[0], Store(paths[1]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
