"""Memory of the C library, for training on a CPU."""

import ctypes
import sys

# Of glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
GROWTH = 64 * 2**20  # bytes asked of the system at a time


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the whole process.

    By default it gives every large block back to the system and asks for it anew: each tensor of a training step then
    lies in fresh pages, which the system has to map and zero at first touch. That is a tenth of a step.

    Returns:
        Whether it could be told: on Linux with glibc only, elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, GROWTH))
    return all(mallopt(option, value) == 1 for option, value in wanted)
