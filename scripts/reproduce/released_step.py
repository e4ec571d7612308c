"""A pretraining step of ours and one of another network: python -m scripts.reproduce.released_step [FILE.py:NAME]

Meant for the network that ASA's authors released, from a checkout of your own: FILE.py is a file of it, NAME what makes
the network there when called without arguments. FILE.py is run as the code that it is. The network takes volumes
`(B, 1, 128, 128, 128)` and returns its loss, alone or among other values. Both networks train in this process,
alternating; printed are the medians of both and of their ratios, for each batch size and precision. Without
FILE.py:NAME nothing is compared.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asa.training.device import pick_device
from scripts.benchmark.clock import synchronise
from scripts.benchmark.networks import make_method
from scripts.benchmark.row import training_step


class Other(nn.Module):
    """A network that returns its own loss, as a method of the training loop."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def model(self) -> nn.Module:
        """The network, under the name that methods use."""
        return self.network

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: the first single number of what the network returns."""
        found = self.network(batch["image"])
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, Tensor) and value.ndim == 0:
                return {"loss": value}
        raise ValueError(f"{type(self.network).__name__} returns no loss (a tensor without axes)")


def load(where: str) -> Callable[[], Any]:
    """What makes the network, from `FILE.py:NAME`.

    Raises:
        ValueError: no such file, or nothing of that name in it.
    """
    file, _, name = where.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"{where}: give FILE.py:NAME, with a file that exists")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it imports its neighbours
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"{path} has no {name!r}")
    return getattr(module, name)


def compare(make: Callable[[], Any], *, size: str, edge: int, batch: int, precision: str, repeats: int) -> str:
    """A line of the table; the first two steps of each network are not counted."""
    device = pick_device("auto")
    torch.manual_seed(0)
    methods: list[nn.Module] = [make_method("asa", size, edge), Other(make())]
    steps = [training_step(method.to(device).train(), precision, device) for method in methods]
    images = {"image": torch.rand(batch, 1, *(edge,) * 3, device=device), "seed": torch.arange(batch)}
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats + 2):
        for step, taken in zip(steps, seconds, strict=True):
            synchronise(device)
            started = time.perf_counter()
            step(images)
            synchronise(device)
            if repeat > 1:
                taken.append(time.perf_counter() - started)
    ours, other = map(statistics.median, seconds)
    ratio = statistics.median(one / two for one, two in zip(*seconds, strict=True))
    return f"| {batch} | {precision} | {ours:.3g} | {other:.3g} | {ratio:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", metavar="FILE.py:NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--size", default="base", choices=["base", "small", "tiny"], help="of our network")
    parser.add_argument("--edge", type=int, default=128, help="of the volumes, in voxels")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.network is None:
        print("nothing compared: no FILE.py:NAME of the released network was given")
        return
    make = load(options.network)
    print("| batch | precision | ours, s | other, s | ours / other |\n|---:|---|---:|---:|---:|")
    for batch in options.batch:
        for precision in options.precision:
            sizes = {"size": options.size, "edge": options.edge, "batch": batch, "repeats": options.repeats}
            print(compare(make, precision=precision, **sizes), flush=True)


if __name__ == "__main__":
    main()
