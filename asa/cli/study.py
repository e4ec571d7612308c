"""A study in one command: `asa run LABELLED UNLABELLED NEW out=STUDY`, then `asa run STUDY/study.yaml`.

It looks at the folders, writes the commands of a whole study into STUDY/study.yaml, and runs them in their order. A
stage is a command with its settings, as it could be typed; the file can be edited. What is done is not done again.
"""

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from asa.config import as_overrides, at_home, build, compose, flatten
from asa.data.datasets.folder import recognise
from asa.data.io.files import read_json, read_yaml, write_json, write_whole
from asa.data.io.lock import locked
from asa.data.store import MANIFEST, Store
from asa.errors import EXPECTED, listed, reason_of
from asa.settings import Config
from asa.tasks import COMMANDS
from asa.tasks.checks import check_settings

STUDY, DONE, PAGE = "study.yaml", "done.json", "study.html"
RECIPES = {"pretrain": {"experiment": "structures_pretrain"}, "finetune": {"experiment": "structures_finetune"}}
ENCODER = "asa://tiny-t1"  # without unlabelled scans
FOLDS = 5
ATLASES = 3  # whose joint label fusion docs/evidence.md compares with networks
HEAD_MB = 9.8  # of a brain at 1 mm in a store: 160 x 192 x 160 voxels in float16
HEADER = """\
# Written by asa run, to be read and changed: each stage is a command with its settings, and paths begin in this folder.
# asa run {file} runs what is not done; a stage whose settings were changed, and those that read its results, are run
# again. A training among the latter asks for its folder to be removed first, or for another out=.
"""
TRAININGS = ("pretrain", "finetune")
OWN = {  # settings of its stages that a study sets itself
    "prepare": {"out"},
    "pretrain": {"data.store", "out"},
    "finetune": {"data.store", "data.split.folds", "data.split.fold", "out"},
    "predict": {"checkpoint", "input", "out"},
}


class Stage(NamedTuple):
    """A command of a study."""

    name: str
    command: str
    settings: Mapping[str, Any]

    def overrides(self) -> list[str]:
        return as_overrides(self.command, self.settings)

    def typed(self) -> str:
        """As on the command line."""
        return " ".join(map(_quoted, [f"asa-{self.command}", *self.overrides()]))

    def composed(self) -> Config:
        return compose(self.command, self.overrides())


def run_study(config: Config) -> None:
    """Write a study, unless its file is given, and run what is not done."""
    if config["config_dir"]:
        raise ValueError("--config-dir is not for asa run: write the settings of your experiments into the study")
    file, stages = _study_of(config)
    with contextlib.chdir(file.parent):
        if config["plan"]:
            print(f"cd {_quoted(str(file.parent))}")  # where the paths of the commands begin
            for stage in stages:
                print("\n".join(filter(None, [f"{stage.name}: {stage.typed()}", _cost(stage)])))
            print(f"nothing was run; asa run {_quoted(str(file))} runs all of it")
            return
        with locked(Path()):
            _run(stages)
    print(f"open {file.parent / PAGE}")


def read_study(file: Path) -> list[Stage]:
    """The stages of a study in their order; a ValueError if the file is none."""
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
        found.append(Stage(str(name), command, at_home(settings)))
    return found


