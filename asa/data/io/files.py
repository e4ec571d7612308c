"""Files written atomically, with bytes that depend on their content only; and text that is read with the file named."""

import errno
import fnmatch
import gzip
import hashlib
import json
import os
import secrets
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from asa.errors import counted, one_line

LARGEST_YAML = 100_000  # values in a configuration; a repeated alias makes billions of a few lines
LONGEST_ID = 200  # bytes; file systems allow names of 255
DIGESTS = "digests.json"  # SHA-256 of files in its folder, by name
ANNEX = b"/annex/objects/"  # in the links of git-annex, and at the beginning of its pointer files
NOT_HERE = "its content is not here, only a link of git-annex: run datalad get or git annex get in its dataset"
PART = ".part"  # ending of a file while it is written; an interruption may leave one behind
FREESURFER = (".mgz", ".mgh")
ITK = (".nrrd", ".mha")  # read by SimpleITK (extra prepare)
IMAGE_ENDINGS = (".nii.gz", ".nii", ".hdr", ".img", ".hdr.gz", ".img.gz", *FREESURFER, *ITK)
VOLUME_ENDINGS = (".nii.gz", ".nii", *FREESURFER, *ITK)  # of one file each, which stores an orientation


def check_id(id: object) -> None:
    """Raise a ValueError for an id of a scan that cannot name its files in every file system and table."""
    if isinstance(id, str) and not is_utf8(id):
        reason = "it is not in UTF-8, as names in tables are"
    elif not isinstance(id, str) or not id or not id.isprintable() or id != id.strip() or id.startswith("."):
        reason = "it is empty, begins with a dot, or has blanks at its ends or control characters"
    elif found := sorted(set('/\\:*?"<>|') & set(id)):
        reason = f"it contains {' '.join(found)}"
    elif len(id.encode(errors="surrogatepass")) > LONGEST_ID:
        reason = f"it is longer than {LONGEST_ID} bytes"
    else:
        return
    shown = f"{id[:60]!r}..." if isinstance(id, str) and len(id) > LONGEST_ID else repr(id)
    raise ValueError(f"{shown}: not usable as an id, because it names files: {reason}; use letters, digits, - and _")


def is_utf8(name: str) -> bool:
    """Whether the name of a file is in UTF-8; Python marks the bytes of one that is not."""
    return name.encode(errors="ignore").decode() == name


def open_unlinked(path: str | Path, mode: str) -> IO[Any]:
    """Open a file that may exist for writing, but not through a symbolic link, which may lead to any of the user's."""
    try:
        return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(f"{path}: is a symbolic link, and nothing is written through one: remove it") from None


def matching_files(root: str | Path, *patterns: str, folders: bool = False) -> list[Path]:
    """The files (or `folders`) below a folder that globs match, sorted; links to folders are followed, by ** too.

    Patterns are those of `Path.glob`. Folders whose names begin with a dot are searched only where one names them.
    Python's own search passes over links, and over folders that cannot be read. Here a warning names the first of those
    folders, of the links that lead nowhere or to a folder that contains them, which is not followed twice, and of the
    names whose capitals alone do not match. Links of git-annex, and names that begin with a dot, are not counted.
    """
    found: set[Path] = set()
    passed: defaultdict[str, set[Path]] = defaultdict(set)  # reason -> what was passed over

    def search(folder: Path, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> None:
        try:
            status = folder.stat()
            mark = (status.st_dev, status.st_ino)
            if mark in above:
                passed["a link to a folder that contains it"].add(folder)
                return
            entries = list(os.scandir(folder))
        except OSError as error:
            passed[error.strerror or one_line(error)].add(folder)
            return
        part, rest = parts[0], parts[1:]
        if part == "**":
            search(folder, rest or ("*",), above)
        for entry in entries:
            path, hidden, inner = folder / entry.name, entry.name.startswith("."), part == "**" or bool(rest)
            if hidden if part == "**" else not fnmatch.fnmatchcase(entry.name, part):
                if not hidden and fnmatch.fnmatchcase(entry.name.lower(), part.lower()):
                    passed[f"its capitals are not those of {part}"].add(path)
            elif os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                if inner:
                    search(path, parts if part == "**" else rest, (*above, mark))
                elif folders:
                    found.add(path)
            elif not inner and not folders:
                found.add(path)
            elif entry.is_symlink() and not hidden and not path.is_file() and not _is_annexed(path):
                passed["a link that leads nowhere"].add(path)

    for pattern in patterns:
        search(Path(root), Path(pattern).parts, ())
    for reason, paths in sorted(passed.items()):
        if paths := paths - found:
            others = f", and {len(paths) - 1} more" if len(paths) > 1 else ""
            warnings.warn(f"{min(paths)}: not searched ({reason}){others}", stacklevel=2)
    return sorted(found)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An error of writing, as on a full disk, names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def whole_file(path: str | Path, *, make_folder: bool = True) -> Iterator[IO[bytes]]:
    """A file to write atomically, under a temporary name that is then renamed.

    Without `make_folder`, a FileNotFoundError names a folder that was removed meanwhile: a new one would hold no other.
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, so that two processes that write the same file do not write into one another's.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with naming(path), part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None  # and not the temporary name
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, payload: bytes, *, make_folder: bool = True) -> None:
    """Write a file atomically: see `whole_file`."""
    with whole_file(path, make_folder=make_folder) as file:
        file.write(payload)


def make_below(root: Path, *files: Path) -> None:
    """Create the folders of files inside one that exists; a FileNotFoundError if that was removed meanwhile."""
    for file in files:
        for folder in reversed(file.parents[: len(file.relative_to(root).parts) - 1]):
            folder.mkdir(exist_ok=True)
    check_kept(root)


def check_kept(folder: Path) -> None:
    """Raise a FileNotFoundError, which names it, if a folder that is written to was removed meanwhile."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / "*"))


def check_out(out: Path, mark: str, what: str) -> None:
    """Raise a ValueError for a folder that holds other files and not `mark`, which each folder of kind `what` has."""
    if out.is_file() or (out.exists() and any(out.iterdir()) and not (out / mark).is_file()):
        raise ValueError(f"{out} is not empty and not {what}: choose another out=")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, indented by two spaces, with keys in the given order."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON; a ValueError or FileNotFoundError names a file that is not valid, has a key twice, or is missing."""
    try:
        return STRICT_JSON.decode(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); restore or correct the file") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"a key is twice among {', '.join(found)[:100]}")
    return found


JSON = json.JSONDecoder(parse_constant=_refuse)  # of finite numbers
STRICT_JSON = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_once)  # and of a key once in an object


