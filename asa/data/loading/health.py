"""Who is healthy, as far as anybody says."""

from collections.abc import Mapping, Sequence
from typing import Any

from asa.data.io.tables import read_column

HEALTHY = "healthy"  # the word for a cohort that is
UNKNOWN = float("nan")


def read_health(source: str | None, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The health of each scan, to go with its crops as "health": 1 healthy, 0 patient, NaN unknown.

    Args:
        source: "healthy" for a cohort that is; a table with the columns subject (or id) and health; None says nothing.
        records: of the store.

    Returns:
        By record id; empty where nothing is said.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a table that does not fit, or a health that is neither 0 nor 1.
    """
    if source is None:
        return {}
    if source == HEALTHY:
        return {record["id"]: {"health": 1.0} for record in records}
    said = read_column(source, "health", records)
    if wrong := [value for value in said.values() if value not in ("0", "1")]:
        raise ValueError(f"{source}: a health of {wrong[0]!r}: give 1 for healthy, 0 for not, or leave the cell empty")
    return {record["id"]: {"health": float(said.get(record["id"], UNKNOWN))} for record in records}
