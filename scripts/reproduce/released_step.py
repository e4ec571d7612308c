"""A pretraining step of ours and of the released network: python -m scripts.reproduce.released_step [CHECKOUT]

CHECKOUT is your own checkout of github.com/LL3RD/ASA, the code that ASA's authors released. Its file with the network
is run as the code that it is, and needs timm and einops. `asa_base`, the same with the settings of experiment=asa_fast,
and the released network train in this process, in turn. Printed are the medians of their seconds, and of our seconds
over those of the released network, for each batch size and precision. 27 % of the patches are air, see `scripts/bench`.

The released step has a plain loss and gets its mask from the loader. Here its mask is drawn in the step, as ours are;
our steps compute the importance, too. Without CHECKOUT nothing is compared.
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asa.ops.patches import patchify, random_mask
from asa.training.device import keep_freed_memory, pick_device
from scripts.benchmark.clock import alternating_seconds
from scripts.benchmark.networks import make_method
from scripts.benchmark.row import step_batch, training_step
from scripts.reproduce.commands import parser_of

FILE, NAME = Path("ASA_Pretrain") / "model" / "model_DEFAULT.py", "PretrainMEDIUMVIT"
PATCH, MASKED = 8, 0.75


class Released(nn.Module):
    """The released network with its plain loss, as a method of the training loop."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def model(self) -> nn.Module:
        """The network, under the name that methods use."""
        return self.network

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean squared error of the masked patches of "image"."""
        patches = patchify(batch["image"], PATCH)
        b, length, voxels = patches.shape
        mask = random_mask(b, length, MASKED, torch.Generator().manual_seed(0)).to(patches.device)
        prediction = self.network(batch["image"], mask)
        return {"loss": F.mse_loss(prediction, patches[mask].reshape(b, -1, voxels))}


def load(checkout: Path) -> Callable[..., nn.Module]:
    """The class of the released network.

    Raises:
        ValueError: the folder does not hold it.
    """
    path = checkout / FILE
    if not path.is_file():
        raise ValueError(f"{checkout}: no checkout of github.com/LL3RD/ASA, which has {FILE}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it may import its neighbours
    spec.loader.exec_module(module)
    if not hasattr(module, NAME):
        raise ValueError(f"{path} has no {NAME}")
    network: Callable[..., nn.Module] = getattr(module, NAME)
    return network


def compare(
    network: Callable[..., nn.Module], *, size: str, edge: int, batch: int, precision: str, repeats: int
) -> str:
    """A line of the table; the first two steps of each network are not counted."""
    device = pick_device("auto")
    torch.manual_seed(0)
    ours = [make_method(name, size, edge) for name in ("asa", "fast")]
    methods = [*ours, Released(network(img_size=(edge,) * 3, mask_ratio=MASKED))]
    steps = [training_step(method.to(device).train(), precision, device) for method in methods]
    images = step_batch(edge, batch, device)
    seconds = alternating_seconds([partial(step, images) for step in steps], device, repeats)
    medians = [f"{statistics.median(taken):.3g}" for taken in seconds]
    released = seconds[-1]
    ratios = [
        f"{statistics.median(one / other for one, other in zip(taken, released, strict=True)):.2f}"
        for taken in seconds[:-1]
    ]
    return f"| {batch} | {precision} | {' | '.join([*medians, *ratios])} |"


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("checkout", nargs="?", type=Path)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.checkout is None:
        print("nothing compared: no checkout of the released code was given")
        return
    network = load(options.checkout)
    keep_freed_memory()
    print("| batch | precision | asa_base, s | asa_fast, s | released, s | asa_base / released | asa_fast / released |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for batch in options.batch:
        for precision in options.precision:
            sizes = {"size": "base", "edge": 128, "batch": batch, "repeats": options.repeats}
            print(compare(network, precision=precision, **sizes), flush=True)


if __name__ == "__main__":
    main()
