"""Pages that mkdocs adds to those in docs/: tables of each command's keys, recipes, the public API."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from asa.cli import COMMANDS
from asa.cli.manual import OPTIONS, Key, Section, examples, sections

ROOT = Path(__file__).parents[1]
PUBLIC = re.compile(r"^from \.(?P<module>[\w.]+) import (?P<name>\w+) as (?P=name)$", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and their places in the navigation (a hook of mkdocs)."""
    for folder, heading, about, pages in (
        ("recipes", "Recipes", "An experiment is a file of settings, taken with `experiment=NAME`.", recipe_pages()),
        ("commands", "Commands", "`--help` prints what these pages say.", command_pages()),
        ("api", "Python", "What `import asa` offers, by the module that it is in.", api_pages()),
    ):
        rows = [f"| [{name}]({name}.md) | {line} |" for name, (line, _) in sorted(pages.items())]
        index = "\n".join([f"# {heading}", "", about, "", "| | |", "|---|---|", *rows, ""])
        texts = {"index": index} | {name: text for name, (_, text) in sorted(pages.items())}
        for name, text in texts.items():
            files.append(File.generated(config, f"{folder}/{name}.md", content=text))
        assert config.nav is not None
        fill(config.nav, f"{folder}/", [f"{folder}/{name}.md" for name in texts])
    return files


def fill(nav: Any, place: str, pages: list[str]) -> None:
    """Put pages where the navigation of mkdocs.yml names their folder."""
    for key, entry in nav.items() if isinstance(nav, dict) else enumerate(nav):
        if entry == place:
            nav[key] = pages
        elif isinstance(entry, list | dict):
            fill(entry, place, pages)


def command_pages() -> dict[str, tuple[str, str]]:
    """A page for each command: its examples, and tables of its keys."""
    pages = {}
    for name, command in COMMANDS.items():
        parts = [f"# asa-{name}", command.about, "## Examples"]
        for line in examples(name).splitlines():
            parts.append(f"```\n{line.strip()}\n```" if line.startswith(" ") else line)
        found = sections(name, every=True)
        found.append(Section("Options", [Key(option, "", note) for option, note in OPTIONS.items()]))
        for title, keys in found:
            rows = [f"| `{key.name}` | {default_of(key)} | {cell(key.note)} |" for key in keys]
            heading, _, about = title.partition(": ")
            parts += [f"## {heading}", *([about] if about else [])]
            parts.append("\n".join(["| key | default | meaning |", "|---|---|---|", *rows]))
        pages[f"asa-{name}"] = (command.about, "\n\n".join(parts) + "\n")
    return pages


def default_of(key: Key) -> str:
    """A default in a cell of a table: a value as code, words as they are."""
    return cell(key.default or "") if key.in_words or not key.default else f"`{key.default}`"


def cell(text: str) -> str:
    """Text in a cell of a table, where none of its characters is Markdown."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("<", "&lt;")


def recipe_pages() -> dict[str, tuple[str, str]]:
    """A page for each experiment: its header as text, and its settings."""
    pages = {}
    for file in (ROOT / "configs" / "experiment").glob("*.yaml"):
        lines = file.read_text().splitlines()[1:]  # without Hydra's @package
        end = next(k for k, line in enumerate(lines) if not line.startswith("#"))
        header = [line.removeprefix("#").strip() for line in lines[:end]]
        parts = [f"# {file.stem}"]
        for command, group in itertools.groupby(header, lambda line: line.startswith(("asa-", "python "))):
            found = list(group)
            parts.append("\n".join(["```", *found, "```"]) if command else " ".join(found))
        parts.append("```yaml\n" + "\n".join(lines[end:]).strip() + "\n```")
        text = next(part for part in parts[1:] if not part.startswith("```"))
        pages[file.stem] = (re.split(r"(?<=[.:]) ", text)[0], "\n\n".join(parts) + "\n")
    return pages


def api_pages() -> dict[str, tuple[str, str]]:
    """A page for each module with public names."""
    names: dict[str, list[str]] = {}
    for module, name in public_names():
        if name not in names.setdefault(module, []):
            names[module].append(name)
    return {
        module: (", ".join(f"`{name}`" for name in found), f"# {module}\n\n::: {module}\n")
        for module, found in names.items()
    }


def public_names() -> Iterator[tuple[str, str]]:
    """The module and the name of everything that `asa` and `asa.models` offer."""
    for package in ("asa", "asa.models"):
        text = (ROOT / package.replace(".", "/") / "__init__.pyi").read_text()
        for found in PUBLIC.finditer(text):
            yield f"{package}.{found['module']}", found["name"]
