"""What all commands share: arguments, help, errors in one line, and the run folder."""

import argparse
import io
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from asa.cli.chain import with_groups_of
from asa.config import CONFIG_DIR, compose, describe, sized_models
from asa.data.io.files import write_whole
from asa.data.splits import write_split
from asa.training.checkpoint import list_checkpoints
from asa.training.device import pick_device
from asa.training.distributed import StoppedElsewhere, is_main, joined, leave, on_main, rank, world_size
from asa.training.lock import LOCK, locked
from asa.training.loop import TrainSettings
from asa.training.signals import RESUME_CODE, Stopped

Config = dict[str, Any]
# What may change when a run goes on: how long, how often it reports, how it is fed and shared out.
FREE_ON_RESUME = (
    "out",
    "loader",
    "predict",
    "plan",
    "data.probe",
    "model.checkpointing",
    "method.model.checkpointing",
    "train.steps",
    "train.accumulate",
    "train.log_every",
    "train.validate_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep",
    "train.best",
    "train.device",
    "train.timeout_minutes",
)


def run_command(
    command: str,
    about: str,
    main: Callable[[Config], None],
    *,
    settings: Mapping[str, type] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse the command line, compose the configuration, and run.

    Args:
        command: name of the YAML file and, after "asa-", of the command.
        about: what it does, for `--help`.
        main: gets the composed configuration.
        settings: typed settings by their key.
        arguments: the command line; that of the process by default.

    Returns:
        0; 1 after an error, which is printed in one line; `RESUME_CODE` where a run was asked to stop and has saved;
        130 after Ctrl-C. Of several processes only the main one prints, but for errors.
    """
    parser = argparse.ArgumentParser(
        prog=f"asa-{command}",
        usage=f"asa-{command} [--help] [--print] [--config-dir DIR] [--traceback] key=value ...",
        description=about,
        epilog=_help_text(command, settings or {}),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    parser.add_argument("--print", action="store_true", help="print the configuration and stop")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups of your own, like experiment/")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    chosen = parser.parse_intermixed_args(arguments)
    code = _run(command, main, settings, chosen)
    leave(code)
    return code


def _run(
    command: str, main: Callable[[Config], None], settings: Mapping[str, type] | None, chosen: argparse.Namespace
) -> int:
    """Compose, run, and turn errors into a line and an exit code."""
    try:
        config = _at_home(compose(command, chosen.overrides, settings=settings, config_dir=chosen.config_dir))
        if chosen.print:
            print(yaml.safe_dump(config, sort_keys=False), end="")
        else:
            with with_groups_of(chosen.config_dir), nullcontext() if is_main() else redirect_stdout(io.StringIO()):
                main(config)
    except KeyboardInterrupt:
        print(f"asa-{command}: interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        if is_main():
            print(f"asa-{command}: {stopped}; the same command goes on from there", file=sys.stderr)
        return RESUME_CODE
    except StoppedElsewhere:
        return 1
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, FloatingPointError, ImportError))
        if chosen.traceback or (world_size() > 1 and not expected):
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        if not expected:
            text = f"{type(error).__name__}: {text} (--traceback shows where; check the types of the settings)"
        place = f"process {rank()}: " if world_size() > 1 else ""
        print(f"asa-{command}: error: {place}{text}", file=sys.stderr)
        return 1
    return 0


def _at_home(node: Any) -> Any:
    """A configuration with `~/` in its values replaced by the home folder."""
    if isinstance(node, dict):
        return {key: _at_home(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_at_home(value) for value in node]
    return str(Path(node).expanduser()) if isinstance(node, str) and node.startswith("~/") else node


def _help_text(command: str, settings: Mapping[str, type]) -> str:
    """The command's YAML with its comments, the typed settings with theirs, and the choices of each group."""
    path = CONFIG_DIR / f"{command}.yaml"
    own = yaml.safe_load(path.read_text())
    lines = ["settings:", *(f"  {line}" for line in _body(path, hidden={"defaults", *settings})), ""]
    for group, cls in settings.items():
        for name, default, note in describe(cls):
            value = own.get(group, {}).get(name, default)
            lines.append(f"  {group}.{name}={_plain(value)}\n      {note}")
        lines.append("")
    for folder in sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir()):
        used = any(folder.name in str(entry) for entry in own["defaults"] if isinstance(entry, dict))
        if not used:
            continue
        choices = sorted(folder.glob("*.yaml"))
        nested = sorted(path for path in folder.glob("*/*.yaml") if path.parent.name != "family")
        names = [str(choice.relative_to(folder).with_suffix("")) for choice in (*choices, *nested)]
        names += sized_models() if folder.name == "model" else []
        lines.append(f"  {folder.name}= one of: {', '.join(names)}")
        if folder.name == "data":  # each reader has keys of its own
            for choice in choices:
                lines += ["", f"  data={choice.stem}", *(f"    {line}" for line in choice.read_text().splitlines())]
    return "\n".join(lines)


def _body(path: Path, hidden: set[str]) -> list[str]:
    """Lines of a YAML file without the blocks of some of its top-level keys."""
    lines, shown = [], True
    for line in path.read_text().splitlines():
        if line and not line.startswith((" ", "-")):
            shown = line.split(":")[0] not in hidden
        if shown:
            lines.append(line)
    return lines


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


@contextmanager
def open_run(config: Config, split: Mapping[str, Sequence[str]], settings: TrainSettings) -> Iterator[Path]:
    """Join the other processes of the job, and make and lock their run folder.

    It holds the configuration and the split. In one that was made with the same settings the run goes on.

    Raises:
        ValueError: the folder holds another run or other files, or is in use.
    """
    run = Path(str(config["out"]))
    with joined(pick_device(settings.device), settings.timeout_minutes), ExitStack() as held:

        def make() -> None:
            _check_folder(run)
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run))
            _check_config(run, config)
            write_whole(run / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
            write_split(run / "split.json", split)

        on_main(make)
        yield run


def _check_folder(run: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    if run.is_file():
        raise ValueError(f"{run} is a file: out= names a folder")
    made = (run / "config.yaml").exists() and (run / "split.json").exists()
    if not made and run.exists() and any(path.name != LOCK for path in run.iterdir()):
        raise ValueError(f"{run} is not empty and not a run: choose another out=")


def _check_config(run: Path, config: Config) -> None:
    """Refuse to go on in a run that was made with other settings.

    A setting that one of the two does not have is no difference while it is off (null, false, 0 or empty): a run goes
    on after an upgrade that brought new ones.
    """
    file = run / "config.yaml"
    if not (list_checkpoints(run) and file.exists()):
        return
    before = _flat(yaml.safe_load(file.read_text()))
    now = _flat(config)
    for key in sorted(before.keys() | now.keys()):
        in_both = key in before and key in now
        same = before[key] == now[key] if in_both else not (before | now)[key]
        if not (same or key.startswith(FREE_ON_RESUME)):
            raise ValueError(
                f"{run} holds a run with other settings ({key} was {before.get(key)}, is {now.get(key)}): "
                "choose another out="
            )


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
