"""How well two ways to prepare a cohort agree on what is brain: Dice of the masks on each scan's own grid.

Usage: python scripts/agreement.py STORE OTHER_STORE
"""

import sys

import numpy as np

from asa.data.preprocessing.pipeline import to_native
from asa.data.store import Store


def native_mask(store: Store, id: str) -> np.ndarray:
    """What is not background in a stored scan's first channel, bool (x, y, z) on the scan's own grid."""
    inside = np.asarray(store.image(id)[:1]) != 0
    return to_native(inside.astype(np.uint8), store.record(id)["chain"], order=0)[0] > 0


def main() -> int:
    """Print a line for each scan that both stores hold."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    one, other = Store(sys.argv[1]), Store(sys.argv[2])
    ids = sorted({record["id"] for record in one.records} & {record["id"] for record in other.records})
    for id in ids:
        a, b = native_mask(one, id), native_mask(other, id)
        quality = [store.record(id)["quality"] for store in (one, other)]
        print(
            f"{id}: masks agree by a Dice of {2 * (a & b).sum() / (a.sum() + b.sum()):.3f}; "
            f"template Dice {' and '.join(str(found.get('template_dice')) for found in quality)}; "
            f"yaw, roll, shift before alignment "
            + " and ".join(f"{q['yaw_degrees']}, {q['roll_degrees']}, {q['shift_mm']}" for q in quality)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
