"""What all commands share: arguments, help, and errors in one line."""

import argparse
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
from asa.errors import EXPECTED, reason_of
from asa.tasks.checks import check, follow_init, say_followed
from asa.training.process import RESUME_CODE, MainRankFailed, Stopped, exit_process, is_main, rank, world_size


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
        name, typed = f"asa-{self.name}", " ".join([*map(str.upper, self.words), "key=value ..."])
        parser = argparse.ArgumentParser(
            prog=name,
            usage=f"{name} [--help] [--version] [--print] [--config-dir DIR] [--traceback] {typed}",
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
    """Print a warning of ours in a line of its own; those of libraries keep their form."""
    if category is not UserWarning or not Path(file).is_relative_to(Path(asa.__file__).parent):
        usual(message, category, file, *rest)
    elif is_main():
        print(f"asa-{command}: warning: {message}", file=sys.stderr)
