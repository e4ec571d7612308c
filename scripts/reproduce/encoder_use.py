"""How much a segmentation network uses its encoder: python -m scripts.reproduce.encoder_use RUN STORE

Dice of the test part of RUN's split, or with --part of another: with the network as trained, with all tokens zero, with
the transformer blocks skipped, and with the encoder's weights as they were before any training. What a pretrained
encoder can change lies between the first row and the others.
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asa.config import build
from asa.data.splits import read_split, select
from asa.data.store import Store
from asa.inference.segmentation import PredictSettings, sliding_window
from asa.models.sw_vit import Block, SWViT
from asa.ops.labels import IGNORED
from asa.training.checkpoint import read_model


def zero_tokens(encoder: SWViT, stack: ExitStack) -> None:
    """Each hidden state becomes zero: the outputs of the blocks and of the final norm."""
    for module in (*encoder.blocks, encoder.norm):
        stack.callback(module.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out)).remove)


def skip_blocks(encoder: SWViT, stack: ExitStack) -> None:
    """The blocks return their input: patches and positions are left."""
    for block in encoder.blocks:
        assert isinstance(block, Block)
        stack.callback(block.register_forward_hook(lambda module, inputs, out: inputs[0]).remove)


def first_weights(config: Mapping[str, Any]) -> Callable[[SWViT, ExitStack], None]:
    """The encoder gets random weights."""

    def replace(encoder: SWViT, stack: ExitStack) -> None:
        trained = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        torch.manual_seed(0)
        fresh: Any = build(config)
        encoder.load_state_dict(fresh.encoder.state_dict())
        stack.callback(encoder.load_state_dict, trained)

    return replace


def scores(model: nn.Module, store: Store, ids: list[str]) -> dict[str, float]:
    """Mean Dice over the scans by label; a scan with a label neither in the truth nor in the prediction counts 1."""
    names = [store.labels[value] for value in store.label_values]
    total = torch.zeros(len(names))
    for id in ids:
        logits = sliding_window(model, torch.from_numpy(store.image(id).copy()).float(), PredictSettings())
        found: Tensor = logits.argmax(dim=0).cpu()
        truth = torch.from_numpy(store.label(id).copy())[0].long()
        counted = truth != IGNORED
        for k in range(1, len(names) + 1):
            a, b = (found == k) & counted, truth == k
            size = int(a.sum() + b.sum())
            total[k - 1] += 2 * float((a & b).sum()) / size if size else 1.0
    return dict(zip(names, (total / len(ids)).tolist(), strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--part", choices=("train", "validation", "test"), default="test")
    options = parser.parse_args()
    store, (model, description) = Store(options.store), read_model(options.run)
    encoder, data = getattr(model, "encoder", None), description["data"]
    if not isinstance(encoder, SWViT) or "labels" not in data or "regions" in data or not store.labels:
        parser.error("RUN must be a segmentation of labels with ASA's encoder, and STORE have labels")
    records = select(store.records, read_split(options.run / "split.json")[options.part])
    if not records:
        parser.error(f"the {options.part} part of the split is empty: give --part")
    ways: dict[str, Callable[[SWViT, ExitStack], None]] = {
        "as trained": lambda encoder, stack: None,
        "tokens zero": zero_tokens,
        "blocks skipped": skip_blocks,
        "first weights": first_weights(description["model"]),
    }
    print(f"| encoder | mean | {' | '.join(store.labels[value] for value in store.label_values)} |")
    print("|---|" + "---:|" * (1 + len(store.labels)))
    for name, change in ways.items():
        with ExitStack() as stack:
            change(encoder, stack)
            dice = scores(model, store, [record["id"] for record in records])
        shown = " | ".join(f"{value:.3f}" for value in (sum(dice.values()) / len(dice), *dice.values()))
        print(f"| {name} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
