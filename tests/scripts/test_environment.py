"""scripts/environment makes and updates its own environments, and never deletes or changes another."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands for Python: `-m venv DIR` copies it to DIR, and what is installed is written down.
FAKE = """#!/bin/bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$FAKE" "$3/bin/python" ;;
  "-m pip "*) echo "$*" >>"$LOG"; [ ! -e "$FAIL" ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/environment"):
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3.11"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    return folder


def source(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script that sources it from the folder above; its last line is the Python that it got."""
    home = checkout.parent
    variables |= {"FAKE": str(home / "bin/python3.11"), "LOG": str(home / "log"), "FAIL": str(home / "fail")}
    variables["PATH"] = f"{home / 'bin'}:{os.environ['PATH']}"
    line = f'source {checkout.name}/scripts/environment; echo "$PYTHON"'
    return subprocess.run(["bash", "-c", line], cwd=home, env=variables, capture_output=True, text=True)


def installations(checkout: Path) -> list[str]:
    log = checkout.parent / "log"
    return [line.split("constraints.txt ")[1] for line in log.read_text().splitlines()] if log.exists() else []


def test_an_environment_is_made_once_and_updated_in_place(checkout: Path) -> None:
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    whole = [torch, "--editable .[dev]"]
    done = source(checkout)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(checkout / ".venv/bin/python")), done.stderr
    assert installations(checkout) == whole
    (checkout / ".venv" / "mine").touch()
    source(checkout)
    assert installations(checkout) == whole
    with (checkout / "constraints.txt").open("a") as file:
        file.write("six==1.17.0\n")
    assert source(checkout).returncode == 0
    assert installations(checkout) == 2 * whole and (checkout / ".venv" / "mine").exists()


def test_a_moved_checkout_keeps_its_environment(checkout: Path) -> None:
    source(checkout)
    before = installations(checkout)
    (checkout / ".venv" / "mine").touch()
    moved = checkout.rename(checkout.with_name("moved"))
    assert source(moved).stdout.splitlines()[-1] == str(moved / ".venv/bin/python")
    assert installations(moved)[len(before) :] == ["--no-deps --editable ."] and (moved / ".venv" / "mine").exists()


def test_an_interrupted_installation_is_done_again(checkout: Path) -> None:
    (checkout.parent / "fail").touch()
    assert source(checkout).returncode != 0
    (checkout.parent / "fail").unlink()
    assert source(checkout).returncode == 0 and len(installations(checkout)) == 3


def test_an_environment_of_the_users_own_is_not_touched(checkout: Path) -> None:
    own = checkout / ".venv"
    (own / "bin").mkdir(parents=True)
    (own / "bin" / "python").touch(mode=0o755)
    refused = source(checkout)
    assert refused.returncode == 1 and "ASA_VENV=.venv uses it as it is" in refused.stderr
    used = source(checkout, ASA_VENV="checkout/.venv")
    assert used.stdout.splitlines() == [f"{checkout.parent}/checkout/.venv/bin/python"]
    other = source(checkout, ASA_VENV=str(checkout.parent / "elsewhere"))
    assert other.stdout.splitlines()[-1] == str(checkout.parent / "elsewhere/bin/python")
    assert sorted(path.name for path in own.rglob("*")) == ["bin", "python"]


def test_a_linked_environment_is_used_as_it_is(checkout: Path) -> None:
    source(checkout, ASA_VENV="shared")
    before = installations(checkout)
    (checkout / ".venv").symlink_to(checkout.parent / "shared")
    (checkout / "constraints.txt").write_text("torch==2.0.0\n")
    assert source(checkout).stdout.splitlines() == [str(checkout / ".venv/bin/python")]
    assert installations(checkout) == before and (checkout / ".venv").is_symlink()


def test_a_folder_that_holds_something_else_is_refused(checkout: Path) -> None:
    (checkout.parent / "data").mkdir()
    done = source(checkout, ASA_VENV="data")
    assert done.returncode == 1 and "is no environment of Python" in done.stderr


def test_the_container_check_leaves_a_folder_that_it_did_not_make_alone(tmp_path: Path) -> None:
    mine = tmp_path / "root"
    (mine / "opt" / "asa").mkdir(parents=True)
    done = subprocess.run([ROOT / "scripts" / "container-check", mine], capture_output=True, text=True)
    assert done.returncode == 1 and "did not make it" in done.stderr and (mine / "opt" / "asa").exists()
