"""Typed settings of the commands: the groups `train`, `optim`, `loader`, `augment` and `predict`.

Defaults are written here and only here; what a command sets otherwise is at the end of its YAML. This module does not
import torch, so that `--help` takes no time.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Config = dict[str, Any]  # of a command, composed

PLACEMENTS = ("centre", "random", "midplane")  # of crops
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
FUSIONS = ("joint", "majority")  # of the labels of atlases
UNCERTAINTIES = ("entropy", "spread")
LARGEST_OVERLAP = 0.9  # of windows: each axis then takes ten times as many as without


def setting(default: T, help: str, *, free: bool = False) -> T:
    """A field of a settings dataclass, with its text in `--help`; a `free` one may change when a run is resumed."""
    given: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    made: T = field(**given, metadata={"help": help, "free": free})
    return made


@dataclass
class TrainSettings:
    """Length, batch, precision and intervals of a training run."""

    steps: int = setting(10000, "optimizer steps of the whole run", free=True)
    batch_size: int = setting(2, "global batch size: samples per optimizer step, over all processes")
    accumulate: int = setting(1, "micro-batches per step (gradient accumulation), to save memory", free=True)
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", free=True)
    precision: str = setting(
        "auto", "auto (bf16 where the GPU or CPU has units for it, else fp16 on a GPU, fp32 on a CPU), fp32, bf16, fp16"
    )
    compile: bool = setting(False, "compile the network with torch.compile: the first steps take a minute or more")
    ema: float = setting(0.0, "decay of the moving average of the weights, validated and saved, like 0.999; 0: none")
    clip: float = setting(1.0, "maximum gradient norm; 0 does not clip")
    seed: int = setting(0, "random seed")
    log_every: int = setting(10, "steps between lines of the log", free=True)
    validate_every: int = setting(500, "steps between validations; 0: only at the end", free=True)
    save_every: int = setting(500, "steps between checkpoints; there is also one every 20 minutes", free=True)
    keep: int = setting(2, "number of most recent checkpoints to keep", free=True)
    best: str | None = setting(
        None, "validation metric of the best checkpoint, in OUT/best, like dice (highest) or -loss (lowest)", free=True
    )
    patience: int = setting(0, "validations without a better train.best that end the run early; 0: never", free=True)
    deterministic: bool = setting(
        False, "deterministic kernels: the same run gives the same bits, also on a GPU; slower, some networks have none"
    )
    log_to: list[str] = setting(
        ["tensorboard"], "trackers beside log.jsonl: tensorboard; mlflow, wandb (extras; offline by default)", free=True
    )
    timeout_minutes: float = setting(
        10.0, "with several processes: the run ends if one of them makes no progress for this long", free=True
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be 1 or more")
        _check_finite(self, "train", ("clip", "seed", "validate_every", "patience"))
        if self.patience and not (self.best and self.validate_every):
            advice = "give a metric there, like dice or -loss, and train.validate_every"
            raise ValueError(f"train.patience={self.patience} counts validations without a better train.best: {advice}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema={self.ema}: the decay must be in [0, 1)")
        if not 0 < self.timeout_minutes < float("inf"):
            raise ValueError(f"train.timeout_minutes={self.timeout_minutes}: must be positive and finite")
        check_batch(self.batch_size, self.accumulate, 1)
        check_backend(self.device, self.precision, "train.")


def _check_finite(settings: Any, group: str, names: Iterable[str]) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < float("inf"):
            raise ValueError(f"{group}.{name}={getattr(settings, name)}: must be 0 or more, and finite")


def check_backend(device: str, precision: str, group: str) -> None:
    """Raise a ValueError for names that no machine has; `asa.training.device` knows what this one has."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ValueError(f"{group}device={device}: not a device; use auto, cpu, cuda or cuda:1")
    check_choice(f"{group}precision", precision, PRECISIONS)


def check_choice(key: str, value: Any, choices: Collection[str], null: str | None = None) -> None:
    """Raise a ValueError for another value than these, or than null where `null` says what that is."""
    if value not in [*choices] and not (null and value is None):
        *others, last = choices
        named = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{key}={value}: choose {named}{f', or {null}' if null else ''}")


def check_axes(axes: str, setting: str) -> None:
    """Raise a ValueError that names the setting if `axes` are not different letters of D, H, W."""
    if not isinstance(axes, str) or not axes or len(set(axes)) < len(axes) or set(axes) - set("DHW"):
        axes_of_a_scan = "D (up-down), H (front-back), W (left-right)"
        raise ValueError(f"{setting}={axes}: name axes to mirror, each once: {axes_of_a_scan}")


def check_placement(placement: Any) -> None:
    """Raise a ValueError for an unknown placement of crops."""
    check_choice("data.placement", placement, PLACEMENTS)


def check_batch(batch_size: int, micro_batches: int, world_size: int) -> None:
    """Raise a ValueError for a batch size that micro-batches times ranks do not divide."""
    if batch_size < 1 or batch_size % micro_batches:
        raise ValueError(f"train.accumulate={micro_batches} does not divide train.batch_size={batch_size}")
    if batch_size % (micro_batches * world_size):
        batch = f"train.batch_size={batch_size}, the global batch size"
        raise ValueError(f"{world_size} processes with train.accumulate={micro_batches} do not divide {batch}")


