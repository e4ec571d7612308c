"""Run the commands of this checkout from the other files here, and read and show what they give."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asa.evaluation.comparison import read_run
from asa.evaluation.statistics import bootstrap_interval


def parser_of(description: str | None, *paths: str) -> argparse.ArgumentParser:
    """A parser of a script's options, of which the first are paths."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        parser.add_argument(name, type=Path)
    return parser


def quoted_path(path: Any) -> str:
    """A path as the value of a setting on the command line, whatever signs it contains."""
    written = str(path).replace("'", "\\'")
    return f"'{written}'"


def quoted(**paths: Any) -> list[str]:
    """Paths as settings on the command line."""
    return [f"{key}={quoted_path(path)}" for key, path in paths.items()]


def declared(labels: Mapping[int, str]) -> str:
    """The names of label values, as the setting of asa-prepare."""
    return "labels={" + ", ".join(f"{value}: {name}" for value, name in labels.items()) + "}"


def asa(command: str, *settings: str, log: Path | None = None, threads: int | None = None, **paths: Any) -> None:
    """Run a command with settings as on the command line, and with paths. Preparation and training are not repeated.

    Args:
        log: file that the output is added to; None prints it.
        threads: of the command; None: as many as it likes.

    Raises:
        RuntimeError: the command failed.
    """
    arguments = [sys.executable, "-m", "asa", command, *settings, *quoted(**paths)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    output = None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("a")
    done = subprocess.run(arguments, env=environment, stdout=output, stderr=output and subprocess.STDOUT)
    if output is not None:
        output.close()
    if done.returncode:
        raise RuntimeError(f"asa-{command} failed{f': see {log}' if log else ''}")


def score(out: Path, name: str, store: Path, log: Path | None = None, threads: int | None = None) -> None:
    """Predict the test brains of OUT/finetuned/NAME into OUT/predicted, and score them in OUT/evaluated, once."""
    run, predictions, scores = (out / kind / name for kind in ("finetuned", "predicted", "evaluated"))
    if (scores / "digests.json").exists():  # the last file of an evaluation
        return
    asa("predict", "part=test", log=log, threads=threads, checkpoint=run, input=store, out=predictions)
    evaluate(out, name, store, run / "split.json", log=log, threads=threads)


def evaluate(
    out: Path, name: str, store: Path, split: Path, log: Path | None = None, threads: int | None = None
) -> None:
    """Score OUT/predicted/NAME, predictions of the split's test part, in OUT/evaluated."""
    predictions, scores = (out / kind / name for kind in ("predicted", "evaluated"))
    asa("evaluate", log=log, threads=threads, predictions=predictions, truth=store, split_file=split, out=scores)


def brain_dice(out: Path, name: str, labels: Iterable[str]) -> np.ndarray:
    """Dice of the test brains of a fine-tuning, `(brains, labels)`."""
    values = read_run(name, out / "evaluated" / name).values
    ids = sorted({id for id, _ in values})
    return np.array([[values[id, label]["dice"] for label in labels] for id in ids])


def validations(run: Path) -> list[dict[str, Any]]:
    """The logged validations of a run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == "validation"]


def interval(values: Sequence[float] | np.ndarray, sign: str = "", digits: int = 3) -> str:
    """Mean and 95 % interval of the mean, as text; with `sign="+"` always with a sign."""
    low, high = bootstrap_interval(np.array(values))
    mean, *ends = (f"{value:{sign}.{digits}f}" for value in (np.mean(values), low, high))
    return mean if len(values) < 2 else f"{mean} ({ends[0]} to {ends[1]})"
