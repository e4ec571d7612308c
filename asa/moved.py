"""Modules under the names that files on disk know them by.

Checkpoints, run configurations and MONAI bundles name functions and classes of this package. Those that were written
before a module moved name its old home, which stays importable.
"""

import importlib
import importlib.machinery
import sys
from types import ModuleType

MOVED = {
    "asa.models.asa": "asa.models.masked_autoencoder",
    "asa.methods.classify": "asa.methods.whole_scans",
    "asa.methods.regress": "asa.methods.whole_scans",
    "asa.data.stages": "asa.data.preprocessing.steps",
    "asa.engine.bundled": "asa.export.monai_runtime",
}


def current_name(target: str) -> str:
    """`package.module.name` with the module's present home."""
    module, _, name = target.rpartition(".")
    return f"{MOVED.get(module, module)}.{name}"


class _MovedModules:
    """Finds and loads a module by an old name of `MOVED`, and packages that only such names lie in."""

    # Not an importlib.abc.Loader: importing that would take most of the time of `import asa`.
    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname in MOVED:
            return importlib.machinery.ModuleSpec(fullname, self)  # type: ignore[arg-type]
        if any(old.startswith(f"{fullname}.") for old in MOVED):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in MOVED:  # importlib takes what lies here afterwards
            sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_MovedModules())
