"""Pretrained weights into the encoder of another model: a plan that can be read, then applied.

Only the encoder moves. What the encoder computes (position codes, window offsets) is no weight, so another volume
size needs nothing. Other channels, patch sizes and windows are adapted, and MONAI's ViT has names of its own.

Letters: token width E, channels C, patch size s, heads M, window S.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.models.sw_vit import SWViT

PREFIX = "encoder."
PATCH_WEIGHT = "patch_embed.weight"
WINDOW_BIAS = "relative_position_bias"
QKV_BIAS = "attention.qkv.bias"
# MONAI's names, as regular expressions after the prefix, and ours.
MONAI = (
    (r"patch_embedding\.patch_embeddings\.(?:1\.)?(weight|bias)", r"patch_embed.\1"),
    (r"blocks\.(\d+)\.(norm[12]\.(?:weight|bias))", r"blocks.\1.\2"),
    (r"blocks\.(\d+)\.attn\.(qkv\.(?:weight|bias))", r"blocks.\1.attention.\2"),
    (r"blocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attention.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.linear1\.(weight|bias)", r"blocks.\1.mlp.0.\2"),
    (r"blocks\.(\d+)\.mlp\.linear2\.(weight|bias)", r"blocks.\1.mlp.2.\2"),
    (r"(norm\.(?:weight|bias))", r"\1"),
)
POSITIONS = "patch_embedding.position_embeddings"


@dataclass(frozen=True)
class Transfer:
    """What happens to one tensor.

    `action` is "loaded", "adapted", "left out" (in the checkpoint only) or "not found" (in the encoder only). `source`
    is the tensor's name in the checkpoint, empty where it has none.
    """

    name: str
    action: str
    why: str
    source: str = ""


@dataclass(frozen=True)
class Source:
    """Weights that an encoder may be started from.

    Args:
        weights: those of the encoder are named `encoder.*`.
        patch_size: that they were trained with; None: the new encoder's.
        names: their names in the checkpoint, where these are others.
        reasons: why tensors are left out or were changed already, by their name in `weights`.
        absent: ends of names that this kind of encoder has no tensors for; they start at 0, which is what their
            absence means.
    """

    weights: Mapping[str, Tensor]
    patch_size: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def plan_transfer(source: Source, encoder: SWViT) -> list[Transfer]:
    """Say for each tensor of a checkpoint and of an encoder what a transfer would do."""
    own = encoder.state_dict()
    plan = []
    for name, tensor in source.weights.items():
        inner, called = name.removeprefix(PREFIX), source.names.get(name, name)
        if inner == name or inner not in own:
            why = "not part of the encoder" if inner == name else "the new encoder has no such tensor"
            plan.append(Transfer(name, "left out", source.reasons.get(name, why), called))
            continue
        changed = _change(inner, tensor, source, encoder)
        if changed is None:
            why = f"{tuple(tensor.shape)} does not fit {tuple(own[inner].shape)}"
            plan.append(Transfer(name, "left out", why, called))
        else:
            known = source.reasons.get(name)
            why = "; ".join(part for part in (known, changed) if part)
            plan.append(Transfer(name, "adapted" if why else "loaded", why or "same shape", called))
    for inner in own:
        if PREFIX + inner not in source.weights:
            if inner.endswith(source.absent):
                plan.append(Transfer(PREFIX + inner, "adapted", "0, as the checkpoint's kind has no such term"))
            else:
                plan.append(Transfer(PREFIX + inner, "not found", "keeps its first values"))
    return plan


def check_kind(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Compare what no tensor's shape tells: the position codes of two models' descriptions.

    Raises:
        ValueError: they differ; the message says what to set.
    """
    before, now = source.get("position", "mirror"), target.get("position", "mirror")
    if before != now:
        raise ValueError(
            f"the encoder was pretrained with position={before}, this model has {now}: add model.position={before}"
        )


def why_refused(plan: list[Transfer], encoder: SWViT) -> str | None:
    """Why a plan cannot be carried out: a tensor of the encoder would keep its first values. None: it can."""
    filled = {entry.name.removeprefix(PREFIX) for entry in plan if entry.action in ("loaded", "adapted")}
    unfilled = [name for name in encoder.state_dict() if name not in filled]
    if not unfilled:
        return None
    reasons = {entry.name: entry.why for entry in plan}
    first = PREFIX + unfilled[0]
    return (
        f"the pretrained encoder does not match: {len(unfilled)} of {len(encoder.state_dict())} tensors would stay "
        f"untrained, the first is {first} ({reasons[first]}). Choose the model size that it was pretrained with "
        "(transfer=explain lists every tensor)"
    )