@dataclass
class OptimSettings:
    """The optimizer and its learning-rate schedule."""

    name: str = setting("adamw", "adamw, or sgd (Nesterov)")
    lr: float = setting(1.5e-4, "peak learning rate")
    reference_batch: int | None = setting(None, "if set, lr is multiplied by train.batch_size / reference_batch")
    weight_decay: float = setting(0.05, "decoupled for AdamW; not applied to biases, norms and tokens")
    betas: list[float] = setting([0.9, 0.95], "beta1 and beta2 of AdamW")
    momentum: float = setting(0.99, "momentum of SGD")
    schedule: str = setting("cosine", "after the warm-up: cosine (down to final_lr), poly ((1 - t)^0.9) or constant")
    warmup: float = setting(0, "linear warm-up to lr: a number of steps, or below 1 a fraction of train.steps")
    warmup_lr: float = setting(1e-6, "learning rate of the first step of the warm-up")
    final_lr: float = setting(0.0, "learning rate at the end of the cosine")
    layer_decay: float = setting(1.0, "learning rate of an encoder block relative to the block above; 1: no decay")
    freeze: list[str] = setting([], "parts that are not trained, like [encoder] or [encoder.blocks.0,encoder.blocks.1]")
    freeze_until: int = setting(0, "step at which freeze ends: all is trained, with a new warm-up; 0: the whole run")
    encoder_lr: float = setting(1.0, "learning rate of the encoder, relative to that of the other parts")

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, ("adamw", "sgd"))
        check_choice("optim.schedule", self.schedule, ("cosine", "poly", "constant"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            given = f"optim.betas={list(self.betas)}, optim.momentum={self.momentum}"
            raise ValueError(f"{given}: all three must be in [0, 1)")
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup % 1):
            raise ValueError(f"optim.warmup={self.warmup:g}: give whole steps, or a fraction of the run below 1")
        if self.freeze_until < 0 or (self.freeze_until and not self.freeze):
            given = f"optim.freeze_until={self.freeze_until}"
            raise ValueError(f"{given}: give a step, and in optim.freeze what is frozen until")
        if not 0 < self.encoder_lr <= 1:
            given = f"optim.encoder_lr={self.encoder_lr}"
            raise ValueError(f"{given}: must be in (0, 1]; 0 would be optim.freeze=[encoder]")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay={self.layer_decay}: must be in (0, 1]")
        _check_finite(self, "optim", ("lr", "weight_decay", "warmup_lr", "final_lr"))
        if self.reference_batch is not None and self.reference_batch < 1:
            raise ValueError(f"optim.reference_batch={self.reference_batch}: must be 1 or more")


@dataclass
class LoaderSettings:
    """How crops are loaded."""

    workers: int = setting(2, "worker processes that read and augment crops; 0 reads in the training process")

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"loader.workers={self.workers}: give 0 or more")


@dataclass
class AugmentSettings:
    """Augmentation of training crops. Angles in degrees; a probability of 0 switches a transform off."""

    rotation: float = setting(0.0, "largest rotation about each axis, degrees")
    rotation_probability: float = setting(0.2, "probability of a rotation")
    scale: list[float] = setting([1.0, 1.0], "smallest and largest zoom (1.4: structures become 1.4 times larger)")
    scale_probability: float = setting(0.2, "probability of a zoom")
    deform: float = setting(0.0, "standard deviation of a smooth random displacement along each axis, mm")
    deform_probability: float = setting(0.5, "probability of a deformation")
    mirror_probability: float = setting(0.0, "probability of a flip, along each of mirror_axes by itself")
    mirror_axes: str = setting("W", "axes that are flipped: D (up-down), H (front-back), W (left-right), like DHW")
    gamma: list[float] = setting([1.0, 1.0], "smallest and largest gamma, the exponent of the intensities")
    gamma_probability: float = setting(0.3, "probability of a gamma transform")
    noise: float = setting(0.0, "largest standard deviation of added Gaussian noise, in units of the intensities")
    brightness: float = setting(0.0, "largest relative change of the intensities (0.2: times 0.8 to 1.2)")
    contrast: list[float] = setting(
        [1.0, 1.0], "smallest and largest factor of the distances from a channel's mean; results stay in its range"
    )
    blur: list[float] = setting([0.0, 0.0], "smallest and largest standard deviation of a blur in voxels; [0, 0]: none")
    bias_field: float = setting(
        0.0, "largest standard deviation of the logarithm of a smooth factor of the intensities"
    )
    modality_dropout: float = setting(0.0, "probability that a channel of several is set to zero, never all of them")

    def __post_init__(self) -> None:
        check_axes(self.mirror_axes, "augment.mirror_axes")
        if len(self.blur) != 2 or not 0 <= self.blur[0] <= self.blur[1]:
            raise ValueError(f"augment.blur={list(self.blur)}: give the smallest and the largest width, 0 or more")
        for name in ("scale", "gamma", "contrast"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise ValueError(f"augment.{name}={list(bounds)}: give the smallest and the largest factor, above 0")
        for name in ("rotation", "scale", "deform", "mirror", "gamma"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                raise ValueError(f"augment.{name}_probability={probability}: a probability must be from 0 to 1")
        if not 0 <= self.modality_dropout < 1:
            raise ValueError(f"augment.modality_dropout={self.modality_dropout}: give 0 or more, and less than 1")
        _check_finite(self, "augment", ("rotation", "deform", "noise", "brightness", "bias_field"))


@dataclass
class PredictSettings:
    """How a volume is covered by windows, and the device and precision of the network."""

    overlap: float | None = setting(None, "overlap of windows, a fraction; null: 0.5, or more if it was validated so")
    batch_size: int = setting(1, "windows per forward pass")
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, ...")
    precision: str = setting("auto", "auto (as in training), fp32, bf16 or fp16")

    def __post_init__(self) -> None:
        if self.overlap is not None and not 0 <= self.overlap <= LARGEST_OVERLAP:
            raise ValueError(f"predict.overlap={self.overlap}: a fraction must be in [0, {LARGEST_OVERLAP}]")
        if self.batch_size < 1:
            raise ValueError(f"predict.batch_size={self.batch_size}: give 1 or more")
        check_backend(self.device, self.precision, "predict.")
