"""asa-prepare: raw scans to the prepared store."""

import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from asa.cli.front import Config, run_command
from asa.config import build
from asa.data.io.files import PART
from asa.data.preprocessing.cohort import Plan, Report, prepare_cohort
from asa.data.store import MANIFEST, Store
from asa.reporting.quality_control import PAGE, TABLE, QualityControlReport


def prepare(config: Config) -> None:
    """Prepare a cohort, check it, or verify a store.

    Raises:
        ValueError: scans failed or are damaged; they are listed before.
    """
    out, check = Path(str(config["out"])), config["check"]
    if config["verify"]:
        verify(out)
        return
    if check not in (None, "only", "also"):
        raise ValueError(f"check={check}: choose only, also, or null")
    strangers = [path for path in out.iterdir() if not path.name.endswith(PART)] if out.is_dir() else []
    if check != "only" and strangers and not (out / MANIFEST).exists():
        raise ValueError(f"{out} is not empty and not a store: choose another out=")
    if config["data"]["root"] is None and not config["data"].get("table"):
        raise ValueError("data.root has to be given: add data.root=FOLDER")
    plan = _plan(config)
    records = build(config["data"], plugins=config["plugins"])
    checkup = QualityControlReport(Path(str(config["report"] or f"{out}_check"))) if check else None
    report = prepare_cohort(
        records,
        None if check == "only" else out,
        plan,
        workers=config["workers"],
        watch=checkup.add if checkup else None,
    )
    _tell(report, "nothing written" if check == "only" else str(out))
    if checkup:
        checkup.finish(asdict(plan.settings))
        print(f"wrote {checkup.folder / TABLE} and {checkup.folder / PAGE}")
    if report.failures:
        raise ValueError(f"{len(report.failures)} scans failed, listed above: mend or leave them out, and run again")


def verify(path: Path) -> None:
    """Compare a store with its checksums.

    Raises:
        ValueError: scans are damaged; they are listed before.
    """
    store = Store(path)
    damaged = store.verify()
    for id, reason in damaged:
        print(f"{id}: {reason}")
    if damaged:
        raise ValueError(f"{len(damaged)} scans of {path} are damaged: do as it says above to redo them")
    print(f"{path}: all {len(store)} scans are as they were written")


def _plan(config: Config) -> Plan:
    labels = config["labels"] or {}
    if not isinstance(labels, dict) or not all(isinstance(value, int) for value in labels):
        raise ValueError(f"labels are values and names, like labels={{1: csf, 2: gm, 3: wm}}, got {labels}")
    return Plan(
        labels=labels,
        ignored=config["ignored"] or (),
        regions=config["regions"] or {},
        settings=build(config["prepare"]),
        missing=config["missing"],
        duplicates=config["duplicates"],
    )


def _tell(report: Report, where: str) -> None:
    for id, notes in report.warnings.items():
        for note in notes:
            print(f"{id}: warning: {note}")
    for id, reason in report.failures.items():
        print(f"{id}: failed: {reason}")
    if report.seconds:
        times = ", ".join(f"{stage} {median(taken):.1f}" for stage, taken in report.seconds.items())
        print(f"median seconds a scan: {times}")
    print(f"{where}: {len(report.prepared)} prepared, {len(report.skipped)} done before, {len(report.failures)} failed")


def main() -> int:
    """Entry point."""
    return run_command("prepare", "Bring raw scans into a prepared store, checked and resumable.", prepare)


if __name__ == "__main__":
    sys.exit(main())