def transfer_encoder(source: Source, encoder: SWViT) -> list[Transfer]:
    """Load a checkpoint's encoder into another encoder, in place.

    What is adapted, and how:

    - other channels: the projection of the patches is summed over the old channels, repeated for each new one and
      divided by their number, so that equal channels give the same tokens as before.
    - another patch size: the projection is resampled by the pseudoinverse of the trilinear enlargement (FlexiViT,
      CVPR 2023), so that an enlarged patch gives the same token as before.
    - another window: offsets in tokens keep their bias; those that the old window did not reach take its outermost.

    Args:
        source: the weights.
        encoder: the target.

    Returns:
        The plan that was carried out; see `transfer_report`.

    Raises:
        ValueError: a tensor of the encoder would keep its first values; nothing has been loaded then.
    """
    plan = plan_transfer(source, encoder)
    if refused := why_refused(plan, encoder):
        raise ValueError(refused)
    own, state = encoder.state_dict(), {}
    for entry in plan:
        if entry.action in ("loaded", "adapted"):
            inner = entry.name.removeprefix(PREFIX)
            tensor = source.weights.get(entry.name)
            state[inner] = torch.zeros_like(own[inner]) if tensor is None else _adapt(inner, tensor, source, encoder)
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


def transfer_table(plan: list[Transfer], encoder: SWViT) -> str:
    """All of a plan, a line a tensor: its name here, its name in the checkpoint, what happens, and why."""
    rows = [("tensor", "in the checkpoint", "action", "why")]
    for entry in plan:
        here = "-" if entry.action == "left out" else entry.name
        rows.append((here, entry.source or "-", entry.action, entry.why))
    grid = " x ".join(map(str, encoder.grid))
    rows.append((f"{PREFIX}position", "-", "computed", f"for the grid of {grid} tokens; no weight"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    )


def from_monai(weights: Mapping[str, Tensor]) -> Source:
    """Weights of MONAI's ViT, or of a network that holds one (ViTAutoEnc, UNETR), under this project's names.

    MONAI reads volumes as (x, y, z), here they are (z, y, x): the patches' axes are turned round. Its learnt positions
    are left out, as they are computed here. It has no window and no bias of the position in one: that one starts at 0.

    Args:
        weights: names to tensors, as `state_dict()` gives them.

    Raises:
        ValueError: no such network in it, or patches that are no cubes.
    """
    marks = [name for name in weights if re.search(r"patch_embedding\.patch_embeddings\.(1\.)?weight$", name)]
    if len(marks) != 1:
        shown = ", ".join(list(weights)[:3])
        raise ValueError(f"no ViT of MONAI's naming in this checkpoint (its tensors are {shown}, ...)")
    prefix = marks[0].split("patch_embedding.")[0]
    found: dict[str, Tensor] = {}
    names, reasons = {}, {}
    patch_size = 0
    for source, tensor in weights.items():
        ours = _ours(source, prefix)
        found[ours], names[ours] = tensor, source
        if ours == PREFIX + PATCH_WEIGHT:
            found[ours], patch_size = _turned_patches(tensor)
            reasons[ours] = "axes x y z turned to z y x"
        elif source == prefix + POSITIONS:
            reasons[ours] = "positions are computed here"
    return Source(found, patch_size, names, reasons, absent=(WINDOW_BIAS, QKV_BIAS))


def _ours(source: str, prefix: str) -> str:
    """A tensor's name here, or the one it has."""
    if source.startswith(prefix):
        for pattern, name in MONAI:
            if match := re.fullmatch(pattern, source.removeprefix(prefix)):
                return PREFIX + match.expand(name)
    return source


def _turned_patches(tensor: Tensor) -> tuple[Tensor, int]:
    """MONAI's patch projection as `(E, C*s^3)` in this project's order, and s.

    A convolution's is (E, C, x, y, z), that of its "perceptron" (E, x*y*z*C).
    """
    if tensor.ndim == 2:
        voxels = tensor.shape[1]
        sizes = [(c, round((voxels / c) ** (1 / 3))) for c in range(1, voxels + 1)]
        c, s = next((c, s) for c, s in sizes if c * s**3 == voxels)
        tensor = tensor.reshape(-1, s, s, s, c).permute(0, 4, 1, 2, 3)
    if tensor.ndim != 5 or len(set(tensor.shape[2:])) != 1:
        raise ValueError(f"patches of {tuple(tensor.shape[2:])} voxels: only cubes can be transferred")
    return tensor.permute(0, 1, 4, 3, 2).flatten(1).contiguous(), tensor.shape[2]


def _change(inner: str, tensor: Tensor, source: Source, encoder: SWViT) -> str | None:
    """What has to change for a tensor to fit: empty for nothing, None where it cannot."""
    own = encoder.state_dict()[inner]
    if inner == PATCH_WEIGHT:
        s, now = source.patch_size or encoder.patch_size, encoder.patch_size
        if tensor.ndim != 2 or len(tensor) != len(own) or tensor.shape[1] % s**3:
            return None
        channels = tensor.shape[1] // s**3
        parts = [f"{channels} to {encoder.in_channels} input channels"] if channels != encoder.in_channels else []
        return "; ".join(parts + ([f"patches of {s} to {now} voxels, resampled"] if s != now else []))
    if tensor.shape == own.shape:
        return ""
    if inner.endswith(WINDOW_BIAS) and tensor.ndim == 2 and len(tensor) == len(own) and tensor.shape[1] % 2:
        before, now = (tensor.shape[1] + 1) // 2, (own.shape[1] + 1) // 2
        how = "the outer offsets cut off" if now < before else "the outermost offset repeated"
        return f"window {before} to {now}, {how}"
    return None


def _adapt(inner: str, tensor: Tensor, source: Source, encoder: SWViT) -> Tensor:
    """A tensor as the encoder takes it; see `transfer_encoder`."""
    if inner.endswith(WINDOW_BIAS):
        return _other_window(tensor, (encoder.state_dict()[inner].shape[1] + 1) // 2)
    if inner != PATCH_WEIGHT:
        return tensor
    s, c = source.patch_size or encoder.patch_size, encoder.in_channels
    kernel = tensor.reshape(len(tensor), -1, s, s, s)
    if s != encoder.patch_size:
        kernel = _other_patch(kernel, encoder.patch_size)
    if kernel.shape[1] != c:
        kernel = (kernel.sum(dim=1, keepdim=True) / c).expand(-1, c, -1, -1, -1)
    return kernel.flatten(1)


def _other_window(bias: Tensor, window: int) -> Tensor:
    """Bias table (M, 2S-1) of another window; its middle is offset 0."""
    wider = window - (bias.shape[1] + 1) // 2
    if wider > 0:
        return F.pad(bias[None], (wider, wider), mode="replicate")[0]
    return bias[:, -wider : bias.shape[1] + wider]


def _other_patch(kernel: Tensor, size: int) -> Tensor:
    """Patch projection (E, C, s, s, s) for patches of another edge."""
    s = kernel.shape[-1]
    resize = F.interpolate(torch.eye(s, dtype=torch.float64)[None], size=size, mode="linear")[0]  # s size
    back = torch.linalg.pinv(resize).to(kernel.dtype)  # size s
    return torch.einsum("ecdhw,xd,yh,zw->ecxyz", kernel, back, back, back)


def transfer_sides(source: Source, model: nn.Module) -> str:
    """Load a SA-Swin's encoder and cross-attention into a network that has the same two, in place.

    A patch embedding of other channels is averaged over the old ones and shared by the new ones.

    Args:
        source: the checkpoint's weights.
        model: has `encoder` and `saca` as `asa.models.sa_swin.SASwin`.

    Returns:
        What was done, in a line.

    Raises:
        ValueError: a tensor that the checkpoint does not have, or that has another shape.
    """
    own, loaded = model.state_dict(), {}
    for name in (name for name in own if name.startswith(("encoder.", "saca."))):
        tensor = source.weights.get(name)
        if tensor is not None and name.endswith("patch_embed.proj.weight") and tensor.shape[1] != own[name].shape[1]:
            tensor = tensor.sum(dim=1, keepdim=True).expand(own[name].shape) / own[name].shape[1]
        if tensor is None or tensor.shape != own[name].shape:
            there = "absent" if tensor is None else f"{tuple(tensor.shape)}"
            raise ValueError(
                f"the pretrained SA-Swin does not match: {name} is {there} there and {tuple(own[name].shape)} here: "
                "choose the model size, and the options of its cross-attention, that it was pretrained with"
            )
        loaded[name] = tensor
    model.load_state_dict({**own, **loaded})
    return f"{len(loaded)} tensors of encoder and cross-attention loaded, {len(source.weights) - len(loaded)} left out"
