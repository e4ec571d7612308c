"""Single changes of the code that the tests have to notice. See scripts/mutants.

Changes are made in temporary copies of the checkout, one at a time. A change survives if its tests pass in spite of it.
Tests of which none ends in time have noticed it.
"""

import argparse
import ast
import copy
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds in which a test has to end
SILENT = "out of time"
COMPARISONS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}  # fmt: skip
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
PAIRS = [("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"), ("floor", "ceil")]
EXCHANGED = dict(PAIRS) | {second: first for first, second in PAIRS}
ELSEWHERE = {"annotation", "returns", "decorator_list"}  # fields of the syntax tree that are not changed
WITHOUT_EFFECT = {"strict", "non_blocking"}  # keyword arguments that change no result of correct code on a CPU


@dataclass(frozen=True)
class Mutant:
    """A change of a file: `new` in place of the characters `start` to `stop` of its text; and the tests to run."""

    file: str
    text: str
    start: int
    stop: int
    new: str
    tests: str

    @property
    def changed(self) -> str:
        """The changed text."""
        return self.text[: self.start] + self.new + self.text[self.stop :]

    def __str__(self) -> str:
        old, new = (" ".join(part.split()) or "nothing" for part in (self.text[self.start : self.stop], self.new))
        return f"{self.file}:{self.text[: self.start].count(chr(10)) + 1}: {old} -> {new}"


def listed(names: Sequence[str] = ()) -> list[Mutant]:
    """The changes in tests/mutants, of all files or of those named.

    Raises:
        ValueError: an unknown name, or a text that is not exactly once in its file.
    """
    files = sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    if unknown := {*names} - {file.stem for file in files}:
        raise ValueError(f"tests/mutants has no {', '.join(sorted(unknown))}: {', '.join(f.stem for f in files)}")
    found = []
    for file in files:
        for entry in tomllib.loads(file.read_text())["mutant"] if not names or file.stem in names else []:
            text, old = (ROOT / entry["file"]).read_text(), entry["old"]
            if text.count(old) != 1:
                raise ValueError(f"{file.name}: {old!r} is {text.count(old)} times in {entry['file']}, not once")
            start = text.index(old)
            found.append(Mutant(entry["file"], text, start, start + len(old), entry["new"], entry["tests"]))
    return found


def drawn(count: int, seed: int, names: Sequence[str] = ()) -> list[Mutant]:
    """Random changes of the code of all folders of asa/, or of those named.

    Their tests are those of the listed changes of the same file, the test file of the same name, those that import the
    file, and the folder's.

    Raises:
        ValueError: an unknown name.
    """
    folders = [ROOT / "asa" / name.removeprefix("asa/") for name in names or [""]]
    if unknown := [folder.name for folder in folders if not folder.is_dir()]:
        raise ValueError(f"asa/ has no folder {', '.join(unknown)}")
    found, known = [], listed()
    testing = {test: test.read_text() for test in sorted((ROOT / "tests").rglob("test_*.py"))}
    for path in sorted(file for folder in folders for file in folder.rglob("*.py")):
        text, file = path.read_text(), path.relative_to(ROOT).as_posix()
        own = [test for mutant in known if mutant.file == file for test in mutant.tests.split()]
        folder = ROOT / "tests" / path.parent.relative_to(ROOT / "asa")
        namesake = folder / f"test_{path.stem}.py"
        of_folder = [folder] if path.parent != ROOT / "asa" else sorted(folder.glob("test_*.py"))
        package, name = ".".join(path.parent.relative_to(ROOT).parts), path.stem
        imported = re.compile(rf"\b{re.escape(package)}(\.{name}\b| import .*\b{name}\b)")
        importing = [test for test, content in testing.items() if imported.search(content)]
        chosen = [test for test in [namesake, *importing, *of_folder] if test.exists()]
        others = [test.relative_to(ROOT).as_posix() for test in chosen]
        tests = " ".join(dict.fromkeys([*own, *others]))
        found += [Mutant(file, text, *change, tests) for change in changes(text)]
    return random.Random(seed).sample(found, min(count, len(found)))


def changes(text: str) -> Iterator[tuple[int, int, str]]:
    """Changes of a module: first and last character, and the new text between them."""
    lines = text.encode().splitlines(keepends=True)

    def place(line: int, column: int) -> int:
        return len((b"".join(lines[: line - 1]) + lines[line - 1][:column]).decode())

    for node in _changeable(ast.parse(text)):
        for new in ["pass"] if isinstance(node, ast.Expr) else [f"({ast.unparse(new)})" for new in _variants(node)]:
            yield place(node.lineno, node.col_offset), place(node.end_lineno or 0, node.end_col_offset or 0), new


