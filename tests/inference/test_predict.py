"""Prediction: mirroring, ensembles, probabilities, and scans on other grids."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from heads import centred, dice, scan
from monai import inferers
from ranks import replaced
from scipy import ndimage
from torch import nn
from untrained import DATA, SETTINGS, WINDOW, a_scan, call, checkpoint, predicted, voxels

from asa.cli import evaluate, finetune, main, predict, prepare
from asa.config import build
from asa.data.datasets import folder
from asa.data.io.files import read_json, sha256_of, write_whole
from asa.data.io.nifti import Volume, from_ras, identity_of, read_image, to_ras, write_image, write_label
from asa.data.io.tables import read_rows
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.pipeline import prepare_case, to_native
from asa.data.preprocessing.resampling import sample_affine
from asa.data.preprocessing.settings import CohortSettings, PrepareSettings
from asa.data.store import Store, entry_line, write_records
from asa.inference.label_maps import Outputs, expected_dice
from asa.inference.preprocessing import ScanPreprocessor, training_scan_metadata
from asa.inference.scans import stored_scans
from asa.inference.segmentation import PredictSettings, Segmenter, count_windows, sliding_window
from asa.settings import UNCERTAINTIES
from asa.training.checkpoint import read_weights, save_checkpoint
from asa.training.checkpoint_files import find_weights

REGIONS = {
    "labels": {**DATA["labels"], 7: "x"},
    "regions": [["sides", [1, 2]], ["left", [1]], ["mid", [5]], ["none", [7]]],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("runs") / "fold0")


def test_with_mirror_the_prediction_of_a_mirrored_head_is_the_mirrored_prediction(run: Path, tmp_path: Path) -> None:
    path = a_scan(tmp_path)
    original = read_image(path)
    write_image(tmp_path / "mirrored.nii.gz", original.data[::-1], original.affine)
    same = {}
    for mirror in (True, False):
        segmenter = Segmenter(run, SETTINGS, mirror=mirror)
        here, there = (predicted(segmenter, file) for file in (path, tmp_path / "mirrored.nii.gz"))
        swapped = np.array([0, 2, 1, 3, 4, 5])[there][::-1]
        same[mirror] = (here == swapped).mean()
        assert len(np.unique(here)) > 2
    assert same[True] == 1.0 and same[False] < 0.9


def test_mirroring_of_all_axes_is_the_mean_over_their_eight_flips(run: Path) -> None:
    image, plain = torch.rand(1, 32, 32, 64), Segmenter(run, SETTINGS)
    expected = torch.zeros(())
    for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
        found = plain.probabilities(image.flip(axes) if axes else image)
        found = found.flip(axes) if axes else found
        expected = expected + (found[[0, 2, 1, 3]] if 3 in axes else found) / 8  # left and right exchanged
    torch.testing.assert_close(Segmenter(run, SETTINGS, mirror="DHW").probabilities(image), expected)
    for wrong in ("", "LR", "WW"):
        with pytest.raises(ValueError, match=f"mirror={wrong}: name axes"):
            Segmenter(run, SETTINGS, mirror=wrong)


def test_an_ensemble_of_one_network_twice_predicts_as_that_network(run: Path) -> None:
    image = torch.rand(1, 32, 40, 64)
    three = PredictSettings(device="cpu", overlap=0.25, batch_size=3)
    with torch.backends.mkldnn.flags(enabled=False):  # its convolutions of three windows are rounded otherwise
        once = Segmenter(run, SETTINGS).probabilities(image)
        assert torch.equal(Segmenter([run, run], SETTINGS).probabilities(image), once)
        torch.testing.assert_close(Segmenter(run, three).probabilities(image), once)


def test_an_ensemble_predicts_the_mean_of_its_networks(run: Path, tmp_path: Path) -> None:
    image, other = torch.rand(1, 32, 32, 64), checkpoint(tmp_path / "fold1", seed=1)
    one, two = (Segmenter(path, SETTINGS).probabilities(image) for path in (run, other))
    torch.testing.assert_close(Segmenter([run, other], SETTINGS).probabilities(image), (one + two) / 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channels", ["t2"]),
        ("labels", {1: "left_x", 2: "right_x", 6: "middle"}),
        ("prepare", {"crop": "none"}),
        ("lateral_pairs", []),
    ],
)
def test_networks_with_different_metadata_are_rejected_as_an_ensemble(
    run: Path, tmp_path: Path, key: str, value: object
) -> None:
    other = checkpoint(tmp_path / "other", **{key: value})
    with pytest.raises(ValueError, match=f"other: .* ensemble must agree in {key}: .* in .*fold0"):
        Segmenter([run, other], SETTINGS)


def test_networks_of_other_voxel_sizes_are_no_ensemble(run: Path, tmp_path: Path) -> None:
    coarse = checkpoint(tmp_path / "coarse", spacing=[[3.0] * 3] * 2)
    with pytest.raises(ValueError, match="coarse: its training scans have voxels of 3 x 3 x 3 mm, those of .*fold0 of"):
        Segmenter([run, coarse], SETTINGS)
    Segmenter([run, checkpoint(tmp_path / "near", spacing=[[0.95] * 3, [1.05] * 3])], SETTINGS)


def test_a_scan_that_changed_since_it_was_prepared_is_refused(tmp_path: Path) -> None:
    path = a_scan(tmp_path / "raw")
    records = folder.records(tmp_path / "raw", images={"t1": "*.nii.gz"})
    assert not prepare_cohort(records, tmp_path / "store", CohortSettings(), progress=False).failures
    network = checkpoint(tmp_path / "run", prepare=Store(tmp_path / "store").settings)
    (one,) = stored_scans(tmp_path / "store", Segmenter(network, SETTINGS).preprocessor)
    assert one.prepared()[2].data.shape == read_image(path).data.shape
    entry = Store(tmp_path / "store").record("a")
    entry["sources"] = {name: {"path": str(path), "sha256": "0" * 64} for name in entry["sources"]}  # of older stores
    write_records(tmp_path / "store", {"a": entry_line(entry)})
    (one,) = stored_scans(tmp_path / "store", Segmenter(network, SETTINGS).preprocessor)
    assert one.prepared()[2].data.shape == read_image(path).data.shape
    scan = read_image(path)
    for data, affine in ((scan.data, scan.affine @ np.diag([-1, 1, 1, 1])), (scan.data + 1, scan.affine)):
        write_image(path, data, affine)
        with pytest.raises(ValueError, match=r"a\.nii\.gz: is not the scan that was prepared any more"):
            one.prepared()


@pytest.mark.parametrize("prepare", [{"crop": "foreground"}, {"crop": "foreground", "spacing": 1.4}])
def test_probabilities_sum_to_1_and_the_largest_is_the_label(tmp_path: Path, prepare: dict) -> None:
    path = a_scan(tmp_path)
    segmenter = Segmenter(checkpoint(tmp_path / "run", prepare=prepare), SETTINGS)
    label = predicted(segmenter, path, tmp_path / "p")
    files = [nibabel.load(tmp_path / "p" / f"{name}.nii.gz") for name in ("background", "left_x", "right_x", "middle")]
    for file in files:
        assert file.get_data_dtype() == np.float32 and np.array_equal(file.affine, nibabel.load(path).affine)
    probabilities = np.stack([np.asarray(file.dataobj) for file in files])
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 1, 2, 5])[probabilities.argmax(axis=0)], label)
    assert len(np.unique(label)) > 2


def test_without_resampling_the_probabilities_are_those_of_the_prepared_grid(run: Path, tmp_path: Path) -> None:
    path = a_scan(tmp_path)
    segmenter = Segmenter(run, SETTINGS)
    predicted(segmenter, path, tmp_path / "p")
    volume = read_image(path)
    case = prepare_case({"t1": volume}, None, {}, segmenter.preprocessor.settings)
    expected = segmenter.probabilities(torch.from_numpy(case.image))[3].numpy()
    found = to_ras(read_image(tmp_path / "p" / "middle.nii.gz").data, volume.affine)[0].transpose(2, 1, 0)
    crop = case.chain["steps"][-1]
    box = tuple(slice(start, start + size) for start, size in zip(crop["start"], crop["size"], strict=True))
    assert np.array_equal(found[box], expected)


def test_labels_chosen_on_the_scans_own_grid_are_closer_to_the_truth_than_resampled_labels(tmp_path: Path) -> None:
    shape = (150, 190, 144)
    image, truth = scan(shape, centred(shape, np.eye(3)))
    write_image(tmp_path / "head.nii.gz", image.data, image.affine)
    settings = PrepareSettings(spacing=3.0, crop="none")
    chain = prepare_case({"t1": image}, None, {}, settings).chain
    (step,) = (step for step in chain["steps"] if step["stage"] == "align")
    masks = [ndimage.gaussian_filter((value == truth.data.T).astype(np.float32), 1.3) for value in (0, 2, 7)]
    probabilities = np.stack([sample_affine(mask, np.array(step["matrix"]), step["shape"]) for mask in masks])
    node = {"labels": {2: "outer", 7: "inner"}, "lateral_pairs": [], "prepare": {"spacing": 3.0, "crop": "none"}}
    segmenter = Segmenter(checkpoint(tmp_path / "run", **node), SETTINGS)
    segmenter.probabilities = lambda *_: torch.from_numpy(probabilities)
    here = predicted(segmenter, tmp_path / "head.nii.gz")
    resampled = np.array([0, 2, 7])[to_native(probabilities.argmax(axis=0).astype(np.uint8)[None], chain)[0]]
    for value in (2, 7):
        error, before = (1 - dice(label == value, truth.data == value) for label in (here, resampled))
        assert error < before / 2


@pytest.mark.parametrize("axes", [[[1, 1], [2, -1], [0, 1]], [[2, 1], [0, -1], [1, -1]]])
def test_a_reoriented_scan_gets_the_same_labels(run: Path, tmp_path: Path, axes: list[list[int]]) -> None:
    path, segmenter = a_scan(tmp_path), Segmenter(run, SETTINGS)
    image = nibabel.load(path)
    turned = image.as_reoriented(np.array(axes))
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    here, there = predicted(segmenter, path), predicted(segmenter, tmp_path / "turned.nii.gz")
    assert there.shape == turned.shape != here.shape
    there_ras, _, _ = to_ras(there, turned.affine)
    assert np.array_equal(from_ras(there_ras, to_ras(here, image.affine)[2]), here)


class Pointwise(nn.Module):
    """A network whose classes are smooth intensity ranges, independent of position."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.tensor([0.0, 0.2, 0.5, 0.8]).view(1, 4, 1, 1, 1))
        self.encoder = SimpleNamespace(img_size=(96, 96, 96))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return -60 * (volume - self.centre) ** 2