def plan_stages(config: Config) -> list[Stage]:
    """The stages of a study of some folders; a ValueError for scans without labels, or in no known layout.

    Labelled scans of several subjects are divided into folds: a network from the pretrained encoder and one from
    scratch are trained for each, and compared on the scans that they were not trained on; where the extra `atlas` is
    installed, also with the registration of a few labelled scans to the others.
    """
    added = {command: _added(config, command) for command in OWN}
    shared = {"prepare.strip": config["strip"], "prepare.midway": True, "prepare.spacing": 1, "check": "also"}
    labels = {} if config["labels"] is None else {"labels": config["labels"]}
    stages, subjects = [], set[str]()

    def store(kind: str) -> str:
        """The store of a folder, which it may be already; else it is the first thing to be made."""
        folder, labelled = Path(config[kind]).resolve(), kind == "labelled"
        if (folder / MANIFEST).exists():
            scans = Store(folder).records if labelled else []
            subjects.update(scan["subject"] for scan in scans if "label" in scan["arrays"])
            return str(folder)
        if config["strip"] is None:
            raise ValueError("strip= has to be given: deepbet for heads, or none for brains that have no skull")
        found = recognise(folder, labelled=labelled)
        none = {"labels": None} if not labelled and found["data"] in ("nnunet", "freesurfer") else {}
        settings = found | shared | (labels if labelled else none) | added["prepare"] | {"out": f"stores/{kind}"}
        stages.append(Stage(kind, "prepare", settings))
        records = _records(stages[-1])
        if labelled:
            _check_labels(stages[-1], records)
            subjects.update(record["subject"] for record in records if Path(record.get("label", "")).is_file())
        return str(settings["out"])

    if config["new"] and not Path(config["new"]).exists():
        raise FileNotFoundError(f"{config['new']}: no such file or folder; new= are the scans to predict")
    tuned = RECIPES["finetune"] | {"data.split.validation": 0, "data.split.test": 0} | added["finetune"]
    init = tuned.pop("init", None)
    if init and config["unlabelled"]:
        raise ValueError(f"finetune.init={init}: an encoder is pretrained on unlabelled=: leave one of them out")
    tuned, init = tuned | {"data.store": store("labelled")}, init or ENCODER
    if not subjects:
        raise ValueError(f"{config['labelled']}: no scan has a label map")
    if config["unlabelled"]:
        scans = {"data.store": store("unlabelled"), "out": (init := "runs/encoder")}
        stages.append(Stage("encoder", "pretrain", RECIPES["pretrain"] | added["pretrain"] | scans))
    folds = min(FOLDS, len(subjects)) if len(subjects) > 1 else 0
    networks = [f"runs/pretrained/fold{k}" for k in range(folds)] or ["runs/pretrained"]
    if folds:
        tuned |= {"data.split.folds": folds, "data.split.fold": "all"}
        stages.append(Stage("scratch", "finetune", tuned | {"out": "runs/scratch"}))
    stages.append(Stage("pretrained", "finetune", tuned | {"init": init, "out": "runs/pretrained"}))
    if folds:
        compared = {run: f"runs/{run}/evaluation" for run in ("scratch", "pretrained")}
        stages.append(Stage("comparison", "evaluate", {"compare": compared, "out": "comparison"}))
        if find_spec("ants"):
            stages += _atlas_stages(tuned["data.store"], min(ATLASES, len(subjects) - 1))
    if config["new"]:
        own = {"checkpoint": networks, "input": str(Path(config["new"]).resolve()), "out": "predictions"}
        stages.append(Stage("predictions", "predict", added["predict"] | own))
    return stages


def _added(config: Config, command: str) -> dict[str, Any]:
    """Settings for all stages of a command, the path of init= absolute; a ValueError for one that a study sets."""
    added = dict(config[command] or {})
    if taken := sorted(OWN[command] & flatten(added).keys()):
        raise ValueError(f"{command}.{taken[0]} is set by asa run: leave it out, or change {STUDY}")
    if added.get("init") and "://" not in added["init"]:
        added["init"] = str(Path(added["init"]).resolve())
    return added


def _atlas_stages(store: str, atlases: int) -> list[Stage]:
    """Registration of the first labelled subjects to the others, compared with the pretrained networks on these."""
    out = "atlas/predictions"
    own = {"predictions": out, "truth": store, "out": "atlas/evaluation"}
    both = {"compare": {"atlas": own["out"], "pretrained": "runs/pretrained/evaluation"}, "out": "atlas/comparison"}
    return [
        Stage("atlas", "predict", {"atlas": store, "labelled": atlases, "input": store, "out": out}),
        Stage("atlas_scores", "evaluate", own | {"allow_missing": True}),  # atlases are not predicted
        Stage("atlas_comparison", "evaluate", both | {"allow_missing": True}),
    ]


def _study_of(config: Config) -> tuple[Path, list[Stage]]:
    """The file of a study and its stages: the one that is given, or a new one, written if all settings are right."""
    given = config["labelled"]
    if given is None:
        raise ValueError("give a folder of labelled scans and out=, or the study.yaml of an earlier asa run")
    file = Path(given) / STUDY if (Path(given) / STUDY).is_file() else Path(given)
    if file.suffix in (".yaml", ".yml"):
        if others := [key for key, value in config.items() if value is not None and key not in ("labelled", "plan")]:
            raise ValueError(f"{others[0]}= is for a new study: change {file} instead")
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; asa run LABELLED UNLABELLED NEW out=STUDY writes one")
        return file.absolute(), [_checked(stage) for stage in read_study(file)]
    if config["out"] is None:
        raise ValueError("out= has to be given: the folder of the study")
    file, stages = Path(config["out"]).absolute() / STUDY, [_checked(stage) for stage in plan_stages(config)]
    content = {"stages": {stage.name: {stage.command: deepcopy(dict(stage.settings))} for stage in stages}}
    if file.exists() and read_yaml(file) != content:
        begun = "" if (file.parent / DONE).exists() else ", and nothing of it was run: remove it"
        raise ValueError(f"{file} is another study, or was changed{begun}; asa run {file} goes on with it")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = HEADER.format(file=STUDY) + yaml.safe_dump(content, sort_keys=False, width=120)
        write_whole(file, text.encode())
        print(text)
    return file, stages


def _checked(stage: Stage) -> Stage:
    """The stage; a ValueError for a key or a value that is wrong whatever the stages before it make."""
    check_settings(stage.command, stage.composed())
    return stage


