"""Every command line in the README, the documentation and the experiments' headers composes."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest

from asa.cli import COMMANDS
from asa.cli.manual import sections
from asa.config import compose
from scripts.docs_pages import public_names

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs/experiment").glob("*.yaml"),
        *(ROOT / "configs").glob("*.yaml"),
    ]
)
STARTS = re.compile(r"(?:asa-|asa |torchrun\b.* -m asa |sbatch\b.*slurm\.sbatch )(?P<command>\w+)(?= |$)")
OPEN = re.compile(r"\.\.\.|\bSETTINGS\b")  # what a reader fills in


def command_lines(text: str) -> list[str]:
    """The lines of a page that run a command: in fenced blocks, in comments, and, with "..." added, in prose."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    comments = "\n".join(re.findall(r"^# +(.*)", text, flags=re.MULTILINE))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join([*span.split(), "..."]) for span in re.findall(r"`([^`]*)`", prose)]
    lines = [line.strip() for block in (*blocks, comments) for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [line for line in (*lines, *(span for span in spans if "=" in span)) if STARTS.match(line)]


def parsed(line: str) -> tuple[str, list[str]]:
    """The command of a line and its settings."""
    found = STARTS.match(line)
    assert found is not None
    words = shlex.split(line[found.end() :], comments=True)
    return found["command"], [word for word in words if "=" in word and not word.startswith("--")]


def test_a_command_line_is_found_wherever_it_stands() -> None:
    text = "# asa-pretrain a=1\n```\nasa-prepare b=2 \\\n  'c={d: e}' out=f   # why\nls\n```\nand `asa export\ng=3`\n"
    lines = command_lines(text)
    assert [parsed(line) for line in lines] == [
        ("prepare", ["b=2", "c={d: e}", "out=f"]),
        ("pretrain", ["a=1"]),
        ("export", ["g=3"]),
    ]
    shown = (
        "torchrun --nproc-per-node=4 -m asa pretrain out=x",
        "sbatch --nodes=2 scripts/slurm.sbatch finetune out=x",
    )
    assert [parsed(line) for line in shown] == [("pretrain", ["out=x"]), ("finetune", ["out=x"])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_of_a_page_composes(page: Path) -> None:
    for line in command_lines(page.read_text()):
        command, settings = parsed(line)
        assert command in COMMANDS, line
        while (reason := why_not(command, settings)) is not None:
            missing = re.match(r"([\w., ]+) has to be given", reason)
            if not (missing and OPEN.search(line)):
                pytest.fail(f"{line}\n{reason}")
            settings += [f"{key}=x" for key in missing[1].split(", ")]


def why_not(command: str, settings: list[str]) -> str | None:
    """Why a command line does not compose, or its method not take a setting; None if they do."""
    try:
        method = compose(command, settings).get("method")
    except ValueError as error:
        return str(error)
    known = {"_target_", *inspect.signature(locate(method["_target_"])).parameters} if method else set()
    wrong = set(method or ()) - known
    return f"{method['_target_']} has no {', '.join(sorted(wrong))}" if wrong else None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built manual; a broken link or an unknown name stops its building."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_no_line_of_prose_is_longer_than_120_characters() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not long, f"{page.name}: {long[0]}"


def test_every_public_name_is_on_a_page_of_the_manual(site: Path) -> None:
    names = list(public_names())
    assert len(names) > 50
    for module, name in names:
        assert f'id="{module}.{name}"' in (site / "api" / f"{module}.html").read_text(), name


def test_every_command_and_every_experiment_has_a_page(site: Path) -> None:
    for name in COMMANDS:
        page = (site / "commands" / f"asa-{name}.html").read_text()
        for key in (key for section in sections(name, every=True) for key in section.keys):
            assert f"<td><code>{key.name}</code></td>" in page, key.name
    for file in (ROOT / "configs" / "experiment").glob("*.yaml"):
        page = (site / "recipes" / f"{file.stem}.html").read_text()
        assert f'<h1 id="{file.stem}"' in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_page_opened_from_the_disk_is_searched(site: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    for word, answer in (("asymmetry", "matching documents"), ("qwertz", "No matching documents")):
        page = f"{(site / 'commands/asa-view.html').as_uri()}?q={word}"
        shown = subprocess.run(["chromium", *options, page], capture_output=True, text=True, timeout=60).stdout
        found = re.search(r'md-search-result__meta">([^<]*)', shown)
        assert found is not None and found[1].strip().endswith(answer), word
        assert found[1].strip()[0].isdigit() == (word == "asymmetry")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_search_finds_the_pages_first_that_have_all_words(site: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    page = f"{(site / 'commands/asa-view.html').as_uri()}?q=asa%20run"
    shown = subprocess.run(["chromium", *options, page], capture_output=True, text=True, timeout=60).stdout
    found = re.findall(r'<li class="md-search-result__item"><a href="[^"?]*/(\w[\w.-]*)\.html', shown)
    assert {"asa-run", "workflow"} <= set(found[:4])


def test_the_manual_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for source in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text()):
            pytest.fail(f"{page.name}: {source}")


def test_what_each_part_of_the_method_is_worth_is_what_the_table_says() -> None:
    details, evidence = ((ROOT / "docs" / name).read_text() for name in ("evidence_details.md", "evidence.md"))
    row = r"^\| `(mae|attentive_mae|spe_mae)` \|[^|]*\|[^|]*\| ([\d.]+), ([\d.]+) \|"
    rows = re.findall(row, details, flags=re.MULTILINE)
    dice = {arm: [float(one) for one in seeds] for arm, *seeds in rows}
    worth = {
        arm: sorted(one - plain for one, plain in zip(dice[arm], dice["mae"], strict=True))
        for arm in ("attentive_mae", "spe_mae")
    }
    loss, encoding = (f"{low:.3f} to {high:.3f}" for low, high in worth.values())
    assert f"The attentive loss is worth {loss}, the symmetric encoding {encoding} (the two seeds)." in details
    low, high = min(map(min, worth.values())), max(map(max, worth.values()))
    assert f"each help, by {low:.3f} to {high:.3f} in either seed" in evidence


def test_the_operations_on_tensors_are_those_that_the_architecture_names() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (row,) = re.findall(r"^\| `ops` \| functions on tensors: (.*?)\. No parameters", text, flags=re.MULTILINE)
    named = {
        "patches and masks": "patches",
        "position encodings": "position",
        "mirroring": "symmetry",
        "sequences of unequal length": "nested",
    }
    assert set(row.split(", ")) == named.keys()
    modules = {path.stem for path in (ROOT / "asa" / "ops").glob("*.py")} - {"__init__", "labels"}
    assert modules == set(named.values())
