"""asa-prepare: raw scans to the prepared store."""

import sys
from pathlib import Path

from asa.cli.front import Config, run_command
from asa.config import build
from asa.data.prepare import prepare_cohort
from asa.data.store import MANIFEST, Store


def prepare(config: Config) -> None:
    """Prepare a cohort, or verify a store.

    Raises:
        ValueError: scans failed or are damaged; they are listed before.
    """
    out = Path(str(config["out"]))
    if config["verify"]:
        damaged = Store(out).verify()
        for id, reason in damaged:
            print(f"{id}: {reason}")
        if damaged:
            raise ValueError(f"{len(damaged)} scans of {out} are damaged: run asa-prepare again to redo them")
        print(f"{out}: all {len(Store(out))} scans are as they were written")
        return
    if out.exists() and not (out / MANIFEST).exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and not a store: choose another out=")
    if config["data"]["root"] is None and not config["data"].get("table"):
        raise ValueError("data.root has to be given: add data.root=FOLDER")
    labels = config["labels"] or {}
    if not isinstance(labels, dict) or not all(isinstance(value, int) for value in labels):
        raise ValueError(f"labels are values and names, like labels={{1: csf, 2: gm, 3: wm}}, got {labels}")
    plugins = config["plugins"]
    report = prepare_cohort(
        build(config["data"], plugins=plugins),
        out,
        labels=labels,
        settings=build(config["prepare"]),
        workers=config["workers"],
    )
    for id, notes in report.warnings.items():
        for note in notes:
            print(f"{id}: warning: {note}")
    for id, reason in report.failures.items():
        print(f"{id}: failed: {reason}")
    print(f"{out}: {len(report.prepared)} prepared, {len(report.skipped)} done before, {len(report.failures)} failed")
    if report.failures:
        raise ValueError(f"{len(report.failures)} scans failed, listed above: mend or leave them out, and run again")


def main() -> int:
    """Entry point."""
    return run_command("prepare", "Bring raw scans into a prepared store, checked and resumable.", prepare)


if __name__ == "__main__":
    sys.exit(main())
