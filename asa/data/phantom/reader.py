"""The phantom cohort as a dataset: generated if it does not exist, and read by the reader of its layout."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from asa.data.datasets import bids, brats, folder, freesurfer, ibsr, wmh
from asa.data.datasets.record import Record
from asa.data.io.files import read_json
from asa.data.phantom.cohort import KINDS, make_cohort


def records(
    root: str | Path,
    *,
    kind: str,
    subjects: int = 10,
    seed: int = 0,
    resolution: float = 1.0,
    rim: bool = False,
    names: int = 2021,
) -> list[Record]:
    """Records of a phantom cohort in the folder `root`, which is generated if it does not exist.

    Options and errors are those of `make_cohort`; a ValueError, too, if the folder holds more subjects.
    """
    root = Path(root)
    options: dict[str, Any] = dict(kind=kind, seed=seed, resolution=float(resolution), rim=rim, names=names)
    about = read_json(root / "phantom.json") if (root / "phantom.json").is_file() else {}
    same = isinstance(about, dict) and options.items() <= about.items()
    if not same or len([*root.rglob("*.nii.gz"), *root.rglob("*.mgz")]) < subjects * KINDS[kind]:
        make_cohort(subjects=subjects, out=root, **options)
    readers: dict[str, Callable[[Path], list[Record]]] = {
        "t1": bids.records,
        "ibsr": ibsr.records,
        "wmh": wmh.records,
        "brats": partial(brats.records, year=names),
        "structures": partial(folder.records, images={"t1": "*_T1.nii.gz"}, label="*_structures.nii.gz"),
        "freesurfer": freesurfer.records,
    }
    found = readers[kind](root)
    if len(found) != subjects:
        raise ValueError(
            f"{root}: holds {len(found)} subjects, not data.subjects={subjects}; give data.subjects={len(found)}, or "
            "another data.root"
        )
    return found
