"""Compare the results of two checkouts, bit by bit. See scripts/compare-checkouts.

Both checkouts run the same commands on a CPU with one thread each: phantoms, stores, pretraining (ASA and SA-Swin),
fine-tuning (segmentation, classification, restoration), prediction, evaluation. What they write is then compared file
by file: stored arrays and manifests, every logged number, the tensors of every checkpoint, voxels and headers of label,
probability and asymmetry maps, images, tables, JSON files. Not compared: software versions, durations, dates and paths
of the files, module paths, text for people (pages, Markdown, LaTeX, descriptions), and the digests of such files.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ALIGN = "prepare.bias=true prepare.register=true prepare.spacing=4"
TRAIN = "loader.workers=0 train.device=cpu train.log_every=1 optim.warmup=1"
PREDICT = "predict.device=cpu predict.overlap=0.25"
PRETRAIN = (
    f"{TRAIN} data.store=t1_store crop=32 data.placement=random data.split='{{validation: 1}}' train.batch_size=2"
)
ASA = f"{PRETRAIN} model=asa_tiny data.mirror_probability=0.5"
FINETUNE = f"{TRAIN} data.store=ibsr_store data.split='{{validation: 1, test: 1}}' train.batch_size=1 {PREDICT}"
SEGMENT = f"{FINETUNE} model=unet_tiny +model.feature_size=4 crop='[64,32,32]' train.best=dice"
CLASSIFY = f"{FINETUNE} method=classify data.classes=classes.csv data.split_file=classes.json crop=32"
RESTORE = f"{TRAIN} method=restore model=rat_tiny crop=16 data.split='{{validation: 1, test: 1}}' train.batch_size=2"
SPLIT = "split_file=tuned/split.json truth=ibsr_store"

# Command and settings; what a command writes is relative to a folder of each checkout's own.
CHAIN = [
    "phantom kind=t1 subjects=3 seed=1 resolution=4 out=t1",
    "phantom kind=ibsr subjects=4 seed=2 resolution=4 out=ibsr",
    f"prepare data=bids data.root=t1 {ALIGN} prepare.crop='[48,64,64]' out=t1_store",
    "prepare data=ibsr data.root=ibsr prepare.midway=true out=ibsr_store",
    f"pretrain {ASA} train.steps=8 train.validate_every=4 out=pretrained",
    f"finetune {SEGMENT} train.steps=6 train.validate_every=3 init=pretrained out=tuned",
    f"finetune {SEGMENT} train.steps=6 train.validate_every=3 out=scratch",
    f"predict {PREDICT} checkpoint=tuned input=ibsr images='{{t1: \"IBSR_01/*_ana_strip.nii.gz\"}}' out=predicted_raw",
    f"predict {PREDICT} checkpoint=tuned input=ibsr_store part=test probabilities=true out=predicted_tuned",
    f"predict {PREDICT} checkpoint=[tuned,scratch] input=ibsr_store part=test mirror=true out=predicted_both",
    f"predict {PREDICT} checkpoint=scratch input=ibsr_store part=test probabilities=true out=predicted_scratch",
    f"evaluate predictions=predicted_tuned {SPLIT} out=evaluated_tuned",
    f"evaluate predictions=predicted_scratch {SPLIT} out=evaluated_scratch",
    "evaluate compare=[evaluated_scratch,evaluated_tuned] out=compared",
    f"pretrain {PRETRAIN} model=sa_swin_tiny method=sa_swin data.health=healthy train.steps=3 out=sa_swin",
    f"predict {PREDICT} checkpoint=sa_swin input=t1_store out=asymmetry",
    f"finetune {CLASSIFY} model=asa_classifier_tiny train.steps=3 out=classifier",
    f"predict {PREDICT} checkpoint=classifier input=ibsr_store out=classified",
    "simulate input=clean kind=sr out=pairs",
    "regions input=pairs/low out=pairs/regions",
    f"finetune {RESTORE} model.upscale=2 data.root=pairs train.steps=4 out=rat",
    f"predict {PREDICT} checkpoint=rat input=pairs/low regions=pairs/regions out=restored",
    "evaluate policy=restoration predictions=restored truth=pairs/high out=evaluated_restored",
]
# Settings, and steps done by BEFORE and in all. A constant learning rate does not depend on the number of steps.
CONSTANT = "optim.schedule=constant train.save_every=1"
RESUMED = [
    (f"pretrain {ASA} {CONSTANT} data.store=../before/t1_store out=pretrained", 4, 8),
    (f"finetune {SEGMENT} {CONSTANT} data.store=../before/ibsr_store train.ema=0.9 "
     "init=../before/pretrained out=tuned", 3, 6),
]  # fmt: skip
# Values that differ between two runs of one checkout, or between versions on purpose.
IGNORED = {"software", "asa", "description", "volumes_per_second", "data_wait", "mtime_ns"}


# ------------------------------------------------------------------------------------------------ running


class Checkout:
    """A checkout of this repository and the folder that its commands write to."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path.resolve(), folder
        self.python = Path(os.environ.get("ASA_VENV", self.path / ".venv")).resolve() / "bin/python"
        if not self.python.exists():
            subprocess.run(["bash", "scripts/environment"], cwd=self.path, check=True)

    def run(self, line: str) -> float:
        """Run a command, and return the seconds it took.

        Raises:
            RuntimeError: the command failed.
        """
        command, *settings = shlex.split(line)
        single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        environment = {**os.environ, **single, "PYTHONPATH": str(self.path), "CUDA_VISIBLE_DEVICES": ""}
        started = time.monotonic()
        done = subprocess.run(
            [self.python, "-m", "asa", command, *settings],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self.path}: asa-{line}\n{done.stdout[-3000:]}")
        return time.monotonic() - started


