"""The architecture: which folder imports which, how large folders are, the path of a sample, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import torch

import asa

ROOT = Path(asa.__file__).parent
FLOORS = {
    "ops": 0,
    **dict.fromkeys(("losses", "models", "data"), 1),
    **dict.fromkeys(("methods", "evaluation"), 2),
    **dict.fromkeys(("training", "baselines"), 3),
    "inference": 4,
    **dict.fromkeys(("reporting", "export"), 5),
    "tasks": 6,
    "restoration": 7,
    "cli": 8,
}
BY_NAME_ONLY = ("baselines", "restoration")  # no other folder imports them, as it would no package of the user's own
LARGEST_FOLDER = 14  # modules
# Lines of each folder of asa/, with its subfolders. A change may lower a number; to raise one, it has to say why.
LINES = {
    "": 705,
    "baselines": 1058,  # puzzles without mirrored patches
    "cli": 753,  # stale stages of a study
    "data": 7740,  # a killed worker fails its own scan; values by session; what a BIDS dataset has beside
    "evaluation": 2344,  # scores over subjects, and on scans of the training; a summary of something else stays
    "export": 740,  # what is not finite becomes no label map
    "inference": 2577,  # labels for unlabelled scans; scans and ensembles are checked by content and voxel size
    "losses": 466,  # two classes or more; features of all processes
    "methods": 700,  # weights of classes and tasks are checked
    "models": 2116,  # layers of a Swin; small convolutions on a CPU
    "ops": 491,  # encodings on a device
    "reporting": 1623,  # ablations over subjects
    "restoration": 1971,  # windows, places and numbers of regions; pairs that do not fit are found first
    "tasks": 3198,  # scans on both sides of a split, or without labels; files of earlier predictions
    "training": 2597,  # a run continues on its own data, and says if it is not through; killed workers of the loader
}
# The only places that may import a library.
HOMES = {
    "hydra": ("config.py", "cli/"),
    "omegaconf": ("config.py", "cli/"),
    "nibabel": ("data/io/",),
    "torch.distributed": ("training/distributed.py", "losses/contrastive.py"),
}
# What a reader opens to follow a sample of pretraining from the store to the loss.
PATH_OF_A_SAMPLE = {
    "data/store.py",
    "data/loading/crops.py",
    "data/loading/augment.py",
    "data/loading/loader.py",
    "training/loop.py",
    "methods/pretrain.py",
    "models/masked_autoencoder.py",
    "models/sw_vit.py",
    "losses/reconstruction.py",
    "ops/patches.py",
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
                assert there not in BY_NAME_ONLY, f"{path} imports {name}"


def test_every_folder_is_on_a_floor_and_small() -> None:
    folders = {path for path in ROOT.rglob("*") if path.is_dir() and list(path.glob("*.py"))}
    assert {folder.relative_to(ROOT).parts[0] for folder in folders} == set(FLOORS)
    for folder in folders | {ROOT}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= LARGEST_FOLDER, f"{folder} holds {len(modules)} modules"


def test_no_folder_grows_beyond_its_lines() -> None:
    counts: dict[str, int] = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        folder = parts[0] if len(parts) > 1 else ""
        counts[folder] = counts.get(folder, 0) + len(path.read_text().splitlines())
    assert counts.keys() == LINES.keys()
    assert {folder: count for folder, count in counts.items() if count > LINES[folder]} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {
        path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
    }
    graph = {module: {name for name in imports(path) if name in modules} for module, path in modules.items()}
    while leaves := {module for module, names in graph.items() if not names & graph.keys()}:
        graph = {module: names for module, names in graph.items() if module not in leaves}
    assert not graph


def test_some_libraries_have_one_home() -> None:
    for path in ROOT.rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            for library, homes in HOMES.items():
                if name == library or name.startswith(f"{library}."):
                    assert place.startswith(homes), f"{place} imports {name}"


def test_no_command_asks_for_a_target_or_a_type() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        text = path.read_text()
        assert "_target_" not in text and "asa.methods" not in text and "asa.models" not in text, path


def test_no_class_is_recognised_by_a_protocol() -> None:
    # From Python 3.12 on, `isinstance` with a protocol does not see the modules and parameters of an nn.Module.
    found = [path for path in ROOT.rglob("*.py") if "runtime_checkable" in path.read_text()]
    assert found == []


def test_a_sample_goes_from_the_store_to_the_loss_through_ten_files(store: Path) -> None:
    crops = asa.CropDataset(asa.Store(store), [{"id": "s0"}], (32, 32, 32), crop="random")
    method = asa.MaskedPretraining(model=asa.asa_tiny(img_size=32))
    entered = set()

    def trace(frame, event, argument) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            entered.add(file.relative_to(ROOT).as_posix())

    from asa.data.loading.loader import LoaderSettings, make_loader

    batches = iter(make_loader(crops, 1, LoaderSettings(workers=0)))
    sys.setprofile(trace)
    try:
        batch = next(batches)
        method(batch)["loss"].backward()
    finally:
        sys.setprofile(None)
    assert entered | {"training/loop.py"} == PATH_OF_A_SAMPLE
    assert len(PATH_OF_A_SAMPLE) <= 10
    assert torch.isfinite(next(method.parameters()).grad).all()


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, asa, asa.models; asa.list_models()\n"
        "print([m for m in ('torch', 'monai', 'hydra', 'nibabel') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_no_command_imports_monai_before_it_makes_a_network_that_needs_it() -> None:
    code = (
        "import importlib, sys, asa.cli\n"
        "for command in asa.cli.COMMANDS.values(): importlib.import_module(command.target.split(':')[0])\n"
        "import asa.tasks.pretraining\n"
        "method = asa.MaskedPretraining(model=asa.asa_tiny(img_size=32))\n"
        "print('torch' in sys.modules, 'monai' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "True False"


def test_the_public_names_need_no_extra() -> None:
    code = (
        "import sys\n"
        "extras = 'matplotlib', 'jinja2', 'nilearn', 'SimpleITK', 'onnxruntime', 'skimage', 'pydicom', 'sklearn'\n"
        "extras += 'huggingface_hub', 'mlflow', 'wandb', 'ants'\n"
        "for name in extras: sys.modules[name] = None\n"
        "import asa, asa.models\n"
        "for name in asa.__all__: getattr(asa, name)\n"
        "for name in asa.models.__all__: getattr(asa.models, name)\n"
        "import importlib, asa.cli\n"
        "for command in asa.cli.COMMANDS.values(): importlib.import_module(command.target.split(':')[0])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_type_checker_sees_the_types_of_public_names(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "import asa\n"
        "from asa.models import SWViT, create_model, list_models, sw_vit_base, unet_base\n"
        "reveal_type(asa.Store('x').channels)\n"
        "reveal_type(asa.MaskedPretraining(model=asa.asa_tiny()).model)\n"
        "reveal_type(unet_base(4))\n"
        "reveal_type(sw_vit_base())\n"
        "reveal_type(list_models())\n"
        "reveal_type(asa.pretrain('store', 'run', crop=96))\n"
        "reveal_type(asa.dice)\n"
        "reveal_type(create_model('unet_base'))\n"
        "asa.dize\n"
        "SWViT(window='wide')\n"
        "from asa.models import nothing\n"
    )
    # In the checkout and with its settings, so that what the type check of the package cached is not checked again:
    # PyTorch alone takes half a minute.
    command = [sys.executable, "-m", "mypy", str(snippet)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    shown = [line.split("note: ")[1] for line in done.stdout.splitlines() if "Revealed type" in line]
    expected = ("list[", "MaskedAutoencoder", "SegmentationUNet", "SWViT", "list[", "pathlib.Path")
    assert all(type_ in line for type_, line in zip(expected, shown, strict=False)), done.stdout
    assert "ndarray" in shown[6] and "float" in shown[6]
    assert shown[7] == 'Revealed type is "torch.nn.modules.module.Module"'
    assert done.stdout.count("error:") == 3 and 'has no attribute "dize"' in done.stdout
    assert 'has no attribute "nothing"' in done.stdout and 'incompatible type "str"' in done.stdout
