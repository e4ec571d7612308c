"""Predictions for a scan in another pose, the table of docs/finetuning.md: python -m scripts.reproduce.poses RUN STORE

Each test scan is predicted as it is, and as copies: with its axes in another order, with another voxel size, rotated,
and all three. The probabilities of a copy are resampled to the scan's own grid, and their argmax is compared with the
scan's label map by Dice. The label map of the copy, resampled by nearest neighbour, is compared too. The Dice of the
true labels, resampled there and back, is the loss by resampling alone. Thin structures lose most.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from statistics import mean

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from asa.data.io.nifti import Volume, read_image, read_label, write_image
from asa.data.preprocessing.resampling import sample_affine, sample_label
from asa.data.splits import read_split, select
from asa.data.store import Store
from asa.evaluation.metrics import dice
from asa.inference.segmentation import Segmenter
from asa.settings import PredictSettings

# Angles about x, y, z in degrees, factor of the voxel size, axes of the copy with their signs.
COPIES = {
    "reoriented": ((0, 0, 0), 1.0, [-2, 3, 1]),
    "resampled": ((0, 0, 0), 0.75, [1, 2, 3]),
    "rotated": ((6, -4, 8), 1.0, [1, 2, 3]),
    "all three": ((6, -4, 8), 0.75, [-2, 3, 1]),
}
MARGIN = 2  # voxels around the head in a copy that is resampled
SHIFT = 0.37  # of a voxel, added to its grid: on a common grid every other voxel would lie on the mask's edge


def copy_of(scan: Volume, angles: tuple[float, ...], factor: float, axes: list[int]) -> Volume:
    """The scan on another grid in the same space: its own voxels in another order, or a grid around its foreground.

    At the rim of a stripped brain only the brain is interpolated: the zeros outside would make it darker.
    """
    order, signs = [abs(axis) - 1 for axis in axes], np.sign(axes)
    rotated = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ scan.affine[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = rotated[:, order] * signs * factor
    same = factor == 1 and not any(angles)
    box = ndimage.find_objects(((scan.data > 0) | same).astype(np.uint8))[0]
    corners = np.stack(np.meshgrid(*((side.start, side.stop - 1) for side in box), indexing="ij"), -1).reshape(-1, 3)
    points = corners @ scan.affine[:3, :3].T @ np.linalg.inv(affine[:3, :3]).T  # in voxels of the copy
    margin, shift = (0, 0) if same else (MARGIN, SHIFT)
    low = np.floor(points.min(axis=0).round(6)) - margin + shift
    shape = [int(size) for size in np.ceil(points.max(axis=0).round(6)) + margin + 1 - low]
    affine[:3, 3] = scan.affine[:3, 3] + affine[:3, :3] @ low
    matrix = np.linalg.inv(scan.affine) @ affine
    brain = scan.data > 0
    nearest = ndimage.distance_transform_edt(~brain, return_distances=False, return_indices=True)
    image = ndimage.affine_transform(scan.data[tuple(nearest)], matrix, output_shape=shape, order=3, mode="nearest")
    inside = ndimage.affine_transform(brain.astype(np.float32), matrix, output_shape=shape, order=1) >= 0.5
    return Volume(np.where(inside, image.clip(min=1e-3), 0).astype(np.float32), affine, scan.header)


def scores(label: np.ndarray, reference: np.ndarray, values: list[int]) -> list[float]:
    """Dice of all labels joined, and of each."""
    return [dice(label > 0, reference > 0), *(dice(label == value, reference == value) for value in values)]


def main() -> int:
    """Print the Dice of each kind of copy."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    run, store = Path(sys.argv[1]), Store(sys.argv[2])
    segmenter, values = Segmenter(run, PredictSettings(device="cpu")), store.label_values
    records = select(store.records, read_split(run / "split.json")["test"])
    probabilities: dict[str, list[list[float]]] = {kind: [] for kind in COPIES}
    labels: dict[str, list[list[float]]] = {kind: [] for kind in COPIES}
    round_trip: dict[str, list[list[float]]] = {kind: [] for kind in COPIES}
    warnings.simplefilter("ignore", UserWarning)  # about resampled copies
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "label.nii.gz"
        for record in records:
            paths = {name: source["path"] for name, source in record["sources"].items()}
            truth = read_label(paths.pop("label"))
            segmenter.segment_file(paths, out)
            here = read_label(out)
            for kind, change in COPIES.items():
                files = {name: Path(folder) / f"{name}.nii.gz" for name in paths}
                for name, path in paths.items():
                    copy = copy_of(read_image(path), *change)
                    write_image(files[name], copy.data, copy.affine)
                segmenter.segment_file(files, out, probabilities=Path(folder))
                there, forth = read_label(out).data, np.linalg.inv(here.affine) @ copy.affine
                back, shape = np.linalg.inv(forth), here.data.shape
                maps = segmenter.outputs.files(Path(folder))[0 if segmenter.outputs.regions else 1 :]
                moved = (sample_affine(read_image(file).data, back, shape) for file in maps)
                winner = segmenter.outputs.label_map(moved, here)
                probabilities[kind].append(scores(winner, here.data, values))
                labels[kind].append(scores(sample_label(there, back, shape), here.data, values))
                both = sample_label(sample_label(truth.data, forth, there.shape), back, shape)
                round_trip[kind].append(scores(both, truth.data, values))
    print(f"Dice with the scan's own label map, mean of {len(records)} scans: probabilities of the copy, resampled")
    print("(label map of the copy, resampled; true labels, resampled there and back)")
    names = ["all", *(store.labels[value] for value in values)]
    for kind in COPIES:
        means = (
            [mean(column) for column in zip(*rows[kind], strict=True)] for rows in (probabilities, labels, round_trip)
        )
        cells = (f"{name} {a:.3f} ({b:.3f}, {c:.3f})" for name, a, b, c in zip(names, *means, strict=True))
        print(f"{kind:<11} {'  '.join(cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
