"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class OptimSettings:
    """The optimizer and its learning rate over the steps."""

    name: str = "adamw"
    "adamw, or sgd (Nesterov)"
    lr: float = 1.5e-4
    "peak learning rate"
    reference_batch: int | None = None
    "if set, lr is multiplied by train.batch_size / reference_batch"
    weight_decay: float = 0.05
    "for AdamW decoupled; biases, norms and tokens have none"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    "AdamW's decay rates"
    momentum: float = 0.99
    "SGD's momentum"
    schedule: str = "cosine"
    "after the warm-up: cosine (down to final_lr), poly ((1 - t)^0.9) or constant"
    warmup: int = 0
    "steps of linear rise to lr"
    warmup_lr: float = 1e-6
    "learning rate of the first step of the warm-up"
    final_lr: float = 0.0
    "where the cosine ends"
    layer_decay: float = 1.0
    "for fine-tuning: each encoder block learns at the rate of the one above times this; 1: all alike"
    freeze: list[str] = field(default_factory=list)
    "parts of the network that do not learn, like [encoder] or [encoder.patch_embed,encoder.blocks.0]"

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"optim.name is adamw or sgd, not {self.name!r}")
        if self.schedule not in ("cosine", "poly", "constant"):
            raise ValueError(f"optim.schedule is cosine, poly or constant, not {self.schedule!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ValueError(
                f"optim.betas={list(self.betas)}, optim.momentum={self.momentum}: two rates and one, below 1"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay={self.layer_decay}: a factor above 0, and at most 1")
        if self.lr < 0 or self.weight_decay < 0 or (self.reference_batch is not None and self.reference_batch < 1):
            raise ValueError("optim.lr and optim.weight_decay are 0 or more, optim.reference_batch 1 or more")


class Schedule:
    """Learning rate by step: `schedule[step]`, for steps 0..total-1.

    Args:
        settings: the optimizer's settings.
        total: steps of the run.
        batch_size: samples a step, for `reference_batch`.

    Raises:
        ValueError: a warm-up as long as the run.
    """

    def __init__(self, settings: OptimSettings, total: int, batch_size: int) -> None:
        if not 0 <= settings.warmup < total:
            raise ValueError(f"optim.warmup={settings.warmup} does not fit a run of {total} steps")
        self.settings, self.total = settings, total
        self.peak = settings.lr * (batch_size / settings.reference_batch if settings.reference_batch else 1.0)

    def __getitem__(self, step: int) -> float:
        s = self.settings
        if step < s.warmup:
            return s.warmup_lr + (self.peak - s.warmup_lr) * step / s.warmup
        t = min((step - s.warmup) / (self.total - s.warmup), 1.0)
        if s.schedule == "cosine":
            return s.final_lr + (self.peak - s.final_lr) * (1 + math.cos(math.pi * t)) / 2
        if s.schedule == "poly":
            return self.peak * (1 - t) ** 0.9
        return self.peak


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Have parts of a network keep their weights: no gradient is computed for them, nor kept what it would need.

    Args:
        model: the network.
        parts: names of modules or parameters, with dots.

    Raises:
        ValueError: a name that the network does not have, or nothing that is left to learn.
    """
    for part in parts:
        found = [weight for name, weight in model.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not found:
            names = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
            raise ValueError(f"optim.freeze names {part!r}; the network's parts are {names}, and what lies in them")
        for weight in found:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(f"optim.freeze=[{','.join(parts)}] leaves nothing to learn")


def set_training(method: nn.Module) -> None:
    """Training mode for what learns, evaluation mode for what is frozen as a whole."""
    method.train()
    for module in method.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer over all parameters that want a gradient.

    Weight decay leaves alone vectors (biases, norms) and what a module names in its `no_weight_decay()`. Where a module
    says by `layers_above(name)` how deep its parameters lie, `layer_decay` to that power scales their learning rate: it
    stands in their group's "lr_scale" for `set_learning_rate`.
    """
    spared: set[str] = set()
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if hasattr(module, "no_weight_decay"):
            spared |= {dot + name for name in module.no_weight_decay()}
        if hasattr(module, "layers_above"):
            scales |= {
                dot + name: settings.layer_decay ** module.layers_above(name) for name, _ in module.named_parameters()
            }
    # Both groups of scale 1 always, so that a run's optimizer keeps its shape.
    members: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and name not in spared
            members.setdefault((scales.get(name, 1.0), decays), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": settings.weight_decay * decays, "lr_scale": scale}
        for (scale, decays), parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
    if settings.name == "adamw":
        low, high = settings.betas
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(low, high), fused=True)
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `make_optimizer` its share of a step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
