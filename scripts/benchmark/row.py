"""One row of the benchmark: `python -m scripts.benchmark.row SPEC` measures it in this process and prints JSON.

A spec is a dict: "kind", "device" ("cpu" or "cuda"), "precision", "threads", "repeats", "matrix",
"scratch" (a folder for files), and entries of the kind.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import asa
from asa.inference.segmentation import sliding_window
from asa.losses.reconstruction import gradient_importance
from asa.ops.patches import unpatchify
from asa.settings import OptimSettings, PredictSettings, TrainSettings
from asa.training.device import (
    PRECISIONS,
    Backend,
    autocast,
    keep_freed_memory,
)
from asa.training.optim import make_optimizer
from asa.training.plan import GIB, step_peak, volume_batch
from scripts.benchmark.checks import CHECKS, voronoi
from scripts.benchmark.clock import Rates, Work, count_operations, peak_memory, synchronise, time_work
from scripts.benchmark.matrix import MatrixRate
from scripts.benchmark.memory import step_memory
from scripts.benchmark.plan import AIR, CHANNELS, Spec
from scripts.benchmark.scale import scale

Batch = dict[str, Any]
Step = Callable[[Batch], None]

BATCHES = 24  # batches of the loader per repeat
STEPS = 12  # steps per repeat, with batches from the loader
READY = 10  # batches taken before timing: those that workers have prefetched (4 x 2) would count as speed


def make_step(spec: Spec, device: torch.device) -> tuple[nn.Module, Step]:
    """A method and its training step."""
    from scripts.benchmark.networks import make_method

    method: nn.Module = make_method(spec["network"], spec["size"], spec["edge"]).to(device).train()
    return method, training_step(method, spec["precision"], device)


def training_step(method: nn.Module, precision: str, device: torch.device) -> Step:
    """A method's training step, as in `asa.training.loop`: forward, loss, backward, clip, fused AdamW."""
    optimizer = make_optimizer(method, OptimSettings())
    dtype, clip = PRECISIONS[precision], TrainSettings().clip
    # The scale of the loop decreases while it skips steps; here no step may be skipped.
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, enabled=dtype == torch.float16)

    def take(batch: Batch) -> None:
        with autocast(device, dtype):
            result = method(batch)
        scaler.scale(result["loss"]).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(method.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return take


def step(spec: Spec, device: torch.device) -> Work:
    """A training step on a batch on the device."""
    method, take = make_step(spec, device)
    batch = step_batch(spec["edge"], spec["batch"], device, CHANNELS[spec["network"]])

    def operations() -> int:
        # On the meta device, because the counter does not support the CPU kernel of fused attention.
        method.to("meta")
        shapes = {key: value if key in ("seed", "air") else value.to("meta") for key, value in batch.items()}
        return count_operations(lambda: method(shapes)["loss"].backward())

    return Work(lambda: take(batch), volumes=spec["batch"], operations=operations)


def step_batch(edge: int, count: int, device: torch.device, channels: int = 1) -> Batch:
    """A batch of volumes of edge^3 voxels whose outer patches are air, with labels."""
    from scripts.benchmark.networks import CLASSES

    cube, side = (edge,) * 3, edge // 8
    air = outer_patches(side)
    hidden = unpatchify(air.float()[None, :, None].expand(count, -1, 8**3), (side,) * 3, 8)
    return {
        "image": torch.rand(count, channels, *cube, device=device) * (1 - hidden).to(device),
        "air": air.expand(count, -1),
        "label": torch.randint(CLASSES, (count, 1, *cube), dtype=torch.uint8, device=device),
        "seed": torch.arange(count),
    }


def planned(spec: Spec, device: torch.device) -> int | None:
    """Bytes of a training step: on a GPU those that `plan=only` measures, None if they do not fit; else a trace's."""
    from scripts.benchmark.networks import make_method

    make = partial(make_method, spec["network"], spec["size"], spec["edge"])
    example = partial(volume_batch, count=spec["batch"], label=spec["network"] != "asa")
    settings, optim = TrainSettings(batch_size=spec["batch"]), OptimSettings()
    dtype = PRECISIONS[spec["precision"]]
    if device.type == "cuda":
        return step_peak(make, example, settings, optim, Backend(device, dtype))
    return step_memory(make, example, settings=settings, optim=optim, dtype=dtype)


def outer_patches(side: int) -> torch.Tensor:
    """The patches of a cube of side^3 patches that are the farthest from its centre, a fraction `AIR`: bool `(L,)`."""
    axis = torch.arange(side) - (side - 1) / 2
    distance = torch.cartesian_prod(axis, axis, axis).norm(dim=1)
    air = torch.zeros(side**3, dtype=torch.bool)
    air[distance.argsort(descending=True)[: round(AIR * side**3)]] = True
    return air


def fed(spec: Spec, device: torch.device) -> Work:
    """A pretraining step on crops from the loader, and the time it waits for them."""
    from asa.data.loading.crops import CropDataset
    from asa.data.loading.loader import make_loader
    from asa.settings import LoaderSettings
    from scripts.benchmark.crops import RandomVolumes

    source = RandomVolumes.write(Path(spec["scratch"]), spec["volume"], channels=1)
    dataset = CropDataset(source, source.records, (spec["edge"],) * 3)
    settings = LoaderSettings(workers=spec["workers"])
    batches = iter(make_loader(dataset, spec["batch"], settings, pin_memory=device.type == "cuda"))
    _, take = make_step(spec, device)
    waited = 0.0

    def call() -> None:
        nonlocal waited
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        take({**batch, "image": batch["image"].to(device, non_blocking=True)})
        synchronise(device)  # else the wait for the next batch would hide behind this step's work

    def prepare() -> None:
        for _ in range(READY):
            next(batches)
        call()

    return Work(call, volumes=spec["batch"], prepare=prepare, calls=STEPS, waited=lambda: waited)


def importance(spec: Spec, device: torch.device) -> Work:
    """The patch scores of a volume."""
    volume = torch.rand(spec["batch"], 1, *(spec["edge"],) * 3, device=device)
    return Work(lambda: gradient_importance(volume, kind=spec["importance"]), volumes=spec["batch"])


def window(spec: Spec, device: torch.device) -> Work:
    """Sliding-window segmentation of a whole volume."""
    from scripts.benchmark.networks import make_method

    # Ours is the network inside its method; a peer is its own.
    model = make_method(spec["network"], spec["size"], spec["edge"]).model.to(device).eval()
    settings = PredictSettings(overlap=spec["overlap"], precision=spec["precision"])
    volume = torch.rand(CHANNELS[spec["network"]], *spec["volume"], device=device)
    one = torch.rand(CHANNELS[spec["network"]], *(spec["edge"],) * 3, device=device)

    def operations() -> int:
        model.to("meta")
        return spec["windows"] * count_operations(lambda: model(one[None].to("meta")))

    return Work(
        lambda: sliding_window(model, volume, settings),
        operations=operations,
        warm_up=lambda: sliding_window(model, one, settings),
        calls=1,
    )


def loader(spec: Spec, device: torch.device) -> Work:
    """Training crops from memory maps in the page cache, as fast as the loader gives them."""
    from asa.data.loading.crops import CropDataset
    from asa.data.loading.loader import make_loader
    from asa.settings import AugmentSettings, LoaderSettings
    from scripts.benchmark.crops import RandomVolumes, finetuning_augmentation

    folder = Path(spec["scratch"])
    source = RandomVolumes.write(folder, spec["volume"])
    augment = finetuning_augmentation() if spec["augment"] else AugmentSettings()
    cube = (spec["edge"],) * 3
    dataset = CropDataset(source, source.records, cube, crop="random", labelled=True, augment=augment)
    settings = LoaderSettings(workers=spec["workers"])
    batches = iter(make_loader(dataset, spec["batch"], settings, pin_memory=device.type == "cuda"))

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    return Work(lambda: take(1), volumes=spec["batch"], prepare=lambda: take(READY), calls=BATCHES)


def digests(spec: Spec, device: torch.device) -> Work:
    """A crop of a stored volume, whose file is compared with its SHA-256 when a process first opens it."""
    from asa.data.io.files import write_json
    from asa.data.store import FORMAT, MANIFEST, Store, entry_line, read_box, write_array, write_records

    root, image = Path(spec["scratch"]), torch.rand(1, *spec["volume"]).numpy()
    own = {
        "subject": "s",
        "sources": {},
        "identity": {},
        "chain": {"stored_affine": torch.eye(4).tolist()},
        "shape": list(image.shape),
    }
    record = {"id": "s", **own, "arrays": {"image": write_array(root, "s", "image", image)}}
    empty = {"settings": {}, "channels": ["t1"], "labels": {}, "ignored": [], "regions": {}}
    write_records(root, {"s": entry_line(record)})
    write_json(root / MANIFEST, {"format": FORMAT, **empty})
    opened = Store(root)
    opened.image("s")

    def read() -> None:
        store = Store(root) if spec["first"] else opened
        read_box(store.image("s"), (8, 8, 8), (spec["edge"],) * 3)

    return Work(read, calls=10)


def attention(spec: Spec, device: torch.device) -> Work:
    """Attention within regions: 8 heads of width 32, as in RAT. The index is computed before, as once for 12 layers."""
    from asa.restoration.regions import region_attention, region_index

    n, heads, width = spec["edge"], 8, 32
    index = region_index(voronoi(n, spec["regions"]).flatten(1).to(device))
    q, k, v = torch.randn(3, 1, heads, n * n, width, device=device, dtype=PRECISIONS[spec["precision"]]).unbind()
    small = torch.zeros(1, 64, dtype=torch.int64, device=device)
    region_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], small, spec["backend"])  # loads the libraries

    def operations() -> int:
        pairs = sum(c * size**2 for c, size in index.groups) if spec["backend"] == "segments" else n**4
        return 4 * pairs * heads * width

    before = peak_memory(device)
    return Work(lambda: region_attention(q, k, v, index, spec["backend"]), operations=operations, before=before)


