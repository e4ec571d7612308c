"""Losses that compare features: of two views of a sample, and of the two sides of a brain.

Letters: B samples of this rank, R ranks, E features.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from asa.ops.symmetry import asymmetry


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


class NTXent(nn.Module):
    """Normalised temperature-scaled cross-entropy (SimCLR, Chen et al., ICML 2020, Eq. (1)).

    The other view of the same sample is classified among all other views of the batch, by cosine similarity. In
    training the batch is that of all ranks, in evaluation mode that of this rank. With gradients averaged over the
    ranks, several ranks take the same step as one. A batch of one sample has no negatives, and its loss is 0.

    Args:
        temperature: initial value; learnt, it is at least a fiftieth of this value.
        learnt: whether the temperature is trained.

    Raises:
        ValueError: a temperature that is not positive.
    """

    def __init__(self, temperature: float = 0.5, learnt: bool = True) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}: must be above 0")
        start = torch.tensor(math.log(temperature))
        # A fixed one is no parameter: modules of which all are frozen stay in evaluation mode, where no rank is asked.
        self.log_temperature: Tensor
        if learnt:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)
        self.least = math.log(temperature / 50)

    def forward(self, one: Tensor, other: Tensor, reduction: str = "mean") -> Tensor:
        """The loss, a scalar in float32: the mean over this rank's 2 B views, from their features `(B, E)` twice.

        `reduction="none"`: that of each view `(2B,)`, views 2k and 2k+1 being those of sample k. All ranks have one B.
        """
        own = F.normalize(torch.stack([one, other], dim=1).float(), dim=-1)  # B 2 E
        everyone, first = gather(own) if self.training else (own, 0)  # R*B 2 E
        own, everyone = own.flatten(0, 1), everyone.flatten(0, 1)  # 2B E, 2RB E; rows 2k and 2k+1 are views of sample k
        with torch.autocast(own.device.type, enabled=False):  # autocast would multiply in 16 bits
            logits = own @ everyone.T / self.log_temperature.clamp(min=self.least).exp()  # 2B 2RB
        rows = torch.arange(len(own), device=own.device)
        itself = F.one_hot(rows + 2 * first, len(everyone)).bool()
        return F.cross_entropy(logits.masked_fill(itself, float("-inf")), (rows ^ 1) + 2 * first, reduction=reduction)


class SymmetryLoss(nn.Module):
    """Makes the two sides of a healthy brain similar, and those of a patient's brain dissimilar.

    With s = cos(z, z~) and h = 1 for healthy: the mean of h (1 - s) / 2 + (1 - h) (1 + s) / 2, which is 0 if every
    healthy sample has s = 1 and every patient s = -1. `"bce"` is the binary cross-entropy of h with the probability
    sigmoid(a s + b), with learnt a and b. The mean is over all samples, and those of unknown health add 0, so that a
    batch computed in parts, or by several ranks, has the same loss.

    The forms in the released code of SA-Swin (MICCAI 2024) are not used: one cannot reach its minimum, and two compare
    samples with each other.

    Raises:
        ValueError: a form other than `"cosine"` and `"bce"`.
    """

    def __init__(self, form: str = "cosine") -> None:
        super().__init__()
        if form not in ("cosine", "bce"):
            raise ValueError(f"the symmetry loss must be cosine or bce, got {form!r}")
        if form == "bce":
            self.affine = nn.Parameter(torch.tensor([5.0, 0.0]))  # a, b
        self.form = form

    def forward(self, side: Tensor, mirrored: Tensor, health: Tensor, reduction: str = "mean") -> Tensor:
        """The loss, a scalar in float32, of z and z~ `(B, E)` and health `(B,)`: 1 healthy, 0 patient, NaN unknown.

        `reduction="none"`: that of each sample `(B,)`.
        """
        labelled = ~health.isnan()
        healthy = health.float().nan_to_num(0.0)
        difference = asymmetry(side, mirrored)  # (1 - s) / 2
        if self.form == "cosine":
            each = healthy * difference + (1 - healthy) * (1 - difference)
        else:
            logit = self.affine[0] * (1 - 2 * difference) + self.affine[1]
            each = F.binary_cross_entropy_with_logits(logit, healthy, reduction="none")
        each = each * labelled
        return each if reduction == "none" else each.mean()
