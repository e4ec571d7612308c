"""Where a fine-tuning starts: a pretrained checkpoint of this package or of others, and what became of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asa.models.sw_vit import Block, SWViT
from asa.models.transfer import (
    Source,
    check_position,
    from_monai,
    plan_transfer,
    transfer_encoder,
    transfer_report,
    transfer_sa_swin,
    transfer_table,
    why_refused,
)
from asa.training.checkpoint import find_weights, read_weights

FOREIGN = (".pt", ".pth", ".ckpt", ".bin")  # what torch.save wrote
INSIDE = ("state_dict", "model_state_dict", "model", "network_weights")  # where training scripts put the weights


def read_source(path: str | Path) -> tuple[Source, dict[str, Any]]:
    """Weights to start from, and the checkpoint's description: {} for one that is not of this package.

    Args:
        path: run folder, checkpoint folder or `.safetensors` file of this package; or a `.pt`, `.pth`, `.ckpt` or
            `.bin` file with a MONAI ViT, ViTAutoEnc or UNETR. Nothing but tensors is loaded from it.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that is known.
    """
    file = find_weights(path)
    if file.suffix in FOREIGN:
        try:
            return from_monai(_tensors(file)), {}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    weights, description = read_weights(file)
    inner = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    return Source(inner, description["model"].get("patch_size")), description


def start_from(
    init: str, source: Source, origin: Mapping[str, Any], encoder: SWViT, model: Mapping[str, Any], *, explain: bool
) -> str:
    """Load a source into an encoder, or with `explain` only say what would happen to each tensor.

    Args:
        init: names the source.
        source: the weights.
        origin: the checkpoint's description, or {}.
        encoder: the target.
        model: the target's description.
        explain: load nothing.

    Returns:
        What to print.

    Raises:
        ValueError: an encoder of another kind, or without `explain` one that does not match.
    """
    note = ""
    if origin:
        check_position(origin["model"], model)
    else:
        note = f"\n{init} does not say its number of heads: taken as {_heads(encoder)}"
    if not explain:
        return f"encoder from {init}:\n{transfer_report(transfer_encoder(source, encoder))}{note}"
    plan = plan_transfer(source, encoder)
    refused = why_refused(plan, encoder)
    verdict = f"refused: {refused}" if refused else "this can be done; nothing was trained (transfer=explain)"
    return f"{transfer_table(plan, encoder)}\n{transfer_report(plan)}{note}\n{verdict}"


def start_sides(init: str, source: Source, origin: Mapping[str, Any], model: nn.Module, node: Mapping[str, Any]) -> str:
    """Load a SA-Swin into a network that has its encoder and cross-attention; what to print.

    Args:
        init: names the source.
        source: the weights.
        origin: the checkpoint's description, or {}.
        model: the target.
        node: the target's description.

    Raises:
        ValueError: it does not match.
    """
    for key in ("position", "norm"):  # what no tensor's shape tells
        before, now = origin.get("model", {}).get(key), node.get(key)
        if before != now:
            raise ValueError(
                f"{init} was pretrained with {key}={before}, this model has {now}: add model.{key}={before}"
            )
    return f"{transfer_sa_swin(source, model)}, from {init}"


def _heads(encoder: SWViT) -> int:
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    return block.attention.num_heads


def _tensors(file: Path) -> dict[str, Tensor]:
    """The named tensors of a file that torch.save wrote."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"damaged, or holds more than tensors, which could run code ({type(error).__name__}): "
            "save its state_dict() alone"
        ) from None
    for key in INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise ValueError("no named tensors in it: save its state_dict()")
    return tensors
