"""Self-supervised learning on brain MRI. `asa COMMAND ...` is the same as `asa-COMMAND ...`."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from asa import __version__

COMMANDS = (
    *("phantom", "orient", "prepare", "pretrain", "finetune", "predict", "evaluate", "ablate", "export"),
    *("dicom", "embed", "regions", "simulate", "view"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command by its name; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        code: int = importlib.import_module(f"asa.cli.{given[0]}").main(arguments=given[1:])
        return code
    abouts = ((name, importlib.import_module(f"asa.cli.{name}").__doc__) for name in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="asa",
        usage="asa [--help] [--version] COMMAND ...",
        description=__doc__,
        epilog="commands:\n"
        + "\n".join(f"  {name:<10}{about}" for name, about in abouts)
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


if __name__ == "__main__":
    sys.exit(main())
