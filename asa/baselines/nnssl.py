"""Checkpoints of nnssl (OpenMind; Wald et al., 2024, arXiv 2412.17041) for the encoders of ResEnc and Primus.

Such a file is a dict with the tensors in "network_weights", and in "nnssl_adaptation_plan" the names of the encoder and
of its stem among them. The tensors are named as in the package dynamic-network-architectures.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from asa.baselines.primus import PATCH
from asa.models.transfer import PREFIX, Source, renamed

POSITIONS = PREFIX + "pos_embed"
# Regular expressions of names, after the stem's name and after the encoder's, and our names after the prefix.
STEM = (
    (r"convs\.0\.((?:conv|norm)\.\w+)", r"stem.\1"),  # ResEnc
    (r"proj\.(weight|bias)", r"patch_embed.\1"),  # Primus
)
ENCODER = (
    (r"(\d+)\.blocks\.(\d+\.conv[12]\.(?:conv|norm)\.\w+)", r"stages.\1.\2"),
    (r"(\d+)\.blocks\.(\d+)\.skip\.[01]\.((?:conv|norm)\.\w+)", r"stages.\1.\2.skip.project.\3"),
    (r"((?:blocks\.\d+|norm)\..+|pos_embed)", r"\1"),
)


def from_nnssl(weights: Mapping[str, Tensor], plan: Mapping[str, Any]) -> Source:
    """The encoder in a checkpoint of nnssl, under this project's names.

    Learnt positions (1, L, E) become (E, T, H, W), on the grid of the volume size that the plan names, or on a cube.
    The package registers each convolution and norm twice; the second name is left out. A ValueError if the plan does
    not name the encoder and its stem, or the grid of the positions, or no tensor has these names.
    """
    stem, encoder = (plan.get(key) for key in ("key_to_stem", "key_to_encoder"))
    if not isinstance(stem, str) or not isinstance(encoder, str):
        raise ValueError("its nnssl_adaptation_plan does not name key_to_encoder and key_to_stem")
    found: dict[str, Tensor] = {}
    names, reasons = {}, {}
    for original, tensor in weights.items():
        ours = renamed(original, f"{stem}.", STEM) or renamed(original, f"{encoder}.", ENCODER)
        name = ours or f"nnssl.{original}"
        if ours is None and ".all_modules." in original:
            reasons[name] = "a second name of a tensor above"
        found[name], names[name] = tensor, original
    if all(name.startswith("nnssl.") for name in found):
        raise ValueError(f"no tensors of ResEnc or Primus under {encoder} and {stem}, as its plan says")
    if POSITIONS in found:
        found[POSITIONS] = _on_grid(found[POSITIONS], plan)
    return Source(found, names=names, reasons=reasons)


def _on_grid(positions: Tensor, plan: Mapping[str, Any]) -> Tensor:
    """Learnt positions `(1, L, E)` as `(E, T, H, W)`."""
    length = positions.shape[1] if positions.ndim == 3 and len(positions) == 1 else 0
    pretraining = plan.get("pretrain_plan")
    configurations = pretraining.get("configurations") if isinstance(pretraining, Mapping) else None
    nodes = configurations.values() if isinstance(configurations, Mapping) else ()
    sizes = [node.get("patch_size") for node in nodes if isinstance(node, Mapping)]
    lists = [size for size in sizes if isinstance(size, list | tuple) and all(isinstance(n, int) for n in size)]
    for grid in [*([n // PATCH for n in size] for size in lists), [round(length ** (1 / 3))] * 3]:
        if len(grid) == 3 and min(grid) > 0 and math.prod(grid) == length:
            return positions[0].T.unflatten(1, grid).contiguous()
    raise ValueError(f"positions of shape {tuple(positions.shape)}, whose grid its nnssl_adaptation_plan does not tell")