USERS_PACKAGE = """
from types import SimpleNamespace

from torch import nn
from untrained import DATA, SETTINGS, WINDOW, a_scan, call, checkpoint, predicted, voxels


class WithoutWindow(nn.Conv3d):
    pass


class WithWindow(nn.Conv3d):
    encoder = SimpleNamespace(img_size=(32, 32, 64))
"""


def test_a_network_of_a_users_package_is_loaded_if_the_package_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text(USERS_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    options = {"in_channels": 1, "out_channels": 4, "kernel_size": 1}
    shell = nn.Module()
    shell.model = nn.Conv3d(**options)
    for name in ("WithWindow", "WithoutWindow"):
        node = {"_target_": f"my_networks.{name}", **options}
        save_checkpoint(tmp_path / name, 1, shell, {"model": node, "data": DATA}, {}, keep=1)
    image = torch.rand(1, 32, 40, 64)
    found = Segmenter(tmp_path / "WithWindow", SETTINGS, plugins=["my_networks"]).probabilities(image)
    torch.testing.assert_close(found, shell.model(image[None])[0].softmax(dim=0).detach())
    with pytest.raises(ValueError, match="my_networks"):
        Segmenter(tmp_path / "WithWindow", SETTINGS)
    with pytest.raises(ValueError, match=r"WithoutWindow has no encoder\.img_size"):
        Segmenter(tmp_path / "WithoutWindow", SETTINGS, plugins=["my_networks"])


def head_file(folder: Path, spacing: float) -> Path:
    shape = tuple(round(size / spacing) for size in (150, 190, 144))
    volume, _ = scan(shape, centred(shape, np.diag([spacing] * 3)))
    folder.mkdir()
    write_image(folder / "head.nii.gz", volume.data, volume.affine)
    return folder / "head.nii.gz"


def test_a_scan_with_another_voxel_size_is_resampled_to_that_of_the_training_and_back(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", spacing=[[3.0, 3.0, 3.0], [3.1, 3.0, 3.0]])
    segmenter = Segmenter(run, SETTINGS)
    segmenter.models = [Pointwise()]
    coarse, fine = head_file(tmp_path / "coarse", 3.0), head_file(tmp_path / "fine", 2.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = predicted(segmenter, fine)
    assert any("voxels of 2 x 2 x 2 mm" in str(one.message) and "resampled to 3" in str(one.message) for one in caught)
    here = predicted(segmenter, coarse)
    assert there.shape == nibabel.load(fine).shape
    # Voxel centres of the coarse grid, read from the prediction on the fine one.
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in here.shape), indexing="ij"), -1)
    to_fine = np.linalg.inv(nibabel.load(fine).affine) @ nibabel.load(coarse).affine
    nearest = np.rint(grid @ to_fine[:3, :3].T + to_fine[:3, 3]).astype(int).clip(0, np.array(there.shape) - 1)
    sampled = there[tuple(np.moveaxis(nearest, -1, 0))]
    assert min(dice(sampled == value, here == value) for value in (0, 5)) > 0.9
    assert dice(sampled > 0, here > 0) > 0.97


