"""Export of a trained network to ONNX, for programs without PyTorch."""

import io
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa.data.io.files import write_whole
from asa.errors import require
from asa.inference.preprocessing import exported
from asa.methods.segment import is_segmentation_network
from asa.models.classifier import Regressor, WholeVolumeNetwork
from asa.models.swin import Swin
from asa.training.checkpoint import read_model

TOLERANCE = 1e-3  # of the difference from PyTorch's output, relative to the largest output


def export_onnx(checkpoint: str | Path, out: Path, *, plugins: Sequence[str] = ()) -> float:
    """Write the network of a run as ONNX, after a check of its outputs against PyTorch.

    A segmentation network maps "image" `(batch, C, D, H, W)`, a window of the trained size, to "logits"
    `(batch, K, D, H, W)`, a classifier to "logits" `(batch, K)`, and a regression network to "number" `(batch,)`. Of a
    pretraining, the encoder is written, with output "tokens" `(batch, L, E)`. The batch size is free. The entry "asa"
    of the file's metadata describes inputs and outputs in JSON: window, channels, labels, preprocessing; and "regions"
    if each logit belongs to a region, with a sigmoid in place of the softmax.

    Args:
        checkpoint: run folder, checkpoint folder or `.safetensors` file.
        out: the `.onnx` to write.
        plugins: packages of your own that the checkpoint's network may come from.

    Returns the largest difference from PyTorch's output on random windows, relative to the largest output; a ValueError
    if it is large, or for another file ending or an unsupported network.
    """
    if out.suffix != ".onnx":
        raise ValueError(f"{out}: give a file name that ends in .onnx")
    onnxruntime = require("onnxruntime", "export", "ONNX export")
    require("onnxscript.optimizer", "export", "ONNX export")
    model, description = read_model(checkpoint, plugins=plugins)
    encoder = getattr(model, "encoder", None)
    if encoder is None or isinstance(encoder, Swin):
        raise ValueError(
            f"{checkpoint}: only networks on a SW-ViT and comparators can be exported to ONNX, "
            f"not {type(model).__name__}"
        )
    if getattr(model, "mirrored", False):
        raise ValueError(f"{checkpoint}: a network that cross-attends to the mirror image cannot be exported to ONNX")
    network: torch.nn.Module = encoder
    output = "tokens"
    if is_segmentation_network(model) or isinstance(model, WholeVolumeNetwork):
        network, output = model, "number" if isinstance(model, Regressor) else "logits"
    shape, axes = (encoder.in_channels, *encoder.img_size), "inferior to superior, back to front, left to right"
    metadata = {"window": list(encoder.img_size), "axes": f"C D H W: {axes}"} | exported(description["data"])
    content = _onnx(network, output, shape, metadata)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator, deviations = torch.Generator().manual_seed(0), list[float]()
    for batch in (1, 3):  # other sizes than the traced one
        image = torch.rand(batch, *shape, generator=generator)
        with torch.inference_mode():
            expected = network(image).numpy()
        (actual,) = session.run(None, {"image": image.numpy()})
        deviations.append(np.abs(actual - expected).max() / np.abs(expected).max())
    worst = float(np.max(deviations))  # NaN if one is
    if not worst < TOLERANCE:
        raise ValueError(
            f"{checkpoint}: the ONNX network's outputs differ from PyTorch's by {worst:.1e}; nothing was written"
        )
    write_whole(out, content)
    return worst


def _onnx(network: torch.nn.Module, output: str, shape: tuple[int, ...], metadata: dict[str, Any]) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports optional packages
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", FutureWarning)  # from PyTorch itself
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *shape),),
            input_names=["image"],
            output_names=[output],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            optimize=False,
        )
        assert program is not None
        # First what is the same for every image: each rule is tried on each node, and a mask of windows has thousands.
        optimizer = require("onnxscript.optimizer", "export", "ONNX export")
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        program.optimize()
    program.model.metadata_props["asa"] = json.dumps(metadata, sort_keys=True)
    return program.model_proto.SerializeToString()
