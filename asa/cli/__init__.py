"""Self-supervised learning on brain MRI. `asa COMMAND ...` is the same as `asa-COMMAND ...`."""

import os

# PyTorch's threads wait for each other by spinning: beside other busy processes a step took three times as long.
# libgomp reads this when torch is loaded, so it is set before any command imports it; a value that is given stays.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import difflib
import io
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

import asa
from asa import __version__
from asa.cli.manual import OPTIONS, examples, help_text
from asa.config import as_overrides, compose, written
from asa.errors import EXPECTED, counted, grouped, reason_of
from asa.settings import Config
from asa.tasks import COMMANDS as TASKS
from asa.tasks.checks import check, follow_init, say_followed
from asa.training.process import RESUME_CODE, MainRankFailed, Stopped, exit_process, is_main, rank, world_size

# --- a command


@dataclass(frozen=True)
class Command:
    """A command, imported when it runs."""

    name: str  # of its YAML file and, after "asa-", of the command
    target: str  # "module:function", which gets the composed configuration
    about: str  # what it does, for `--help`
    words: Sequence[str] = ()  # keys of arguments that are typed without one, in their order

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run it with the arguments of a command line, by default those of the process.

        Help, and most errors in settings, need neither torch nor MONAI: the target is imported after them.

        Returns:
            0; 1 after an error, which is printed in one line; `RESUME_CODE` where a run was asked to stop and has
            saved; 130 after Ctrl-C. Of several processes only the main one prints, but for errors.
        """
        given = list(sys.argv[1:] if arguments is None else arguments)
        chosen = self._parser().parse_intermixed_args(["--help"] if given == ["help"] else [*self._with_keys(given)])
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, self.name, warnings.showwarning)
            code = self._run(chosen)
        exit_process(code)
        return code

    def _parser(self) -> argparse.ArgumentParser:
        words = " ".join([*map(str.upper, self.words), "key=value ..."])
        parser = argparse.ArgumentParser(
            prog=f"asa-{self.name}",
            usage=f"asa-{self.name} [--help] [--version] [--print] [--config-dir DIR] [--traceback] {words}",
            description=f"{self.about}\n\nexamples:\n{indent(examples(self.name), '  ')}",
            epilog=help_text(self.name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
        parser.add_argument("--print", action="store_true", help=OPTIONS["--print"])
        parser.add_argument("--config-dir", metavar="DIR", help=OPTIONS["--config-dir"])
        parser.add_argument("--traceback", action="store_true", help=OPTIONS["--traceback"])
        parser.add_argument("--version", action="version", version=f"asa {__version__}")
        return parser

    def _with_keys(self, given: list[str]) -> Iterator[str]:
        """Arguments; words without a key get those of `words` in their order."""
        keys, before = iter(self.words), ""
        for word in given:
            value = word.startswith("-") or "=" in word or before == "--config-dir"
            key, before = None if value else next(keys, None), word
            yield f"{key}={written(word)}" if key else word

    def _run(self, chosen: argparse.Namespace) -> int:
        """Compose, run, and turn errors into a line and an exit code."""
        command = self.name
        try:
            if sys.platform == "win32":
                raise ValueError("commands need Linux or macOS: on Windows run them in WSL 2 (docs/faq.md)")
            followed = follow_init(command, chosen.overrides)
            overrides = [*chosen.overrides, *as_overrides(command, followed)]
            config = compose(command, overrides, config_dir=chosen.config_dir)
            if chosen.config_dir and "config_dir" in config:  # of a command that composes the configurations of others
                config["config_dir"] = chosen.config_dir
            if chosen.print:
                print(yaml.safe_dump(config, sort_keys=False), end="")
            else:
                check(command, config)
                with nullcontext() if is_main() else redirect_stdout(io.StringIO()):
                    say_followed(followed)
                    pkgutil.resolve_name(self.target)(config)
        except KeyboardInterrupt:
            print(f"asa-{command}: interrupted", file=sys.stderr)
            return 130
        except Stopped as stopped:
            if is_main():
                print(f"asa-{command}: {stopped}; the same command goes on from there", file=sys.stderr)
            return RESUME_CODE
        except MainRankFailed:
            return 1
        except Exception as error:
            expected = isinstance(error, EXPECTED)
            if chosen.traceback or (world_size() > 1 and not expected):
                traceback.print_exc()
            advice = "" if expected else " (--traceback shows where; check the types of the settings)"
            place = f"process {rank()}: " if world_size() > 1 else ""
            print(f"asa-{command}: error: {place}{reason_of(error)}{advice}", file=sys.stderr)
            return 1
        return 0


def _show_warning(command: str, usual: Any, message: Warning | str, category: Any, file: str, *rest: Any) -> None:
    """Print a warning of this package in one line; those of libraries keep their form."""
    if category is not UserWarning or not Path(file).is_relative_to(Path(asa.__file__).parent):
        usual(message, category, file, *rest)
    elif is_main():
        print(f"asa-{command}: warning: {message}", file=sys.stderr)


# --- the commands that are a single call, with what they print


def make_phantoms(config: Config) -> None:
    from asa.data.phantom.cohort import make_cohort
    from asa.data.phantom.planted import plant_cohort

    out, source, planted = Path(str(config["out"])), config["source"], config["kind"] == "lesions"
    if (source is not None) != planted:
        raise ValueError("source= is a store for kind=lesions, which needs one: give both or neither")
    if planted:
        keys = ("lesions", "planted", "draws", "joined", "seed", "subjects")
        files = plant_cohort(source, out, **{key: config[key] for key in keys})
    else:
        own = {key: config[key] for key in ("kind", "seed", "resolution", "rim", "names")}
        files = make_cohort(out=out, subjects=10 if config["subjects"] is None else config["subjects"], **own)
    print(f"wrote {counted(len(files), 'file')} to {out}")


def set_orientation(config: Config) -> None:
    """Write the files; a ValueError after the list of those that failed: the others are written."""
    from asa.data.io.files import failure_lines
    from asa.data.io.orientation import orient_files

    source, out = Path(str(config["input"])), Path(str(config["out"]))
    done, kept, failures = orient_files(source, out, str(config["axes"]))
    for line in failure_lines(failures, "file"):
        print(line)
    if kept:
        print(f"not written, as an orientation is stored: {counted(len(kept), 'file')}, like {kept[0]}")
    if failures:
        raise ValueError(f"{counted(len(failures), 'file')} failed, listed above")
    print(f"wrote {counted(len(done), 'file')} to {config['out']}: check the results, left and right above all")


def convert_dicom(config: Config) -> None:
    """Convert the series; a ValueError after the list of those that are in no volume: the others are written."""
    from asa.data.io.dicom import TABLE, convert_series
    from asa.data.io.files import failure_lines

    report = convert_series(Path(str(config["input"])), Path(str(config["out"])))
    for line in failure_lines(report.failures, "file"):
        print(line)
    for warning, names in grouped(report.warnings).items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        print(f"{names[0]}{others}: warning: {warning}")
    if not report.written:
        raise ValueError(f"{config['input']}: no series is a volume")
    volumes = counted(len(report.written), "volume")
    if report.failures:
        failed = f"{len(report.failures)} series or files are in no volume, listed above"
        raise ValueError(f"{failed}; {volumes} written to {config['out']}")
    print(f"wrote {volumes} to {config['out']}; names and {TABLE} hold patients' ids and dates")


def write_export(config: Config) -> None:
    from asa.export.hub import export_hub
    from asa.export.monai_bundle import export_bundle
    from asa.export.nnunet import export_nnunet
    from asa.export.onnx import export_onnx

    out = Path(str(config["out"]))
    if config["format"] == "nnunet":
        about = export_nnunet(config["store"], out)
        print(f"wrote {out}: {about['numTraining']} training cases, labels {about['labels']}")
    elif config["format"] == "onnx":
        difference = export_onnx(config["checkpoint"], out, plugins=config["plugins"])
        print(f"wrote {out}; its outputs differ from PyTorch's by at most {difference:.1e} of the largest")
    elif config["format"] == "bundle":
        export_bundle(config["checkpoint"], out, plugins=config["plugins"])
        print(f"wrote {out}; {out}/docs/README.md says how MONAI runs it")
    else:
        card = {key: config[key] for key in ("licence", "trained_on", "evaluation")}
        export_hub(config["checkpoint"], out, **card, plugins=config["plugins"])
        print(f"wrote {out}: read {out}/README.md, then publish it with hf upload ORG/NAME {out}")


# --- all commands

phantom = Command("phantom", "asa.cli:make_phantoms", "Make a phantom cohort, to try every command.")
orient = Command("orient", "asa.cli:set_orientation", "Write files that store no orientation with one that you state.")
dicom = Command("dicom", "asa.cli:convert_dicom", "Convert DICOM series to NIfTI files, for asa-prepare.")
prepare = Command("prepare", TASKS["prepare"], "Prepare raw scans into a store: checked, parallel and resumable.")
pretrain = Command("pretrain", TASKS["pretrain"], "Pretrain an encoder on unlabelled scans.")
finetune = Command(
    "finetune",
    TASKS["finetune"],
    "Fine-tune a segmentation, classification or regression network, from a pretrained encoder or from scratch.",
)
predict = Command(
    "predict",
    TASKS["predict"],
    "Label maps of new scans from a trained network or registered atlases, or anomaly maps.",
)
embed = Command("embed", TASKS["embed"], "Features of scans from a frozen encoder, as a table.")
evaluate = Command(
    "evaluate",
    TASKS["evaluate"],
    "Score predicted label maps against true ones under a named policy, or compare such evaluations.",
)
ablate = Command(
    "ablate",
    TASKS["ablate"],
    "Compare arms of the method (the paper's Table 4) over numbers of labelled subjects and seeds, in one table.",
)
export = Command(
    "export",
    "asa.cli:write_export",
    "Write a trained network as ONNX, a MONAI bundle or a folder for the Hub, or a store as a dataset of nnU-Net.",
)
view = Command(
    "view", "asa.reporting.viewing:view_task", "Look at a store, predictions or reconstructions in a browser."
)
run = Command(
    "run",
    "asa.cli.study:run_study",
    "A whole study of folders of scans: prepare, pretrain, fine-tune, compare and predict, in one command.",
    ("labelled", "unlabelled", "new"),
)
regions = Command(
    "regions", "asa.restoration.region_maps:regions", "Divide images into regions, and store the label maps."
)
simulate = Command(
    "simulate", "asa.restoration.simulation:simulate", "Simulate degraded images from clean ones, for restoration."
)

_LISTED = (run, phantom, orient, dicom, prepare, pretrain, finetune, predict, embed, evaluate, ablate, export, view)
COMMANDS = {command.name: command for command in (*_LISTED, regions, simulate)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command by its name; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        given = [*given[1:2], "--help"]
    if given and given[0] in COMMANDS:
        return COMMANDS[given[0]].main(given[1:])
    parser = argparse.ArgumentParser(
        prog="asa",
        usage="asa [--help] [--version] COMMAND ...",
        description=__doc__,
        epilog="commands:\n"
        + "\n".join(f"  {name:<10}{command.about}" for name, command in COMMANDS.items())
        + "\n\nasa COMMAND --help lists the settings of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"asa {__version__}")
    _, others = parser.parse_known_args(given)
    if not others:
        parser.print_help()
        return 0
    near = difflib.get_close_matches(others[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    print(f"asa: error: no command {others[0]!r}: {hint}", file=sys.stderr)
    return 1