def test_a_voxel_size_unlike_that_of_an_anisotropic_training_grid_is_rejected(tmp_path: Path) -> None:
    segmenter = Segmenter(checkpoint(tmp_path / "run", spacing=[[3.0, 1.0, 1.0], [3.0, 1.0, 1.0]]), SETTINGS)
    with pytest.raises(ValueError, match=r"voxels of 1 x 1 x 1 mm .* trained on 3 x 1 x 1: resample"):
        predicted(segmenter, a_scan(tmp_path))


def test_what_an_earlier_prediction_wrote_beside_a_label_map_does_not_stay_beside_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"checkpoint={checkpoint(tmp_path / 'run')}", f"input={a_scan(tmp_path / 'scans')}", f"out={tmp_path}/out"]
    assert call(predict, monkeypatch, *given, "probabilities=true", "uncertainty=entropy") == 0
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 6
    assert call(predict, monkeypatch, *given, "uncertainty=entropy") == 0
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.nii.gz")}
    assert files == {"a.nii.gz", "uncertainty/a.nii.gz"}
    assert call(predict, monkeypatch, *given) == 0
    assert [path.name for path in (tmp_path / "out").rglob("*.nii.gz")] == ["a.nii.gz"]


@pytest.mark.parametrize(("first", "second"), [("layout=null", "layout=mgz"), ("layout=mgz", "layout=null")])
def test_label_maps_of_two_layouts_do_not_meet_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: str, second: str
) -> None:
    given = [f"checkpoint={checkpoint(tmp_path / 'run')}", f"input={a_scan(tmp_path)}", f"out={tmp_path / 'out'}"]
    assert call(predict, monkeypatch, *given, first) == 0
    assert call(predict, monkeypatch, *given, second) == 1
    assert "label maps of the other layout are here: choose another out=" in capsys.readouterr().err
    assert call(predict, monkeypatch, *given, first) == 0
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == ["a.mgz" if first == "layout=mgz" else "a.nii.gz", "volumes.csv"]
    (tmp_path / "truth").mkdir()
    (tmp_path / "out" / kept[0]).rename(tmp_path / "truth" / kept[0])  # a folder of truth in either format
    assert call(predict, monkeypatch, *given, first) == 0
    truth = [f"truth={tmp_path / 'truth'}", "labels={1: left_x, 2: right_x, 5: middle}"]
    assert call(evaluate, monkeypatch, f"predictions={tmp_path / 'out'}", *truth, f"out={tmp_path / 'scores'}") == 0
    assert read_json(tmp_path / "scores" / "summary.json")["results"]["middle"]["dice"]["mean"] == 1.0


