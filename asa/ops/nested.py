"""Nested regions, each predicted by its own channel: from a label map to region masks, and back.

A region is a set of labels, as the whole tumour is oedema, necrosis and enhancing tumour (BraTS).

Letters: label map `B 1 D H W`, R regions `B R D H W`.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def region_masks(label: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Binary masks of regions, each some labels: a label map `(B, 1, D, H, W)` -> bool `(B, R, D, H, W)`."""
    masks = [torch.stack([label == value for value in values]).any(dim=0) for values in regions]
    return torch.cat(masks, dim=1)


def painting_order(regions: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """(index of the region, its own label) in the order of painting into a label map: inner regions over outer ones.

    A region's own label is the one that no region inside it has. A voxel gets that of the innermost region predicted
    there, whether or not the regions around that one are predicted too.

    Args:
        regions: name -> labels.

    Raises:
        ValueError: no regions; two that overlap without one being inside the other; a region with no or several labels
            of its own.
    """
    sets = {name: frozenset(values) for name, values in regions.items()}
    if not sets:
        raise ValueError("no regions are given")
    for name, values in sets.items():
        for other, others in sets.items():
            if values & others and not (values <= others or others <= values):
                raise ValueError(f"regions {name} and {other} overlap, and neither is inside the other")
    order = []
    for index, (name, values) in enumerate(sets.items()):
        own = values.difference(*(inner for inner in sets.values() if inner < values))
        if len(own) != 1 or list(sets.values()).count(values) > 1:
            raise ValueError(
                f"region {name} must have exactly one label of its own, which no region inside it and no equal region "
                f"has, to be converted to labels; it has {sorted(own)}"
            )
        order.append((len(values), index, *own))
    return [(index, label) for _, index, label in sorted(order, key=lambda item: (-item[0], item[1]))]


def paint(probabilities: Iterable[Tensor], order: Sequence[tuple[int, int]]) -> Tensor:
    """The label map, int32 `(D, H, W)`, of R probability maps `(D, H, W)`, which are read one by one.

    A region is predicted above 0.5; where none is, the label is 0. The order is from `painting_order`.
    """
    turn = {index: n for n, (index, _) in enumerate(order, start=1)}
    labels = torch.tensor([0, *(label for _, label in order)], dtype=torch.int32)
    innermost = torch.zeros((), dtype=torch.uint8)
    for index, probability in enumerate(probabilities):
        predicted = torch.where(probability > 0.5, turn[index], 0).to(torch.uint8)
        innermost = torch.maximum(innermost.to(probability.device), predicted)
    return labels.to(innermost.device)[innermost.int()]
