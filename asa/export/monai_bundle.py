"""A segmentation network as a MONAI bundle: https://docs.monai.io/en/stable/mb_specification.html."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asa import __version__
from asa.data.io.files import check_out, whole_file, write_json, write_whole
from asa.data.preprocessing.brain import TOOLS
from asa.inference.label_maps import Outputs
from asa.inference.preprocessing import check_metadata, exported
from asa.inference.segmentation import overlap_of, window_size
from asa.models.unet import SegmentationUNet
from asa.models.vit_seg import TokenSegmentation
from asa.training.checkpoint import read_model

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
METADATA = "configs/metadata.json"
PAPER = "Attentive Symmetric Autoencoder for Brain MRI Segmentation, MICCAI 2022"
EXPRESSION = "$@%"  # characters that mark Python code, references and files for MONAI's parser


def export_bundle(checkpoint: str | Path, out: Path, *, plugins: Sequence[str] = ()) -> None:
    """Write a segmentation network as a MONAI bundle that predicts the same label maps as `asa-predict`.

    `monai.bundle` runs its `configs/inference.json`. Scans are prepared and label maps written by this package, which
    must be installed where the bundle runs; the sliding window is MONAI's. `configs/metadata.json` follows MONAI's
    schema of 2024-07-25, `configs/asa.json` holds the metadata of the training scans, `models/model.pt` the state dict.

    The arguments are those of `export_onnx`; `out` is the folder to write. A ValueError for another network, or one
    that cross-attends to the mirror image, and for a name that MONAI would read as an expression.
    """
    model, description = read_model(checkpoint, plugins=plugins)
    data, node = description["data"], description["model"]
    if "labels" not in data:
        raise ValueError(f"{checkpoint}: a bundle holds a segmentation network: give a run of asa-finetune with labels")
    if getattr(model, "mirrored", False):
        raise ValueError(f"{checkpoint}: a network that cross-attends to the mirror image cannot be a bundle")
    check_metadata(str(checkpoint), data)
    facts = exported(data)
    _check_plain([node, facts["channels"], facts["labels"], facts.get("regions", [])], str(checkpoint))
    check_out(out, METADATA, "a bundle")
    window = list(window_size(model))
    metadata = _metadata(model, facts, window, description)
    with whole_file(out / "models" / "model.pt") as file:
        torch.save(model.state_dict(), file)
    write_json(out / "configs" / "asa.json", facts)
    write_json(out / "configs" / "inference.json", _inference(node, facts["channels"], window, overlap_of([data])))
    write_json(out / METADATA, metadata)
    write_whole(out / "docs" / "README.md", _readme(facts, window).encode())
    write_whole(out / "LICENSE", LICENSE.encode())


def _check_plain(node: Any, source: str) -> None:
    """Raise a ValueError for texts that MONAI would evaluate: the checkpoint may come from an untrusted source."""
    if isinstance(node, Mapping):
        node = [*node.keys(), *node.values()]
    if isinstance(node, str) and any(sign in node for sign in EXPRESSION):
        raise ValueError(
            f"{source}: {node!r} contains one of {' '.join(EXPRESSION)}, which MONAI reads as code: rename it"
        )
    for item in node if isinstance(node, list | tuple) else ():
        _check_plain(item, source)


def _inference(network: dict[str, Any], channels: Sequence[str], window: list[int], overlap: float) -> dict[str, Any]:
    """`configs/inference.json`, with the names that MONAI's inference workflows expect."""
    sliding = {"roi_size": window, "sw_batch_size": 1, "overlap": overlap, "mode": "gaussian"}
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "scans",
        "output_dir": "$@bundle_root + '/eval'",
        "images": _patterns(channels),
        "strip": None,
        "probabilities": False,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "facts": "$@bundle_root + '/configs/asa.json'",
        "network_def": network,
        "network": {
            "_target_": "asa.export.monai_runtime.load_network",
            "network": "@network_def",
            "weights": "$@bundle_root + '/models/model.pt'",
            "device": "@device",
        },
        "preprocessing": {"_target_": "Compose", "transforms": [_runtime("PrepareScan", "facts", "strip")]},
        "dataset": {
            "_target_": "Dataset",
            "data": {"_target_": "asa.data.datasets.folder.records", "root": "@dataset_dir", "images": "@images"},
            "transform": "@preprocessing",
        },
        "inferer": {"_target_": "SlidingWindowInferer", **sliding},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [_runtime("WriteLabelMap", "facts", "output_dir", "probabilities")],
        },
        "evaluator": _runtime("Evaluator", "dataset", "network", "inferer", "postprocessing", "device"),
        "run": ["$@evaluator.run()"],
    }


