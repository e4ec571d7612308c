"""Errors as one line for the user, and packages that only an optional extra installs."""

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)  # their messages are written for the user
LONGEST = 2000  # letters of a message: an id or a path of somebody else's may have millions


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, cut if it is very long; its type where it has no message."""
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str | os.PathLike):  # of the system
        path = Path(error.filename)
        try:
            folders = path.absolute().parents
        except FileNotFoundError:
            return f"{path}: the folder in which this runs was removed: put it back, and run this again"
        if gone := [folder for folder in folders if not folder.exists()]:
            return f"{path}: the folder {gone[-1]} was removed while it was in use: put it back, and run this again"
        return f"{path}: no such file or folder"
    text = " ".join(str(error).split())
    cut = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}" if len(text) > LONGEST else text
    return cut or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line; the type of an unexpected error comes first."""
    return one_line(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {one_line(error)}"


def listed(ids: Sequence[str], limit: int = 20) -> str:
    """Ids in one line: the first `limit` of them, and the number of the others."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def counted(number: int, unit: str) -> str:
    """A number with its unit, like "1 scan" or "2 scans"."""
    return f"{number} {unit}{'' if number == 1 else 's'}"


def grouped(messages: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Messages of scans by their text: which scans each is said of, in order."""
    found: dict[str, list[str]] = {}
    for id, texts in messages.items():
        for text in texts:
            found.setdefault(text, []).append(id)
    return found


def require(module: str, extra: str | None, purpose: str) -> Any:
    """Import a module, like `"PIL.Image"`, that belongs to an extra of asa-mri, or to none where it is None.

    An ImportError says what to install, and for which purpose.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        target = f'"asa-mri[{extra}]"' if extra else module.replace("_", "-")
        raise ImportError(
            f"{error.name or module} is not installed, and {purpose} needs it: run pip install {target}"
        ) from None
