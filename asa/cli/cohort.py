"""From a configuration's `data` node to a store and its parts."""

from pathlib import Path
from typing import Any

from asa.data.cohort import read_split, select, split_subjects
from asa.data.store import Store
from asa.engine.checkpoint import list_checkpoints

Records = list[dict[str, Any]]


def open_parts(data: dict[str, Any], run: Path) -> tuple[Store, dict[str, list[str]], dict[str, Records]]:
    """Open the store, and split its subjects or read their split.

    Args:
        data: `store`, `split_file` or `split`, and optionally `labelled`, see the YAML of the commands.
        run: the run folder; a `split.json` in it holds for the run that goes on there.

    Returns:
        The store; the subjects, and their records, of "train", "validation" and "test".

    Raises:
        ValueError: no store, or a split that does not fit it.
    """
    store = Store(data["store"])
    if list_checkpoints(run):  # whatever became of the file since, subjects do not change parts in a run
        split = read_split(run / "split.json")
    elif data["split_file"] is not None:
        split = read_split(data["split_file"])
    else:
        split = split_subjects(store.records, **data["split"])
    if data.get("labelled") is not None:
        n = int(data["labelled"])
        if not 1 <= n <= len(split["train"]):
            raise ValueError(f"data.labelled={n}, but the split has {len(split['train'])} training subjects")
        split = {**split, "train": split["train"][:n]}
    return store, split, {name: select(store.records, subjects) for name, subjects in split.items()}
