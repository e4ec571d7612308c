"""Time to score a case under each policy, a table of docs/evaluation.md: python -m scripts.reproduce.scoring [REPEATS]

Measured in one process, from two NIfTI files to the rows of a case of 240 x 240 x 155 voxels. The truth is a simulated
tumour of three nested regions with some eighty satellite lesions. The prediction is the same tumour with another
surface and other satellites.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from scipy.ndimage import gaussian_filter

from asa.data.io.nifti import Volume, read_label, write_label
from asa.evaluation.policies import POLICIES
from asa.tasks.evaluation import evaluate_case

SHAPE = (240, 240, 155)
LABELS = {1: "necrosis", 2: "oedema", 4: "enhancing"}
REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}


def tumour(seed: int) -> np.ndarray:
    """Label map `(x, y, z)`: about 4 % of the image is tumour, in one large and some eighty small pieces."""
    half = tuple((side + 1) // 2 for side in SHAPE)
    common, own = (np.random.default_rng(s).normal(size=half) for s in (0, seed))
    field = gaussian_filter(common, 3) + 0.3 * gaussian_filter(own, 3)
    grid = np.indices(half, dtype=np.float32) - np.array(half).reshape(3, 1, 1, 1) * [[[[0.45]]], [[[0.55]]], [[[0.5]]]]
    field = field / field.std() - np.linalg.norm(grid, axis=0) / 9
    field = field.repeat(2, 0).repeat(2, 1).repeat(2, 2)[tuple(slice(side) for side in SHAPE)]
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for value, fraction in ((2, 0.04), (4, 0.015), (1, 0.005)):
        labels[field > np.quantile(field, 1 - fraction)] = value
    specks = gaussian_filter(np.random.default_rng(seed + 1).normal(size=SHAPE), 4)
    labels[(specks > np.quantile(specks, 0.9995)) & (labels == 0)] = 4
    return labels


def main(repeats: int) -> None:
    """Print a Markdown table."""
    like = Volume(np.zeros(SHAPE, dtype=np.uint8), np.eye(4), None)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.nii.gz" for name in ("prediction", "truth")]
        for seed, file in enumerate(files, start=1):
            write_label(file, tumour(10 * seed), like)
        print("| policy | s (median) | of which reading |\n|---|---:|---:|")
        for name, policy in POLICIES.items():
            rules = replace(policy.of_cohort(REGIONS, []), ignored=())  # 2 is oedema here
            reading, whole = [], []
            for _ in range(repeats):
                begin = time.perf_counter()
                prediction, truth = map(read_label, files)
                reading.append(time.perf_counter() - begin)
                evaluate_case(prediction, truth, LABELS, rules, case_id="a")
                whole.append(time.perf_counter() - begin)
            print(f"| `{name}` | {median(whole):.2f} | {median(reading):.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
