"""Transfer of a pretrained encoder's weights to another model: first a plan that can be printed, then loading.

Only the encoder is transferred. Position encodings and window offsets are computed, not stored, so another volume size
changes no weight. Each encoder adapts other sizes itself, by its method `adapted`; weights of MONAI's ViT are renamed.

Letters: token width E, channels C, patch size s, heads M, window S.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "encoder."
ABSENT = ("relative_position_bias", "attention.qkv.bias")  # a ViT of MONAI has no windows, and may have no such bias
# MONAI's names as regular expressions, after the prefix, and ours.
MONAI = (
    (r"patch_embedding\.patch_embeddings\.(?:1\.)?(weight|bias)", r"patch_embed.\1"),
    (r"blocks\.(\d+)\.attn\.(qkv\.(?:weight|bias))", r"blocks.\1.attention.\2"),
    (r"blocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attention.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.linear1\.(weight|bias)", r"blocks.\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.linear2\.(weight|bias)", r"blocks.\1.mlp.2.\2"),
    (r"((?:blocks\.\d+\.norm[12]|norm)\.(?:weight|bias))", r"\1"),
)
MONAI_POSITIONS = "patch_embedding.position_embeddings"
# How a model treats positions, and its settings where a checkpoint names none.
POSITIONS = {"position": "mirror", "mirror_patches": False, "order": "raster", "bias": "sequence"}


class Encoder(Protocol):
    """A module whose weights can be initialised from a checkpoint of other sizes."""

    def adapted(self, name: str, tensor: Tensor, patch_size: int | None) -> tuple[Tensor, str]:
        """A checkpoint's tensor as this encoder needs it, and what was changed; itself and "" if that is impossible.

        `name` is this encoder's; `patch_size` the checkpoint's, or None: this encoder's.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Source:
    """Weights that an encoder can be initialised from.

    `absent` are suffixes of tensor names that this kind of encoder does not have: they are initialised with 0, which is
    equivalent.
    """

    weights: Mapping[str, Tensor]  # those of the encoder are named encoder.*
    patch_size: int | None = None  # that they were trained with; None: the new encoder's
    names: Mapping[str, str] = field(default_factory=dict)  # in the checkpoint, of tensors that were renamed
    reasons: Mapping[str, str] = field(default_factory=dict)  # why some are left out or have been changed, by name
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transfer:
    """What happens to one tensor."""

    name: str  # with the prefix encoder. where it belongs to the encoder
    action: str  # "loaded", "adapted", "left out" (in the checkpoint only) or "not found" (in the encoder only)
    why: str
    source: str = ""  # its name in the checkpoint, if it is there
    tensor: Tensor | None = None  # what the encoder's is set to; None: it keeps its initial values


def plan_transfer(source: Source, encoder: Encoder) -> list[Transfer]:
    """The action of a transfer for each tensor of a checkpoint and of an encoder."""
    own, plan = encoder.state_dict(), []
    for name, tensor in source.weights.items():
        inner, original, reason = name.removeprefix(PREFIX), source.names.get(name, name), source.reasons.get(name, "")
        if inner == name or inner not in own:
            missing = "not part of the encoder" if inner == name else "the new encoder has no such tensor"
            plan.append(Transfer(name, "left out", reason or missing, original))
            continue
        adapted, change = encoder.adapted(inner, tensor, source.patch_size)
        if adapted.shape != own[inner].shape:
            why = f"{tuple(tensor.shape)} does not fit {tuple(own[inner].shape)}"
            plan.append(Transfer(name, "left out", why, original))
        else:
            why = "; ".join(filter(None, (reason, change)))
            plan.append(Transfer(name, "adapted" if why else "loaded", why or "same shape", original, adapted))
    for inner, tensor in own.items():
        name = PREFIX + inner
        if name in source.weights:
            continue
        if inner.endswith(source.absent):
            why = "0, as the checkpoint's kind has no such term"
            plan.append(Transfer(name, "adapted", why, tensor=torch.zeros_like(tensor)))
        else:
            plan.append(Transfer(name, "not found", "keeps its initial values"))
    return plan


def transfer_encoder(source: Source, encoder: Encoder) -> list[Transfer]:
    """Load a checkpoint's encoder into another encoder, in place; returns the plan that was carried out.

    Raises:
        ValueError: a tensor of the encoder would keep its initial values; nothing is loaded then.
    """
    plan = plan_transfer(source, encoder)
    if refused := why_refused(plan, encoder):
        raise ValueError(refused)
    encoder.load_state_dict({e.name.removeprefix(PREFIX): e.tensor for e in plan if e.tensor is not None})
    return plan


