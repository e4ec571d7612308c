"""Agreement of two skull strips on raw heads, the table of docs/data.md: python -m scripts.reproduce.heads DATA OUT

DATA: heads with their skulls, openmsNN_T1W.nii.gz (open_ms_data, CC BY). They are prepared with deepbet and with ROBEX.
The masks of the two stores are then compared by Dice on each scan's own grid.
"""

import os

import numpy as np

from asa.data.preprocessing.pipeline import to_native
from asa.data.store import Store
from scripts.reproduce.commands import asa, parser_of


def native_mask(store: Store, id: str) -> np.ndarray:
    """Foreground of a stored scan's first channel, bool (x, y, z) on the scan's own grid."""
    inside = np.asarray(store.image(id)[:1]) != 0
    return to_native(inside.astype(np.uint8), store.record(id)["chain"])[0] > 0


def print_agreement(one: Store, other: Store) -> None:
    """Print a line for each scan that both stores hold."""
    for id in sorted({record["id"] for record in one.records} & {record["id"] for record in other.records}):
        a, b = native_mask(one, id), native_mask(other, id)
        quality = [store.record(id)["quality"] for store in (one, other)]
        print(
            f"{id}: Dice of the masks {2 * (a & b).sum() / (a.sum() + b.sum()):.3f}; "
            f"template Dice {' and '.join(str(found.get('template_dice')) for found in quality)}; "
            f"yaw, roll, shift before alignment "
            + " and ".join(f"{q['yaw_degrees']}, {q['roll_degrees']}, {q['shift_mm']}" for q in quality)
        )


def main() -> None:
    """Prepare twice, and compare."""
    options = parser_of(__doc__, "data", "out").parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the times in the text are those of one core
    stages = ("prepare.bias=true", "prepare.register=true", "prepare.midway=true", "check=also")
    images = "data.images={t1: openms*_T1W.nii.gz}"
    for strip in ("deepbet", "robex"):
        paths = {"data.root": options.data, "out": options.out / strip}
        asa("prepare", "data=folder", images, f"prepare.strip={strip}", *stages, **paths)
    print_agreement(Store(options.out / "deepbet"), Store(options.out / "robex"))


if __name__ == "__main__":
    main()
