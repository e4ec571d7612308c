"""Files written atomically, with bytes that depend on their content only."""

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

LONGEST_ID = 200  # bytes; file systems allow names of 255
PART = ".part"  # ending of a file while it is written; an interruption may leave one behind


def check_id(id: object) -> None:
    """Check that the id of a scan can name its files, in every file system and table.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(id, str) or not id or not id.isprintable() or id != id.strip() or id.startswith("."):
        reason = "it is empty, begins with a dot, or has blanks at its ends or control characters"
    elif found := sorted(set('/\\:*?"<>|') & set(id)):
        reason = f"it contains {' '.join(found)}"
    elif len(id.encode(errors="surrogatepass")) > LONGEST_ID:
        reason = f"it is longer than {LONGEST_ID} bytes"
    else:
        return
    raise ValueError(f"{id!r}: not usable as an id, because it names files: {reason}; use letters, digits, - and _")


def write_whole(path: str | Path, payload: bytes) -> None:
    """Write a file atomically, under a temporary name that is then renamed; its folder is created if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}{PART}")
    try:
        with part.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, indented by two spaces, with keys in the given order."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore or correct the file") from None


def gzipped(payload: bytes, level: int = 6) -> bytes:
    """Compress without time and file name in the header, so that the same content gives the same bytes."""
    return gzip.compress(payload, compresslevel=level, mtime=0)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path or take the case out of the cohort")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
