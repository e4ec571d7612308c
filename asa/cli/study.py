"""A study in one command: `asa run LABELLED UNLABELLED NEW out=STUDY`, then `asa run STUDY/study.yaml`.

It looks at the folders, writes the commands of a whole study into STUDY/study.yaml, and runs them in their order. A
stage is a command with its settings, as it could be typed; the file can be edited. What is done is not done again.
"""

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from asa.cli.front import Config
from asa.config import as_overrides, build, compose
from asa.data.datasets.recognise import recognise
from asa.data.io.files import read_json, read_yaml, write_json, write_whole
from asa.data.io.lock import locked
from asa.data.io.nifti import read_label
from asa.data.store import MANIFEST
from asa.errors import EXPECTED, listed, reason_of
from asa.tasks import COMMANDS
from asa.tasks.checks import check

STUDY, DONE, PAGE = "study.yaml", "done.json", "study.html"
RECIPES = {"pretrain": {"experiment": "structures_pretrain"}, "finetune": {"experiment": "structures_finetune"}}
ENCODER = "asa://tiny-t1"  # without unlabelled scans
FOLDS = 5
ATLASES = 3  # whose joint label fusion docs/evidence.md compares with networks
HEAD_MB = 9.8  # of a brain at 1 mm in a store: 160 x 192 x 160 voxels in float16
HEADER = """\
# Written by asa run, to be read and changed: each stage is a command with its settings, and paths begin in this folder.
# asa run {file} runs what is not done; a stage whose settings were changed, and all after it, are run again.
"""


class Stage(NamedTuple):
    """A command of a study."""

    name: str
    command: str
    settings: Mapping[str, Any]

    def typed(self) -> str:
        """As on the command line."""
        return shlex.join([f"asa-{self.command}", *as_overrides(self.command, self.settings)])


def run_study(config: Config) -> None:
    """Write a study, unless its file is given, and run what is not done.

    Raises:
        FileNotFoundError, ValueError: no such folder or study, scans that are in no known layout, or a stage that
            failed.
    """
    if config["plan"] not in (None, "only"):
        raise ValueError(f"plan={config['plan']}: choose only, or null")
    file = _study_file(config)
    stages, folder = read_study(file), file.parent
    for stage in stages:
        compose(stage.command, as_overrides(stage.command, stage.settings))  # a wrong key is found before the first run
    if config["plan"]:
        with contextlib.chdir(folder):
            for stage in stages:
                print(f"{stage.name}: {stage.typed()}\n{_cost(stage)}")
        print(f"nothing was run; asa run {file} runs all of it")
        return
    with locked(folder), contextlib.chdir(folder):
        _run(stages)
    print(f"open {folder / PAGE}")


def read_study(file: Path) -> list[Stage]:
    """The stages of a study in their order.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a study.
    """
    stages = (read_yaml(file) or {}).get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ValueError(f"{file}: not a study: it needs stages: {{NAME: {{COMMAND: {{KEY: VALUE}}}}}}")
    found = []
    for name, node in stages.items():
        if not isinstance(node, dict) or len(node) != 1 or not isinstance(next(iter(node.values())), dict):
            raise ValueError(f"{file}: stage {name} is one command and its settings: {{COMMAND: {{KEY: VALUE}}}}")
        ((command, settings),) = node.items()
        if command not in COMMANDS:
            raise ValueError(f"{file}: stage {name}: no command {command}: choose one of {', '.join(COMMANDS)}")
        if not settings.get("out"):
            raise ValueError(f"{file}: stage {name} needs out=: a folder of its own")
        found.append(Stage(str(name), command, settings))
    return found