def why_refused(plan: list[Transfer], encoder: Encoder, fitting: str = "the model size") -> str | None:
    """Why a plan is refused, if it leaves a tensor untrained; `fitting` is the setting with which it would not."""
    entries, names = {entry.name: entry for entry in plan}, [PREFIX + name for name in encoder.state_dict()]
    untrained = [name for name in names if entries[name].tensor is None]
    if not untrained:
        return None
    return (
        f"the pretrained encoder does not match: {len(untrained)} of {len(names)} tensors would stay untrained, the "
        f"first is {untrained[0]} ({entries[untrained[0]].why}). Choose {fitting} that it was "
        "pretrained with (transfer=explain lists every tensor)"
    )


def other_position(source: Mapping[str, Any], target: Mapping[str, Any]) -> str | None:
    """How two models' configurations treat positions differently, if so, which no shape tells, and what to set."""
    before, now = ({key: node.get(key, usual) for key, usual in POSITIONS.items()} for node in (source, target))
    differing = [key for key in POSITIONS if before[key] != now[key]]
    if not differing:
        return None
    has, wanted = (", ".join(f"{key}={str(node[key]).lower()}" for key in differing) for node in (now, before))
    add = " ".join(f"model.{setting}" for setting in wanted.split(", "))
    return f"the encoder was pretrained with {wanted}, this model has {has}: add {add}"


def transfer_report(plan: list[Transfer]) -> str:
    """A short table of a transfer: how many tensors had each action, and why."""
    lines = []
    for action in ("loaded", "adapted", "left out", "not found"):
        reasons = Counter(entry.why for entry in plan if entry.action == action)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        lines.append(f"  {action:<10}{reasons.total():>4} tensors{'  ' + why if why else ''}")
    return "\n".join(lines)


