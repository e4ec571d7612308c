"""Collective operations inside a forward pass. In a single process they are the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(part: Tensor) -> tuple[Tensor, int]:
    """All ranks' rows `(N, ...)`, the same N on each, in the order of the ranks; and the index of this rank's first.

    The gradient of a row is the sum of its gradients from all ranks' losses. If each rank's loss is a mean over its own
    rows and gradients are averaged over the ranks, this is the gradient of the mean over all rows.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
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
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # others may share it
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        return total[first : first + ctx.rows]
