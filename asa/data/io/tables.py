"""Tables (CSV) that say something of each scan."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_column(path: str | Path, column: str, records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a table says of each scan in one of its columns.

    Its rows name scans in a column "id", or all scans of a subject in a column "subject". Empty cells say nothing.

    Args:
        path: a CSV file with a header.
        column: to read.
        records: of a store.

    Returns:
        The values by record id; scans that the table does not name are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: columns that are missing, a name in two rows, or no row that names a scan of the store.
    """
    records = list(records)
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        key = next((name for name in ("id", "subject") if name in header), None)
        if key is None or column not in header:
            raise ValueError(f"{path}: the table has the columns {', '.join(header)}: give id or subject, and {column}")
        values: dict[str, str] = {}
        for row in reader:
            name, value = str(row[key] or "").strip(), str(row[column] or "").strip()
            if name in values:
                raise ValueError(f"{path}: {key} {name} stands in two rows: leave one")
            if value:
                values[name] = value
    found = {record["id"]: values[record[key]] for record in records if record[key] in values}
    if not found:
        raise ValueError(f"{path}: no {key} of its {len(values)} rows is in the store, like {records[0][key]}")
    return found


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV text, its lines ended by a newline on every system."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
