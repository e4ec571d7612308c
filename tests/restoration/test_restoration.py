"""Restoration from pairs on disk to scores, by the commands; tiles; metrics."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asa
from asa.cli import evaluate, finetune, predict
from asa.data.loading.loader import collate
from asa.inference.segmentation import PredictSettings
from asa.models.unet import unet_tiny
from asa.restoration.evaluation import evaluate_pictures, score_image
from asa.restoration.images import read_picture, write_picture, write_regions
from asa.restoration.method import Restoration, restore_image, tiles
from asa.restoration.pairs import PairDataset, find_pairs
from asa.restoration.rat import rat_tiny
from asa.restoration.restormer import Restormer

pytest.importorskip("PIL")


def run(monkeypatch: pytest.MonkeyPatch, command, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["asa", *map(str, arguments)])
    return command.main()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs of 32 x 40 pixels: squares under noise, two subjects with two slices each, with label maps."""
    root, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for k in range(7):
        labels = np.zeros((32, 40), dtype=int)
        top, left = generator.integers(4, 14, size=2)
        labels[top : top + 14, left : left + 14] = 1
        clean = 0.2 + 0.5 * labels[None]
        name = f"p{k // 2 if k < 4 else k}_slice{k}.png"
        write_picture(root / "high" / name, clean)
        write_picture(root / "low" / name, clean + generator.normal(0, 0.1, clean.shape))
        write_regions(root / "regions" / name, labels)
    return root


TINY = ["method=restore", "model=rat_tiny", "crop=16", "loader.workers=0", "train.validate_every=0"]
SPLIT = ["data.subject='(p\\d+)_'", "data.split={validation: 1, test: 1}"]


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps."""
    out = tmp_path_factory.mktemp("runs") / "rat"
    steps = ["train.steps=30", "train.batch_size=4", "optim.lr=3e-3", "optim.warmup=0"]
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, finetune, f"data.root={pairs}", f"out={out}", *TINY, *SPLIT, *steps) == 0
    return out


def check_gain(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restored images of a folder are 1 dB nearer to the clean ones than the input, by asa-evaluate."""
    scores = {}
    for name, folder in (("restored", tmp_path / "restored"), ("input", pairs / "low")):
        options = ["policy=restoration", "allow_missing=true", f"truth={pairs / 'high'}"]
        assert run(monkeypatch, evaluate, *options, f"predictions={folder}", f"out={tmp_path / name}_scores") == 0
        scores[name] = json.loads((tmp_path / f"{name}_scores" / "summary.json").read_text())["results"]["image"]
    assert scores["restored"]["psnr"]["mean"] > scores["input"]["psnr"]["mean"] + 1


