"""What the ranks of a job compute together inside a forward pass. In one process everything here is the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several that are connected."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(part: Tensor) -> tuple[Tensor, int]:
    """Each rank's rows, on all ranks in their order; gradients go back to the rank that a row came from.

    The gradient of a row is the sum of what all ranks' losses ask of it. Where every rank's loss is a mean over its own
    rows, and gradients are then averaged over the ranks, that is the gradient of the mean over all rows.

    Args:
        part: `(N, ...)`, of the same shape on all ranks.

    Returns:
        `(ranks * N, ...)`, and the place of this rank's first row in it.
    """
    if not several_ranks():
        return part, 0
    rows: Tensor = _Gather.apply(part)
    return rows, dist.get_rank() * len(part)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        ctx.rows = len(part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        return total[first : first + ctx.rows]
