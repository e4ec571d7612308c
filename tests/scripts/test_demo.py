"""What the demonstration says and draws at its end, of made-up results."""

from pathlib import Path

import numpy as np
import pytest
from scored import write_run

from asa.data.io.nifti import read_image, write_image, write_label
from asa.reporting.figures import READABLE, TITLE
from scripts import demo_check

NAMES = ["ventricle", "thalamus"]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished demonstration; from scratch, 1 label is ahead of 3."""
    dice = {"scratch_1": 0.3, "scratch_3": 0.25, "pretrained_1": 0.5, "pretrained_3": 0.55}
    for name, value in dice.items():
        write_run(tmp_path / "evaluations" / name, {label: [value, value + 0.01] for label in NAMES})
    image = tmp_path / "labelled" / "s1_T1.nii.gz"
    write_image(image, np.pad(np.ones((20, 24, 16)), 4), np.eye(4))
    label = np.pad(np.ones((4, 24, 16), dtype=np.uint8), ((4, 20), (4, 4), (4, 4)))
    for file in ("labelled/s1_structures", "predictions/pretrained_1/s1", "predictions/scratch_1/s1"):
        write_label(tmp_path / f"{file}.nii.gz", label, read_image(image))
    monkeypatch.setattr(demo_check, "validations", lambda run: [{"masked_mse": 0.4, "mean_predictor_mse": 1.0}])
    monkeypatch.setattr(demo_check, "reconstruction", lambda out: b"")
    monkeypatch.setattr("sys.argv", ["demo_check", str(tmp_path)])
    return tmp_path


def test_the_last_line_names_the_page_and_few_labels_from_scratch_are_explained(demo: Path, capsys) -> None:
    assert demo_check.main() == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].endswith(f": {demo / 'comparison' / 'comparison.html'}")
    assert "differ by less than the seeds do" in text and "from scratch 3 may end below 1" in text
    assert (demo / "ablation.md").read_text().splitlines()[2].startswith("- pretrained with 1 labelled is ahead of scr")


def test_the_label_maps_have_titles_and_a_legend(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = demo_check.overlay_panel(np.ones((16, 24, 20)), [np.ones((16, 24, 20), int)] * 3)
    drawn = list[np.ndarray]()
    monkeypatch.setattr(demo_check, "encode_png", drawn.append)
    demo_check.label_maps(demo, NAMES)
    factor = round(READABLE / plain.shape[1])
    assert drawn[0].shape == (plain.shape[0] * factor + 2 * TITLE, plain.shape[1] * factor, 3)
    assert drawn[0][:TITLE].any() and drawn[0][-TITLE:].any()
