"""CSV tables with a value for each scan."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_column(
    path: str | Path, column: str, records: Iterable[Mapping[str, Any]], *, missing_ok: bool = False
) -> dict[str, str]:
    """One column of a table, by scan.

    A row describes a scan, named in a column "id", or all scans of a subject, named in a column "subject". Empty cells
    are skipped.

    Args:
        path: of the table.
        column: its name.
        records: scans, each with an id and a subject.
        missing_ok: a table without this column gives no values, instead of an error.

    Returns:
        Record id -> value, for the records that the table lists.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing column, a name in two rows, or no row for any of the scans.
    """
    records = list(records)
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if missing_ok and column not in header:
            return {}
        key = next((name for name in ("id", "subject") if name in header), None)
        if key is None or column not in header:
            raise ValueError(f"{path}: the columns are {', '.join(header)}; give id or subject, and {column}")
        values: dict[str, str] = {}
        for row in reader:
            name, value = str(row[key] or "").strip(), str(row[column] or "").strip()
            if name in values:
                raise ValueError(f"{path}: {key} {name} is in two rows: remove one")
            if value:
                values[name] = value
    found = {record["id"]: values[record[key]] for record in records if record[key] in values}
    if not found:
        raise ValueError(f"{path}: no {key} of its {len(values)} rows is one of the scans, like {records[0][key]}")
    return found


def check_health(source: str | Path, values: Iterable[str]) -> None:
    """Raise a ValueError that names the table `source` if a value of its column "health" is neither 0 nor 1."""
    if wrong := [value for value in values if value not in ("0", "1")]:
        raise ValueError(f"{source}: a health of {wrong[0]!r}: give 1 for healthy, 0 for not, or leave the cell empty")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV text, its lines ended by a newline on every system."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
