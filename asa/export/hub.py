"""A trained network as a folder for the Hugging Face Hub, which `hf upload ORG/NAME FOLDER` publishes as it is.

model.safetensors        weights; the description of network and preparation in the header
config.json              the same description, to read
training_subjects.json   digests of the training scans and subjects (see `asa.data.splits`)
README.md                the model card: https://huggingface.co/docs/hub/model-cards
digests.json             SHA-256 of each file; that of the weights is compared whenever they are read
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from asa import __version__
from asa.data.io.files import DIGESTS, check_out, read_json, sha256_of, write_digests, write_json, write_whole
from asa.data.io.tables import short
from asa.data.splits import stored_digests
from asa.errors import reason_of
from asa.inference.preprocessing import without_command
from asa.training.checkpoint import read_model, read_weights
from asa.training.checkpoint_files import WEIGHTS, find_weights, on_hub

CONFIG, SUBJECTS, CARD = "config.json", "training_subjects.json", "README.md"
LIBRARY = "asa-mri"
# What the Hub calls the tasks; others are tagged only.
PIPELINES = {
    "pretraining": "image-feature-extraction",
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "restoration": "image-to-image",
}


def export_hub(
    checkpoint: str | Path,
    out: Path,
    *,
    licence: str | None,
    trained_on: str | None,
    evaluation: str | Path | None = None,
    plugins: Sequence[str] = (),
    reference: str = "hf://ORG/NAME@REVISION",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint as a folder for the Hub.

    A command of skull stripping is left out of the preparation, as it may hold paths of your machine.

    Args:
        checkpoint, out, plugins: see `export_onnx`; `out` is the folder to write.
        licence: of the weights, in the Hub's words, like cc-by-4.0; a ValueError without one.
        trained_on: the training data, in words, for the card; a ValueError without any.
        evaluation: folder that asa-evaluate wrote, for the card; None: the card says that there is none.
        reference: the name that it will be loaded by, for the card.
        dtype: of the weights in the file; whoever loads them gets float32.
    """
    if not licence or not re.fullmatch(r"[a-z0-9.-]+", licence):
        raise ValueError(
            f"licence={licence}: weights without a licence may not be used: give one in the Hub's words, like "
            "apache-2.0, cc-by-4.0, cc-by-nc-4.0 or other"
        )
    if not trained_on:
        raise ValueError(
            "trained_on= has to be given: the data, its source and its terms, in words, for the model card"
        )
    check_out(out, SUBJECTS, "a folder of asa-export format=hub")
    results = None if evaluation is None else _results(Path(evaluation), sha256_of(find_weights(checkpoint)))
    read_model(checkpoint, plugins=plugins)  # what cannot be loaded is not published
    weights, description = read_weights(checkpoint)
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    description["data"] = without_command(description["data"])
    digests = stored_digests(description["data"]) or {}
    config = {"library_name": LIBRARY, "asa_version": __version__, **description}
    config["data"] = {key: value for key, value in description["data"].items() if key not in digests}
    header = {"asa": json.dumps(description, sort_keys=True)}
    write_whole(out / WEIGHTS, save(weights, metadata=header))
    write_json(out / CONFIG, config)
    write_json(out / SUBJECTS, digests)
    card = _card(config, digests, licence, trained_on, results, sha256_of(out / WEIGHTS), reference)
    write_whole(out / CARD, card.encode())
    write_digests(out, (WEIGHTS, CONFIG, SUBJECTS, CARD))


def _results(folder: Path, digest: str) -> dict[str, Any]:
    """What asa-evaluate wrote: "rows" are the defined means of labels and metrics, "notes" how they are to be read.

    "own" is whether the predictions are of the network with this SHA-256, as far as one can tell.
    """
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or "policy" not in summary:
        raise ValueError(
            f"{folder}/summary.json: a card shows evaluations of label maps and of restored images: give the folder of "
            "one, or leave evaluation out"
        )
    try:
        rows = [
            {"label": label, "metric": metric, **{key: statistic[key] for key in ("mean", "low", "high", "used")}}
            for label, by_metric in summary["results"].items()
            for metric, statistic in by_metric.items()
        ]
        rows = [row for row in rows if None not in row.values()]
        if not all(isinstance(row[key], int | float) for row in rows for key in ("mean", "low", "high", "used")):
            raise ValueError("a mean that is no number")
        networks, name = summary.get("networks", []), short(digest)
        own = networks == [name] or "labels" not in summary
        notes = [str(note) for note in summary.get("notes", [])]
        if not own:
            made = f"were made by {' and '.join(map(str, networks))}" if networks else "may be of another network"
            notes.insert(0, f"The predictions {made}; this network is {name}.")
        about = {"cases": int(summary["cases"]), "policy": str(summary["policy"]["name"]), "asa": str(summary["asa"])}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder}/summary.json: not as asa-evaluate writes it ({reason_of(error)}): evaluate again"
        ) from None
    return {**about, "rows": rows, "notes": notes, "own": own}


