"""Commands called by commands, in this process."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from asa.config import compose

_OWN_GROUPS: ContextVar[str | None] = ContextVar("config_dir", default=None)


@contextmanager
def with_groups_of(config_dir: str | None) -> Iterator[None]:
    """Let the commands that are called meanwhile find the configurations of the user's folder; None: of none."""
    before = _OWN_GROUPS.set(config_dir)
    try:
        yield
    finally:
        _OWN_GROUPS.reset(before)


def call(command: str, *settings: Mapping[str, Any]) -> None:
    """Run a command with settings as on its command line, `--config-dir` too; what is given later wins.

    Args:
        command: its name, without "asa-".
        settings: nested, or by dotted key.

    Raises:
        ValueError: a setting that the command does not have, and whatever the command raises.
    """
    module = importlib.import_module(f"asa.cli.{command}")  # now: a command that calls others is one of them
    chosen: dict[str, str] = {}
    for node in settings:
        chosen |= arguments(node)
    overrides = [f"{key}={value}" for key, value in chosen.items()]
    settings_of = getattr(module, "SETTINGS", {})
    getattr(module, command)(compose(command, overrides, settings=settings_of, config_dir=_OWN_GROUPS.get()))


def arguments(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value in the grammar of the command line, for nested settings."""
    found: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= arguments(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _written(value)
    return found


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(_written(item) for item in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    quoted = str(value).replace("'", "\\'")
    return f"'{quoted}'"
