"""Checkpoints: complete or absent, safe to load, and enough to continue a run exactly where it stopped.

    RUN/checkpoints/step-NNNNNNNN/model.safetensors    weights; the description of the model in the header
    RUN/checkpoints/step-NNNNNNNN/training.pt          optimizer, loss scale, random state
    RUN/checkpoints/step-NNNNNNNN/digests.json         SHA-256 of both, compared whenever they are read
    RUN/best/step-NNNNNNNN/                            the best checkpoint, without a training state (`train.best`)

With `train.ema` the first file holds the averaged weights, which everything but the training itself reads, and the
second one also those that training continues with. The description is plain data: "model" (what `asa.config.build`
takes), "data", "task" (its name), and with `train.best` "best" (name and value of the metric).
"""

import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from asa.config import CHECKPOINT_TARGETS, build, flatten
from asa.data.io.files import check_digest, sha256_of, write_digests
from asa.errors import reason_of
from asa.training.checkpoint_files import BEST, NEWEST, TRAINING, WEIGHTS, find_weights, list_checkpoints

FORMAT = 1
LARGEST_NUMBER = 1 << 16  # of the keywords of a model
LAYERS = ("depth", "groups")  # in the names of keywords that count layers
LARGEST_TABLES = 1 << 30  # bytes of buffers that a model computes and a checkpoint does not hold
T = TypeVar("T")
RETRIES = 10  # of a checkpoint that is removed while it is read, before this is an error


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, was changed after it was written, or cannot be read."""


# --- saving


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
    """Write a checkpoint under a temporary name, flush it to the disk, rename it, and delete old ones; its folder.

    Args:
        run, step, model: the run folder, the steps done, and the network whose weights are saved.
        description: plain data, see the module's docstring.
        training: plain data and tensors to continue with.
        keep: number of checkpoints to keep in the folder: this one and the newest others.

    Raises:
        OSError: it could not be written; earlier checkpoints are unchanged.
    """
    parent = run / folder
    final, temporary = parent / f"step-{step:08d}", parent / f".step-{step:08d}.tmp"
    for leftover in parent.glob(".step-*.tmp"):  # of a process that was killed while saving
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover, ignore_errors=True)
    header = {"asa": json.dumps({"format": FORMAT, "step": step, **description}, sort_keys=True)}
    try:
        temporary.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS, metadata=header)
        torch.save({"step": step, **training}, temporary / TRAINING)
        write_digests(temporary, (WEIGHTS, TRAINING))
        for name in (WEIGHTS, TRAINING):
            _flush(temporary / name)
        _flush(temporary)
        _remove(final)
        temporary.rename(final)
        _flush(parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of the three
        shutil.rmtree(temporary, ignore_errors=True)
        of_torch = isinstance(error, RuntimeError) and "enforce fail" in str(error)
        reason = "not all of it, as on a full disk" if of_torch else str(error).strip().splitlines()[0]
        advice = f"The last complete checkpoint is {newest_name(run)}; free disk space and run the same command again"
        raise OSError(f"{final}: could not be written ({reason}). {advice}") from error
    newest_first = [path for path in reversed(list_checkpoints(run, folder)) if path != final]
    for old in newest_first[keep - 1 :]:
        _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it never exists incomplete under its name."""
    if checkpoint.exists():
        old = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        checkpoint.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_best(
    run: Path, step: int, name: str, metrics: Mapping[str, float], method: nn.Module, description: Mapping[str, Any]
) -> bool:
    """Save the weights in the run's `best` folder if they validated better than those there; whether they were saved.

    The highest value of the metric `name` is best; with a minus sign before it, the lowest. Of equal values the first
    is kept, and a non-finite one never is. The best so far is read from its checkpoint, also in a resumed run.
    Raises as `check_best` and `save_checkpoint`.
    """
    check_best(name, metrics)
    sign = -1 if name.startswith("-") else 1
    value, before = metrics[name.removeprefix("-")], read_best(run)
    better = before is None or before["name"] != name or sign * value > sign * before["value"]
    if not better or not math.isfinite(value):
        return False
    best = {"name": name, "value": value}
    save_checkpoint(run, step, method, {**description, "best": best}, {}, keep=1, folder=BEST)
    return True


def check_best(name: str, metrics: Collection[str]) -> None:
    """Raise a ValueError if validation gives no metric of this name, which may have a minus sign before it."""
    if name.removeprefix("-") not in metrics:
        raise ValueError(f"train.best={name}: validation gives {', '.join(metrics)}")


