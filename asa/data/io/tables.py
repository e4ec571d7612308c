"""Tables with a value for each scan: CSV, and by their ending TSV and Parquet (extra parquet)."""

import csv
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asa.data.io.files import check_present, write_whole
from asa.errors import counted, listed, one_line, require

PARQUET = ".parquet"
ENDINGS = (".csv", ".tsv", PARQUET)
EMPTY = ("", "n/a")  # cells; the second is that of BIDS
# Columns that name what a row is about -> the same of a scan.
NAMED_BY = {"id": "id", "subject": "subject", "participant_id": "subject"}
SESSION = "session_id"  # column of BIDS, of a table by subject and session
_SESSION = re.compile(r"(?:^|_)ses[-_]([^_]+)", re.IGNORECASE)  # in an id
# Columns of the tables that asa-predict writes; in a table of numbers no other column is called so. The last two are
# the beginning of the SHA-256 of each network's weights, and whether one of them was trained on the scan.
PREDICTED, TRAINING_MEAN, NETWORK, TRAINED_ON = "predicted", "training_mean", "network", "trained_on"
RESERVED = ("id", "subject", PREDICTED, TRAINING_MEAN, NETWORK, TRAINED_ON)
# A Parquet file of 32 kB can hold millions of equal rows. So many cells are read and bytes unpacked however small the
# file is, and beyond them one cell, or 20 bytes, per byte of the file.
MANY_CELLS, SMALL, LARGEST_RATIO = 1_000_000, 1 << 26, 20
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters that make a spreadsheet compute a cell


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table, cells without blanks at their ends; what `csv_text` quoted is as it was before.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no table in UTF-8, a Parquet that holds far more than its size accounts for, two columns with one
            name, or a row with fewer or more cells.
        ImportError: a .parquet without the `parquet` extra.
    """
    path = Path(path)
    if path.suffix == PARQUET:
        names, columns = _parquet_columns(path)
        return [dict(zip(names, map(_cell, row), strict=True)) for row in zip(*columns, strict=True)]
    with _text_rows(path) as reader:
        header, own = [name for name in reader.fieldnames or () if name], _delimiter(path)
        if len(header) == 1 and (others := [mark for mark in SEPARATORS if mark != own and mark in header[0]]):
            found = f"by {SEPARATORS[others[0]]}, and have to be by {SEPARATORS[own]}"
            raise ValueError(f"{path}: its columns are separated {found}: export it again")
        if len(set(header)) < len(header) or not all(name.isprintable() for name in header):
            raise csv.Error("two columns have one name, or a name has line breaks")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                given = [cell for cell in row.values() if isinstance(cell, str)] + list(row.get(None, ()))
                raise ValueError(
                    f"{path}: line {reader.line_num} has {len(given)} cells, and the table {len(row.keys() - {None})} "
                    "columns: write decimals with a point, quote a cell with a comma, and leave no cell out"
                )
            rows.append({key: _unquoted(value.strip()) for key, value in row.items()})
        return rows


def read_header(path: Path) -> list[str]:
    """Names of the columns of a table, of which no rows are read; a ValueError where it is none."""
    if path.suffix == PARQUET:
        with _parquet_errors(path) as arrow:
            return list(arrow.parquet.read_schema(path).names)
    with _text_rows(path) as reader:
        return list(reader.fieldnames or ())


def check_own(table: Path, command: str, required: Collection[str], others: str = ".*") -> None:
    """Raise a ValueError for a table, if there is one, that a command cannot replace or add to as it is not its own.

    Each table of the command has the columns `required`, and `others` is a regular expression of all other names.
    """
    names, own = set(read_header(table) if table.exists() else ()), set(required)
    if names and not (own <= names and all(re.fullmatch(others, name) for name in names - own)):
        raise ValueError(f"{table}: exists and is no table of {command}: choose another out=")


def short(*digests: str) -> str:
    """What tables call networks by: the beginnings of the SHA-256 of their weights."""
    return "+".join(digest[:8] for digest in digests)


def notes_of(rows: Collection[Mapping[str, str]]) -> list[str]:
    """Lines about how scores on the rows of a table of asa-predict are to be read."""
    lines = []
    if seen := [row["id"] for row in rows if row.get(TRAINED_ON) == "yes"]:
        lines.append(
            f"warning: the network, or the encoder that it started from, was trained on {len(seen)} of "
            f"{counted(len(rows), 'scan')} ({listed(seen, 5)}): scores on them are optimistic"
        )
    networks = Counter(row[NETWORK] for row in rows if row.get(NETWORK))
    if len(networks) > 1:
        by = f"{len(networks)} networks (scans of each: {', '.join(f'{name} {n}' for name, n in networks.items())})"
        lines.append(f"note: predicted by {by}: right for a cross-validation alone")
    return lines


def check_capitals(table: str | Path, header: Collection[str], names: Iterable[str]) -> None:
    """Raise a ValueError if a table has one of these columns with other capitals, which would not be read."""
    for name in names:
        if name not in header and (near := [one for one in header if one.casefold() == name.casefold()]):
            raise ValueError(f"{table}: its column {near[0]} has to be called {name}: rename it")


def read_column(
    path: str | Path, column: str, records: Iterable[Mapping[str, Any]], *, missing_ok: bool = False
) -> dict[str, str]:
    """One column of a table, by the id of each of the `records` that it lists.

    A row describes a scan, named in a column "id", or all scans of a subject, named in a column "subject", or
    "participant_id" as in participants.tsv of BIDS. With a column "session_id" too, like ses-01 or 01, it describes
    those scans of the subject whose ids have this session, like sub-01_ses-01_run-1; an id without one is of the
    subject's only row. Empty cells are skipped, and those of BIDS, n/a. With `missing_ok` a table without this column
    gives no values.

    Raises:
        FileNotFoundError, ValueError: no such file, a missing column, a name in two rows, a value with line breaks, or
            no row for any of the scans.
    """
    records, rows = list(records), read_rows(path)
    if not rows:
        raise ValueError(f"{path}: has no rows: fill it in, or export it again")
    header = list(rows[0])
    key = next((name for name in NAMED_BY if name in header), None)
    check_capitals(path, header, (*(NAMED_BY if key is None else ()), column))
    if missing_ok and column not in header:
        return {}
    if key is None or column not in header:
        columns = ", ".join(header)
        raise ValueError(f"{path}: the columns are {columns}; give id, subject or participant_id, and {column}")
    own = NAMED_BY[key]
    by_session = own == "subject" and SESSION in header
    values: dict[str, dict[str, str]] = {}  # by name and session
    for row in rows:
        name, value = row[key], row[column]
        session = _session(row[SESSION]) if by_session else ""
        if session in values.get(name, {}):
            twice = f"{key} {name} {row[SESSION]}" if by_session else f"{key} {name}"
            advice = f"; a table by session needs a column {SESSION}, or a column id like sub-01_ses-01"
            more = "" if by_session or own == "id" else advice
            raise ValueError(f"{path}: {twice} is in two rows: remove one{more}")
        if not value.isprintable():
            raise ValueError(f"{path}: {key} {name}: {value!r} has line breaks or other control characters: correct it")
        if value not in EMPTY:
            values.setdefault(name, {})[session] = value
    names = match_names(path, values, {record[own] for record in records})
    matched = {one["id"]: _of_session(values[names[one[own]]], one["id"]) for one in records if one[own] in names}
    if not (found := {id: value for id, value in matched.items() if value is not None}):
        of, like = (f"{key} with its {SESSION}", "id") if by_session else (key, own)
        count = sum(map(len, values.values()))
        raise ValueError(f"{path}: no {of} of its {count} rows is one of the scans, like {records[0][like]}")
    return found


def _session(text: str) -> str:
    """A session as it is compared: without ses-, zeros before a number, and the .0 that pandas writes; "" for none."""
    core = re.sub(r"^ses[-_]", "", text.casefold()).removesuffix(".0")
    return "" if text in EMPTY else core.lstrip("0") or "0"


def _of_session(values: Mapping[str, str], id: str) -> str | None:
    """The value of a scan among those of its subject by session, "" of which stands for all; None if it has none."""
    found = _SESSION.search(id)
    if found is None and len(values) == 1:
        return next(iter(values.values()))
    return values.get(_session(found[1]) if found else "", values.get(""))


def match_names(path: str | Path, listed: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Name of a scan or subject -> its name among those `listed` in the table `path`.

    They may differ in sub-, zeros before a number, capitals, and the .0 that pandas writes, unless several of the
    others may be meant. Warnings say which names were matched in this way, and how many of the table match none.
    """
    found = {name: name for name in names if name in listed}
    loose: dict[str, tuple[list[str], list[str]]] = {}
    for side, texts in enumerate((names, listed)):
        for text in sorted(set(texts) - found.keys()):
            core = text.casefold().removeprefix("sub-").removesuffix(".0").lstrip("0")
            loose.setdefault(core, ([], []))[side].append(text)
    near = {ours[0]: theirs[0] for ours, theirs in loose.values() if len(ours) == len(theirs) == 1}
    if near:
        name, text = min(near.items())
        told = f"{len(near)} names differ in sub-, zeros or capitals, so {text} is taken for {name}"
        warnings.warn(f"{path}: {told}", stacklevel=3)
    found |= near
    lone, without = sorted(set(listed) - set(found.values())), sorted(set(names) - found.keys())
    if lone and without:
        told = f"{len(lone)} of its {len(listed)} names match none here, like {lone[0]}"
        absent = f"{len(without)} here are not in it, like {without[0]}"
        warnings.warn(f"{path}: {told}, and {absent}: compare their spelling", stacklevel=3)
    return found