def transfer_table(plan: list[Transfer], encoder: Encoder) -> str:
    """The whole plan, one line per tensor: its name here, its name in the checkpoint, the action and the reason."""
    rows = [("tensor", "in the checkpoint", "action", "why")]
    for entry in plan:
        here = "-" if entry.action == "left out" else entry.name
        rows.append((here, entry.source or "-", entry.action, entry.why))
    if hasattr(encoder, "position"):
        grid = " x ".join(map(str, getattr(encoder, "grid", ())))
        rows.append((f"{PREFIX}position", "-", "computed", f"for the grid of {grid} tokens; not a weight"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    )


# ---- tensors for other sizes, as the encoders adapt them ----


def other_channels(kernel: Tensor, channels: int) -> tuple[Tensor, str]:
    """The kernel (E, C, d, h, w) of a first convolution for other channels, and what was changed.

    It is summed over the old channels and shared among the new ones: equal channels give the same features as before.
    """
    if kernel.ndim != 5 or kernel.shape[1] == channels:
        return kernel, ""
    mean = kernel.sum(dim=1, keepdim=True) / channels
    return mean.repeat_interleave(channels, dim=1), f"{kernel.shape[1]} to {channels} input channels"


def other_patches(weight: Tensor, s: int, size: int, channels: int) -> tuple[Tensor, str]:
    """A patch projection (E, C*s^3) for other channels and patches of another size, and what was changed.

    Patches are resampled by the pseudoinverse of the trilinear enlargement (FlexiViT, CVPR 2023), so that an enlarged
    patch gives the same token as before.
    """
    kernel, resampled = weight.reshape(len(weight), -1, s, s, s), ""
    if s != size:
        resampled = f"patches of {s} to {size} voxels, resampled"
        enlarge = F.interpolate(torch.eye(s, dtype=torch.float64)[None], size=size, mode="linear")[0]  # s size
        back = torch.linalg.pinv(enlarge).to(kernel)  # size s
        kernel = torch.einsum("ecdhw,xd,yh,zw->ecxyz", kernel, back, back, back)
    kernel, change = other_channels(kernel, channels)
    return kernel.flatten(1), "; ".join(filter(None, (change, resampled)))


def other_window(bias: Tensor, window: int) -> tuple[Tensor, str]:
    """A bias table (M, 2S-1), whose middle is offset 0, for another window, and what was changed.

    Offsets in tokens keep their bias; offsets beyond the old window take the bias of its outermost one.
    """
    before = (bias.shape[1] + 1) // 2
    wider = window - before
    if wider == 0:
        return bias, ""
    if wider < 0:
        return bias[:, -wider:wider], f"window {before} to {window}, the outer offsets cut off"
    padded = F.pad(bias[None], (wider, wider), mode="replicate")[0]
    return padded, f"window {before} to {window}, the outermost offset repeated"


# ---- weights from elsewhere ----


def from_monai(weights: Mapping[str, Tensor]) -> Source:
    """Weights of MONAI's ViT, or of a network that contains one (ViTAutoEnc, UNETR), under this project's names.

    MONAI reads volumes as (x, y, z) and this project as (z, y, x), so the patches' axes are reversed. Its learnt
    position embeddings are left out, as positions are computed; it has no windows, so their bias starts at 0.

    Raises:
        ValueError: no such network, or patches that are not cubes.
    """
    marks = [name for name in weights if re.search(r"patch_embedding\.patch_embeddings\.(1\.)?weight$", name)]
    if len(marks) != 1:
        shown = ", ".join(list(weights)[:3])
        raise ValueError(f"no ViT with MONAI's tensor names in this checkpoint (its tensors are {shown}, ...)")
    prefix = marks[0].split("patch_embedding.")[0]
    found: dict[str, Tensor] = {}
    names, reasons = {}, {}
    patch_size = 0
    for source, tensor in weights.items():
        ours = renamed(source, prefix, MONAI) or source
        found[ours], names[ours] = tensor, source
        if ours == f"{PREFIX}patch_embed.weight":
            found[ours], patch_size = _reversed_patches(tensor)
            reasons[ours] = "axes x y z turned to z y x"
        elif source == prefix + MONAI_POSITIONS:
            reasons[ours] = "positions are computed here"
    return Source(found, patch_size, names, reasons, absent=ABSENT)


def renamed(source: str, prefix: str, patterns: Sequence[tuple[str, str]]) -> str | None:
    """This project's name of another's tensor, by patterns of what follows a prefix; None for any other name."""
    if source.startswith(prefix):
        for pattern, name in patterns:
            if match := re.fullmatch(pattern, source.removeprefix(prefix)):
                return PREFIX + match.expand(name)
    return None


def _reversed_patches(tensor: Tensor) -> tuple[Tensor, int]:
    """MONAI's patch projection, (E, C, x, y, z) or (E, x*y*z*C) ("perceptron"), as `(E, C*s^3)` in our order, and s."""
    if tensor.ndim == 2:
        voxels = tensor.shape[1]
        sizes = [(c, round((voxels / c) ** (1 / 3))) for c in range(1, voxels + 1)]
        c, s = next((c, s) for c, s in sizes if c * s**3 == voxels)
        tensor = tensor.reshape(-1, s, s, s, c).permute(0, 4, 1, 2, 3)
    if tensor.ndim != 5 or len(set(tensor.shape[2:])) != 1:
        raise ValueError(f"patches of {tuple(tensor.shape[2:])} voxels: only cubes can be transferred")
    return tensor.permute(0, 1, 4, 3, 2).flatten(1).contiguous(), tensor.shape[2]


def transfer_sa_swin(source: Source, model: nn.Module) -> str:
    """Load an SA-Swin's encoder and cross-attention into a network that has the same two, in place; says what was done.

    The caller checks that it has all of the cross-attention, with as many heads. See `other_channels` for channels.

    Raises:
        ValueError: a tensor that the checkpoint does not have, or that has another shape.
    """
    own, loaded = model.state_dict(), {}
    for name in (name for name in own if name.startswith(("encoder.", "saca."))):
        tensor = source.weights.get(name)
        if tensor is not None and name.endswith("patch_embed.proj.weight"):
            tensor, _ = other_channels(tensor, own[name].shape[1])
        if tensor is None or tensor.shape != own[name].shape:
            there = "absent" if tensor is None else f"{tuple(tensor.shape)}"
            raise ValueError(
                f"the pretrained SA-Swin does not match: {name} is {there} there and {tuple(own[name].shape)} here: "
                "choose the model size, and the options of its cross-attention, that it was pretrained with"
            )
        loaded[name] = tensor
    model.load_state_dict({**own, **loaded})
    return f"{len(loaded)} tensors of encoder and cross-attention loaded, {len(source.weights) - len(loaded)} left out"