def _card(
    config: Mapping[str, Any],
    digests: Mapping[str, Sequence[str]],
    licence: str,
    trained_on: str,
    summary: Mapping[str, Any] | None,
    weights: str,
    reference: str,
) -> str:
    """`README.md`: metadata that the Hub reads, and the card."""
    data, task = config["data"], str(config.get("task", "network"))
    restores = task == "restoration"
    tags = ["medical", "2d", task] if restores else ["mri", "brain", "medical", "3d", task]
    about: dict[str, Any] = {"license": licence, "library_name": LIBRARY, "tags": tags}
    if task in PIPELINES:
        about["pipeline_tag"] = PIPELINES[task]
    if summary is not None and summary["rows"] and summary["own"]:
        result = {
            "task": {"type": PIPELINES.get(task, task)},
            "dataset": {"name": f"{summary['cases']} cases, see the card", "type": "private"},
            "metrics": [
                {"type": row["metric"], "name": f"{row['metric']} {row['label']}", "value": row["mean"]}
                for row in summary["rows"]
            ],
        }
        about["model-index"] = [{"name": "asa", "results": [result]}]
    keys = ("channels", "labels", "classes", "number", "regions", *(["window"] if restores else []))
    known = {key: data[key] for key in keys if key in data}
    modalities = {name: one["prepare"] for name, one in data.get("modalities", {}).items()}
    seen = (
        f"{len(digests['subjects'])} subjects and {len(digests['scans'])} images. `{SUBJECTS}` holds digests of them, "
        "without names, by which asa-finetune warns of held-out subjects that this network has seen. Whoever has a "
        "scan, or guesses the name of a subject, can confirm that it was among them."
        if digests
        else "The checkpoint does not hold digests of its training subjects: what it has seen cannot be checked."
    )
    install = 'pip install "asa-mri[hub]"' if on_hub(reference) else "pip install asa-mri"
    prepared = (
        f"Scans are prepared as follows, by asa itself when it predicts:\n\n"
        f"{_fenced(modalities or data.get('prepare', {}))}"
    )
    fixed = " A commit as REVISION fixes what is loaded." if on_hub(reference) else ""
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---

# {_plain(task.capitalize())} of {"2-D images" if restores else "brain MRI"} by asa

```
{install}
asa-{"finetune init" if task == "pretraining" else "predict checkpoint"}={reference} ...
```

In Python `asa.load_model("{reference}")`.{fixed}

Made by asa {config["asa_version"]} in {_plain(config["step"])} steps. Research only: not a medical device.

## Data

{trained_on}

{seen}

## Network and input

{_fenced({"model": config["model"], **known})}
{"Values of the window become 0 and 1." if restores else prepared}
## Evaluation

{_evaluated(summary)}

## Licence

{licence}, stated by whoever published these weights.

SHA-256 of `{WEIGHTS}`: `{weights}`. asa compares it with `{DIGESTS}` whenever it reads the weights.
"""


def _evaluated(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "Not evaluated: whoever uses it has to."
    lines = [
        f"Means over {summary['cases']} cases with 95 % bootstrap intervals, policy "
        f"{_plain(summary['policy'])} of asa {_plain(summary['asa'])}.",
        *(f"\n{_plain(note)}" for note in summary["notes"]),
        "",
        "| label | metric | mean | interval | n |",
        "|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        mean, low, high = (f"{row[key]:.4g}" for key in ("mean", "low", "high"))
        lines.append(f"| {_plain(row['label'])} | {_plain(row['metric'])} | {mean} | {low} to {high} | {row['used']} |")
    return "\n".join(lines)


def _plain(text: object) -> str:
    """A text of somebody else's as Markdown shows it: one line, without tags, tables, links and code of its own."""
    return re.sub(r"([\\`*\[\]|#])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _fenced(content: Any) -> str:
    return f"```json\n{json.dumps(content, indent=2, ensure_ascii=False)}\n```\n"
