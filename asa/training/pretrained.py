"""Pretrained weights for fine-tuning: from a checkpoint of this package, of nnssl, or from a MONAI ViT."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from asa.models import transfer
from asa.models.sw_vit import SWViT
from asa.models.transfer import Source
from asa.training.checkpoint import load_tensors, read_weights
from asa.training.checkpoint_files import SHIPPED_PREFIX, find_weights, shipped

SIZES = ("base", "small", "tiny")  # of the encoders of this package
TORCH_FILES = (".pt", ".pth", ".ckpt", ".bin")  # written by torch.save
NNSSL_PLAN = "nnssl_adaptation_plan"
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "network_weights")  # used by training scripts


def read_source(path: str | Path, *, shapes: bool = False) -> tuple[Source, dict[str, Any]]:
    """Pretrained weights and the checkpoint's description, which is {} for a checkpoint of another package.

    Args:
        path: see `read_weights`; or a `.pt`, `.pth`, `.ckpt` or `.bin` file of nnssl, or with a MONAI ViT, ViTAutoEnc
            or UNETR, from which only plain data and tensors are loaded.
        shapes: see `read_weights`.
    """
    file = find_weights(path)
    if file.suffix in TORCH_FILES:
        try:
            content = _content(file)
            if isinstance(plan := content.get(NNSSL_PLAN), dict):
                nnssl = importlib.import_module("asa.baselines.nnssl")
                return nnssl.from_nnssl(_tensors(content), plan), {}
            return transfer.from_monai(_tensors(content)), {}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    weights, description = read_weights(path, shapes=shapes)
    if not isinstance(description.get("model"), Mapping):
        raise ValueError(f"{path}: its description has no model: not a checkpoint of this package")
    inner = {name.removeprefix("model."): one for name, one in weights.items() if name.startswith("model.")}
    return Source(inner, description["model"].get("patch_size")), description


def load_pretrained(
    init: str,
    source: Source,
    description: Mapping[str, Any],
    model: Any,
    model_config: Mapping[str, Any],
    *,
    explain: bool = False,
) -> str:
    """Load pretrained weights into a network's encoder, or with `explain` only report what would happen to each tensor.

    A hierarchical encoder (a Swin, which has `levels`) is loaded with its cross-attention; it has no report of single
    tensors, so that `explain` makes no difference.

    Args:
        init, source, description: its name for messages, and what `read_source` returned.
        model, model_config: the network, whose `encoder` is changed in place, and its description.

    Returns:
        The report to print; a ValueError for an encoder of another kind, a network that takes none, or (without
        `explain`) one that differs.
    """
    if not hasattr(model.encoder, "state_dict"):  # nothing to load into
        advice = "leave init out, or choose model=unet_..., resenc_... or primus_..."
        raise ValueError(f"init={init}: this model is trained from scratch: {advice}")
    swin = hasattr(model.encoder, "levels")
    was_swin = isinstance(description.get("model", {}).get("position"), bool)  # of ASA a kind of encoding is named
    if description and was_swin != swin:
        kinds = ("ASA's", "SA-Swin's") if swin else ("SA-Swin's", "another")
        advice = "leave model= and experiment= out, and the network follows the encoder"
        raise ValueError(f"init={init}: is {kinds[0]} encoder, and this network has {kinds[1]}: {advice}")
    if swin:
        return _load_swin(init, source, description, model, model_config)
    note, differs = "", None
    if description:
        differs = transfer.other_position(description["model"], model_config)
    elif isinstance(model.encoder, SWViT):
        block: Any = model.encoder.blocks[0]
        heads = block.attention.num_heads
        note = f"\n{init} does not contain its number of heads: {heads} assumed"
    plan = transfer.plan_transfer(source, model.encoder)
    untrained = transfer.why_refused(plan, model.encoder, _of_size(description.get("model", {}), model_config))
    refused = "; ".join(filter(None, (untrained, differs)))  # at once: whoever adds both has a command that runs
    if not explain:
        if refused:
            raise ValueError(refused)
        loaded = transfer.transfer_encoder(source, model.encoder)
        return f"encoder from {init}:\n{transfer.transfer_report(loaded)}{note}"
    verdict = f"refused: {refused}" if refused else "the transfer is possible; nothing was trained (transfer=explain)"
    return f"{transfer.transfer_table(plan, model.encoder)}\n{transfer.transfer_report(plan)}{note}\n{verdict}"


def _of_size(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to choose for this model to have the size of another one: `model=FAMILY_SIZE` where both have a name."""
    (_, _, size), (family, _, other) = (str(node.get("_target_", "")).rpartition("_") for node in (before, now))
    named = size != other and {size, other} <= set(SIZES)
    return f"model={family.rpartition('.')[2]}_{size}, the size" if named else "the model size"


def fitting_shipped(model: Any, model_config: Mapping[str, Any]) -> list[str]:
    """The encoders of this package, as `asa://NAME`, that a network's encoder could be initialised from."""
    found = []
    for name in shipped() if isinstance(model.encoder, SWViT) else []:
        source, description = read_source(f"{SHIPPED_PREFIX}{name}")
        if transfer.other_position(description["model"], model_config):
            continue
        if transfer.why_refused(transfer.plan_transfer(source, model.encoder), model.encoder) is None:
            found.append(f"{SHIPPED_PREFIX}{name}")
    return found


def _load_swin(
    init: str, source: Source, description: Mapping[str, Any], model: nn.Module, model_config: Mapping[str, Any]
) -> str:
    """Load a SA-Swin into a network that has the same encoder and cross-attention; returns the report to print."""
    before = description.get("model", {})
    # Not visible in the shapes of the tensors that the model asks for.
    keys = ("position", "norm", "self_attention", "cross_heads")
    if differing := [key for key in keys if before.get(key) != model_config.get(key)]:
        had = [f"{key}={before.get(key)}" for key in differing]
        has, add = ", ".join(str(model_config.get(key)) for key in differing), " ".join(f"model.{one}" for one in had)
        raise ValueError(f"{init} was pretrained with {', '.join(had)}, this model has {has}: add {add}")
    return f"{transfer.transfer_sa_swin(source, model)}, from {init}"


def _content(file: Path) -> dict[str, Any]:
    """What torch.save wrote, {} if it is not a dict."""
    try:
        content = load_tensors(file)
    except ValueError:
        raise
    except Exception as error:
        found = f"damaged, or contains more than tensors, which could run code ({type(error).__name__})"
        raise ValueError(f"{found}: save only its state_dict()") from None
    return content if isinstance(content, dict) else {}


def _tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The named tensors of a checkpoint."""
    for key in WEIGHT_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("no named tensors: save its state_dict()")
    return tensors
