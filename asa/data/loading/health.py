"""The health of each subject, as far as it is known."""

from collections.abc import Mapping, Sequence
from typing import Any

from asa.data.io.tables import read_column

HEALTHY = "healthy"  # value of data.health for a cohort of healthy subjects
UNKNOWN = float("nan")


def read_health(source: str | None, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The number "health" that goes with the crops of each scan: 1 healthy, 0 patient, NaN unknown.

    Args:
        source: "healthy" for a healthy cohort, a table with the columns subject (or id) and health, or None.
        records: of the store.

    Returns:
        By record id; empty for None.

    Raises:
        FileNotFoundError: no such table.
        ValueError: an invalid table, or a health that is neither 0 nor 1.
    """
    if source is None:
        return {}
    if source == HEALTHY:
        return {record["id"]: {"health": 1.0} for record in records}
    values = read_column(source, "health", records)
    if wrong := [value for value in values.values() if value not in ("0", "1")]:
        raise ValueError(f"{source}: a health of {wrong[0]!r}: give 1 for healthy, 0 for a patient, or an empty cell")
    return {record["id"]: {"health": float(values.get(record["id"], UNKNOWN))} for record in records}
