"""Compare a run that is killed and resumed many times with an uninterrupted one. See scripts/verify-resume."""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from asa.data.io.files import sha256_of
from asa.training.checkpoint_files import find_weights


def main() -> int:
    """Run both and compare them; 1 if they differ."""
    parser = argparse.ArgumentParser(
        prog="scripts/verify-resume",
        description="Run a training command once without interruption and once with kill -9 at random times, resuming "
        "each time, and compare the SHA-256 of the final weights.",
    )
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the two runs")
    parser.add_argument("command", choices=["pretrain", "finetune"])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for asa-pretrain, without out=")
    chosen = parser.parse_intermixed_args()
    if chosen.out.exists():
        parser.error(f"{chosen.out} exists: give a new folder")
    chosen.out.mkdir(parents=True)
    times = random.Random(chosen.seed)

    started = time.monotonic()
    whole = start(chosen, "whole")
    until_training(whole, chosen.out / "whole")
    begun = time.monotonic()
    if whole.wait():
        print((chosen.out / "whole.txt").read_text(), file=sys.stderr)
        return 1
    training = time.monotonic() - begun
    print(f"uninterrupted: {time.monotonic() - started:.0f} s, of which training {training:.0f} s", flush=True)

    kills = finished = 0
    # Each time is drawn from an equal part of the remaining run, so that the last kill comes at about three quarters;
    # steps that are lost by kills are repeated.
    steps = last_step(chosen.out / "whole")
    while kills < chosen.kills and not finished:
        process = start(chosen, "killed")
        until_training(process, chosen.out / "killed")
        try:
            left = 1 - last_step(chosen.out / "killed") / steps
            finished = process.wait(times.uniform(0, 1.5 * training * left / (chosen.kills - kills))) == 0
            if not finished:
                break  # it failed without a kill: the start below shows why
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            print(f"kill {kills} at step {last_step(chosen.out / 'killed')}", flush=True)
    if start(chosen, "killed").wait():
        print((chosen.out / "killed.txt").read_text(), file=sys.stderr)
        return 1
    one, other = (sha256_of(find_weights(chosen.out / name)) for name in ("whole", "killed"))
    print(f"uninterrupted   {one}\n{kills:2d} x kill -9    {other}")
    print("the same weights" if one == other else "the weights differ")
    if kills < chosen.kills:
        print(f"the run ended before {chosen.kills} kills: raise train.steps, or lower train.log_every")
    return int(one != other)


def start(chosen: argparse.Namespace, name: str) -> subprocess.Popen[bytes]:
    """Start the command in its own process group."""
    run = str(chosen.out / name).replace("'", "\\'")
    with (chosen.out / f"{name}.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "asa", chosen.command, *chosen.settings, f"out='{run}'"],
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def until_training(process: subprocess.Popen[bytes], run: Path) -> None:
    """Wait until this process has logged a step or has ended."""
    before = len(lines(run / "log.jsonl"))
    while process.poll() is None:
        now = len(lines(run / "log.jsonl"))
        if now > before:
            return
        before = now  # fewer: the process removed the lines after its checkpoint
        time.sleep(0.02)


def lines(log: Path) -> list[str]:
    """Lines of a log; none if the log does not exist yet."""
    return log.read_text().splitlines() if log.exists() else []


def last_step(run: Path) -> int:
    """The last step of the log."""
    newest = lines(run / "log.jsonl")[-1:]
    return int(newest[0].partition(",")[0].rpartition(" ")[2]) if newest else 0


if __name__ == "__main__":
    sys.exit(main())