def run_side_by_side(checkouts: list[Checkout], lines: list[str]) -> None:
    """Run the same commands with each checkout."""
    with ThreadPoolExecutor(len(checkouts)) as pool:
        for line in lines:
            seconds = list(pool.map(lambda checkout, line=line: checkout.run(line), checkouts))
            took = " / ".join(f"{s:.0f}" for s in seconds)
            out = next(word for word in line.split() if word.startswith("out="))
            print(f"ran      asa-{line.split()[0]} {out}: {took} s", flush=True)


def write_inputs(folder: Path) -> None:
    """Write clean images, and classes with a split that has both in each part."""
    (folder / "clean").mkdir(parents=True)
    for k in range(5):
        write_png(folder / "clean" / f"{k}.png", random.Random(k))
    classes = "".join(f"IBSR_0{k},{'patient' if k % 2 else 'control'}\n" for k in range(1, 5))
    (folder / "classes.csv").write_text(f"subject,class\n{classes}")
    split = {"train": ["IBSR_01", "IBSR_02"], "validation": [], "test": ["IBSR_03", "IBSR_04"]}
    (folder / "classes.json").write_text(json.dumps(split))


def write_png(path: Path, draw: random.Random, edge: int = 64) -> None:
    """A grey image of noisy discs."""
    discs = [
        (draw.uniform(0, edge), draw.uniform(0, edge), draw.uniform(6, 20), draw.randrange(40, 200)) for _ in "abcdef"
    ]
    rows = b""
    for y in range(edge):
        covering = ([grey for a, b, r, grey in discs if (x - a) ** 2 + (y - b) ** 2 < r * r] for x in range(edge))
        rows += b"\0" + bytes(max([20, *greys]) + draw.randrange(10) for greys in covering)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


# ------------------------------------------------------------------------------------------------ comparing

Items = dict[str, Any]  # what a file holds, by name


def digest(data: bytes) -> str:
    """The start of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def flat(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested JSON data with their dotted names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in IGNORED:
                yield from flat(value, f"{name}.{key}" if name else key)
    elif isinstance(node, list):
        for k, value in enumerate(node):
            yield from flat(value, f"{name}[{k}]")
    else:
        yield name, node


def read_bytes(path: Path, root: str) -> Items:
    """Any file as a whole."""
    return {"bytes": digest(path.read_bytes())}


def read_nifti(path: Path, root: str) -> Items:
    """Header and voxels of a compressed volume."""
    data = gzip.decompress(path.read_bytes())
    start = int(struct.unpack_from("<f", data, 108)[0])
    return {"header": digest(data[:start]), "voxels": digest(data[start:])}


def read_tensors(path: Path, root: str) -> Items:
    """Tensors of a .safetensors file, without the description in its header."""
    data = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: f"{tensor['dtype']} {tensor['shape']} {digest(data[start:][slice(*tensor['data_offsets'])])}"
        for name, tensor in header.items()
    }


def read_lines(path: Path, root: str) -> Items:
    """Lines of a text file, without the folder of the checkout."""
    return {f"line {k}": line for k, line in enumerate(path.read_text().replace(root, ".").splitlines(), start=1)}


def read_json(path: Path, root: str) -> Items:
    """The values of a JSON file."""
    return dict(flat(json.loads(path.read_text().replace(root, "."))))


def read_store(path: Path, root: str) -> Items:
    """The values of a manifest and of the records beside it."""
    lines = path.with_name("records.jsonl").read_text().replace(root, ".").splitlines()
    return read_json(path, root) | dict(flat({"records": [json.loads(line) for line in lines]}))


def read_log(path: Path, root: str) -> Items:
    """The numbers of a run's log."""
    return dict(flat([json.loads(line) for line in path.read_text().splitlines()]))