def plan_stages(config: Config) -> list[Stage]:
    """The stages of a study of some folders.

    Labelled scans of several subjects are divided into folds: a network from the pretrained encoder and one from
    scratch are trained for each, and compared on the scans that they were not trained on; where the extra `atlas` is
    installed, also with the registration of a few labelled scans to the others. One subject alone gives a network,
    which nothing can be said about.

    Args:
        config: of asa-run.

    Raises:
        FileNotFoundError, ValueError: see `recognise`, and the readers; scans without labels.
    """
    added = {command: config[command] or {} for command in ("prepare", "pretrain", "finetune", "predict")}
    shared = {"prepare.strip": config["strip"], "prepare.midway": True, "prepare.spacing": 1, "check": "also"}
    labels = {} if config["labels"] is None else {"labels": config["labels"]}

    def store(kind: str, labelled: bool) -> Stage:
        found = recognise(Path(config[kind]).resolve(), labelled=labelled)
        none = {"labels": None} if not labelled and found["data"] in ("nnunet", "freesurfer") else {}
        settings = found | shared | (labels if labelled else none) | added["prepare"] | {"out": f"stores/{kind}"}
        composed, stage = compose("prepare", as_overrides("prepare", settings)), Stage(kind, "prepare", settings)
        check("prepare", composed)
        if labelled and not composed["labels"]:
            raise ValueError(_which_labels(stage))
        return stage

    if config["new"] and not Path(config["new"]).exists():
        raise FileNotFoundError(f"{config['new']}: no such file or folder; new= are the scans to predict")
    stages = [store("labelled", True)]
    subjects = {record["subject"] for record in _records(stages[0])}
    init = ENCODER
    if config["unlabelled"]:
        init = "runs/encoder"
        stages.append(store("unlabelled", False))
        scans = {"data.store": "stores/unlabelled", "out": init}
        stages.append(Stage("encoder", "pretrain", RECIPES["pretrain"] | added["pretrain"] | scans))
    tuned = RECIPES["finetune"] | {"data.split.validation": 0, "data.split.test": 0} | added["finetune"]
    tuned |= {"data.store": "stores/labelled"}
    if len(subjects) > 1:
        folds = min(FOLDS, len(subjects))
        tuned |= {"data.split.folds": folds, "data.split.fold": "all"}
        runs = ["scratch", "pretrained"]
        networks = [f"runs/pretrained/fold{k}" for k in range(folds)]
    else:
        runs, networks = ["pretrained"], ["runs/pretrained"]
    for run in runs:
        start = {"init": init} if run == "pretrained" else {}
        stages.append(Stage(run, "finetune", tuned | start | {"out": f"runs/{run}"}))
    if len(runs) > 1:
        compared = {run: f"runs/{run}/evaluation" for run in runs}
        stages.append(Stage("comparison", "evaluate", {"compare": compared, "out": "comparison"}))
        if find_spec("ants"):
            stages += _atlas_stages(min(ATLASES, len(subjects) - 1))
    if config["new"]:
        own: dict[str, Any] = {
            "checkpoint": networks,
            "input": str(Path(config["new"]).resolve()),
            "out": "predictions",
        }
        stages.append(Stage("predictions", "predict", added["predict"] | own))
    return stages


def _atlas_stages(atlases: int) -> list[Stage]:
    """Registration of the first labelled subjects to the others, compared with the pretrained networks on these."""
    store, out = "stores/labelled", "atlas/predictions"
    own = {"predictions": out, "truth": store, "out": "atlas/evaluation"}
    both = {"compare": {"atlas": own["out"], "pretrained": "runs/pretrained/evaluation"}, "out": "atlas/comparison"}
    return [
        Stage("atlas", "predict", {"atlas": store, "labelled": atlases, "input": store, "out": out}),
        Stage("atlas_scores", "evaluate", own | {"allow_missing": True}),  # atlases are not predicted
        Stage("atlas_comparison", "evaluate", both | {"allow_missing": True}),
    ]


