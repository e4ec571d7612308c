"""How much a segmentation network uses its encoder: python -m scripts.reproduce.encoder_use RUN STORE

Dice of the test part of RUN's split, or with --part of another: with the network as trained, with all tokens zero, with
the transformer blocks skipped, and with the encoder's weights as they were before any training. What a pretrained
encoder can change lies between the first row and the others.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from asa.config import build
from asa.data.splits import read_split, select
from asa.data.store import Store
from asa.inference.segmentation import overlap_of
from asa.methods.segment import Segmentation
from asa.models.sw_vit import Block, SWViT
from asa.models.unet import SegmentationUNet
from asa.models.vit_seg import TokenSegmentation
from asa.settings import PredictSettings
from asa.tasks.segmentation import validate_segmentation
from asa.training.checkpoint import read_model
from scripts.reproduce.commands import parser_of


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


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__, "run", "store")
    parser.add_argument("--part", choices=("train", "validation", "test"), default="test")
    options = parser.parse_args()
    store, (model, description) = Store(options.store), read_model(options.run)
    data = description["data"]
    if not isinstance(model, SegmentationUNet | TokenSegmentation) or "regions" in data or not store.labels:
        parser.error("RUN must be a segmentation of labels with ASA's encoder, and STORE have labels")
    ids = [record["id"] for record in select(store.records, read_split(options.run / "split.json")[options.part])]
    if not ids:
        parser.error(f"the {options.part} part of the split is empty: give --part")
    ways: dict[str, Callable[[SWViT, ExitStack], None]] = {
        "as trained": lambda encoder, stack: None,
        "tokens zero": zero_tokens,
        "blocks skipped": skip_blocks,
        "first weights": first_weights(description["model"]),
    }
    method, settings = Segmentation(model=model), PredictSettings(overlap=overlap_of([data]))
    labels = {store.labels[value]: [k] for k, value in enumerate(store.label_values, 1)}
    print(f"| encoder | mean | {' | '.join(labels)} |")
    print("|---|" + "---:|" * (1 + len(labels)))
    for name, change in ways.items():
        with ExitStack() as stack:
            change(model.encoder, stack)
            dice, _ = validate_segmentation(method, store, ids, labels, settings, list(labels))
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in dice.values())} |", flush=True)


if __name__ == "__main__":
    main()