def restore(spec: Spec, device: torch.device) -> Work:
    """A forward pass of the restoration network over a whole image."""
    from asa.restoration import rat

    model = getattr(rat, f"rat_{spec['size']}")().to(device).eval()
    image, regions = torch.rand(1, 1, *(spec["edge"],) * 2, device=device), voronoi(spec["edge"], spec["regions"])
    dtype = PRECISIONS[spec["precision"]]

    def call() -> None:
        with torch.inference_mode(), autocast(device, dtype):
            model(image, regions.to(device))

    return Work(call)


KINDS: dict[str, Callable[[Spec, torch.device], Work]] = {
    "step": step,
    "importance": importance,
    "window": window,
    "loader": loader,
    "fed": fed,
    "digests": digests,
    "attention": attention,
    "restore": restore,
}


def measure(spec: Spec, rates: Rates | None) -> dict[str, Any]:
    """Measure a row in this process.

    Args:
        spec: see above; "kind" is one of `KINDS`.
        rates: returns the matrix-product rates by precision; None for rows without matrix products.

    Returns:
        See `time_work`. For a row that is "planned" also "planned_bytes" and, on a GPU, "peak_to_plan"; if the plan
        does not fit there, "status" and "reason" only.
    """
    torch.manual_seed(0)
    device = torch.device(spec["device"])
    if device.type == "cpu":  # as in training; for all networks, so that networks are compared and not allocators
        keep_freed_memory()
    row: dict[str, Any] = {}
    if spec.get("planned"):
        needed = planned(spec, device)
        if needed is None:
            free = torch.cuda.mem_get_info(device)[0]
            return {"status": "left out", "reason": f"plan=only: a step does not fit in the {free / GIB:.0f} GiB free"}
        row["planned_bytes"] = needed
    row |= time_work(KINDS[spec["kind"]](spec, device), device, spec["repeats"], rates, spec["precision"])
    if spec.get("planned") and device.type == "cuda":  # on a CPU the peak is that of the process, libraries included
        row["peak_to_plan"] = row["peak_bytes"] / row["planned_bytes"]
    return row


