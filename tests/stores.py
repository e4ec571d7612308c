"""A store's manifest and records as one tree, for tests that change what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

from asa.data.io.files import write_json
from asa.data.store import MANIFEST, RECORDS


def read_tree(root: Path) -> dict[str, Any]:
    """The manifest of a store, with the entries of its scans under "records"."""
    entries = [json.loads(line) for line in (root / RECORDS).read_text().splitlines()]
    return {**json.loads((root / MANIFEST).read_text()), "records": entries}


def with_subjects(store: Path, copy: Path, subjects: dict[str, str]) -> Path:
    """A copy of a store whose scans, by id, have these subjects."""
    shutil.copytree(store, copy)
    tree = read_tree(store)
    tree["records"] = [{**entry, "subject": subjects[entry["id"]]} for entry in tree["records"]]
    write_tree(copy, tree)
    return copy


def without_labels(store: Path, *ids: str) -> None:
    """Take the label maps of some scans out of a store."""
    tree = read_tree(store)
    for entry in tree["records"]:
        for kind in ("arrays", "sources") if entry["id"] in ids else ():
            del entry[kind]["label"]
    write_tree(store, tree)


def write_tree(root: Path, tree: dict[str, Any]) -> None:
    """Write what `read_tree` returned, with any change, into a folder that is made if needed."""
    write_json(root / MANIFEST, {key: value for key, value in tree.items() if key != "records"})
    (root / RECORDS).write_text("".join(json.dumps(entry) + "\n" for entry in tree["records"]))