def test_a_store_whose_background_was_nan_is_predicted_as_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = read_image(a_scan(tmp_path))
    for name, outside, settings in (("a", 0, PrepareSettings()), ("nan", np.nan, PrepareSettings(nan="zero"))):
        write_image(tmp_path / f"{name}_raw" / "s.nii.gz", np.where(scan.data > 0, scan.data, outside), scan.affine)
        records = folder.records(tmp_path / f"{name}_raw", images={"t1": "*.nii.gz"})
        assert not prepare_cohort(records, tmp_path / f"{name}_store", CohortSettings(settings=settings)).failures
    run = checkpoint(tmp_path / "run", prepare=Store(tmp_path / "a_store").settings)
    for name in ("a", "nan"):
        given = [f"checkpoint={run}", f"input={tmp_path / f'{name}_store'}", f"out={tmp_path / name}"]
        assert call(predict, monkeypatch, *given) == 0
    maps = [voxels(next((tmp_path / name).glob("*.nii.gz"))) for name in ("a", "nan")]
    assert maps[0].any() and np.array_equal(*maps)


def test_windows_are_stitched_on_the_cpu_if_gpu_memory_runs_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, image = Segmenter(run, SETTINGS), torch.rand(1, 40, 32, 64)
    expected = sliding_window(segmenter.models[0], image, SETTINGS)
    real, calls = inferers.sliding_window_inference, []

    def crowded(*inputs: object, **options: object) -> object:
        calls.append(options["device"])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("full")
        return real(*inputs, **options)

    monkeypatch.setattr(inferers, "sliding_window_inference", crowded)
    with pytest.warns(UserWarning, match="stitched on the CPU"):
        assert torch.equal(sliding_window(segmenter.models[0], image, SETTINGS), expected)
    assert calls == [torch.device("cpu")] * 2

    def full(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(inferers, "sliding_window_inference", full)
    with (
        pytest.warns(UserWarning, match="stitched on the CPU"),
        pytest.raises(ValueError, match=r"lower predict\.batch_size"),
    ):
        sliding_window(segmenter.models[0], image, SETTINGS)


@pytest.mark.parametrize("size", [(32, 32, 64), (20, 40, 65), (70, 33, 64), (48, 49, 130)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.3])
def test_the_progress_bar_counts_the_windows_that_are_computed(size: tuple[int, int, int], overlap: float) -> None:
    model, done = Pointwise(), []
    model.encoder.img_size = (32, 32, 64)
    settings = PredictSettings(device="cpu", overlap=overlap, batch_size=3)
    sliding_window(model, torch.rand(1, *size), settings, tick=done.append)
    assert sum(done) == count_windows(size, (32, 32, 64), overlap)


def test_windows_overlap_as_in_the_validation_unless_by_less_than_half(run: Path, tmp_path: Path) -> None:
    more, less = (checkpoint(tmp_path / str(overlap), overlap=overlap) for overlap in (0.7, 0.2))
    auto = PredictSettings(device="cpu")
    for paths, expected in (([run], 0.5), ([less], 0.5), ([more], 0.7), ([run, less, more], 0.7)):
        assert Segmenter(paths, auto).overlap == expected
    image, given = torch.rand(1, 48, 32, 64), PredictSettings(device="cpu", overlap=0.7)
    assert Segmenter(more, SETTINGS).overlap == SETTINGS.overlap == 0.25
    found = Segmenter(more, auto).probabilities(image)
    assert torch.equal(found, Segmenter(run, given).probabilities(image))
    assert not torch.equal(found, Segmenter(run, auto).probabilities(image))


def test_mirroring_needs_a_partner_for_every_lateral_label(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", lateral_pairs=[])
    with pytest.raises(ValueError, match="'left_x' contains a side"):
        Segmenter(run, SETTINGS, mirror=True)
    Segmenter(run, SETTINGS)


def test_classes_with_the_same_file_name_are_rejected(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", labels={1: "a b", 2: "a/b", 3: "c"}, lateral_pairs=[])
    with pytest.raises(ValueError, match=r"'a b' and 'a/b' would both be written to a_b\.nii\.gz"):
        predicted(Segmenter(run, SETTINGS), a_scan(tmp_path))


def test_a_scan_without_a_channel_is_named_and_the_others_are_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    node = dict(_target_="asa.models.unet.unet_tiny", out_channels=4, in_channels=2, feature_size=4, img_size=WINDOW)
    shell = nn.Module()
    shell.model = build(node)
    data = {**DATA, "channels": ["t1", "flair"]}
    save_checkpoint(tmp_path / "run", 1, shell, {"model": node, "task": "segmentation", "data": data}, {}, keep=1)
    scans = tmp_path / "scans"
    for name in ("a_t1", "a_flair", "b_t1"):
        a_scan(scans, name)
    common = [f"checkpoint=[{tmp_path}/run,{tmp_path}/run]", f"input={scans}", f"out={tmp_path}/out", "mirror=true"]
    files = "images={t1: '*_t1.nii.gz', flair: '*_flair.nii.gz'}"
    code = call(predict, monkeypatch, *common, files, "probabilities=true", "predict.device=cpu")
    shown = capsys.readouterr()
    assert code == 1 and "b: failed: no file for the channel flair" in shown.out and "1 scan failed" in shown.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.nii.gz", "probabilities", "volumes.csv",
    ]  # fmt: skip
    assert len(list((tmp_path / "out" / "probabilities" / "a").iterdir())) == 4
    assert call(predict, monkeypatch, *common, "images={t1: '*_t1.nii.gz'}") == 1
    assert "takes the channels t1, flair, got t1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii.gz", "by hand", "is not empty and not a folder of asa-predict"),
        ("notes.txt", "mine", "is not empty and not a folder of asa-predict"),
        ("volumes.csv", "id,hippocampus\na,3\n", "volumes.csv: exists and is no table of asa-predict"),
    ],
)
def test_files_that_asa_predict_did_not_write_are_not_replaced(
    run: Path, tmp_path: Path, monkeypatch, capsys, name: str, content: str, message: str
) -> None:
    out = tmp_path / "out"
    write_whole(out / name, content.encode())
    common = [f"checkpoint={run}", f"input={a_scan(tmp_path)}", f"out={out}", "predict.device=cpu"]
    assert call(predict, monkeypatch, *common) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == content


