"""Both containers run the build steps that scripts/container-check runs, and nothing else."""

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, DOCKER, APPTAINER, CHECK = (
    (ROOT / name).read_text()
    for name in ("containers/install", "containers/Dockerfile", "containers/asa.def", "scripts/container-check")
)


def test_both_containers_and_the_check_run_the_same_steps_on_the_same_debian() -> None:
    bases = [re.search(r"^(?:FROM|From:) debian:(\w+)-slim$", text, re.MULTILINE) for text in (DOCKER, APPTAINER)]
    assert all(base is not None and f"minbase {base[1]} " in CHECK for base in bases)
    for text in (DOCKER, APPTAINER, CHECK):
        assert "/tmp/source/containers/install /tmp/source" in text
    runs = re.findall(r"^RUN (.*)", DOCKER, re.MULTILINE)
    post = re.search(r"^%post\n((?: +.*\n)+)", APPTAINER, re.MULTILINE)
    assert len(runs) == 1 and post is not None
    assert [line.strip() for line in post[1].splitlines()] == runs[0].split(" && ")


def test_the_containers_are_used_as_an_ordinary_user() -> None:
    (user,) = re.findall(r"^USER (\w+)$", DOCKER, re.MULTILINE)
    assert re.search(rf"^useradd .* {user}$", STEPS, re.MULTILINE)
    assert 'ENTRYPOINT ["asa"]' in DOCKER and 'exec asa "$@"' in APPTAINER
    assert re.search(r"^install --directory --mode 1777 /input /output$", STEPS, re.MULTILINE)


def test_the_commands_are_checked_in_the_containers_environment() -> None:
    (settings,) = re.findall(r"^ENV (.*)$", DOCKER, re.MULTILINE)
    assert settings in CHECK and "USER=" in settings  # PyTorch and MONAI ask for the name of a user that has none
    (exported,) = re.findall(r"^    export (.*)$", APPTAINER, re.MULTILINE)
    assert set(exported.split()) == set(settings.split()) - {"HOME=/tmp"}  # Apptainer has a home of the user's


def test_the_steps_install_the_tested_versions_of_extras_that_exist() -> None:
    installs = re.findall(r"pip install (.*)", STEPS)
    assert len(installs) == 2 and all('--constraint "$source/constraints.txt"' in line for line in installs)
    extras = re.search(r"\$source\[([\w,]+)\]", STEPS)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras is not None and set(extras[1].split(",")) <= known.keys()


def test_no_registry_is_named_and_the_scripts_parse() -> None:
    for text in (STEPS, DOCKER, APPTAINER, CHECK):
        assert not re.search(r"https?://|\w\.(?:io|org|com)/", text)
    for name in ("containers/install", "scripts/container-check"):
        subprocess.run(["bash", "-n", ROOT / name], check=True)
