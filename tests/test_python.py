"""The package from Python, as a user of timm and TorchIO expects it: attributes, names, what objects say they hold."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from examples import write_examples
from untrained import checkpoint

import asa
from asa.config import build


def test_subpackages_of_networks_are_attributes() -> None:
    code = "import asa; print(asa.models.unet_tiny.__name__, 'asa_tiny' in asa.models.list_models(), asa.baselines)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("unet_tiny True <module 'asa.baselines'")
    folders = {path.parent.name for path in Path(asa.__file__).parent.glob("*/__init__.py")}
    assert folders - set(dir(asa)) == {"cli", "export", "reporting", "tasks"}, "what notebooks use"


def test_a_method_takes_its_model_by_position() -> None:
    model = asa.asa_tiny(img_size=32)
    assert asa.MaskedPretraining(model, mask_ratio=0.5).model is model


def test_a_keyword_that_is_misspelt_is_named_before_the_one_that_is_missing() -> None:
    with pytest.raises(ValueError, match=r"unet_tiny: no keyword 'out_chanels'; did you mean out_channels\?"):
        asa.create_model("unet_tiny", out_chanels=4)
    with pytest.raises(ValueError, match="unet_tiny: .* missing .* 'out_channels'"):
        asa.create_model("unet_tiny", img_size=64)
    with pytest.raises(ValueError, match="unet_tiny: .* unexpected keyword argument 'patchsize'"):
        asa.create_model("unet_tiny", out_channels=4, patchsize=8)


@pytest.mark.parametrize("size", [(32, 48), 32, (32, 32, 0)])
def test_a_crop_has_three_edges(store: Path, size: object) -> None:
    opened = asa.Store(store)
    with pytest.raises(ValueError, match=r"give the three edges \(D, H, W\)"):
        asa.CropDataset(opened, opened.records, size)


def test_a_store_its_records_and_a_dataset_tell_what_they_hold(store: Path) -> None:
    opened = asa.Store(store)
    assert repr(opened) == f"Store('{store}': 4 scans of 4 subjects, channels t1, labels csf, gm, wm)"
    assert repr(opened.records) == "Records(4 scans: s0, s1, s2, ...)"
    assert repr(opened.records[:2]) == "Records(2 scans: s0, s1)"
    crops = asa.CropDataset(opened, opened.records, (32, 48, 32), crop="random", labelled=True)
    assert repr(crops) == "CropDataset(4 scans, crops of 32 x 48 x 32 voxels, random, labelled)"


def test_lightning_trains_a_method_as_the_manual_says(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    (block,) = re.findall(r"^```python\n(import asa, lightning.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "store").symlink_to(store)
    block = block.replace("Trainer(", "Trainer(accelerator='cpu', ")
    code = f"{block}\nlosses = trainer.logged_metrics\nprint(trainer.global_step, float(losses['loss']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    steps, loss = done.stdout.split()[-2:]
    assert done.returncode == 0 and steps == "40" and 0 < float(loss) < 10, done.stderr


def test_arrays_and_files_are_predicted_as_the_manual_says(
    store: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    (block,) = re.findall(r"^## Prediction of arrays\n\n```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    checkpoint(tmp_path / "run")
    (tmp_path / "store").symlink_to(store)
    (tmp_path / "scan.nii.gz").symlink_to(raw / "s0_T1.nii.gz")
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(block, made)
    assert made["probabilities"].shape == (4, *made["image"].shape[1:]) == (4, *made["case"].image.shape[1:])
    assert (tmp_path / "labels.nii.gz").is_file() and made["volumes"].keys() == {"left_x", "right_x", "middle"}


def test_a_package_of_ones_own_is_found_beside_its_configurations(store: Path, tmp_path: Path) -> None:
    write_examples(tmp_path)
    few = "train.steps=1 train.batch_size=1 train.device=cpu loader.workers=0 crop=32 model.out_channels=1"
    line = f"pretrain --config-dir mine plugins=[mine] method=noise model=network data.store={store} out=run {few}"
    # Not `python -m`, which searches the current folder, but as the commands that pip installs.
    code = f"from asa.cli import main; raise SystemExit(main({[*line.split(), 'data.split={validation: 1}']}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(asa.__file__).parents[1]), "PYTHONSAFEPATH": "1"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote run/" in done.stdout, done.stderr


def test_a_package_that_is_not_found_says_where_it_is_searched() -> None:
    with pytest.raises(ValueError, match="install nowhere, or give --config-dir, beside which it is searched"):
        build({"_target_": "nowhere.Network"}, plugins=["nowhere"])