def test_a_stopped_prediction_begins_anew_in_its_folder_and_a_second_one_gives_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        a_scan(tmp_path / "scans", name)
    common = [f"checkpoint={run}", f"input={tmp_path / 'scans'}", f"out={tmp_path / 'out'}", "predict.device=cpu"]

    def stopped(segmenter: Segmenter, image: torch.Tensor, spread: None = None) -> torch.Tensor:
        if list((tmp_path / "out").glob("*.nii.gz")):
            raise KeyboardInterrupt
        return probabilities(segmenter, image, spread)

    probabilities = Segmenter.probabilities
    with replaced(Segmenter, "probabilities", stopped):
        assert call(predict, monkeypatch, *common) == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "volumes.csv"]
    assert [row["id"] for row in read_rows(tmp_path / "out" / "volumes.csv")] == ["a"]  # as soon as it has a label map
    contents = []
    for _ in range(2):
        assert call(predict, monkeypatch, *common) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1] and contents[0].keys() == {"a.nii.gz", "b.nii.gz", "volumes.csv"}


def test_scans_that_a_network_was_trained_on_are_told_from_new_ones_under_any_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, new = a_scan(tmp_path / "scans", "renamed"), tmp_path / "scans" / "new.nii.gz"
    known = read_image(seen)
    write_image(new, known.data[::-1], known.affine)
    trained = checkpoint(tmp_path / "run", seed=1, scans=[identity_of(known)], subjects=["0" * 16])
    tables = {}
    for name, networks in {"unknown": run, "trained": trained, "both": f"[{run},{trained}]"}.items():
        arguments = [f"checkpoint={networks}", f"input={tmp_path / 'scans'}", f"out={tmp_path / name}"]
        assert call(predict, monkeypatch, *arguments, "predict.device=cpu", "mirror=false") == 0
        tables[name] = {row["id"]: row for row in read_rows(tmp_path / name / "volumes.csv")}
        noted = "was trained on 1 of 2 scans (renamed): scores on them are optimistic" in capsys.readouterr().out
        assert noted == (name != "unknown")
    answers = {name: [rows[id]["trained_on"] for id in ("renamed", "new")] for name, rows in tables.items()}
    assert answers == {"unknown": ["", ""], "trained": ["yes", "no"], "both": ["yes", ""]}
    digests = [sha256_of(find_weights(path))[:8] for path in (run, trained)]
    networks = {name: rows["new"]["network"] for name, rows in tables.items()}
    assert networks == {"unknown": digests[0], "trained": digests[1], "both": "+".join(digests)}

    (tmp_path / "unknown" / "renamed.nii.gz").unlink()
    arguments = [f"checkpoint={trained}", f"input={seen}", f"out={tmp_path / 'unknown'}", "predict.device=cpu"]
    assert call(predict, monkeypatch, *arguments) == 0
    (tmp_path / "truth").mkdir()
    for id in ("renamed", "new"):
        write_label(tmp_path / "truth" / f"{id}.nii.gz", np.ones(known.data.shape, np.uint8), known)
    labels, out = "labels={1: left_x, 2: right_x, 5: middle}", tmp_path / "scores"
    arguments = [f"predictions={tmp_path / 'unknown'}", f"truth={tmp_path / 'truth'}", labels, f"out={out}"]
    assert call(evaluate, monkeypatch, *arguments) == 0
    notes = read_json(out / "summary.json")["notes"]
    assert notes[0].startswith("warning: ") and "was trained on 1 of 2 scans (renamed)" in notes[0]
    assert notes[1].startswith("note: predicted by 2 networks") and set(notes) <= {
        *capsys.readouterr().out.splitlines()
    }
    assert all(note in (out / "report.html").read_text() for note in notes)


