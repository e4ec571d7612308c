"""From a configuration's `data` node to a store and its parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asa.data.splits import keep_labelled, make_split, read_split, select
from asa.data.store import Store
from asa.training.checkpoint import list_checkpoints

Records = list[dict[str, Any]]


def open_parts(data: dict[str, Any], run: Path) -> tuple[Store, dict[str, list[str]], dict[str, Records]]:
    """Open the store, and split its subjects or read their split.

    Args:
        data: `store`, `split_file` or `split`, and optionally `labelled`, see the YAML of the commands. The store's
            path is made absolute in it, so that the run goes on from any directory.
        run: the run folder; a `split.json` in it holds for the run that goes on there.

    Returns:
        The store; the subjects, and their records, of "train", "validation" and "test".

    Raises:
        ValueError: no store, or a split that does not fit it.
    """
    if data["store"] is None:
        raise ValueError("data.store has to be given: a folder made by asa-prepare")
    data["store"] = str(Path(str(data["store"])).resolve())
    store = Store(data["store"])
    split = choose_split(store.records, data, run)
    return store, split, {name: select(store.records, subjects) for name, subjects in split.items()}


def choose_split(records: Sequence[Mapping[str, Any]], data: Mapping[str, Any], run: Path) -> dict[str, list[str]]:
    """The subjects of each part: see `open_parts`."""
    if list_checkpoints(run):  # whatever became of the options since, subjects do not change parts in a run
        return read_split(run / "split.json")
    file = data["split_file"]
    split = make_split(records, **data["split"]) if file is None else read_split(file)
    return split if data.get("labelled") is None else keep_labelled(split, data["labelled"])
