"""The examples of docs/extending.md: the files of a package `mine`, and the cells of a notebook that uses it."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r"^```(?:python|yaml)\n(?:# (mine/\S+)\n)?(.*?)^```", re.DOTALL | re.MULTILINE)


def write_examples(folder: Path) -> list[str]:
    """Write each block that begins with a file's name to this file in a folder; returns the other blocks."""
    blocks = BLOCK.findall(PAGE.read_text())
    for name, text in blocks:
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return [text for name, text in blocks if not name]