def _study_file(config: Config) -> Path:
    """The study's file: the one that is given, or a new one of the folders that are.

    Raises:
        FileNotFoundError, ValueError: see `plan_stages`; settings that are missing, or the folder of another study.
    """
    given = config["labelled"]
    if given is None:
        raise ValueError("give a folder of labelled scans and out=, or the study.yaml of an earlier asa run")
    if Path(given).suffix in (".yaml", ".yml"):
        if others := [key for key, value in config.items() if value is not None and key not in ("labelled", "plan")]:
            raise ValueError(f"{others[0]}= is for a new study: change {given} instead")
        if not Path(given).is_file():
            raise FileNotFoundError(f"{given}: no such file; asa run LABELLED UNLABELLED NEW out=STUDY writes one")
        return Path(given).absolute()
    if config["out"] is None:
        raise ValueError("out= has to be given: the folder of the study")
    if config["strip"] is None:
        raise ValueError("strip= has to be given: deepbet for heads, or none for brains that have no skull")
    file = Path(config["out"]).absolute() / STUDY
    content = {"stages": {stage.name: {stage.command: dict(stage.settings)} for stage in plan_stages(config)}}
    if file.exists() and read_yaml(file) != content:
        raise ValueError(f"{file} is another study, or was changed: asa run {file} goes on with it; or choose out=")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = HEADER.format(file=STUDY) + yaml.safe_dump(content, sort_keys=False, width=120)
        write_whole(file, text.encode())
        print(text)
    return file


def _run(stages: Sequence[Stage]) -> None:
    """Run what is not done, in the study's folder, and write the page after each stage.

    Raises:
        ValueError: a stage failed.
    """
    from asa.reporting.pages import write_page
    from asa.tasks.run import call

    before: list[dict[str, Any]] = read_json(Path(DONE)) if Path(DONE).exists() else []
    done: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        row = {"name": stage.name, "command": stage.command, "settings": dict(stage.settings)}
        found = before[number] if number < len(before) else {}
        if all(found.get(key) == value for key, value in row.items()):
            print(f"{stage.name}: done before")
        else:
            before = []  # all that follows was made from other results
            print(f"{stage.name}: {stage.typed()}", flush=True)
            begun = time.monotonic()
            try:
                call(stage.command, stage.settings)
            except EXPECTED as error:
                raise ValueError(f"stage {stage.name}, asa-{stage.command}: {reason_of(error)}") from error
            today = datetime.now(UTC).date().isoformat()
            found = row | {"seconds": round(time.monotonic() - begun), "finished": today}
        done.append(found)
        write_json(Path(DONE), done)
        rows = [(row, made.typed(), _results(made)) for row, made in zip(done, stages, strict=False)]
        write_page(Path(PAGE), "study.html.j2", rows=rows, missing=[each.name for each in stages[number + 1 :]])


def _results(stage: Stage) -> list[str]:
    """Pages and tables of a stage, and of the quality control of its store."""
    out = str(stage.settings["out"])
    return [
        path.as_posix()
        for folder in (out, f"{out}_check")
        for pattern in ("*.html", "volumes.csv", "evaluation/*.html")
        for path in sorted(Path(folder).glob(pattern))
    ]


def _records(stage: Stage) -> list[Mapping[str, Any]]:
    """What the reader of a preparation finds."""
    config = compose("prepare", as_overrides("prepare", stage.settings))
    records: list[Mapping[str, Any]] = build(config["data"], plugins=config["plugins"])
    return records


def _which_labels(stage: Stage) -> str:
    """What to do where a dataset does not name its labels, with the values of its first label map."""
    files = [record["label"] for record in _records(stage) if Path(record.get("label", "")).is_file()]
    values = [str(value) for file in files[:1] for value in np.unique(read_label(file).data) if value]
    held = f": {files[0]} holds the values {listed(values)}; name all" if values else ""
    return f"labels= has to be given{held}, like 'labels={{1: csf, 2: gm}}'"


def _cost(stage: Stage) -> str:
    """What is known of a stage before it is run."""
    if stage.command == "prepare":
        records = _records(stage)
        files = [Path(file) for record in records for file in record["images"].values() if file]
        size = sum(file.stat().st_size for file in files if file.exists()) / 1e9
        spacing = stage.settings.get("prepare.spacing")
        disk = f"; {HEAD_MB / spacing**3:.1f} MB a head in the store" if spacing else ""
        return f"  {len(records)} scans, {size:.2f} GB{disk}"
    if stage.command in ("pretrain", "finetune"):
        store = Path(str(stage.settings["data.store"]))
        if not (store / MANIFEST).exists():
            return f"  memory and time: again with plan=only when {store} is there"
        from asa.tasks.run import call

        planned = {"plan": "only"} | ({"data.split.fold": 0} if stage.settings.get("data.split.fold") == "all" else {})
        call(stage.command, stage.settings, planned)
    return ""
