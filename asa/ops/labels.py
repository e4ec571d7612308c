"""Class indices of label maps."""

import re
from collections.abc import Sequence

IGNORED = 255  # index of voxels that count neither in a loss nor in a score

SIDE = re.compile(r"(^|[^a-z])(left|right|lh|rh|l|r)([^a-z]|$)")
WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # where one begins in leftPutamen or LPutamen


def side_of(name: str) -> str:
    """The side in the name of a label, "l" or "r"; "" if it contains none."""
    found = SIDE.search(_words(name))
    return found[2][0] if found else ""


def _words(name: str) -> str:
    return WORDS.sub("_", name).lower()


def pairs_by_name(names: Sequence[str]) -> list[list[str]]:
    """`[left, right]` names of labels that differ in their side alone, like left_putamen and right_putamen."""
    sides: dict[str, dict[str, str]] = {}
    for name in names:
        if side := side_of(name):
            sides.setdefault(SIDE.sub(r"\1*\3", _words(name), count=1), {})[side] = name
    return [[pair["l"], pair["r"]] for pair in sides.values() if len(pair) == 2]


def joined_sides(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Class indices 0 ... count - 1 -> consecutive indices of which the left and the right of each pair share one.

    A ValueError for a class that is in two pairs, or its own partner.
    """
    if len({index for pair in pairs for index in pair}) < 2 * len(pairs):
        raise ValueError("a label is in more than one place of data.lateral_pairs: pair each label with one other")
    partner = dict(pairs) | {right: left for left, right in pairs}
    firsts = [min(index, partner.get(index, index)) for index in range(count)]
    kept = sorted(set(firsts))
    return [kept.index(first) for first in firsts]