def read_best(run: Path) -> dict[str, Any] | None:
    """The best checkpoint: "name" and "value" of its metric, its "step" and "file"; None if there is none."""
    checkpoints = list_checkpoints(run, BEST)
    if not checkpoints:
        return None
    description = read_description(checkpoints[-1])
    return {**description["best"], "step": description["step"], "file": checkpoints[-1] / WEIGHTS}


def describe_best(run: Path) -> str:
    """A line about the best checkpoint: its metric, step and file."""
    found = "best {name} {value:.4g} at step {step}: {file}"
    return found.format(**best) if (best := read_best(run)) else "no validation gave a best checkpoint"


# --- loading


def newest_name(run: Path) -> str:
    """Name of the run's newest checkpoint, for messages; "none" if there is none."""
    return next((path.name for path in list_checkpoints(run)[-1:]), "none")


def load_newest(run: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The run's newest intact checkpoint with its weights and training state; None if there are no checkpoints.

    Newer, damaged ones are reported and renamed, so that they do not count; a DamagedCheckpoint if none is intact.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            weights, training = load_training(checkpoint)
        except DamagedCheckpoint as error:
            damaged[checkpoint] = str(error)
            continue
        for path, reason in damaged.items():
            renamed = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
            report(f"warning: {reason}: renamed to {renamed.name}; continuing from {checkpoint.name}")
        return checkpoint, weights, training
    if damaged:
        raise DamagedCheckpoint(
            f"no checkpoint is intact: {'; '.join(damaged.values())}. Remove {run / NEWEST} to start again"
        )
    return None


def load_training(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and training state of a folder, on the CPU; a DamagedCheckpoint if a file is missing or has changed."""
    for name in (WEIGHTS, TRAINING):
        if not (checkpoint / name).is_file():
            raise DamagedCheckpoint(f"{checkpoint / name}: missing")
    weights, _ = read_weights(checkpoint / WEIGHTS)
    _compare(checkpoint / TRAINING)
    try:
        return weights, load_tensors(checkpoint / TRAINING)
    except Exception as error:
        raise DamagedCheckpoint(f"{checkpoint / TRAINING}: damaged ({type(error).__name__})") from error


def load_tensors(file: Path) -> Any:
    """What `torch.save` wrote: plain data and tensors on the CPU, and nothing that could run code.

    A ValueError for a compressed file or tensors larger than it; errors of many types for a damaged file or other
    objects.
    """
    if zipfile.is_zipfile(file):  # torch.save does not compress, but torch.load unpacks whatever is compressed
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > file.stat().st_size:
            raise ValueError(f"a compressed archive of {unpacked} bytes: save it with torch.save")
    content = torch.load(file, map_location="cpu", weights_only=True)
    for tensor in tree_leaves(content):
        if isinstance(tensor, Tensor) and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError("a tensor repeats the values of a smaller one: save it with .contiguous()")
    return content


def _compare(file: Path) -> None:
    """Compare a file with its digest: see `check_digest`, whose error is a DamagedCheckpoint here."""
    try:
        check_digest(file, listed=True)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error


def read_weights(
    path: str | Path, *, tensors: bool = True, shapes: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (none without `tensors`) and description from a run folder, checkpoint folder or file.

    With `shapes` the weights are on the meta device: their numbers are not read. Those in float16 become float32.

    Raises:
        FileNotFoundError: no checkpoint there.
        DamagedCheckpoint: not a complete safetensors file, or with `tensors` a changed one.
        ValueError: not a checkpoint of this package.
    """
    return _of_newest(path, lambda file: _read(file, tensors, shapes))


def _of_newest(path: str | Path, read: Callable[[Path], T]) -> T:
    """What is read of the weights file of a path; it is looked for again where it was removed meanwhile."""
    for _ in range(RETRIES):
        file = find_weights(path)
        try:
            return read(file)
        except (OSError, ValueError):
            if file.is_file():
                raise
    return read(find_weights(path))  # of a run that goes on, whose newest was removed since


def _read(file: Path, tensors: bool, shapes: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_weights` of a file."""
    if tensors and not shapes:
        _compare(file)
    try:
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get("asa")
            if header is None:
                raise ValueError(f"{file}: not a checkpoint of asa: its header has no description of the model")
            try:
                description = json.loads(header)
            except ValueError as error:
                raise DamagedCheckpoint(f"{file}: its description is not JSON ({error})") from error
            if not isinstance(description, dict):
                kind = type(description).__name__
                raise DamagedCheckpoint(f"{file}: its description is a {kind}, not a mapping")
            if description.get("format") != FORMAT:
                raise ValueError(f"{file}: checkpoint format {description.get('format')}; this version reads {FORMAT}")
            names = list(opened.keys()) if tensors else []
            if shapes:
                sizes = {name: opened.get_slice(name).get_shape() for name in names}
                return {name: torch.empty(size, device="meta") for name, size in sizes.items()}, description
            weights = {name: opened.get_tensor(name) for name in names}
            half = {name: tensor.float() for name, tensor in weights.items() if tensor.dtype == torch.float16}
            return {**weights, **half}, description
    except (SafetensorError, RuntimeError, TypeError) as error:  # the last two: of sizes that no tensor has
        raise DamagedCheckpoint(f"{file}: not a complete safetensors file ({error})") from error


def read_description(path: str | Path) -> dict[str, Any]:
    """Only the description of a checkpoint; raises the errors of `read_weights`."""
    return read_weights(path, tensors=False)[1]


def load_model(path: str | Path, *, plugins: Sequence[str] = ()) -> nn.Module:
    """The network of a checkpoint, with its weights, in evaluation mode.

    Args:
        path: run folder, checkpoint folder or `.safetensors` file; `hf://ORG/NAME[@REVISION]`, on the Hub; or
            `asa://NAME`, in this package.
        plugins: your own packages that the checkpoint's model may come from; the file itself cannot add any.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or one that does not match its model.
        ImportError, OSError: `hf://` without the extra `hub`, or without a network and a copy in the cache.
    """
    return read_model(path, plugins=plugins)[0]


def read_model(
    path: str | Path, *, plugins: Sequence[str] = (), img_size: int | Sequence[int] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of `load_model`, for another `img_size` if given, and the description, with the file's "sha256"."""
    (weights, description), digest = _of_newest(path, lambda file: (_read(file, True, False), sha256_of(file)))
    description["sha256"] = digest
    node = description.get("model")
    if not isinstance(node, Mapping) or not isinstance(description.setdefault("data", {}), Mapping):
        raise ValueError(f"{path}: its description has no model or no data: not a checkpoint of this package")
    if img_size is not None:
        node = {**node, "img_size": img_size if isinstance(img_size, int) else list(img_size)}
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    _check_size(node, own, str(path), plugins)
    model = build(node, plugins=plugins, targets=CHECKPOINT_TARGETS)
    load_weights(model, own, str(path))
    return model.eval(), description


def _check_size(node: Mapping[str, Any], weights: Mapping[str, Tensor], source: str, plugins: Sequence[str]) -> None:
    """Raise a ValueError for more layers, other tensors or larger tables than the file accounts for.

    Before memory is allocated: a file of 1 kB can describe a network of any size.
    """
    for key, value in flatten(node).items():
        numbers = value if isinstance(value, list) else [value]
        limit = len(weights) if any(name in key for name in LAYERS) else LARGEST_NUMBER
        # Sizes are integers; other numbers, like the mean of what a network predicts, are in units of their own.
        if wrong := [number for number in numbers if isinstance(number, int) and not abs(number) <= limit]:
            raise ValueError(f"{source}: does not match the model: {key}={wrong[0]} with {len(weights)} tensors")
    try:
        with torch.device("meta"):
            model = build(node, plugins=plugins, targets=CHECKPOINT_TARGETS)
    except ValueError:
        raise
    except Exception as error:  # keywords of wrong types fail in many ways
        raise ValueError(f"{source}: its model cannot be built ({reason_of(error)})") from error
    compare_shapes(model, weights, source)
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in weights)
    if tables > LARGEST_TABLES:
        raise ValueError(f"{source}: its model computes tables of {tables / 2**30:.1f} GiB, which no network needs")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights whose names and shapes must match the model's exactly; raises as `compare_shapes`."""
    compare_shapes(model, weights, source)
    model.load_state_dict(dict(weights))


def compare_shapes(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raise a ValueError that names `source` and the first tensor that is not the same in a model and in weights."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here = tuple(own[name].shape) if name in own else "absent"
        there = tuple(weights[name].shape) if name in weights else "absent"
        if here != there:
            differs = f"{name} is {there} in the checkpoint and {here} in the model"
            raise ValueError(f"{source}: does not match the model: {differs}")


def load_encoder(
    path: str | Path, *, img_size: int | Sequence[int] | None = None, plugins: Sequence[str] = ()
) -> nn.Module:
    """The encoder of a checkpoint's network, with its weights, in evaluation mode.

    Args:
        path, plugins: as for `load_model`.
        img_size: volume size in voxels that it is to take, one number or (D, H, W), with the position encoding of this
            size; None: that of the training.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, a network without an encoder, or a size that it cannot take.
    """
    encoder: Any = getattr(read_model(path, img_size=img_size, plugins=plugins)[0], "encoder", None)
    if not hasattr(encoder, "token_grid"):
        advice = "give a run of asa-pretrain or of segmentation"
        raise ValueError(f"{path}: this network has no encoder with tokens to read: {advice}")
    return encoder
