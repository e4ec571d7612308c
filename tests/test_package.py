"""The wheel contains everything that the commands need."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from examples import write_examples
from wheels import build_wheel

from asa.config import CONFIG_DIR

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, unpacked, as in an installation."""
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("source"))).extractall(target)
    return target


def test_the_wheel_contains_every_configuration_and_the_report_templates(unpacked: Path) -> None:
    expected = {path.relative_to(CONFIG_DIR) for path in CONFIG_DIR.rglob("*.yaml")}
    assert {
        path.relative_to(unpacked / "asa/configs") for path in (unpacked / "asa/configs").rglob("*.yaml")
    } == expected
    assert list((unpacked / "asa").rglob("*.j2")) and (unpacked / "asa/py.typed").exists()
    modules = {path.relative_to(ROOT) for path in (ROOT / "asa").rglob("*.py")}
    assert {path.relative_to(unpacked) for path in (unpacked / "asa").rglob("*.py")} == modules


def test_an_installed_wheel_composes_its_configurations_from_another_directory(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import asa, sys; from asa.config import CONFIG_DIR; print(asa.__file__, CONFIG_DIR); "
        "from asa.cli import pretrain; sys.argv = ['asa-pretrain', '--print', 'out=x', 'data.store=y']; pretrain.main()"
    )
    # PYTHONPATH precedes the checkout's editable install.
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, *rest = shown.stdout.splitlines()
    assert first == f"{unpacked}/asa/__init__.py {unpacked}/asa/configs"
    assert "  steps: 20000" in rest


def test_the_examples_of_the_manual_run_from_an_installed_wheel_in_another_directory(
    unpacked: Path, store: Path, tmp_path: Path
) -> None:
    cells = write_examples(tmp_path)
    (tmp_path / "store").symlink_to(store)
    assert "losses.append" in cells[-1]
    code = "\n".join([*cells, "print(asa.__file__, losses[0], losses[-1])"])
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, first, last = shown.stdout.splitlines()[-1].rsplit(maxsplit=2)
    assert file == f"{unpacked}/asa/__init__.py" and float(last) < 0.95 * float(first)
    assert "encoder from runs/noise" in shown.stdout
    assert len(list((tmp_path / "labels").glob("*.nii.gz"))) == 1
    assert (tmp_path / "volumes" / "predictions.csv").read_text().startswith("id,subject,brain_ml,")