def test_the_commands_denoise_held_out_subjects(
    pairs: Path, trained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    split = json.loads((trained / "split.json").read_text())
    inputs = [f"checkpoint={trained}", f"input={pairs / 'low'}", f"regions={pairs / 'regions'}", "part=test"]
    assert run(monkeypatch, predict, *inputs, f"out={tmp_path / 'restored'}") == 0
    found = sorted(path.name for path in (tmp_path / "restored").iterdir())
    assert found and all(name.split("_")[0] in split["test"] for name in found)
    check_gain(pairs, tmp_path, monkeypatch)
    shown = capsys.readouterr().out
    assert "PSNR (dB)" in shown and "95 % interval" in shown and "data range" in shown
    rows = (tmp_path / "restored_scores" / "cases.csv").read_text().splitlines()
    assert rows[0] == "id,psnr,ssim,rmse,truth" and len(rows) == 1 + len(found)


def test_restormer_is_trained_resumed_and_scored_by_the_same_commands_and_predicts_without_regions(
    pairs: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    own = [f"data.root={pairs}", f"out={tmp_path / 'run'}", *TINY, *SPLIT, "model=restormer_tiny"]
    own += ["method.beta=0", "train.batch_size=4", "optim.lr=3e-3", "optim.warmup=0"]
    for steps in (15, 30):  # in two parts
        assert run(monkeypatch, finetune, *own, f"train.steps={steps}") == 0
    assert "continuing from step 15" in capsys.readouterr().out
    assert isinstance(asa.load_model(tmp_path / "run"), Restormer)
    inputs = [f"checkpoint={tmp_path / 'run'}", f"input={pairs / 'low'}", "part=test", f"out={tmp_path / 'restored'}"]
    assert run(monkeypatch, predict, *inputs) == 0
    check_gain(pairs, tmp_path, monkeypatch)
    assert run(monkeypatch, predict, *inputs, f"regions={pairs / 'regions'}") == 1
    assert "does not attend inside regions: leave it out" in capsys.readouterr().err


def test_a_run_goes_on_and_its_network_loads(pairs: Path, trained: Path, monkeypatch, capsys) -> None:
    steps = ["train.steps=31", "train.batch_size=4", "optim.lr=3e-3", "optim.warmup=0"]
    assert run(monkeypatch, finetune, f"data.root={pairs}", f"out={trained}", *TINY, *SPLIT, *steps) == 0
    assert "continuing from step 30" in capsys.readouterr().out
    model = asa.load_model(trained)
    assert isinstance(model, asa.RegionAttentionTransformer) and model.in_channels == 1
    with pytest.raises(ValueError, match="no encoder"):
        asa.load_encoder(trained)


def test_a_run_starts_from_another_one(pairs: Path, trained: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "next"
    steps = ["train.steps=1", "train.batch_size=1", "optim.lr=0", "optim.warmup=0"]
    assert run(monkeypatch, finetune, f"data.root={pairs}", f"out={out}", f"init={trained}", *TINY, *SPLIT, *steps) == 0
    before, after = asa.load_model(trained).state_dict(), asa.load_model(out).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transfer=explain"], "transfer=explain is not for method=restore"),
        (["init=somewhere"], "no checkpoint here"),
        (["crop=[16,16]"], "crops of images are square"),
        (["data.root=null"], "data.root has to be given"),
        (["model.upscale=2"], "with model.upscale=2"),
        (["model.in_channels=3"], "is a grey image, but the network takes colour"),
        (["model=unet_tiny"], "model=unet_tiny is not for asa-finetune with method=restore: choose rat_tiny"),
        (["crop=48"], "lower crop"),
        (["data.regions=maps"], "asa-regions"),
    ],
)
def test_wrong_settings_are_refused_before_a_run_folder_is_made(
    pairs: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str
) -> None:
    if arguments == ["model=unet_tiny"]:
        arguments = [*arguments, "model.out_channels=2", "crop=64"]
    assert run(monkeypatch, finetune, f"data.root={pairs}", f"out={tmp_path / 'run'}", *TINY, *arguments) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_plan_is_printed_and_leaves_nothing_behind(pairs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    given = [f"data.root={pairs}", f"out={tmp_path / 'run'}", *TINY, *SPLIT, "plan=only", "plan_rate=2"]
    assert run(monkeypatch, finetune, *given, "init=not/read/for/a/plan", "train.device=cuda:7") == 0
    shown = capsys.readouterr().out
    assert "encoder" not in shown and "total 0.2" in shown
    for text in (
        "crops in one micro-batch",
        "GFLOP forward",
        "memory      weights",
        "activations, which are measured where there is a GPU",
        "epochs of",
        "pairs",
        "at 2 TFLOP/s",
    ):
        assert text in shown
    assert not (tmp_path / "run").exists()


def test_wrong_inputs_of_prediction_are_named(pairs: Path, trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    source = tmp_path / "low"
    labels = tmp_path / "regions"
    write_picture(source / "colour.png", np.zeros((3, 20, 20)))
    write_picture(source / "lone.png", np.zeros((1, 20, 20)))
    write_picture(source / "other.png", np.zeros((1, 20, 20)))
    for name in ("colour", "other"):
        write_regions(labels / f"{name}.png", np.zeros((20, 24)))
    inputs = [f"checkpoint={trained}", f"input={source}", f"out={tmp_path / 'out'}"]
    assert run(monkeypatch, predict, *inputs, f"regions={labels}") == 1
    shown = "".join(capsys.readouterr())
    assert "colour: failed:" in shown and "is a colour image, but the network takes grey" in shown
    assert "lone: failed: no label map of this image" in shown
    assert "other: failed:" in shown and "the label map is 24 x 20 pixels, its image 20 x 20" in shown
    for more, message in (
        ([], "attends inside regions"),
        (["mirror=true"], "one checkpoint"),
        (["part=nobody"], "part=nobody"),
    ):
        assert run(monkeypatch, predict, *inputs, *more) == 1
        assert message in capsys.readouterr().err


def test_images_whose_folder_is_removed_are_not_begun_anew(
    pairs: Path, trained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"

    def removing(*args: Any, **options: Any) -> Any:
        shutil.rmtree(out)
        return restore_image(*args, **options)

    monkeypatch.setattr("asa.restoration.task.restore_image", removing)
    inputs = [f"checkpoint={trained}", f"input={pairs / 'low'}", f"regions={pairs / 'regions'}", f"out={out}"]
    assert run(monkeypatch, predict, *inputs) == 1
    assert f"the folder {out} was removed while it was in use" in capsys.readouterr().err and not out.exists()


def test_images_of_other_cases_or_sizes_are_not_scored(pairs: Path, tmp_path: Path) -> None:
    name = next((pairs / "high").iterdir()).name
    write_picture(tmp_path / "a" / name, np.zeros((1, 8, 8)))
    with pytest.raises(ValueError, match="no prediction of"):
        evaluate_pictures(tmp_path / "a", pairs / "high", tmp_path / "out")
    with pytest.raises(ValueError, match="its target"):
        evaluate_pictures(tmp_path / "a", pairs / "high", tmp_path / "out", allow_missing=True)
    write_picture(tmp_path / "a" / "stranger.png", np.zeros((1, 8, 8)))
    with pytest.raises(ValueError, match="no image stranger"):
        evaluate_pictures(tmp_path / "a", pairs / "high", tmp_path / "out", allow_missing=True)


def test_restoration_takes_its_own_network_only() -> None:
    with pytest.raises(ValueError, match="model=rat_"):
        Restoration(model=unet_tiny(2, img_size=64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more"):
        Restoration(model=rat_tiny(), beta=-1)


@pytest.mark.parametrize("upscale", [1, 2])
def test_the_method_gives_the_loss_at_the_targets_resolution(upscale: int) -> None:
    torch.manual_seed(0)
    method = Restoration(model=rat_tiny(upscale=upscale), beta=0.5)
    image, labels = torch.rand(2, 1, 16, 16), torch.randint(3, (2, 16, 16))
    target = torch.rand(2, 1, 16 * upscale, 16 * upscale)
    found = method({"image": image, "target": target, "regions": labels})
    fine = labels.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
    prediction = method.model(image, labels)
    torch.testing.assert_close(found["loss"], asa.FocalRegionLoss(0.5)(prediction, target, fine))
    torch.testing.assert_close(found["mae"], (prediction - target).abs().mean().detach())
    assert set(found) == {"loss", "mae", "psnr"}


# ------------------------------------------------------------------------------------------ tiles


def test_an_image_that_fits_a_tile_is_restored_in_one_piece() -> None:
    torch.manual_seed(0)
    model = rat_tiny(dim=8, num_heads=2).eval()
    image, labels = torch.rand(1, 30, 50), torch.randint(3, (30, 50))
    with torch.no_grad():
        expected = model(image[None], labels[None])[0]
    torch.testing.assert_close(restore_image(model, image, labels, PredictSettings(device="cpu"), tile=50), expected)


def test_tiles_cover_an_image_once_and_hold_small_regions_whole() -> None:
    generator = np.random.default_rng(0)
    labels = np.zeros((210, 170), dtype=int)
    for k in range(1, 30):
        top, left = generator.integers(0, (190, 150))
        labels[top : top + generator.integers(2, 40), left : left + generator.integers(2, 40)] = k
    seen = np.zeros_like(labels)
    for core, context in tiles(labels, 64, 16):
        seen[core] += 1
        assert all(side.start % 16 == 0 for side in context)
        for k in np.unique(labels[core])[1:]:
            rows, columns = np.nonzero(labels == k)
            if max(np.ptp(rows), np.ptp(columns)) < 64:
                assert (labels[context] == k).sum() == len(rows)
    assert (seen == 1).all()


def test_a_tile_is_what_its_context_gives() -> None:
    torch.manual_seed(0)
    model = rat_tiny(dim=8, groups=1, depth=1, num_heads=2, upscale=2).eval()
    for name, parameter in model.named_parameters():
        if "scale" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    image, labels = torch.rand(1, 100, 70), torch.randint(3, (25, 18)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    labels = labels[:, :70].contiguous()
    found = restore_image(model, image, labels, PredictSettings(device="cpu"), tile=64)
    assert found.shape == (1, 200, 140) and found.isfinite().all()
    core, context = list(tiles(labels.numpy(), 64, model.multiple))[-1]
    with torch.no_grad():
        near = model(image[:, *context][None], labels[context][None])[0]
    places = [slice(2 * (c.start - x.start), 2 * (c.stop - x.start)) for c, x in zip(core, context, strict=True)]
    torch.testing.assert_close(found[:, 128:, 128:], near[:, *places])
    with pytest.raises(ValueError, match="tile=0"):
        restore_image(model, image, labels, PredictSettings(device="cpu"), tile=0)


# ------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_are_those_of_scikit_image(channels: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    torch.manual_seed(0)
    target = torch.rand(channels, 40, 33)
    prediction = (target + 0.1 * torch.randn_like(target)).clamp(0, 1)
    found = score_image(prediction, target, width=2000)
    a, b = prediction.numpy().astype(np.float64), target.numpy().astype(np.float64)
    assert found["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=1), abs=1e-4)
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)
    assert found["ssim"] == pytest.approx(metrics.structural_similarity(b, a, **settings), abs=1e-4)
    assert found["rmse"] == pytest.approx(2000 * np.sqrt(metrics.mean_squared_error(b, a)), rel=1e-4)


def test_scores_of_simple_errors_are_known() -> None:
    target = torch.full((1, 16, 16), 0.5)
    found = score_image(target + 0.1, target)
    assert found["psnr"] == pytest.approx(20, abs=1e-4) and found["rmse"] == pytest.approx(0.1)
    assert score_image(target, target) == {"psnr": 100.0, "ssim": pytest.approx(1), "rmse": 0.0}
    assert score_image(target + 9, target)["rmse"] == pytest.approx(0.5)  # cut off to [0, 1]
    assert np.isnan(score_image(target[:, :8], target[:, :8])["ssim"])


def test_validation_sees_whole_images_beside_the_plain_input(pairs: Path) -> None:
    from asa.restoration.task import validate_restoration

    dataset = PairDataset(find_pairs(pairs)[:2], 16)
    method = Restoration(model=rat_tiny()).eval()
    numbers, pictures = validate_restoration(method, dataset, PredictSettings(device="cpu"))
    views = dataset.whole(0)
    one = score_image(views["image"], views["target"])["psnr"]
    other = score_image(dataset.whole(1)["image"], dataset.whole(1)["target"])["psnr"]
    assert numbers["input_psnr"] == pytest.approx((one + other) / 2)
    assert set(numbers) == {"psnr", "ssim", "input_psnr", "input_ssim", "loss"}
    with torch.no_grad():  # these images fit into one crop, and their loss is that of training
        losses = [float(method(collate([{**dataset.whole(k), "seed": 0, "id": ""}]))["loss"]) for k in (0, 1)]
    assert numbers["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    (panel,) = pictures.values()
    assert panel.shape == (32, 120, 3) and panel.dtype == np.uint8


def test_a_written_prediction_is_in_the_training_window(tmp_path: Path) -> None:
    write_picture(tmp_path / "p" / "a.png", np.full((1, 16, 16), 0.5))
    import nibabel as nib

    (tmp_path / "t").mkdir()
    nib.save(nib.Nifti1Image(np.full((16, 16), 100, dtype=np.float32), np.eye(4)), tmp_path / "t" / "a.nii")
    evaluate_pictures(tmp_path / "p", tmp_path / "t", tmp_path / "out", window=(-1000, 1000))
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["results"]["image"]["rmse"]["mean"] == pytest.approx(100, abs=0.1)  # HU
    assert found["data_range"] == [-1000, 1000]
    # A prediction that knows its window needs none given, and refuses another one.
    write_picture(tmp_path / "p" / "a.png", np.full((1, 16, 16), 0.5), (-1000, 1000))
    evaluate_pictures(tmp_path / "p", tmp_path / "t", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    with pytest.raises(ValueError, match=r"p/a\.png: 0 and 1 are -1000 and 1000 in it, and not .0.0, 100.0"):
        evaluate_pictures(tmp_path / "p", tmp_path / "t", tmp_path / "out", window=(0, 100))
    assert read_picture(tmp_path / "p" / "a.png").dtype == np.float32


def test_predictions_that_are_no_png_have_the_units_of_the_window(tmp_path: Path) -> None:
    import nibabel as nib

    for folder, value in (("p", 100), ("t", 300)):
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image(np.full((16, 16), value, dtype=np.float32), np.eye(4))
        nib.save(image, tmp_path / folder / "a.nii.gz")
    evaluate_pictures(tmp_path / "p", tmp_path / "t", tmp_path / "out", window=(-1000, 1000))
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["results"]["image"]["rmse"]["mean"] == pytest.approx(200, abs=0.01)


@pytest.mark.parametrize(
    ("part", "size", "reason"),
    [
        ("low", (16, 12), "with model.upscale=1 it must be"),
        ("regions", (16, 12), "remove it, and compute it from this image"),
        ("both", (12, 20), "is 20 x 12 pixels, smaller than crop=16: lower crop"),
    ],
)
def test_a_pair_that_does_not_fit_is_found_before_the_run(pairs, tmp_path, monkeypatch, capsys, part, size, reason):
    shutil.copytree(pairs, tmp_path / "pairs")
    for name in ("low", "high", "regions"):
        if name == part or (part == "both" and name != "regions"):
            write_picture(tmp_path / "pairs" / name / "p1_slice2.png", np.zeros((1, *size)))
    if part == "both":
        write_regions(tmp_path / "pairs" / "regions" / "p1_slice2.png", np.zeros(size))
    given = [f"data.root={tmp_path / 'pairs'}", f"out={tmp_path / 'run'}", *TINY, "data.split={validation: 0, test: 0}"]
    assert run(monkeypatch, finetune, *given, "train.steps=3", "train.batch_size=1") == 1
    assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()
