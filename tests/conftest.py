"""Shared by the tests: few threads, and a store of tiny synthetic brains."""

import os
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from asa.data.datasets import folder
from asa.data.io.nifti import read_image, write_image, write_label
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.training import device

# Tiny tensors: threads would cost more than they give.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=1.0, help="time for each kind of file in test_fuzz.py")
    parser.addoption("--niivue", type=Path, help="NiiVue's niivue.umd.js, for tests in a browser: see CONTRIBUTING.md")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the files with long tests to the processes, which begin with them, so that none waits for the last one.

    A process is given a part of all items, of equal size, and then takes over quick tests of the others.
    """
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("slow")]
    files = list(dict.fromkeys(item.path for item in long))
    quick = iter([item for item in items if not item.get_closest_marker("slow")])
    parts = [[item for item in long if files.index(item.path) % count == k] for k in range(count)]
    items[:] = [item for part in parts for item in [*part, *islice(quick, max(0, len(items) // count - len(part)))]]
    items.extend(quick)


LABELS = {1: "csf", 2: "gm", 5: "wm"}


def write_brain(folder_: Path, name: str, seed: int, size: tuple[int, int, int] = (72, 80, 76)) -> None:
    """An ellipsoid of nested tissues with noise: NAME_T1.nii.gz and NAME_seg.nii.gz, in LAS orientation."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in size], indexing="ij")
    radius = np.sqrt(sum((axis * rng.uniform(0.95, 1.1)) ** 2 for axis in axes))
    label = np.zeros(size, dtype=np.uint8)
    for value, edge in ((1, 0.95), (2, 0.85), (5, 0.6)):
        label[radius < edge] = value
    means = np.array([0.0, 300.0, 700.0, 0.0, 0.0, 1000.0])
    image = np.where(label > 0, means[label] + rng.normal(0, 40, size), 0).clip(min=0).astype(np.float32)
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[0, 3] = size[0]
    folder_.mkdir(parents=True, exist_ok=True)
    write_image(folder_ / f"{name}_T1.nii.gz", image, affine)
    like = read_image(folder_ / f"{name}_T1.nii.gz")
    write_label(folder_ / f"{name}_seg.nii.gz", label, like)


@pytest.fixture(scope="session", autouse=True)
def workers_have_imported_what_they_need() -> None:
    """Ranks and loader workers are forks of a process that starts here, before a loader starts one that knows less."""
    tasks = ["asa.tasks.pretraining", "asa.tasks.segmentation", "asa.tasks.evaluation"]
    libraries = ["torch.utils.tensorboard", "torch._dynamo", "hydra"]
    forkserver.set_forkserver_preload([*tasks, "asa.data.preprocessing.cohort", *libraries])
    forkserver.ensure_running()


@pytest.fixture(autouse=True)
def same_precision_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """train.precision=auto is float32, whether or not this CPU has bfloat16 units."""
    monkeypatch.setattr(device, "has_bf16_units", lambda: False)


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests compute on the CPU, also in processes that they start, unless they are marked "gpu"."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labelled scans."""
    path = tmp_path_factory.mktemp("raw scans")
    for k in range(4):
        write_brain(path, f"s{k}", seed=k)
    return path


@pytest.fixture(scope="session")
def store(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four scans prepared, with labels."""
    out = tmp_path_factory.mktemp("stores") / "store"
    records = folder.records(raw, images={"t1": "*_T1.nii.gz"}, label="*_seg.nii.gz")
    report = prepare_cohort(records, out, CohortSettings(labels=LABELS), progress=False)
    assert not report.failures
    return out