class _WithoutMerging(yaml.SafeLoader):
    """YAML without merge keys: ten lines of them, which copy as they are read, make ten thousand million entries."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("a merge key, <<, which asa does not write")
        super().flatten_mapping(node)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the configuration of a run, a mapping in YAML.

    Raises:
        FileNotFoundError, ValueError: no such file; not YAML, merge keys, no mapping, or over `LARGEST_YAML` values.
    """
    try:
        content = yaml.load(_text(path), _WithoutMerging)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date may be none, and numbers too long
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}); restore the file") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: is empty or not a mapping of settings; restore the file")
    nodes: list[Any] = [content]
    for node in nodes:  # of which there are more and more
        if isinstance(node, dict | list):
            nodes += node.values() if isinstance(node, dict) else node
        if len(nodes) - 1 > LARGEST_YAML:
            raise ValueError(f"{path}: more than {LARGEST_YAML} values; this is no configuration of a run")
    return content


def _text(path: str | Path) -> str:
    check_present(Path(path), "")
    return Path(path).read_text(encoding="utf-8")


def gzipped(payload: bytes, level: int = 6) -> bytes:
    """Compress without time and file name in the header, so that the same content gives the same bytes."""
    return gzip.compress(payload, compresslevel=level, mtime=0)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits; a FileNotFoundError where there is none."""
    path = Path(path)
    check_present(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_present(path: Path, advice: str = "; check the path, or leave this scan out") -> None:
    """Raise a FileNotFoundError for a file that is missing, or whose content git-annex (DataLad) has elsewhere."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {NOT_HERE if _is_annexed(path) else f'no such file{advice}'}")
    with path.open("rb") as file:
        if file.read(len(ANNEX)) == ANNEX:
            raise FileNotFoundError(f"{path}: {NOT_HERE}")


def failure_lines(failures: Mapping[str, str], unit: str = "scan") -> list[str]:
    """A line for each failure, name -> reason; those whose content git-annex has elsewhere share one, the last."""
    absent = [name for name, reason in failures.items() if reason.endswith(NOT_HERE)]
    lines = [f"{name}: failed: {reason}" for name, reason in failures.items() if name not in absent]
    if absent:
        lines.append(f"{absent[0]}: failed: {failures[absent[0]]} ({counted(len(absent), unit)} like this one)")
    return lines


def _is_annexed(path: Path) -> bool:
    return path.is_symlink() and ANNEX.decode() in os.readlink(path)


def write_digests(folder: Path, names: Iterable[str]) -> None:
    """Write the SHA-256 of files of a folder into its `DIGESTS`, which keeps those of other files."""
    before: Any = None
    with suppress(FileNotFoundError, ValueError):
        before = read_json(folder / DIGESTS)
    others = before if isinstance(before, dict) else {}
    write_json(folder / DIGESTS, others | {name: sha256_of(folder / name) for name in names})


def check_digest(path: str | Path, *, listed: bool = False) -> None:
    """Raise a ValueError for a file that has changed since its SHA-256 was written beside it, if one was.

    `listed`: where there are digests of other files, its own has to be among them.
    """
    path = Path(path)
    digests = path.with_name(DIGESTS)
    if not digests.is_file():
        return
    found = read_json(digests)
    if not isinstance(found, dict):
        raise ValueError(f"{digests}: no digests of files: restore it, or remove it to leave out the comparison")
    if (listed or path.name in found) and sha256_of(path) != found.get(path.name):
        raise ValueError(
            f"{path}: has changed since it was written: its SHA-256 is not that in {DIGESTS}. Restore it; if you "
            "changed it on purpose, remove its entry there"
        )
