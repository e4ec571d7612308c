"""The manual of a command: its examples and its keys, for `--help` and for the pages of the site.

Both come from the YAML files: a comment above a key, or behind its value, is its meaning; the comment that a command's
file begins with holds the examples.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from asa.config import CONFIG_DIR, SETTINGS, choices

WIDTH = 100
OPTIONS = {
    "--print": "print the configuration and stop",
    "--config-dir": "a folder of your own with experiment/, model/, ...; plugins are searched beside it",
    "--traceback": "show where an error came from",
}


class Key(NamedTuple):
    """A setting, or a group of settings where `default` is None."""

    name: str
    default: str | None
    note: str

    @property
    def required(self) -> bool:
        return (self.default or "").startswith("required")

    @property
    def in_words(self) -> bool:
        """Whether the default is no value that could be typed."""
        return self.required or (self.default or "").startswith("that of")


class Section(NamedTuple):
    """Keys that belong together."""

    title: str
    keys: list[Key]


def examples(command: str) -> str:
    """Command lines, each below a line that says what it is for."""
    return _parts((CONFIG_DIR / f"{command}.yaml").read_text())[0]


def sections(command: str, *, every: bool = False) -> list[Section]:
    """The keys of a command: those that are required or in its examples, then the others.

    With `every` those of every method and model, not only of the command's own.
    """
    text = (CONFIG_DIR / f"{command}.yaml").read_text()
    own, typed = yaml.safe_load(text), SETTINGS.get(command, {})
    keys = [key for key in _keys(text) if key.name.partition(".")[0] not in typed]
    for group, target in typed.items():
        values = own.get(group, {})
        for field in fields(target):
            default = values.get(field.name, getattr(target(), field.name))
            keys.append(Key(f"{group}.{field.name}", _plain(default), field.metadata["help"]))
    chosen = [next(iter(entry.items())) for entry in own["defaults"] if isinstance(entry, dict)]
    groups = {group: name for group, name in chosen if group not in typed}
    found = []
    for group, default in groups.items():
        names = choices(command, group)
        note = f"one of: {', '.join(names)}" if names else "a file of your own, in a folder that --config-dir names"
        keys.append(Key(group, _plain(default), note))
        if group == "data":  # each reader has keys of its own
            shown = [name for name in names if every or "/" not in name]
        else:
            shown = names if every and group != "experiment" else [default] if default else []
        files = {_file_of(group, name): name for name in shown}  # the sizes of a model share a file
        for file, name in files.items():
            text = file.read_text()
            about = " ".join(_parts(text)[0].split())  # that of a model begins with its names
            title = about if group == "model" else f"{group}={name}: {about}"
            found.append(Section(title, list(_keys(text, "" if "_global_" in text else f"{group}."))))
    used = set(re.findall(r"[\s'+]([\w.]+)=", examples(command)))
    first = [key for key in keys if key.required or key.name in used]
    others = [key for key in keys if key not in first]
    return [Section("Set most often", first), *([Section("Others", others)] if others else []), *found]


def help_text(command: str) -> str:
    """The keys of a command as text."""
    lines = ["settings:"]
    for section in sections(command):
        lines += ["", *textwrap.wrap(section.title, WIDTH, initial_indent="  ", subsequent_indent="  ")]
        for key in section.keys:
            value = "" if key.default is None else f"  ({key.default})" if key.in_words else f"={key.default}"
            lines += textwrap.wrap(f"{key.name}{value}", WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6)
            lines += textwrap.wrap(key.note, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _file_of(group: str, name: str) -> Path:
    file = f"family/{name.rpartition('_')[0]}" if group == "model" else name
    return CONFIG_DIR / group / f"{file}.yaml"


def _parts(text: str) -> tuple[str, str]:
    """The comment that a file begins with, and the rest with empty lines in its place."""
    lines = text.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    header = [line.removeprefix("#").removeprefix(" ") for line in lines[:end] if "@package" not in line]
    return "\n".join(header), "\n".join([""] * end + lines[end:])


def _keys(text: str, prefix: str = "") -> Iterator[Key]:
    """The keys of a YAML file in their order, but for those that only Hydra reads."""
    body = _parts(text)[1]
    yield from _walk(yaml.compose(body), body.splitlines(), prefix)


def _walk(node: Any, lines: list[str], prefix: str) -> Iterator[Key]:
    for key, value in node.value:
        name, row = f"{prefix}{key.value}", key.start_mark.line
        if key.value.startswith("_") or key.value == "defaults" or value.value == f"${{{key.value}}}":
            continue
        above = row
        while above and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        notes = [line.lstrip(" #") for line in lines[above:row]]
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            if notes:
                yield Key(name, None, " ".join(notes))
            yield from _walk(value, lines, f"{name}.")
            continue
        begin, end = value.start_mark, value.end_mark
        shown = " ".join(" ".join(lines[begin.line : end.line + 1])[begin.column :].partition("  #")[0].split())
        behind = lines[end.line][end.column :].partition("#")[2].strip()
        if shown == "???" or behind.startswith("required"):
            shown, behind = behind or "required", ""
        yield Key(name, re.sub(r"^\$\{([\w.]+)\}$", r"that of \1", shown), " ".join([*notes, behind]).strip())


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
