"""What separating joined sides by a plane costs, the table of docs/asymmetry.md: python -m scripts.reproduce.plane DATA

The true regions of each scan are joined, left with right, and separated again by the mid-sagittal plane that
preparation estimates, and by that plane bent along the fissure, as asa-predict separates a network's classes. Printed
are the rate of voxels that get the wrong side, the same of deep grey matter, and the mean and the lowest Dice of the
separated regions with the true ones. A few seconds per scan on one core.

DATA: brains ID_SS.nii.gz with the manual regions of the MICCAI 2012 multi-atlas challenge, ID_glm.nii.gz, or heads
ID_T1.nii.gz with regions in MUSE's numbers, which are the same and some more, ID_regions.nii.gz.
"""

import warnings

import numpy as np

from asa.data.io.nifti import read_image, read_label
from asa.data.preprocessing.midsagittal import distance_to_the_right
from asa.data.preprocessing.pipeline import prepare_case, to_native
from asa.data.preprocessing.settings import PrepareSettings
from asa.evaluation.metrics import dice
from scripts.reproduce.commands import parser_of

FILES = (("_SS.nii.gz", "_glm.nii.gz"), ("_T1.nii.gz", "_regions.nii.gz"))
# (left, right): deep grey matter; ventricles, cerebellum, white matter, ventral diencephalon, vessels, basal forebrain.
DEEP = [(30, 23), (32, 31), (37, 36), (48, 47), (56, 55), (58, 57), (60, 59)]
OTHERS = [(39, 38), (41, 40), (45, 44), (50, 49), (52, 51), (62, 61), (64, 63), (75, 76), (43, 42)]
LOBES = [(value + 1, value) for value in range(81, 95, 2)]  # white matter of MUSE
CORTEX = [(value + 1, value) for value in range(100, 208, 2)]
PAIRS = [*DEEP, *OTHERS, *LOBES, *CORTEX]


def separated(truth: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A map of regions whose sides are those of the plane.

    Args:
        truth: values (x, y, z).
        right: bool, of the same shape: right of the plane.
    """
    table = np.arange(256)
    to_left, to_right = table.copy(), table.copy()
    for left, other in PAIRS:
        to_left[other], to_right[left] = left, other
    return np.where(right, to_right[truth], to_left[truth])


def measure(truth: np.ndarray, found: np.ndarray) -> list[float]:
    """Rate of the wrong side over the voxels of pairs, the same of deep grey matter, mean Dice, and the lowest."""
    paired, deep = np.isin(truth, PAIRS), np.isin(truth, DEEP)
    scores = [dice(found == value, truth == value) for value in np.unique(truth[paired])]
    return [float((found != truth)[mask].mean()) for mask in (paired, deep)] + [float(np.mean(scores)), min(scores)]


def main() -> None:
    """Measure all scans, and print a row for each and the means."""
    parser = parser_of(__doc__, "data")
    parser.add_argument("--scans", type=int, help="the first ones only")
    options = parser.parse_args()
    image_end, label_end = next(ends for ends in FILES if any(options.data.glob(f"*{ends[0]}")))
    rows = []
    print(
        f"{'plane, bent plane':<24}"
        + 2 * "".join(f"{name:>12}" for name in ("wrong side", "deep", "Dice", "lowest Dice"))
    )
    for path in sorted(options.data.glob(f"*{image_end}"))[: options.scans]:
        image, truth = read_image(path), read_label(path.with_name(path.name.replace(image_end, label_end)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has a skull, and is tilted
            values = truth.data.astype(np.uint8)
            labels = {int(value): str(value) for value in np.unique(values[values > 0])}
            case = prepare_case({"t1": image}, truth, labels, PrepareSettings())
        assert case.label is not None
        paired = np.isin(np.array([0, *labels])[case.label[0]], PAIRS)
        row = []
        for voxels in (np.zeros_like(paired), paired):  # without paired voxels the plane is flat
            distance = to_native(distance_to_the_right(case.chain, voxels)[None], case.chain)[0]
            row += measure(values, separated(values, distance > 0))
        rows.append(row)
        print(f"{path.name.removesuffix(image_end):<24}" + "".join(f"{value:>12.4f}" for value in rows[-1]), flush=True)
    print(f"{f'mean of {len(rows)}':<24}" + "".join(f"{value:>12.4f}" for value in np.mean(rows, axis=0)))


if __name__ == "__main__":
    main()
