"""Regions that join labels, each predicted by itself: from a label map to masks, and back.

Letters: label map `B 1 D H W`, R regions `B R D H W`. A region is the set of the labels that it joins, as the whole
tumour joins oedema, necrosis and enhancing tumour (BraTS).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def region_masks(label: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Where each region lies.

    Args:
        label: label map `(B, 1, D, H, W)`.
        regions: the labels that each joins.

    Returns:
        Bool `(B, R, D, H, W)`.
    """
    masks = [torch.stack([label == value for value in values]).any(dim=0) for values in regions]
    return torch.cat(masks, dim=1)


def painting_order(regions: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
    """How a label map is painted from regions: the outer ones first, the inner ones over them.

    Each region paints the one label that no region inside it holds. A voxel then has the label of the innermost
    region that claims it, whether or not those around that one do.

    Args:
        regions: name -> the labels that it joins.

    Returns:
        (place of the region in `regions`, the label that it paints), in order.

    Raises:
        ValueError: no regions; two that overlap, and neither lies inside the other; one with no label of its own, or
            with several.
    """
    sets = {name: frozenset(values) for name, values in regions.items()}
    if not sets:
        raise ValueError("there are no regions to learn")
    for name, values in sets.items():
        for other, others in sets.items():
            if values & others and not (values <= others or others <= values):
                raise ValueError(f"regions {name} and {other} overlap, and neither lies inside the other")
    order = []
    for place, (name, values) in enumerate(sets.items()):
        own = values.difference(*(inner for inner in sets.values() if inner < values))
        if len(own) != 1 or list(sets.values()).count(values) > 1:
            raise ValueError(
                f"region {name} has to hold one label that no region inside it holds, and that it shares with no "
                f"other, to be turned into labels; it has {sorted(own)}"
            )
        order.append((len(values), place, *own))
    return [(place, label) for _, place, label in sorted(order, key=lambda item: (-item[0], item[1]))]


def paint(shares: Iterable[Tensor], order: Sequence[tuple[int, int]]) -> Tensor:
    """The label map of region probabilities.

    Args:
        shares: R probabilities `(D, H, W)`, taken one after the other; a region claims a voxel above one half.
        order: of `painting_order`.

    Returns:
        int32 `(D, H, W)`, 0 where no region claims a voxel.
    """
    turn = {place: n for n, (place, _) in enumerate(order, start=1)}
    labels = torch.tensor([0, *(label for _, label in order)], dtype=torch.int32)
    innermost = torch.zeros((), dtype=torch.uint8)
    for place, share in enumerate(shares):
        claimed = torch.where(share > 0.5, turn[place], 0).to(torch.uint8)
        innermost = torch.maximum(innermost.to(share.device), claimed)
    return labels.to(innermost.device)[innermost.int()]