READERS: list[tuple[str, str, Callable[[Path, str], Items] | None]] = [  # first match; None: not compared
    ("digests.json", "", None),  # of files that hold paths and descriptions
    ("log.jsonl", "logged numbers", read_log),
    ("*.safetensors", "weights", read_tensors),
    ("manifest.json", "manifest", read_store),
    ("records.jsonl", "", None),  # read with its manifest
    ("*.json", "JSON files", read_json),
    ("*.csv", "tables", read_lines),
    ("*.npy", "arrays", read_bytes),
    ("*.nii.gz", "volumes", read_nifti),
    ("*.png", "images", read_bytes),
]


def read_folder(root: Path) -> dict[tuple[str, str], dict[str, Items]]:
    """What is compared, by (top folder, kind) and file."""
    found: dict[tuple[str, str], dict[str, Items]] = defaultdict(dict)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root)
        for pattern, kind, read in READERS:
            if path.match(pattern):
                if read is not None:
                    found[name.parts[0], kind][str(name)] = read(path, str(root))
                break
    return found


def compare(before: Path, after: Path, only: Collection[str] = ()) -> bool:
    """Print a line per folder (all, or some only) and kind of file. Whether all is the same."""
    one, other = read_folder(before), read_folder(after)
    same = True
    for key in sorted(key for key in {*one, *other} if not only or key[0] in only):
        differences = list(differ(one.get(key, {}), other.get(key, {})))
        same &= not differences
        files = {*one.get(key, {}), *other.get(key, {})}
        items = sum(len(content) for content in one.get(key, {}).values())
        print(f"{'DIFFERS' if differences else 'same':<8} {key[0]}: {key[1]} ({len(files)} files, {items} values)")
        for line in differences[:5]:
            print(f"         {line}")
        if len(differences) > 5:
            print(f"         and {len(differences) - 5} more")
    return same


def differ(one: dict[str, Items], other: dict[str, Items]) -> Iterator[str]:
    """A line for each file or value that is not the same."""
    for file in sorted({*one, *other}):
        if file not in one or file not in other:
            yield f"{file}: only {'after' if file not in one else 'before'}"
            continue
        for name in sorted({*one[file], *other[file]}):
            a, b = (side[file].get(name, "absent") for side in (one, other))
            if repr(a) != repr(b):  # NaN is like NaN
                yield f"{file}, {name}: {a} before, {b} after"


# ------------------------------------------------------------------------------------------------ resuming


def compare_resumed(before: Checkout, after: Checkout, out: Path) -> bool:
    """Whether AFTER predicts from BEFORE's checkpoints as BEFORE did, and continues its runs as if its own."""
    predictions = [line for line in CHAIN if line.startswith("predict")]
    made = [line.rpartition("out=")[2] for line in predictions]
    shutil.copytree(before.folder, out / "inherited", ignore=shutil.ignore_patterns(*made))
    inheriting = Checkout(after.path, out / "inherited")

    def train() -> None:
        resumed, alone = out / "resumed", out / "alone"
        for folder in (resumed, alone):
            folder.mkdir()
        for settings, half, whole in RESUMED:
            line = f"{settings} train.validate_every={half}"  # a run that ends there validates there
            run_side_by_side([Checkout(before.path, resumed)], [f"{line} train.steps={half}"])
            run_side_by_side([Checkout(after.path, resumed)], [f"{line} train.steps={whole}"])
            run_side_by_side([Checkout(after.path, alone)], [f"{line} train.steps={whole}"])

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(train), pool.submit(run_side_by_side, [inheriting], predictions)]:
            job.result()
    results = [compare(before.folder, inheriting.folder, made), compare(out / "resumed", out / "alone")]
    return all(results)


def main() -> int:
    """Run both, compare; 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="scripts/compare-checkouts", description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of this repository")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--out", type=Path, help="a new folder for what the commands write (default: a temporary one)")
    resume = "also continue runs of BEFORE with AFTER, and predict from BEFORE's checkpoints"
    parser.add_argument("--resume", action="store_true", help=resume)
    chosen = parser.parse_args()
    for checkout in (chosen.before, chosen.after):
        if not (checkout / "asa" / "cli").is_dir():
            parser.error(f"{checkout} is not a checkout of this repository")
    if chosen.out and chosen.out.exists():
        parser.error(f"--out={chosen.out} exists: give a new folder")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="asa-compare-") as scratch:
        out = (chosen.out or Path(scratch)).resolve()
        before, after = Checkout(chosen.before, out / "before"), Checkout(chosen.after, out / "after")
        for checkout in (before, after):
            write_inputs(checkout.folder)
        try:
            run_side_by_side([before, after], CHAIN)
            same = compare(before.folder, after.folder)
            if chosen.resume:
                same &= compare_resumed(before, after, out)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{'all is the same to the bit' if same else 'something differs'} ({time.monotonic() - started:.0f} s)")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
