"""Optimizers, learning-rate schedules, frozen parameters, and the moving average of the weights (EMA)."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asa.settings import OptimSettings


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of a warm-up that is given as `optim.warmup`, in a run of `total` steps."""
    return round(warmup * total if warmup < 1 else warmup)


class Schedule:
    """Learning rate of each step: `schedule[step]`, for steps 0 to total - 1.

    With `freeze_until` the steps before it have a warm-up and then the peak rate, and the others a warm-up and the
    schedule. A ValueError for a warm-up as long as the run, or as what follows `freeze_until`.
    """

    def __init__(self, settings: OptimSettings, total: int, batch_size: int) -> None:
        warmup = warmup_steps(settings.warmup, total)
        if warmup >= total and warmup:
            raise ValueError(f"optim.warmup={settings.warmup:g} must be shorter than the run of {total} steps")
        if settings.freeze_until and settings.freeze_until + warmup >= total:
            both = f"optim.freeze_until={settings.freeze_until} and the warm-up of {warmup} steps after it"
            raise ValueError(f"{both} must be shorter than the run of {total} steps")
        self.settings, self.total, self.warmup = settings, total, warmup
        self.peak = settings.lr * (batch_size / settings.reference_batch if settings.reference_batch else 1.0)

    def __getitem__(self, step: int) -> float:
        s = self.settings
        begin = s.freeze_until if step >= s.freeze_until else 0
        if step - begin < self.warmup:
            return s.warmup_lr + (self.peak - s.warmup_lr) * (step - begin) / self.warmup
        if step < s.freeze_until:
            return self.peak
        begin += self.warmup
        t = min((step - begin) / (self.total - begin), 1.0)
        if s.schedule == "cosine":
            return s.final_lr + (self.peak - s.final_lr) * (1 + math.cos(math.pi * t)) / 2
        if s.schedule == "poly":
            return self.peak * (1 - t) ** 0.9
        return self.peak


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts of a network from training: no gradients are computed for them, and no optimizer changes them.

    A ValueError for a dotted name in `parts` that the network does not have, or if no parameter is left to train.
    """
    for part in parts:
        found = _weights_in(model, part)
        if not found:
            names = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
            raise ValueError(f"optim.freeze: no part {part!r}; the network's parts are {names}, and those inside them")
        for weight in found:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"optim.freeze=[{','.join(parts)}] leaves no parameter to train")


def unfreeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Train the parts of `freeze` again."""
    for part in parts:
        for weight in _weights_in(model, part):
            weight.requires_grad_(True)


def _weights_in(model: nn.Module, part: str) -> list[nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if f"{name}.".startswith(f"{part}.")]


def set_training(method: nn.Module) -> None:
    """Training mode for all modules but those whose parameters are all frozen, which stay in evaluation mode."""
    method.train()
    for module in method.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer over all parameters that require a gradient.

    Weight decay is not applied to vectors (biases, norms) and to what a module lists in `no_weight_decay()`. Where a
    module has `layers_above(name)`, as encoders do, the learning rate of that parameter is scaled by `encoder_lr` and
    by `layer_decay` to this power; the factor is "lr_scale" in its group, for `set_learning_rate`.
    """
    no_decay: set[str] = set()
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if hasattr(module, "no_weight_decay"):
            no_decay |= {dot + name for name in module.no_weight_decay()}
        if hasattr(module, "layers_above"):
            scales |= {
                dot + name: settings.encoder_lr * settings.layer_decay ** module.layers_above(name)
                for name, _ in module.named_parameters()
            }
    if not scales and (settings.encoder_lr != 1 or settings.layer_decay != 1):
        why = "the layers of this network's encoder have no order that is known here"
        warnings.warn(f"optim.encoder_lr and optim.layer_decay have no effect: {why}", stacklevel=2)
    # Both groups of scale 1 are always there, so that the optimizer states of all checkpoints have the same layout.
    members: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and name not in no_decay
            members.setdefault((scales.get(name, 1.0), decays), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": settings.weight_decay * decays, "lr_scale": scale}
        for (scale, decays), parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
    if settings.name == "adamw":
        low, high = settings.betas
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(low, high), fused=True)
    momentum = settings.momentum
    return torch.optim.SGD(groups, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set a step's learning rate in every group of `make_optimizer`, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class EMA:
    """The exponential moving average of a method's parameters, not of its buffers; none with a decay of 0.

    The effective decay rises from (1 + step) / (10 + step), so that initial weights do not dominate a short run.
    """

    def __init__(self, method: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: list[Tensor] = list(method.parameters())
        self.mean = [weight.detach().clone() for weight in self.weights] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step 1, 2, ..."""
        if self.decay:
            torch._foreach_lerp_(self.mean, self.weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def restart(self) -> None:
        """Set the average to the current weights."""
        for mean, weight in zip(self.mean, self.weights, strict=False):
            mean.copy_(weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the average in place of the weights inside the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, mean in zip(self.weights, self.mean, strict=False):  # no pairs without decay
            weight.data, mean.data = mean.data, weight.data