def _runtime(name: str, *arguments: str) -> dict[str, Any]:
    """An object of `monai_runtime` whose arguments are the entries of the same names."""
    return {"_target_": f"asa.export.monai_runtime.{name}"} | {argument: f"@{argument}" for argument in arguments}


def _patterns(channels: Sequence[str]) -> dict[str, str]:
    return {name: "*.nii.gz" if len(channels) == 1 else f"*_{name}.nii.gz" for name in channels}


def _metadata(
    model: nn.Module, facts: Mapping[str, Any], window: Sequence[int], description: Mapping[str, Any]
) -> dict[str, Any]:
    """`configs/metadata.json`, following MONAI's schema."""
    channels, prepare = facts["channels"], facts["prepare"]
    names, packages = Outputs.of(facts).channel_names, {name: version(name) for name in ("nibabel", "scipy")}
    modality = "CT" if "window" in prepare else "MR"
    unit = modality == "CT" or prepare.get("normalise", "percentile") == "percentile"  # of [0, 1]

    def tensor(names: Sequence[str], values: Sequence[int], **about: str) -> dict[str, Any]:
        shared = {"type": "image", "spatial_shape": list(window), "dtype": "float32", "is_patch_data": True}
        named = {str(k): name for k, name in enumerate(names)}
        return {**shared, **about, "num_channels": len(names), "value_range": values, "channel_def": named}

    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by asa {__version__} from a run of {description['step']} steps"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {_package(prepare): __version__} | packages,
        "task": f"Segmentation of {', '.join(name for name in names if name != 'background')} on MRI of the brain",
        "description": (
            f"The network {description['model']['_target_']}. Scans are prepared and label maps brought back to each "
            "scan's own grid by the package asa, as asa-predict does."
        ),
        "authors": "not stated: fill in",
        "copyright": "not stated: fill in",
        "data_type": "nibabel",
        "image_classes": f"{', '.join(channels)}, prepared as configs/asa.json says",
        "pred_classes": f"a logit for each of {', '.join(names)}",
        "intended_use": "Research. Not a medical device.",
        "references": [PAPER] if isinstance(model, SegmentationUNet | TokenSegmentation) else [],
        "network_data_format": {
            "inputs": {"image": tensor(channels, [0, 1] if unit else [], format="magnitude", modality=modality)},
            "outputs": {"pred": tensor(names, [], format="logits")},
        },
    }


def _package(prepare: Mapping[str, Any]) -> str:
    """This package's name for pip, with the extra that the preparation needs."""
    tools = prepare.get("bias") or prepare.get("register") or prepare.get("strip", "none") in TOOLS
    return "asa-mri[prepare]" if tools else "asa-mri"


def _readme(facts: Mapping[str, Any], window: Sequence[int]) -> str:
    channels, prepare = facts["channels"], facts["prepare"]
    outputs = Outputs.of(facts)
    rows = "\n".join(f"| {value} | {name} |" for value, name in sorted(outputs.labels.items()))
    activation = "a sigmoid for each of the regions" if outputs.regions else "a softmax over"
    files = ", ".join(f"`{pattern}`" for pattern in _patterns(channels).values())
    return f"""# Segmentation of brain MRI by asa {__version__}

Install {_package(prepare)}, then run MONAI in this folder, or from elsewhere with `--bundle_root THIS_FOLDER`:

```
python -m monai.bundle run --config_file configs/inference.json --dataset_dir FOLDER --output_dir OUT
```

This needs MONAI's optional package `fire`; `monai.bundle.run(config_file=..., dataset_dir=..., output_dir=...)` in
Python does not. Scans are {files} in FOLDER; `--images#{channels[0]} PATTERN` selects other files, with a * where names
differ.
`OUT/ID.nii.gz` lies on the scan's own grid, with its header, and equals the label map of asa-predict in float32.

Preprocessing is not MONAI's: `asa.export.monai_runtime.PrepareScan` prepares a scan as asa-prepare prepared the
training scans, and `WriteLabelMap` undoes it. For scans that are skull-stripped already, give `--strip none`.

```
{json.dumps(prepare, indent=2, sort_keys=True)}
```

The network takes windows of {" x ".join(map(str, window))} voxels, `C D H W`: {", ".join(channels)}; inferior to
superior, back to front, left to right. Its logits need {activation} {", ".join(outputs.channel_names)}.

| value | label |
|---|---|
{rows}

`configs/asa.json` holds further metadata of the training scans. Not a medical device.
"""


LICENSE = """The files in configs/ and docs/, and the package asa that they call, are under the Apache License,
Version 2.0: https://www.apache.org/licenses/LICENSE-2.0

The weights in models/ belong to whoever trained them. No licence is stated for them here: state one before you
distribute this bundle.
"""