def as_number(source: str | Path, scan: str, column: str, text: str) -> float:
    """The number of a cell; a ValueError that names the table, the scan and the column where it is none."""
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    advice = "give one, or leave the cell empty to leave the scan out"
    raise ValueError(f"{source}: {scan}: {column} is {text!r} and not a number: {advice}")


def check_health(source: str | Path, values: Iterable[str]) -> None:
    """Raise a ValueError that names the table `source` if a value of its column "health" is neither 0 nor 1."""
    if wrong := [value for value in values if value not in ("0", "1")]:
        raise ValueError(f"{source}: a health of {wrong[0]!r}: give 1 for healthy, 0 for not, or leave the cell empty")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]], delimiter: str = ",") -> str:
    """A table as CSV text, its lines ended by a newline on every system.

    A text that a spreadsheet would compute, like `=cmd|...`, gets a ' before it, which `read_rows` removes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", delimiter=delimiter)
    writer.writerow(header)
    writer.writerows([_quoted(cell) for cell in row] for row in rows)
    return text.getvalue()


def check_table(path: Path) -> None:
    """Raise a ValueError for a file that `write_numbers` cannot write, an ImportError for a missing extra."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: a table ends with {', '.join(ENDINGS)}")
    if path.suffix == PARQUET:
        _pyarrow()


