"""Eleven structures of OASIS-1 brains, their sides joined: python -m scripts.reproduce.structures DATA OUT

DATA: skull-stripped brains, ID_SS.nii.gz, with the manual regions of the MICCAI 2012 challenge, ID_glm.nii.gz; the R
package malf.templates carries such a set. OUT receives ID_SS.nii.gz (a link) and ID_structures.nii.gz.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from asa.data.io.nifti import read_image, read_label, write_label
from scripts.reproduce.commands import asa, declared, parser_of, quoted

# Names in the order of their values 1, 2, ..., with the values of both sides in ID_glm.
STRUCTURES = {
    "ventricle": (51, 52),
    "thalamus": (59, 60),
    "caudate": (36, 37),
    "putamen": (57, 58),
    "pallidum": (55, 56),
    "hippocampus": (47, 48),
    "amygdala": (31, 32),
    "accumbens": (23, 30),
    "brainstem": (35,),
    "cerebellum_gm": (38, 39, 71, 72, 73),
    "cerebellum_wm": (40, 41),
}
LABELS = declared(dict(enumerate(STRUCTURES, start=1)))
FILES = ("data=folder", "data.images={t1: *_SS.nii.gz}", "data.label=*_structures.nii.gz", LABELS)


def write_structures(
    data: Path,
    out: Path,
    ids: list[str],
    image: str = "SS",
    regions: str = "glm",
    labels: Mapping[str, tuple[int, ...]] = STRUCTURES,
    name: str = "structures",
) -> None:
    """Link ID_IMAGE of some subjects, and write ID_NAME with the values 1, 2, ... of labels, from ID_REGIONS, once."""
    out.mkdir(parents=True, exist_ok=True)
    for id in ids:
        label, link = out / f"{id}_{name}.nii.gz", out / f"{id}_{image}.nii.gz"
        if not link.exists():
            link.symlink_to((data / link.name).resolve())
        if not label.exists():
            values = read_label(data / f"{id}_{regions}.nii.gz").data
            table = np.zeros(1 + max(values.max(), *(value for own in labels.values() for value in own)), np.uint8)
            for value, own in enumerate(labels.values(), start=1):
                table[list(own)] = value
            write_label(label, table[values], read_image(link))


def make_store(data: Path, out: Path, name: str, ids: list[str]) -> None:
    """Write OUT/NAME for some subjects, and prepare it to the store OUT/store_NAME."""
    write_structures(data, out / name, ids)
    paths = {"data.root": out / name, "out": out / f"store_{name}"}
    asa("prepare", *FILES, *quoted(**paths), log=out / "logs" / f"prepare_{name}.txt")


def subjects(data: Path) -> list[str]:
    """The ids of the brains in a folder, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(path.name.removesuffix("_glm.nii.gz") for path in data.glob("*_glm.nii.gz"))
    if not found:
        raise FileNotFoundError(f"{data}: holds no ID_glm.nii.gz: give the folder of the labelled brains")
    return found


def main() -> None:
    """Write the labels of all brains."""
    options = parser_of(__doc__, "data", "out").parse_args()
    ids = subjects(options.data)
    write_structures(options.data, options.out, ids)
    print(f"wrote {len(ids)} brains to {options.out}; asa-prepare with {' '.join(map(repr, FILES))}")


if __name__ == "__main__":
    main()
