"""What windows along all axes cost, and what the mirror does to them: python -m scripts.reproduce.orders

Times: the pretraining step of `asa_base` at 128^3 with each order and bias, in one process, in turn. Printed are the
medians of the seconds, and of their ratios to those of the published network.

Mirror: an encoder of `structures_pretrain` with mirrored patches and random weights. Printed is the root mean square
difference between the tokens of the mirror image and the mirrored tokens, relative to the tokens' own spread: 0 for a
network that commutes with the mirror.
"""

import statistics
from functools import partial

import torch

from asa.methods.pretrain import MaskedPretraining
from asa.models.masked_autoencoder import asa_base
from asa.models.sw_vit import BIASES, ORDERS, sw_vit_tiny
from asa.training.device import keep_freed_memory, pick_device
from scripts.benchmark.clock import alternating_seconds
from scripts.benchmark.row import step_batch, training_step
from scripts.reproduce.commands import parser_of

KINDS = [(order, bias) for bias in BIASES for order in ORDERS]  # the published one first
CROP = (64, 64, 160)


def times(edge: int, batch: int, precision: str, repeats: int) -> list[list[float]]:
    """Seconds of the steps of each kind; the first two of each are not counted."""
    device, steps = pick_device("auto"), []
    for order, bias in KINDS:
        torch.manual_seed(0)
        method = MaskedPretraining(model=asa_base(img_size=edge, order=order, bias=bias))
        steps.append(training_step(method.to(device).train(), precision, device))
    images = step_batch(edge, batch, device)
    return alternating_seconds([partial(step, images) for step in steps], device, repeats)


@torch.no_grad()
def asymmetry(order: str, bias: str) -> float:
    """How far an encoder of mirrored patches is from commuting with the mirror."""
    torch.manual_seed(0)
    settings = dict(img_size=CROP, window=32, position="mirror_sincos", mirror_patches=True)
    encoder = sw_vit_tiny(**settings, order=order, bias=bias).eval()
    volume = torch.rand(1, 1, *CROP)
    tokens, mirrored = (encoder(each).unflatten(1, encoder.grid) for each in (volume, volume.flip(-1)))
    return float((mirrored - tokens.flip(3)).pow(2).mean().sqrt() / tokens.std())


def main() -> None:
    """Print both tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--edge", type=int, default=128, help="of the volume, in voxels")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    names = [f"{order}, {bias}" for order, bias in KINDS]
    print("| order, bias | difference after mirroring |\n|---|---:|")
    for name, (order, bias) in zip(names, KINDS, strict=True):
        print(f"| {name} | {asymmetry(order, bias):.3f} |", flush=True)
    keep_freed_memory()
    print(f"\n| batch | precision | {names[0]}, s | {' | '.join(f'{name}: ratio' for name in names[1:])} |")
    print("|---:|---|---:|" + "---:|" * (len(names) - 1))
    for batch in options.batch:
        for precision in options.precision:
            first, *others = times(options.edge, batch, precision, options.repeats)
            ratios = [statistics.median(a / b for a, b in zip(taken, first, strict=True)) for taken in others]
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {batch} | {precision} | {statistics.median(first):.3g} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
