"""The networks and the scores of scripts/reproduce/detector.py."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asa.data.io.nifti import read_image, write_image, write_label
from asa.inference.asymmetry import Asymmetry

detector = importlib.import_module("scripts.reproduce.detector")


def test_every_network_finds_its_start_and_few_labels_are_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"ms": ["07", "19"], "few": [f"s{k}" for k in range(12)]}
    monkeypatch.setattr(
        detector, "Store", lambda path: SimpleNamespace(records=[{"id": id} for id in ids[Path(path).name]])
    )
    found, trained = detector.trainings(Path("out")), []
    for name, training in found.items():
        if training.init and not training.init.startswith("asa://"):
            assert Path(training.init).name in trained
        trained.append(name)
    assert found["ms_07_detector"].labelled == ("07",) and found["ms_07_scratch"].init is None
    assert found["planted10_scratch"].labelled == tuple(ids["few"][:10])
    assert found["planted2_encoder"].labelled == ("s0", "s1")


def test_the_map_is_the_probability_of_any_lesion_inside_the_brain(tmp_path: Path) -> None:
    image = np.ones((4, 3, 2), np.float32)
    image[0] = 0  # air
    nothing = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 3, 2)
    predicted = tmp_path / "predicted" / "network" / "ms"
    (predicted / "probabilities" / "a").mkdir(parents=True)
    write_image(tmp_path / "a_T1.nii.gz", image, np.eye(4))
    write_image(predicted / "probabilities" / "a" / "background.nii.gz", nothing, np.eye(4))
    label = np.zeros((4, 3, 2), np.uint8)
    label[1, 1, 1], label[2, 1, 1] = 1, 4
    write_label(predicted / "a.nii.gz", label, read_image(tmp_path / "a_T1.nii.gz"))
    found = detector.predict(tmp_path, "network", "ms", tmp_path, {"a": tmp_path / "a_T1.nii.gz"})["a"]
    np.testing.assert_allclose(found.map.map.numpy(), np.where(image == 0, 0, 1 - nothing).T, atol=1e-6)
    assert found.label.sum() == 2 and found.label[1, 1, 1] and found.label[1, 1, 2]


def test_the_scores_of_a_perfect_map_and_of_nothing_found() -> None:
    lesion = np.zeros((4, 4, 4), bool)
    lesion[1, 1, :2] = True
    inside = torch.ones(4, 4, 4, dtype=torch.bool)
    perfect = detector.Found(Asymmetry(0.0, torch.from_numpy(lesion).float(), inside), lesion)
    blind = detector.Found(Asymmetry(0.0, torch.zeros(4, 4, 4), inside), np.zeros_like(lesion))
    assert detector.voxels_row({"a": perfect}, {"a": lesion}) == "1.000 | 1.000 | 1.000 | 1.000"
    assert detector.voxels_row({"a": blind}, {"a": lesion}) == "0.500 | 0.031 | 0.000 | 0.000"
