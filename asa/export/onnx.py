"""A trained network as an ONNX file, for programs without PyTorch."""

import io
import json
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.data.io.files import write_whole
from asa.methods.segment import SegmentationNetwork
from asa.models.sw_vit import SWViT
from asa.training.checkpoint import read_model

TOLERANCE = 1e-3  # largest difference of an output from PyTorch's, relative to the largest output


def export_onnx(checkpoint: str | Path, out: Path) -> float:
    """Write the network of a run as ONNX, after comparing what it computes with PyTorch.

    The U-Net of a fine-tuning takes "image" `(batch, C, D, H, W)`, a window of the size it was trained on, and gives
    "logits" `(batch, K, D, H, W)`. Of a pretraining the encoder is written: "tokens" `(batch, L, E)`. Any batch size
    works. The entry "asa" of the file's metadata says in JSON what goes in and comes out: window, channels, labels,
    preparation; and "regions" where a logit belongs to one of these, and takes a sigmoid in place of the softmax.

    Args:
        checkpoint: run folder, checkpoint folder or `.safetensors` file.
        out: the `.onnx` to write.

    Returns:
        The largest difference from PyTorch's output, relative to the largest output, on random windows.

    Raises:
        ImportError: a package of the `export` extra is missing.
        FileNotFoundError, ValueError: no checkpoint, another file ending, or outputs that differ from PyTorch's.
    """
    if out.suffix != ".onnx":
        raise ValueError(f"{out}: give a name that ends in .onnx")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch.onnx works with
    except ImportError as error:
        raise ImportError(f'{error.name} is not installed: pip install "asa-mri[export]"') from None
    model, description = read_model(checkpoint)
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, SWViT):
        raise ValueError(f"{checkpoint}: only networks on a SW-ViT are written as ONNX, not {type(model).__name__}")
    if getattr(model, "mirrored", False):
        raise ValueError(f"{checkpoint}: a network that looks at the mirror image is not written as ONNX")
    network, output = (model, "logits") if isinstance(model, SegmentationNetwork) else (encoder, "tokens")
    shape = (encoder.in_channels, *encoder.img_size)
    content = _onnx(network, output, shape, _facts(encoder, description["data"]))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in (1, 3):  # neither is the one that was traced
        image = torch.rand(batch, *shape, generator=generator)
        with torch.inference_mode():
            expected = network(image).numpy()
        (found,) = session.run(None, {"image": image.numpy()})
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not worst < TOLERANCE:
        raise ValueError(
            f"{checkpoint}: the ONNX network's outputs differ from PyTorch's by {worst:.1e}: nothing written"
        )
    write_whole(out, content)
    return worst


def _onnx(network: torch.nn.Module, output: str, shape: tuple[int, ...], facts: dict[str, Any]) -> bytes:
    """The bytes of the ONNX file."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that are not needed
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *shape),),
            input_names=["image"],
            output_names=[output],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
        )
    assert program is not None
    program.model.metadata_props["asa"] = json.dumps(facts, sort_keys=True)
    return program.model_proto.SerializeToString()


def _facts(encoder: SWViT, data: dict[str, Any]) -> dict[str, Any]:
    """What one has to know to use the network; not on whom it was trained."""
    keys = "channels", "labels", "regions", "prepare", "lateral_pairs", "spacing"
    kept: dict[str, Any] = {key: data[key] for key in keys if key in data}
    return {
        "window": list(encoder.img_size),
        "axes": "C D H W: inferior to superior, back to front, left to right",
        **kept,
    }