def _changeable(node: ast.AST) -> Iterator[ast.expr | ast.Expr]:
    """Expressions, and statements that are calls; not in annotations, decorators and messages."""
    if isinstance(node, ast.expr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            left_alone = name in ELSEWHERE or isinstance(child, ast.Raise | ast.JoinedStr)
            if isinstance(child, ast.AST) and not left_alone and getattr(child, "arg", "") not in WITHOUT_EFFECT:
                yield from _changeable(child)


def _variants(node: ast.expr) -> Iterator[ast.expr]:
    """Expressions with one change of the node itself."""
    if isinstance(node, ast.Compare):
        for k, old in enumerate(node.ops):
            for kind in COMPARISONS[type(old)]:
                changed = copy.deepcopy(node)
                changed.ops[k] = kind()
                yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (ast.Constant(node.value + step) for step in (1, -1))
    elif isinstance(node, ast.Call):
        for k, keyword in enumerate(node.keywords):
            if keyword.arg and keyword.arg not in WITHOUT_EFFECT:
                yield ast.Call(node.func, node.args, node.keywords[:k] + node.keywords[k + 1 :])
    elif isinstance(node, ast.Name) and node.id in EXCHANGED:
        yield ast.Name(EXCHANGED[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in EXCHANGED:
        yield ast.Attribute(node.value, EXCHANGED[node.attr])


def copy_checkout(folder: Path) -> Path:
    """A copy of all files of the checkout that git does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(checkout: Path, tests: str) -> str:
    """Run tests until the first that fails.

    Returns:
        Its id without parameters, or the file that cannot be imported; "" if all pass; `SILENT` where none has ended
        for too long.
    """
    alone = {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "-m", "not slow", *tests.split()],
        cwd=checkout, env={**os.environ, **alone}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    failed = re.compile(r"^(?:FAILED|ERROR) ([^ \[]+)")
    found = ""
    try:
        while line := lines.get(timeout=PATIENCE):
            if match := failed.match(line):
                found = match[1]
    except queue.Empty:
        os.killpg(process.pid, signal.SIGKILL)
        found = SILENT
    code = process.wait()
    return found or ("" if code == 0 else tests)


def _read(process: subprocess.Popen[str], lines: "queue.Queue[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def survivors(mutants: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """The changes that their tests do not notice.

    Raises:
        RuntimeError: a test that fails with the unchanged code.
    """
    with tempfile.TemporaryDirectory(prefix="asa-mutants-", ignore_cleanup_errors=True) as scratch:
        free: queue.Queue[Path] = queue.Queue()
        for k in range(jobs):
            free.put(copy_checkout(Path(scratch) / str(k)))

        def survives(mutant: Mutant) -> bool:
            checkout = free.get()
            try:
                (checkout / mutant.file).write_text(mutant.changed)
                first, _, others = mutant.tests.partition(" ")  # most are noticed by the first, which takes no time
                failed = run_tests(checkout, first) or (others and run_tests(checkout, others))
                (checkout / mutant.file).write_text(mutant.text)
                if failed and failed != SILENT and run_tests(checkout, failed):
                    raise RuntimeError(f"{failed} does not pass with the unchanged code")
            finally:
                free.put(checkout)
            print(f"{'noticed ' if failed else 'SURVIVED'} {mutant}", flush=True)
            return not failed

        with ThreadPoolExecutor(jobs) as pool:
            return [mutant for mutant, alive in zip(mutants, pool.map(survives, mutants), strict=True) if alive]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the survivors; 1 if there are any."""
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="folders of asa/ (default: all)")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="changes at a time, each in a copy of its own")
    parser.add_argument("--draw", type=int, metavar="N", help="N random changes in place of the listed ones")
    parser.add_argument("--seed", type=int, default=0, help="random seed of --draw")
    chosen = parser.parse_args(arguments)
    try:
        mutants = drawn(chosen.draw, chosen.seed, chosen.names) if chosen.draw else listed(chosen.names)
        alive = survivors(mutants, max(chosen.jobs, 1))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(alive)} of {len(mutants)} changes survived")
    for mutant in alive:
        print(f"  {mutant} ({mutant.tests})")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
