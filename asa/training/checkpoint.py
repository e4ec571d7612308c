"""Checkpoints: whole or absent, safe to load, and enough to go on exactly where a run stopped.

A run folder holds `checkpoints/step-NNNNNNNN/` with `model.safetensors` (weights, and in its header the description
needed to rebuild the model) and `training.pt` (optimizer, scaler, random state). With `train.ema` the first file holds
the averaged weights, which is what everybody reads, and the second the weights that training goes on with. With
`train.best` there is a checkpoint in `best/` too, see `best.py`.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asa.config import CHECKPOINT_TARGETS, build
from asa.models.sw_vit import SWViT
from asa.models.swin import Swin

FORMAT = 1
WEIGHTS, TRAINING = "model.safetensors", "training.pt"
NEWEST = "checkpoints"  # folder of a run


class Damaged(ValueError):
    """A checkpoint that is not whole."""


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    description: Mapping[str, Any],
    training: Mapping[str, Any],
    keep: int,
    *,
    folder: str = NEWEST,
) -> Path:
    """Write a checkpoint beside its final place, flush it to the disk, rename it, and drop old ones.

    Args:
        run: the run folder.
        step: steps done.
        model: its weights are kept.
        description: plain data that rebuilds the model; `description["model"]` is what `build` takes.
        training: plain data and tensors, to go on with.
        keep: checkpoints to keep, this one and the newest others.
        folder: of the run, where it is one among others.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written; what was saved before is as it was.
    """
    place = run / folder
    final, beside = place / f"step-{step:08d}", place / f".step-{step:08d}.tmp"
    for left in place.glob(".step-*.tmp"):  # by a process that was killed while saving
        shutil.rmtree(left, ignore_errors=True)
    header = {"asa": json.dumps({"format": FORMAT, "step": step, **description}, sort_keys=True)}
    try:
        beside.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, beside / WEIGHTS, metadata=header)
        torch.save({"step": step, **training}, beside / TRAINING)
        for name in (WEIGHTS, TRAINING):
            _flush(beside / name)
        _flush(beside)
        _remove(final)
        beside.rename(final)
        _flush(place)
    except (OSError, RuntimeError, SafetensorError) as error:  # each of the three writes a full disk in its own words
        shutil.rmtree(beside, ignore_errors=True)
        before = [path.name for path in list_checkpoints(run)[-1:]]
        raise OSError(
            f"{final}: could not be written ({str(error).strip().splitlines()[0]}). The last whole checkpoint is "
            f"{before[0] if before else 'none'}; make room and give the same command again"
        ) from error
    others = [path for path in list_checkpoints(run, folder) if path != final]
    for old in others[: max(len(others) - (keep - 1), 0)]:
        _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, never leaving half of it under its name."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file's or folder's bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_checkpoints(run: Path, folder: str = NEWEST) -> list[Path]:
    """The run's checkpoints in one of its folders, oldest first."""
    return sorted((run / folder).glob("step-*"))


def load_newest(run: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The run's newest whole checkpoint with its weights and training state, None if there is none.

    Damaged ones that are newer are named and set aside, so that later ones are not counted beside them.

    Raises:
        Damaged: there are checkpoints, and none is whole.
    """
    damaged: list[Path] = []
    reasons: list[str] = []
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            weights, training = load_training(checkpoint)
        except Damaged as error:
            damaged.append(checkpoint)
            reasons.append(str(error))
            continue
        for path, reason in zip(damaged, reasons, strict=True):
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            say(f"warning: {reason}: now {aside.name}, the run goes on from {checkpoint.name}")
        return checkpoint, weights, training
    if damaged:
        raise Damaged(f"no checkpoint is whole: {'; '.join(reasons)}. Remove {damaged[0].parent} to start again")
    return None


def load_training(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and training state of a checkpoint folder, on the CPU.

    Raises:
        Damaged: a file that is missing or not whole.
    """
    for name in (WEIGHTS, TRAINING):
        if not (checkpoint / name).is_file():
            raise Damaged(f"{checkpoint / name}: missing")
    weights, _ = read_weights(checkpoint / WEIGHTS)
    try:
        return weights, torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Damaged(f"{checkpoint / TRAINING}: damaged ({type(error).__name__})") from error


def find_weights(path: str | Path) -> Path:
    """The weights file that a path means: the file itself, a checkpoint folder's, or a run's newest; RUN/best its best.

    Raises:
        FileNotFoundError: nothing there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if found := list_checkpoints(path) or list_checkpoints(path, "."):
        return found[-1] / WEIGHTS
    raise FileNotFoundError(
        f"{path}: no checkpoint here; give a run folder (or its best, where train.best kept one), a checkpoint folder "
        "or a .safetensors file"
    )


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description from a run folder, checkpoint folder or file.

    Raises:
        FileNotFoundError: nothing there.
        Damaged: not a whole safetensors file.
        ValueError: not one of this package.
    """
    file = find_weights(path)
    description = read_description(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, description  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise Damaged(f"{file}: not a whole safetensors file ({error})") from error


def read_description(path: str | Path) -> dict[str, Any]:
    """Only the description that a checkpoint holds beside its weights.

    Raises:
        FileNotFoundError, Damaged, ValueError: as `read_weights`.
    """
    file = find_weights(path)
    try:
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get("asa")
    except SafetensorError as error:
        raise Damaged(f"{file}: not a whole safetensors file ({error})") from error
    if header is None:
        raise ValueError(f"{file}: not a checkpoint of asa: its header has no description of the model")
    description: dict[str, Any] = json.loads(header)
    if description.get("format") != FORMAT:
        raise ValueError(f"{file}: checkpoint format {description.get('format')}, this version reads {FORMAT}")
    return description


def load_model(path: str | Path, *, plugins: Sequence[str] = ()) -> nn.Module:
    """The network of a run, with its weights, in evaluation mode: an autoencoder, a U-Net or a restoration network.

    Args:
        path: run folder, checkpoint folder or `.safetensors` file.
        plugins: packages of your own that the checkpoint's model may come from. The file itself cannot add any.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not a checkpoint that fits.
    """
    return read_model(path, plugins=plugins)[0]


def read_model(path: str | Path, *, plugins: Sequence[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """`load_model`, and the checkpoint's description beside the network."""
    weights, description = read_weights(path)
    model = build(description["model"], plugins=plugins, targets=CHECKPOINT_TARGETS)
    kept = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    load_weights(model, kept, str(path))
    return model.eval(), description


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights that have to fit exactly.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(weights[name].shape) if name in weights else "absent"
        if here != there:
            raise ValueError(
                f"{source}: does not fit the model: {name} is {there} in the checkpoint and {here} in the model"
            )
    model.load_state_dict(dict(weights))


def load_encoder(path: str | Path) -> SWViT | Swin:
    """The encoder of a run, with its weights, in evaluation mode.

    Args:
        path: run folder, checkpoint folder or `.safetensors` file, of pretraining or fine-tuning.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not a checkpoint that fits.
    """
    encoder = getattr(load_model(path), "encoder", None)
    if not isinstance(encoder, SWViT | Swin):
        raise ValueError(f"{path}: this network has no encoder: give a run of asa-pretrain or of segmentation")
    return encoder