@pytest.mark.parametrize("pattern", ["*_T1.nii.gz", "sub-*/anat/*_dseg.nii.gz"])
def test_a_pattern_of_predictions_says_as_a_folder_does_which_scans_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    like, out, rows = read_image(a_scan(tmp_path)), tmp_path / "out", ["id,file,trained_on", "gone,gone.nii.gz,yes"]
    for id, seen in {"a": "yes", "b": "no"}.items():
        file = pattern.replace("*", id)
        for path in (out / file, tmp_path / "truth" / f"{id}.nii.gz"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_label(path, np.ones(like.data.shape, np.uint8), like)
        rows.append(f"{Path(file).name.removesuffix('.nii.gz')},{file},{seen}")
    if "/" in pattern:
        (out / "dataset_description.json").write_text("{}")
    (out / "volumes.csv").write_text("\n".join(rows))
    arguments = [f"predictions='{out}/{pattern}'", f"truth={tmp_path / 'truth'}", "labels={1: x}"]
    assert call(evaluate, monkeypatch, *arguments, f"out={tmp_path / 'scores'}") == 0
    (note,) = read_json(tmp_path / "scores" / "summary.json")["notes"]
    assert "was trained on 1 of 2 scans (" in note


def test_a_folder_of_folds_says_which_checkpoints_to_give(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folds = [tmp_path / "cv" / f"fold{k}" for k in (0, 2, 10)]
    for fold in folds:
        (fold / "checkpoints" / "step-1").mkdir(parents=True)
    a_scan(tmp_path / "scans")
    assert main(["predict", f"checkpoint={tmp_path}/cv", f"input={tmp_path}/scans", f"out={tmp_path}/out"]) == 1
    assert f"give asa-predict checkpoint=[{','.join(map(str, folds))}]" in capsys.readouterr().err


def test_regions_are_refused_by_a_network_of_label_maps(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    common = [f"checkpoint={run}", f"input={a_scan(tmp_path)}", f"out={tmp_path}/out", "predict.device=cpu"]
    assert call(predict, monkeypatch, *common, "regions=x") == 1
    assert "regions=x: label maps for a network of method=restore: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def predicted_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run asa-predict on a folder with files at the given paths: exit code, names of the label maps, output."""

    def segment_prepared(self: Segmenter, image: object, chain: object, like: object, out: Path, **_: object) -> object:
        write_whole(out, b"label")
        return {}, {}

    monkeypatch.setattr(Segmenter, "segment_prepared", segment_prepared)
    prepared = SimpleNamespace(image=np.zeros((1, 2, 2, 2)), chain={})
    monkeypatch.setattr(ScanPreprocessor, "prepare", lambda self, images: (prepared, None))

    def predict_scans(*paths: str, out: str = "out", images: str = "null") -> tuple[int, list[str], str]:
        for path in paths:
            write_whole(tmp_path / "scans" / path, b"scan")
        arguments = [f"checkpoint={run}", f"input={tmp_path}/scans", f"out={tmp_path}/{out}", f"images={images}"]
        code = call(predict, monkeypatch, *arguments)
        shown = capsys.readouterr()
        return code, sorted(path.name for path in (tmp_path / out).glob("*.nii.gz")), shown.out + shown.err

    return predict_scans


def test_scans_of_one_name_in_several_folders_get_different_ids(predicted_folder) -> None:
    code, maps, _ = predicted_folder("a.nii.gz", "x/scan.nii.gz", "y/scan.nii.gz", "y/.hidden/scan.nii.gz")
    assert code == 0 and maps == ["a.nii.gz", "x_scan.nii.gz", "y_scan.nii.gz"]


def test_label_maps_inside_the_folder_of_the_scans_are_not_predicted(predicted_folder) -> None:
    for _ in range(2):
        code, maps, _ = predicted_folder("a.nii.gz", out="scans/labels")
        assert code == 0 and maps == ["a.nii.gz"]


def test_a_channel_that_a_stored_scan_lacks_is_named(tmp_path: Path) -> None:
    a_scan(tmp_path / "scans", "a_t1"), a_scan(tmp_path / "scans", "b_t1"), a_scan(tmp_path / "scans", "a_flair")
    records = folder.records(tmp_path / "scans", images={"t1": "*_t1.nii.gz", "flair": "*_flair.nii.gz"})
    prepare_cohort(records, tmp_path / "store", CohortSettings(missing="zero", duplicates="keep"), progress=False)
    store = Store(tmp_path / "store")
    data = {"channels": store.channels, "prepare": store.settings}
    whole, lacking = stored_scans(store.path, ScanPreprocessor("run", data, None))
    with pytest.warns(UserWarning, match="^has no flair: 0 stands in its place$"):
        lacking.prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.prepared()


@pytest.mark.parametrize("paths", [("x/a.nii.gz", "x_a.nii.gz"), ("x/a.nii.gz", "x/a.nii"), ("b.nii", "b.nii.gz")])
def test_scans_with_the_same_id_are_rejected(predicted_folder, paths: tuple[str, str]) -> None:
    code, maps, output = predicted_folder(*paths)
    assert code == 1 and not maps and "would both give" in output


def test_in_a_bids_tree_with_several_suffixes_one_must_be_chosen(predicted_folder) -> None:
    paths = [f"sub-{k}/anat/sub-{k}_{kind}.nii.gz" for k in (1, 2) for kind in ("FLAIR", "T1w")]
    code, maps, output = predicted_folder(*paths)
    assert code == 1 and not maps and "several kinds (FLAIR, T1w)" in output
    assert "images={t1: **/*_T1w.nii.gz}" in output
    code, maps, _ = predicted_folder(*paths, images="{t1: '**/*_T1w.nii.gz'}")
    assert code == 0 and maps == ["sub-1_anat_sub-1.nii.gz", "sub-2_anat_sub-2.nii.gz"]


def test_a_checkpoint_records_lateral_pairs_and_voxel_size(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        f"data.store={store}", f"out={tmp_path}/run", "data.split={validation: 0, test: 1}", "model=unet_tiny",
        "+model.feature_size=4", "crop=[64,32,32]", "train.steps=1", "train.batch_size=1", "loader.workers=0",
        "train.device=cpu", "optim.warmup=0", "data.lateral_pairs=[[csf, gm]]", "data.join_sides=false",
    ]  # fmt: skip
    assert call(finetune, monkeypatch, *arguments) == 0
    data = read_weights(tmp_path / "run")[1]["data"]
    assert data["lateral_pairs"] == [["csf", "gm"]]
    assert data["spacing"] == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert Segmenter(tmp_path / "run", SETTINGS, mirror=True).mirrored_channels == [0, 2, 1, 3]


def test_volumes_are_those_of_the_label_maps_and_scans_predicted_later_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = REGIONS["regions"]
    for name, more, header in (
        ("classes", {}, "id,left_x_ml,right_x_ml,middle_ml,left_x_expected_dice,right_x_expected_dice"),
        ("regions", REGIONS, "id,left_x_ml,right_x_ml,middle_ml,x_ml,sides_ml,left_ml,mid_ml,none_ml,sides_expected"),
    ):
        run, out = checkpoint(tmp_path / name, **more), tmp_path / f"{name} out"
        for id in ("b", "a", "c"):
            arguments = f"checkpoint={run}", f"input={a_scan(tmp_path, id)}", f"out='{out}'", "predict.device=cpu"
            assert call(predict, monkeypatch, *arguments) == 0
            if id == "a":
                (out / "b.nii.gz").unlink()  # its row goes with it
        table = (out / "volumes.csv").read_text().splitlines()
        assert table[0].startswith(header) and [line[0] for line in table[1:]] == ["a", "c"]
        row = dict(zip(table[0].split(","), table[1].split(","), strict=True))
        made = nibabel.load(out / "a.nii.gz")
        ml = np.prod(made.header.get_zooms()) / 1000
        for label, values in (("left_x", [1]), ("right_x", [2]), ("middle", [5]), *(regions if more else ())):
            assert float(row[f"{label}_ml"]) == pytest.approx(np.isin(made.dataobj, values).sum() * ml, abs=5e-4)


def test_the_volume_of_the_brain_mask_is_listed_where_the_scan_was_stripped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = a_scan(tmp_path), tmp_path / "out"
    mask = read_image(path).data > 500
    monkeypatch.setattr("asa.data.preprocessing.pipeline.brain_mask", lambda method, image, affine: image > 500)
    given = (f"checkpoint={run}", f"input={path}", "predict.device=cpu")
    assert call(predict, monkeypatch, *given, f"out={out}", "strip=deepbet") == 0
    (row,) = read_rows(out / "volumes.csv")
    assert list(row)[-3:] == ["brain_mask_ml", "network", "trained_on"]
    assert float(row["brain_mask_ml"]) == pytest.approx(mask.sum() / 1000, abs=0.05)
    assert call(predict, monkeypatch, *given, f"out={tmp_path / 'whole'}") == 0
    assert "brain_mask_ml" not in read_rows(tmp_path / "whole" / "volumes.csv")[0]


def test_scans_predicted_later_by_a_network_with_other_labels_leave_the_rows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "out", {}
    for id, more in (("b", {}), ("a", REGIONS), ("c", {})):
        run = checkpoint(tmp_path / f"run_{id}", **more)
        arguments = f"checkpoint={run}", f"input={a_scan(tmp_path, id)}", f"out={out}", "predict.device=cpu"
        assert call(predict, monkeypatch, *arguments) == 0
        rows = {row["id"]: row for row in read_rows(out / "volumes.csv")}
    assert list(rows) == ["a", "b", "c"]
    assert all(row["middle_ml"] for row in rows.values())
    assert [bool(row["sides_ml"]) for row in rows.values()] == [True, False, False]


def test_a_stored_scan_without_its_first_channel_is_predicted_on_the_grid_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a_t1", "a_flair", "b_flair"):
        a_scan(tmp_path / "scans", name)
    (tmp_path / "scans" / "table.csv").write_text("id,t1,flair\na,a_t1.nii.gz,a_flair.nii.gz\nb,,b_flair.nii.gz\n")
    files = f"data.root={tmp_path}/scans", "data.table=table.csv"
    assert call(prepare, monkeypatch, *files, "missing=zero", "duplicates=keep", f"out={tmp_path}/store") == 0
    node = dict(_target_="asa.models.unet.unet_tiny", out_channels=4, in_channels=2, feature_size=4, img_size=WINDOW)
    shell = nn.Module()
    shell.model = build(node)
    data = {**DATA, "channels": ["t1", "flair"], "prepare": Store(tmp_path / "store").settings}
    save_checkpoint(tmp_path / "run", 1, shell, {"model": node, "task": "segmentation", "data": data}, {}, keep=1)
    paths = f"checkpoint={tmp_path}/run", f"input={tmp_path}/store", f"out={tmp_path}/out"
    assert call(predict, monkeypatch, *paths, "predict.device=cpu") == 0
    made, scan = read_image(tmp_path / "out" / "b.nii.gz"), read_image(tmp_path / "scans" / "b_flair.nii.gz")
    assert made.data.shape == scan.data.shape and np.array_equal(made.affine, scan.affine)


@pytest.mark.parametrize("regions", [False, True])
def test_maps_of_uncertainty_follow_their_formulas_on_the_scans_own_grid(tmp_path: Path, regions: bool) -> None:
    more = REGIONS if regions else {}
    runs = [checkpoint(tmp_path / str(seed), seed, prepare={"crop": "none"}, **more) for seed in range(3)]
    scan = a_scan(tmp_path)
    for kind in UNCERTAINTIES:
        segmenter = Segmenter(runs, SETTINGS, uncertainty=kind)
        segmenter.segment_file({"t1": scan}, tmp_path / "label.nii.gz", uncertainty=tmp_path / "map.nii.gz")
        found = nibabel.load(tmp_path / "map.nii.gz")
        assert np.array_equal(found.affine, nibabel.load(scan).affine)
        image = torch.from_numpy(segmenter.preprocessor.prepare({"t1": scan})[0].image)
        members = np.stack([Segmenter(run, SETTINGS).probabilities(image).numpy() for run in runs]).astype(np.float64)
        p = members.mean(axis=0)
        if kind == "spread":
            expected = members.std(axis=0).max(axis=0)
        elif regions:
            expected = (-p * np.log2(p) - (1 - p) * np.log2(1 - p)).max(axis=0)
        else:
            expected = -(p * np.log(p)).sum(axis=0) / np.log(len(p))
        native = np.asarray(found.dataobj)[::-1].transpose(2, 1, 0)  # the file is LAS
        np.testing.assert_allclose(native, expected, atol=1e-5)
    with pytest.raises(ValueError, match="several checkpoints or mirror=true"):
        Segmenter(runs[0], SETTINGS, uncertainty="spread")
    with pytest.raises(ValueError, match="choose entropy or spread"):
        Segmenter(runs[0], SETTINGS, uncertainty="sd")


def test_the_expected_dice_is_the_mean_over_truths_drawn_from_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(12, 12, 12, generator=generator) ** 2
    for mask in (probability > 0.5, probability > 0.2):
        truths = torch.rand(400, 12, 12, 12, generator=generator) < probability
        scores = 2 * (truths & mask).sum(dim=(1, 2, 3)) / (truths.sum(dim=(1, 2, 3)) + mask.sum())
        assert expected_dice(probability, mask) == pytest.approx(float(scores.mean()), abs=0.003)
    certain = probability > 0.5
    assert expected_dice(certain.float(), certain) == 1 and expected_dice(certain.float(), ~certain) == 0
    assert np.isnan(expected_dice(torch.zeros(4, 4, 4), torch.zeros(4, 4, 4, dtype=torch.bool)))


def test_a_scan_unlike_the_training_scans_is_named_with_what_is_unlike(
    tmp_path: Path, store: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Store(store).records
    measured = training_scan_metadata(records)
    volumes = [record["quality"]["brain_ml"] for record in records]
    assert measured["range"]["brain_ml"] == [min(volumes), max(volumes)]
    means = [record["intensity"]["t1"]["mean"] for record in records]
    assert measured["range"]["mean t1"] == [min(means), max(means)]
    run = checkpoint(tmp_path / "run", range=measured["range"])
    scans = tmp_path / "scans"
    like = read_image(raw / "s0_T1.nii.gz")
    noise = np.random.default_rng(0).uniform(800, 1000, like.data.shape).astype(np.float32)
    write_image(scans / "usual.nii.gz", like.data, like.affine)
    write_image(scans / "head.nii.gz", np.where(like.data > 0, like.data, noise), like.affine)
    write_image(scans / "dark.nii.gz", np.where(like.data > 800, like.data, like.data / 9), like.affine)
    code = call(
        predict, monkeypatch, f"checkpoint={run}", f"input={scans}", f"out={tmp_path}/out", "predict.device=cpu",
        "predict.overlap=0",
    )  # fmt: skip
    assert code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning: unlike the training scans" in line]
    assert [line.split(":")[0] for line in lines] == ["dark", "head"]
    assert "mean t1 of the intensities" in lines[0] and "brain volume" not in lines[0] and "brain volume" in lines[1]
    preprocessor = Segmenter(run, SETTINGS).preprocessor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for record in records:
            preprocessor.warn_outside_range(record["quality"], record["intensity"])
    with pytest.warns(UserWarning, match=r"brain volume 9999 ml \(there \d+ to \d+\)"):
        preprocessor.warn_outside_range({"brain_ml": 9999.0}, {})
    narrow = checkpoint(
        tmp_path / "narrow", range={**measured["range"], "brain_ml": [1, 2]}, prepare=Store(store).settings
    )
    (stored, *_) = stored_scans(store, Segmenter(narrow, SETTINGS).preprocessor)
    with pytest.warns(UserWarning, match=r"brain volume \d+ ml \(there 1 to 2\)"):  # of a store, too
        stored.prepared()


def test_a_voxel_that_is_as_probable_as_the_background_is_background() -> None:
    outputs, like = Outputs({1: "a", 4: "b"}), Volume(np.zeros((2, 2, 1)), np.eye(4), None)
    a = np.array([[[0.5], [0.51]], [[0.4], [0.3]]], np.float32)
    b = np.array([[[0.0], [0.0]], [[0.4], [0.35]]], np.float32)
    assert outputs.label_map([a, b], like)[..., 0].tolist() == [[0, 1], [1, 0]]  # of two classes the first
