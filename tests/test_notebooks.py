"""The notebooks run from top to bottom, at tiny size, and are committed without output."""

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SMALLER = {"modules": "STEPS = 3", "finetuning": "SUBJECTS, STEPS = 4, 6"}
PICTURES = {"modules": 6, "finetuning": 2}
ELSEWHERE = ["first_hour"]  # scripts/whole-path runs it from the wheel


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*SMALLER, *ELSEWHERE}
    assert all(f"notebooks/{name}.ipynb" in (FOLDER.parent / "scripts/whole-path").read_text() for name in ELSEWHERE)


@pytest.mark.parametrize("name", [*SMALLER, *ELSEWHERE])
def test_a_notebook_is_committed_without_output(name: str) -> None:
    for cell in cells(name):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: (shown.append(pyplot.gcf()), pyplot.close("all")))
    names: dict[str, Any] = {}
    parameters = 0
    for cell in cells(name):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "install" in tags:
            continue
        exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
        if "parameters" in tags:
            before = set(names)
            exec(SMALLER[name], names)
            assert set(names) == before, "the test may only override parameters of the notebook"
            parameters += 1
    assert parameters == 1 and len(shown) == PICTURES[name]