def _check_labels(stage: Stage, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError if values of the first label map have no name."""
    from asa.data.io.nifti import read_label
    from asa.tasks.preparation import cohort_of

    cohort = cohort_of(stage.composed())
    files = [record["label"] for record in records if Path(record.get("label", "")).is_file()]
    held = [int(value) for file in files[:1] for value in np.unique(read_label(file).data) if value]
    if {*held} <= {*cohort.labels, *cohort.ignored} and cohort.labels:
        return
    values = f": {files[0]} holds the values {listed(list(map(str, held)))}; name all" if held else ""
    raise ValueError(f"labels= has to name every label{values}, like 'labels={{1: csf, 2: gm}}'")


def _run(stages: Sequence[Stage]) -> None:
    """Run what is not done, in the study's folder, and write the page after each stage.

    `DONE` has a row for each stage that was begun. One that is run with other settings keeps its row of `before` until
    it is through; then those that its results go into are stale: a training must not go on from them.
    """
    from asa.reporting.pages import write_study
    from asa.tasks.run import call

    rows: dict[str, dict[str, Any]] = {}
    if Path(DONE).exists():
        rows = {row["name"]: row for row in read_json(Path(DONE))}
    for number, stage in enumerate(stages):
        row = {"name": stage.name, "command": stage.command, "settings": stage.overrides()}
        found = rows.get(stage.name, {})
        stale = found.get("stale", False)
        before = {} if stale else found if "finished" in found else found.get("before", {})
        if before and before | row == before:
            rows[stage.name] = before
            print(f"{stage.name}: done before")
        else:
            if stale and stage.command in TRAININGS and any(Path(str(stage.settings["out"])).glob("**/config.yaml")):
                trained = f"{stage.settings['out']} was trained from results that have changed since"
                advice = f"remove it, or give the stage another out= in {STUDY}"
                raise ValueError(f"stage {stage.name}: {trained}: {advice}")
            rows[stage.name] = row | ({"before": before} if before else {})
            write_json(Path(DONE), [*rows.values()])
            print(f"{stage.name}: {stage.typed()}", flush=True)
            begun = time.monotonic()
            try:
                call(stage.command, stage.settings)
            except EXPECTED as error:
                skip = f"; failed: skip in {STUDY} leaves failed scans out" if stage.command == "prepare" else ""
                raise ValueError(f"stage {stage.name}, asa-{stage.command}: {reason_of(error)}{skip}") from error
            today = datetime.now(UTC).date().isoformat()
            if before and before | row != before:
                _mark_stale(rows, stages[number:])
            rows[stage.name] = row | {"seconds": round(time.monotonic() - begun), "finished": today}
        write_json(Path(DONE), [*rows.values()])
        done = stages[: number + 1]
        shown = [rows[each.name] | {"out": str(each.settings["out"]), "typed": each.typed()} for each in done]
        write_study(Path(PAGE), shown, [each.name for each in stages[number + 1 :]])


def _mark_stale(rows: Mapping[str, dict[str, Any]], stages: Sequence[Stage]) -> None:
    """Mark the rows of the stages whose settings name what the first one writes, or what one of these writes."""
    changed = {str(stages[0].settings["out"])}
    for later in stages[1:]:
        if any(path in later.typed() for path in changed):
            changed.add(str(later.settings["out"]))
            if later.name in rows:
                rows[later.name]["stale"] = True


def _quoted(word: str) -> str:
    """A word for the shell, in double quotes where it has single ones."""
    return f'"{word}"' if "'" in word and not {*'"$`\\!'} & {*word} else shlex.quote(word)


def _records(stage: Stage) -> list[Mapping[str, Any]]:
    """What the reader of a preparation finds."""
    config = stage.composed()
    records: list[Mapping[str, Any]] = build(config["data"], plugins=config["plugins"])
    return records


def _cost(stage: Stage) -> str:
    """What is known of a stage before it is run."""
    config = stage.composed()
    if stage.command == "prepare":
        records = _records(stage)
        files = [Path(file) for record in records for file in record["images"].values() if file]
        size = sum(file.stat().st_size for file in files if file.exists()) / 1e9
        spacing = config["prepare"]["spacing"]
        disk = f"; the store about {len(records) * HEAD_MB / spacing**3 / 1000:.1g} GB" if spacing else ""
        return f"  {len(records)} scans, {size:.1g} GB{disk}"
    if config.get("atlas"):
        return "  about two minutes of a core for each atlas and scan"
    if stage.command in ("pretrain", "finetune"):
        data = config["data"]
        stores = data.get("stores") or [data["store"]]  # restoration has none
        if absent := [path for path in stores if path and not (Path(str(path)) / MANIFEST).exists()]:
            return f"  memory and time: again with plan=only when {absent[0]} is there"
        from asa.tasks.run import call

        planned = {"plan": "only"} | ({"data.split.fold": 0} if data["split"].get("fold") == "all" else {})
        call(stage.command, stage.settings, planned)
    return ""
