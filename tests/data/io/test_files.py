"""Files are on the disk before anything can refer to them."""

import os
from pathlib import Path

import pytest

from asa.data.io.files import write_json, write_whole
from asa.data.store import append_records


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """What is synchronised, by the size that the file has then, and renamed, in order."""
    made: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace

    def synchronise(descriptor: int) -> None:
        made.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def rename(part: Path, path: Path) -> None:
        made.append(("rename", path.name))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", synchronise)
    monkeypatch.setattr(os, "replace", rename)
    return made


def test_all_bytes_of_a_file_are_synchronised_before_it_has_its_name(tmp_path: Path, calls: list) -> None:
    write_whole(tmp_path / "new" / "a", b"four")
    write_json(tmp_path / "b", [1])
    assert calls == [("fsync", 4), ("rename", "a"), ("fsync", 8), ("rename", "b")]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "b"]


def test_appended_lines_are_synchronised_as_a_whole(tmp_path: Path, calls: list) -> None:
    append_records(tmp_path, [b"{1}"])
    append_records(tmp_path, [b"{22}", b"{333}"])
    assert calls == [("fsync", 4), ("fsync", 15)]
    assert (tmp_path / "records.jsonl").read_bytes() == b"{1}\n{22}\n{333}\n"
