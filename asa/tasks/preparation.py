"""Preparation: raw scans to a store, checked, parallel and resumable; their quality control; a store's checksums."""

import importlib
from pathlib import Path
from statistics import median

from asa.config import build
from asa.data.datasets.record import in_dataset
from asa.data.io.files import PART, failure_lines
from asa.data.io.lock import LOCK
from asa.data.preprocessing.settings import CohortSettings
from asa.data.store import MANIFEST, RECORDS, Store
from asa.errors import counted, listed
from asa.settings import Config, check_choice

SCHEME = "label_scheme"  # function of a reader, which gets the keys of data=


def prepare_task(config: Config) -> None:
    """Prepare a cohort, run its quality control, or verify a store; a ValueError after the list of failed scans."""
    out, check = Path(str(config["out"])), config["check"]
    if config["verify"]:
        verify(out)
        return
    if check != "only" and out.is_dir() and not (out / MANIFEST).exists() and any(map(_is_foreign, out.iterdir())):
        raise ValueError(f"{out} is not empty and not a store: choose another out=")
    scheduler = _scheduler(config)
    if config["data"]["root"] is None and not config["data"].get("table"):
        raise ValueError("data.root has to be given: add data.root=FOLDER")
    cohort = cohort_of(config)
    records = build(config["data"], plugins=config["plugins"])
    if config["dataset"] is not None:
        records = in_dataset(records, str(config["dataset"]))
    from asa.data.preprocessing.cohort import prepare_cohort  # imports torch, when all that was given is right
    from asa.reporting.quality_control import PAGE, TABLE, QualityControlReport

    quality = QualityControlReport(Path(str(config["report"] or f"{out}_check"))) if check else None
    target, on_scan = None if check == "only" else out, quality.add if quality else None
    report = prepare_cohort(records, target, cohort, workers=config["workers"], scheduler=scheduler, on_scan=on_scan)
    for id, warnings in report.warnings.items():
        for warning in warnings:
            print(f"{id}: warning: {warning}")
    for line in failure_lines(report.failures):
        print(line)
    if report.seconds:
        times = ", ".join(f"{stage} {median(durations):.1f}" for stage, durations in report.seconds.items())
        print(f"median seconds per scan: {times}")
    where = "nothing written" if check == "only" else out
    print(f"{where}: {len(report.prepared)} prepared, {len(report.skipped)} done before, {len(report.failures)} failed")
    prefix = f"{config['dataset']}_" if config["dataset"] else ""
    if others := [id for id in report.others if id.startswith(prefix)]:
        print(f"note: {counted(len(others), 'scan')} of the store not in this cohort, kept there: {listed(others, 5)}")
    if quality:
        quality.finish(cohort.settings.as_json())
        print(f"wrote {quality.folder / TABLE} and {quality.folder / PAGE}")
    if report.failures and (config["failed"] == "refuse" or not (report.prepared or report.skipped)):
        failed = counted(len(report.failures), "scan")
        raise ValueError(f"{failed} failed, listed above: fix them, or leave them out with failed=skip, and run again")


def _is_foreign(path: Path) -> bool:
    """Whether a file is none of those that an asa-prepare leaves that was killed before its first manifest."""
    return path.name != LOCK and path.suffix != PART and (path.name != RECORDS or path.stat().st_size > 0)


def verify(path: Path) -> None:
    """Compare a store with its checksums; a ValueError after the list of damaged scans."""
    store = Store(path)
    damaged = store.verify()
    for id, reason in damaged:
        print(f"{id}: {reason}")
    if damaged:
        raise ValueError(f"{path}: {counted(len(damaged), 'scan')} damaged, listed above with what to do")
    print(f"{path}: {counted(len(store), 'scan')} unchanged, all of them")


def _scheduler(config: Config) -> str | None:
    """Address of the dask scheduler; None for processes of this machine."""
    executor, scheduler = config["executor"], config["scheduler"]
    check_choice("executor", executor, ("processes", "dask"))
    if (executor == "dask") != (scheduler is not None):
        raise ValueError("executor=dask and scheduler=ADDRESS go together, as in scheduler=tcp://login1:8786")
    if executor == "dask" and config["workers"] != 1:
        raise ValueError("workers= is for executor=processes: start as many dask workers as the cluster has room for")
    return None if scheduler is None else str(scheduler)


def cohort_of(config: Config) -> CohortSettings:
    """Labels, channels and preprocessing; a ValueError if they contradict each other, or a dataset has no labels."""
    labels, ignored, regions = config["labels"] or {}, config["ignored"] or (), config["regions"] or {}
    if labels == "dataset":
        reader = str(config["data"]["_target_"]).rpartition(".")[0]
        if not hasattr(importlib.import_module(reader) if reader.startswith("asa.") else None, SCHEME):
            raise ValueError("labels=dataset: this reader knows no labels; give them, like 'labels={1: csf, 2: gm}'")
        labels, ignored, regions = build({**config["data"], "_target_": f"{reader}.{SCHEME}"})
    settings, missing, duplicates = build(config["prepare"]), config["missing"], config["duplicates"]
    return CohortSettings(labels, ignored, regions, settings, missing, duplicates)