def machine(spec: Spec) -> dict[str, Any]:
    """Description of the machine, and the meaning of "auto" on it."""
    import monai

    backend = Backend.of(spec["device"], spec["precision"])
    device = backend.device
    info = {
        "device": device.type,
        "precision": backend.precision,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": spec["threads"] or torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "asa": asa.__version__,
        "torch": torch.__version__,
        "monai": monai.__version__,
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    with MatrixRate({**spec, **info}) as rates:
        info["matrix_rates"] = rates()
    return info


def processor() -> str:
    """The CPU's name."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def first_to_go() -> None:
    """If memory runs out, Linux should end this process and not other work of the user."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):  # another system, or /proc is read-only
        score.write_text("1000")


def main() -> None:
    """Entry point."""
    first_to_go()
    spec = json.loads(sys.argv[1])
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    if spec["kind"] == "machine":
        row = machine(spec)
    elif spec["kind"] in CHECKS:
        torch.manual_seed(0)
        row = CHECKS[spec["kind"]](spec, torch.device(spec["device"]))
    elif spec["kind"] == "scale":
        row = scale(spec, torch.device(spec["device"]))
    else:
        with nullcontext() if spec["kind"] in ("loader", "fed") else MatrixRate(spec) as rates:
            row = measure(spec, rates)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
