"""The rows of scripts/reproduce/detector.py, and those that it shares with planted.py."""

import importlib
from types import SimpleNamespace

import numpy as np
import torch

detector = importlib.import_module("scripts.reproduce.detector")
planted = importlib.import_module("scripts.reproduce.planted")


def lesion_at(side: int) -> np.ndarray:
    lesion = np.zeros((4, 4, 4), bool)
    lesion[1, 1, side] = True
    return lesion


def store(lesion: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(
        records=[{"id": "ill"}],
        image=lambda id: 1 + lesion[None].astype(np.float16),
        label=lambda id: lesion[None].astype(np.uint8),
    )


def test_a_patients_row_is_of_the_lesion_or_with_its_mirror_image() -> None:
    lesion, found = lesion_at(0), lambda image: image[0] - 1
    (row,) = detector.rows_of_patients("map", False, found, store(lesion))
    assert row == "| map | ill | 1.000 | 1.000 | 0.016 |"
    (row,) = detector.rows_of_patients("map", True, found, store(lesion))  # half of what is true is found
    assert row == "| map | ill | 0.750 | 0.516 | 0.031 |"


def test_a_map_of_a_systematic_error_is_right_above_healthy() -> None:
    """All brains are found to be ill at one place: what is left after the comparison is the lesion."""
    error = torch.from_numpy(lesion_at(3)).float()
    noise = torch.Generator().manual_seed(0)
    healthy = {id: 1 + torch.rand(1, 4, 4, 4, generator=noise) / 100 for id in "abc"}
    patients = {id: image + torch.from_numpy(lesion_at(0)) / 2 for id, image in healthy.items()}
    bench = planted.Bench(healthy, patients, {id: lesion_at(0) for id in healthy}, dict.fromkeys(healthy, "wmh"))
    rows = list(planted.rows_of("map", False, lambda image: image[0] - 1 + error, bench))
    assert rows[0] == "| map | all | 0.500 | 0.984 | 0.500 | 0.016 | 0 of 3 |"
    assert rows[2] == "| map, above healthy | all | 1.000 | 1.000 | 1.000 | 0.016 | 3 of 3 |"
    assert len(rows) == 4 and "wmh" in rows[1] and "wmh" in rows[3]


def test_a_row_of_few_lesions_is_of_means_and_of_paired_differences() -> None:
    few = importlib.import_module("scripts.reproduce.few_lesions")

    def measured(*dice: float) -> dict[str, np.ndarray]:
        scores = np.array([dice, [0.5] * len(dice)])
        return {"tested": scores, "healthy": np.array([[10, 20], [1.0, 3.0]]), "ms": scores[:, :2]}

    scratch = measured(0.1, 0.3, 0.5)
    assert few.row(1, "scratch", scratch) == (
        "| 1 | scratch | 0.300 |  | 0.500 | 15, 2 ml | 0.100 and 0.300 | 0.500 and 0.500 |"
    )
    assert "| 0.400 | +0.100 (+0.100 to +0.100) |" in few.row(1, "encoder", measured(0.2, 0.4, 0.6), scratch)
