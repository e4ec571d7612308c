"""scripts/mutants: the list is true of the code, and changes are noticed or survive."""

import ast
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
mutants = importlib.import_module("scripts.mutants")

ADD = "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return a * 2\n"
TEST = "from asa.ops.sums import add\n\n\ndef test_two_and_three_are_five():\n    assert add(2, 3) == 5\n"
ENTRY = '[[mutant]]\nfile = "asa/ops/sums.py"\nold = {!r}\nnew = {!r}\ntests = "tests/ops"\n'


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of two functions, of which one is tested."""
    files = {"asa/ops/sums.py": ADD, "tests/ops/test_sums.py": TEST, "pyproject.toml": "[tool.pytest.ini_options]\n"}
    files["tests/mutants/ops.toml"] = ENTRY.format("a + b", "a - b") + ENTRY.format("a * 2", "a * 3")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return tmp_path


def test_every_listed_change_is_of_a_text_that_is_once_in_its_file_and_has_tests() -> None:
    listed = mutants.listed()
    assert len(listed) > 50
    for mutant in listed:
        ast.parse(mutant.changed)
        assert mutant.changed != mutant.text
        assert all((ROOT / test).exists() for test in mutant.tests.split())
    assert not [count for count in Counter((one.file, one.changed) for one in listed).values() if count > 1]


def test_a_list_is_of_the_folder_that_it_is_named_after() -> None:
    for path in (ROOT / "tests" / "mutants").glob("*.toml"):
        assert {mutant.file.split("/")[1] for mutant in mutants.listed([path.stem])} == {path.stem}


def test_a_change_that_no_test_notices_survives_and_the_checkout_stays_as_it_is(checkout: Path, capsys) -> None:
    assert mutants.main(["ops", "-j", "2"]) == 1
    shown = capsys.readouterr().out
    assert "noticed  asa/ops/sums.py:2: a + b -> a - b" in shown and "1 of 2 changes survived" in shown
    assert shown.endswith("  asa/ops/sums.py:6: a * 2 -> a * 3 (tests/ops)\n")
    assert (checkout / "asa/ops/sums.py").read_text() == ADD
    (checkout / "tests/mutants/ops.toml").write_text(ENTRY.format("a + b", "a - b"))
    assert mutants.main([]) == 0


def test_tests_that_do_not_end_have_noticed_a_change(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "PATIENCE", 1)
    endless = ENTRY.format("return a + b", "while True: pass")
    (checkout / "tests/mutants/ops.toml").write_text(endless)
    assert mutants.main([]) == 0


def test_tests_that_fail_without_a_change_and_texts_that_are_not_once_in_their_file_are_errors(
    checkout: Path, capsys
) -> None:
    for old, count in (("a / b", 0), ("return a", 2)):
        (checkout / "tests/mutants/ops.toml").write_text(ENTRY.format(old, "b"))
        assert mutants.main([]) == 1
        assert f"ops.toml: '{old}' is {count} times in asa/ops/sums.py, not once" in capsys.readouterr().err
    assert mutants.main(["losses"]) == 1 and "tests/mutants has no losses: ops" in capsys.readouterr().err
    (checkout / "tests/mutants/ops.toml").write_text(ENTRY.format("a + b", "a - b"))
    (checkout / "asa/ops/sums.py").write_text(ADD.replace("a + b", "a + 2 * b"))
    (checkout / "tests/mutants/ops.toml").write_text(ENTRY.format("a + 2", "a - 2"))
    assert mutants.main([]) == 1
    assert "::test_two_and_three_are_five does not pass with the unchanged code" in capsys.readouterr().err


def test_drawn_changes_are_of_one_place_and_depend_on_the_seed_alone(checkout: Path) -> None:
    drawn = mutants.drawn(100, 0)
    assert sorted(str(mutant) for mutant in drawn) == [
        "asa/ops/sums.py:2: a + b -> (a - b)",
        "asa/ops/sums.py:6: 2 -> (1)",
        "asa/ops/sums.py:6: 2 -> (3)",
        "asa/ops/sums.py:6: a * 2 -> (a / 2)",
    ]
    assert mutants.drawn(2, 0) == drawn[:2] == mutants.drawn(2, 0, ["asa/ops"]) != mutants.drawn(2, 1)


def test_every_kind_of_change_is_drawn_and_messages_and_annotations_are_left_alone() -> None:
    text = (
        '@cache(maxsize=3)\ndef é(a: "int | None" = -x) -> Literal[3]:\n    """Text."""\n'
        '    if not a < max(b, c) and True:\n        raise ValueError(f"{a + 1} " + "b")\n'
        '    run(a, key=b, strict=True)\n    "ü", a is b.any()\n'
    )
    found = {f"{text[start:stop]} -> {new}" for start, stop, new in mutants.changes(text)}
    assert found == {
        "-x -> (x)",
        "not a < max(b, c) -> (a < max(b, c))",
        "not a < max(b, c) and True -> (not a < max(b, c) or True)",
        "a < max(b, c) -> (a <= max(b, c))",
        "a < max(b, c) -> (a > max(b, c))",
        "max -> (min)",
        "True -> (False)",
        "run(a, key=b, strict=True) -> pass",
        "run(a, key=b, strict=True) -> (run(a, strict=True))",
        "a is b.any() -> (a is not b.any())",
        "b.any -> (b.all)",
    }