def write_numbers(path: Path, header: Sequence[str], rows: Mapping[str, Iterable[float]]) -> None:
    """Write rows of numbers, by id, as a table with the columns id and `header`; raises as `check_table`.

    NaN becomes an empty cell, or null in Parquet, which holds float32; text has 6 digits.
    """
    check_table(path)
    if path.suffix == PARQUET:
        arrow, content, numbers = _pyarrow(), io.BytesIO(), zip(*rows.values(), strict=True)
        columns = [arrow.array(values, arrow.float32(), from_pandas=True) for values in numbers]
        table = arrow.table([arrow.array(list(rows), arrow.string()), *columns], names=["id", *header])
        arrow.parquet.write_table(table, content)
        write_whole(path, content.getvalue())
        return
    cells = ([id, *("" if math.isnan(value) else f"{value:.6g}" for value in row)] for id, row in rows.items())
    write_whole(path, csv_text(["id", *header], cells, _delimiter(path)).encode())


def _cell(value: Any) -> str:
    """A value of a Parquet as text; whole numbers without decimals, which a column with empty cells gives them."""
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _pyarrow() -> Any:
    require("pyarrow.parquet", "parquet", "Parquet")
    return require("pyarrow", "parquet", "Parquet")


def _parquet_columns(path: Path) -> tuple[list[str], list[list[Any]]]:
    """Names and values of the columns; equal texts are one object."""
    with _parquet_errors(path) as arrow:
        schema = arrow.parquet.read_schema(path)
        names, texts = schema.names, [field.name for field in schema if arrow.types.is_string(field.type)]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns have one name: rename one")
        file = arrow.parquet.ParquetFile(path, memory_map=False, read_dictionary=texts)
        about, size = file.metadata, path.stat().st_size
        groups = [about.row_group(k) for k in range(about.num_row_groups)]
        cells = about.num_rows + sum(group.column(k).num_values for group in groups for k in range(group.num_columns))
        unpacked = sum(group.total_byte_size for group in groups)
        if cells > MANY_CELLS + size or unpacked > SMALL + LARGEST_RATIO * size:
            raise ValueError(f"{path}: {cells} cells and {unpacked} bytes in a file of {size}: write it as CSV")
        columns: list[list[Any]] = [[] for _ in names]
        for values, column in zip(columns, file.read().columns, strict=True):
            for chunk in column.chunks:
                if isinstance(chunk, arrow.DictionaryArray):
                    distinct = [*chunk.dictionary.to_pylist(), None]
                    values += [distinct[-1 if k is None else k] for k in chunk.indices.to_pylist()]
                else:
                    values += chunk.to_pylist()
        return names, columns


@contextmanager
def _parquet_errors(path: Path) -> Iterator[Any]:
    """pyarrow, whose errors become a ValueError that names the file."""
    arrow = _pyarrow()
    check_present(path, "")
    try:
        yield arrow
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({one_line(error)}): write it again") from None


@contextmanager
def _text_rows(path: Path) -> Iterator["csv.DictReader[str]"]:
    """A reader of a table of text; what is wrong with the table is a ValueError that names it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a table (CSV)")
    check_present(path, "")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            # Strict: a quote that nothing closes would take in the rows after it.
            yield csv.DictReader(file, delimiter=_delimiter(path), strict=True)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a table of text in UTF-8 ({error}): correct it or export it again") from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _quoted(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith((*FORMULA, "'")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell  # a number


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith((*FORMULA, "'")) else cell
