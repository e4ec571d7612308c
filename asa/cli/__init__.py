"""Self-supervised learning on brain MRI. `asa COMMAND ...` is the same as `asa-COMMAND ...`."""

import os

# PyTorch's threads wait for each other by spinning: beside other busy processes a step took three times as long.
# libgomp reads this when torch is loaded, so it is set before any command imports it; a value that is given stays.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import difflib
import sys
from collections.abc import Sequence

from asa import __version__
from asa.cli.front import Command
from asa.tasks import COMMANDS as TASKS

phantom = Command("phantom", "asa.cli.tools:make_phantoms", "Make a phantom cohort, to try every command.")
orient = Command("orient", "asa.cli.tools:orient", "Write files that store no orientation with one that you state.")
dicom = Command("dicom", "asa.cli.tools:convert_dicom", "Convert DICOM series to NIfTI files, for asa-prepare.")
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
    "asa.cli.tools:export",
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
