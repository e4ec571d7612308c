"""The floors of the house, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import asa

ROOT = Path(asa.__file__).parent
FLOORS = {
    "ops": 0,
    **dict.fromkeys(("losses", "models", "data"), 1),
    "methods": 2,
    "training": 3,
    "inference": 4,
    "evaluation": 5,
    **dict.fromkeys(("reporting", "export"), 6),
    "tasks": 7,
    "cli": 8,
}
# What may be imported where, and nowhere else.
HOMES = {
    "hydra": ("config.py", "cli/"),
    "omegaconf": ("config.py", "cli/"),
    "nibabel": ("data/io/nifti.py",),
    "torch.distributed": ("training/distributed.py", "ops/collectives.py"),
}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def test_imports_point_down_only() -> None:
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            there = name.split(".")[1] if name.startswith("asa.") else ""
            if here in FLOORS and there in FLOORS and here != there:
                assert FLOORS[there] < FLOORS[here], f"{path} imports {name}"


def test_some_libraries_have_one_home() -> None:
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            for library, homes in HOMES.items():
                if name == library or name.startswith(f"{library}."):
                    assert place.startswith(homes), f"{place} imports {name}"


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, asa; print([m for m in ('torch', 'monai', 'hydra', 'nibabel') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_public_names_need_no_extra() -> None:
    code = (
        "import sys\n"
        "extras = 'matplotlib', 'jinja2', 'nilearn', 'SimpleITK', 'onnxruntime', 'skimage', 'pydicom'\n"
        "for name in extras: sys.modules[name] = None\n"
        "import asa\n"
        "for name in asa.__all__: getattr(asa, name)\n"
        "import asa.cli.phantom, asa.cli.prepare, asa.cli.pretrain\n"
        "import asa.cli.finetune, asa.cli.predict, asa.cli.evaluate, asa.cli.export, asa.cli.ablate\n"
        "import asa.cli.regions, asa.cli.simulate, asa.cli.orient\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
