"""Pretrained weights into the encoder of another model: a plan that can be read, then applied.

Only the encoder moves. What the encoder computes (position codes, window offsets) is no weight, so another volume
size needs nothing.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asa.models.sw_vit import SWViT

PREFIX = "encoder."
PATCH_WEIGHT = "patch_embed.weight"


@dataclass(frozen=True)
class Transfer:
    """What happens to one tensor.

    `action` is "loaded", "adapted", "left out" (in the checkpoint only) or "not found" (in the encoder only).
    """

    name: str
    action: str
    why: str


def plan_transfer(weights: Mapping[str, Tensor], encoder: SWViT) -> list[Transfer]:
    """Say for each tensor of a checkpoint and of an encoder what a transfer would do.

    Args:
        weights: the source model's weights; those of its encoder are named `encoder.*`.
        encoder: the target.
    """
    own = encoder.state_dict()
    plan = []
    for name, tensor in weights.items():
        inner = name.removeprefix(PREFIX)
        if inner == name:
            plan.append(Transfer(name, "left out", "not part of the encoder"))
        elif inner not in own:
            plan.append(Transfer(name, "left out", "the new encoder has no such tensor"))
        elif tensor.shape == own[inner].shape:
            plan.append(Transfer(name, "loaded", "same shape"))
        elif inner == PATCH_WEIGHT and (channels := _source_channels(tensor, encoder)):
            plan.append(Transfer(name, "adapted", f"{channels} to {encoder.in_channels} input channels"))
        else:
            why = f"{tuple(tensor.shape)} does not fit {tuple(own[inner].shape)}"
            plan.append(Transfer(name, "left out", why))
    missing = [name for name in own if PREFIX + name not in weights]
    return plan + [Transfer(PREFIX + name, "not found", "keeps its first values") for name in missing]


def check_kind(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Compare what no tensor's shape tells: the position codes and patch size of two models' descriptions.

    Raises:
        ValueError: they differ; the message says what to set.
    """
    for key, default in (("position", "mirror"), ("patch_size", 8)):
        before, now = source.get(key, default), target.get(key, default)
        if before != now:
            raise ValueError(
                f"the encoder was pretrained with {key}={before}, this model has {now}: add model.{key}={before}"
            )


def transfer_encoder(weights: Mapping[str, Tensor], encoder: SWViT) -> list[Transfer]:
    """Load a checkpoint's encoder into another encoder, in place.

    The projection of the patches follows the number of channels: its weights are summed over the old channels,
    repeated for each new one and divided by their number, so that equal channels give the same tokens as before.

    Args:
        weights: the source model's weights; those of its encoder are named `encoder.*`.
        encoder: the target.

    Returns:
        The plan that was carried out; see `transfer_report`.

    Raises:
        ValueError: a tensor of the encoder would keep its first values; nothing has been loaded then.
    """
    plan = plan_transfer(weights, encoder)
    moved = [entry for entry in plan if entry.action in ("loaded", "adapted")]
    filled = {entry.name.removeprefix(PREFIX) for entry in moved}
    unfilled = [name for name in encoder.state_dict() if name not in filled]
    if unfilled:
        reasons = {entry.name: entry.why for entry in plan if entry.action != "loaded"}
        first = PREFIX + unfilled[0]
        raise ValueError(
            f"the pretrained encoder does not match: {len(unfilled)} of {len(encoder.state_dict())} tensors would stay "
            f"untrained, the first is {first} ({reasons[first]}). "
            "Choose the model size, patch size and window that it was pretrained with"
        )
    state = {}
    for entry in moved:
        tensor = weights[entry.name]
        state[entry.name.removeprefix(PREFIX)] = _adapt(tensor, encoder) if entry.action == "adapted" else tensor
    encoder.load_state_dict(state)
    return plan


def transfer_report(plan: list[Transfer]) -> str:
    """A short table of a transfer: how many tensors met which fate, and what was adapted."""
    lines = []
    for action in ("loaded", "adapted", "left out", "not found"):
        entries = [entry for entry in plan if entry.action == action]
        reasons = Counter(entry.why for entry in entries)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        lines.append(f"  {action:<10}{len(entries):>4} tensors{'  ' + why if why else ''}")
    return "\n".join(lines)


def _source_channels(tensor: Tensor, encoder: SWViT) -> int:
    """Input channels of a patch projection `(E, C*s^3)` with the target's patch size and width, or 0."""
    voxels = encoder.patch_size**3
    fits = tensor.ndim == 2 and tensor.shape[0] == encoder.embed_dim and tensor.shape[1] % voxels == 0
    return tensor.shape[1] // voxels if fits else 0


def _adapt(tensor: Tensor, encoder: SWViT) -> Tensor:
    c = encoder.in_channels
    summed = tensor.reshape(tensor.shape[0], -1, encoder.patch_size**3).sum(dim=1)  # E s^3
    return (summed / c).repeat(1, c)  # E C*s^3
