"""Anomaly maps: by prediction of hidden parts, by labels, and above healthy scans; and their table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from stores import read_tree, write_tree
from torch import Tensor, nn
from untrained import SETTINGS, a_scan, call, checkpoint, metadata, voxels

from asa.cli import predict
from asa.config import build
from asa.data.datasets import folder
from asa.data.io.nifti import read_image, write_image
from asa.data.io.tables import read_rows
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.data.store import Store
from asa.inference.anomaly import (
    BLUR,
    AnomalyMap,
    AnomalyScorer,
    AsymmetryScorer,
    HealthyReference,
    InpaintedBoxes,
    LabelScorer,
    PredictedPatches,
    PredictionErrorScorer,
    read_pretrained,
)
from asa.inference.preprocessing import exported
from asa.inference.segmentation import Segmenter, sliding_window
from asa.methods.pretrain import normalised
from asa.models.masked_autoencoder import asa_tiny
from asa.models.sa_swin import sa_swin_tiny
from asa.ops.patches import Selection, patchify
from asa.training.checkpoint import save_checkpoint

ASA = dict(img_size=[32, 32, 64], embed_dim=12, depth=1, num_heads=2, decoder_depth=1)
SWIN = dict(img_size=[32, 32, 64], embed_dim=4, num_heads=[1, 1, 2, 2], window=2, cross_heads=2)


def pretrained(folder: Path, target: str = "asa.models.masked_autoencoder.asa_tiny", **more: object) -> Path:
    """An untrained network as asa-pretrain saves it."""
    torch.manual_seed(0)
    node = {"_target_": target, **(SWIN if "swin" in target else ASA)}
    shell = nn.Module()
    shell.model = build(node)
    data = {key: value for key, value in metadata().items() if key != "labels"} | more
    save_checkpoint(folder, 1, shell, {"model": node, "task": "pretraining", "data": data}, {}, keep=1)
    return folder


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans of two sizes."""
    root = tmp_path_factory.mktemp("healthy")
    for k, name in enumerate("bcd"):
        values, front = voxels(a_scan(root, name)), 4 * (name == "d")
        noise = np.random.default_rng(k).uniform(0, 300, values.shape) * (values > 0)
        write_image(root / f"{name}.nii.gz", (values + noise)[:, front:], np.diag([-1.0, 1.0, 1.0, 1.0]))
    records = folder.records(root, images={"t1": "*.nii.gz"})
    assert not prepare_cohort(records, root / "store", CohortSettings(), progress=False).failures
    return root / "store"


# ---- above healthy scans ----


def constant(value: float, *size: int) -> AnomalyMap:
    return AnomalyMap(torch.full(size, float(value)), torch.ones(size, dtype=torch.bool))


def test_scans_of_other_sizes_are_compared_at_the_stretched_place() -> None:
    scans = [constant(1, 4, 4, 4), constant(3, 6, 5, 4)]
    found = HealthyReference(scans, (6, 5, 4)).standardise(constant(6, 5, 4, 7))
    torch.testing.assert_close(found.map, torch.full((5, 4, 7), 2.0))  # (6 - 2) / (1 + 1)
    halves = [
        AnomalyMap(map.map * (1 + 8 * (torch.arange(n) >= n // 2))[:, None, None], map.inside)
        for map in scans
        for n in [len(map.map)]
    ]
    new = AnomalyMap(torch.cat([torch.ones(8, 4, 4), torch.full((8, 4, 4), 50.0)]), torch.ones(16, 4, 4) > 0)
    above = HealthyReference(halves, (6, 5, 4)).standardise(new).map
    assert not above[:6].any() and (above[10:] > 1).all()
    same = HealthyReference([constant(1, 4, 4, 4), constant(3, 4, 4, 4)], (4, 4, 4)).standardise(constant(6, 4, 4, 4))
    assert torch.equal(same.map, torch.full((4, 4, 4), 2.0))


def test_where_healthy_maps_do_not_differ_nothing_is_above_them() -> None:
    reference = HealthyReference([constant(0, 4, 4, 4)] * 3, (4, 4, 4))
    for value in (0, 5):
        assert not reference.standardise(constant(value, 4, 4, 4)).map.any()  # and not 0 / 0


@pytest.mark.parametrize("prepare", [{"crop": "none"}, {"crop": [32, 40, 32]}, {"register": True}])
def test_volumes_of_several_sizes_that_are_not_boxes_around_brains_are_refused(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: dict
) -> None:
    manifest = read_tree(healthy)
    manifest["settings"] |= prepare
    write_tree(tmp_path / "store", manifest)
    run = pretrained(tmp_path / "run", prepare=manifest["settings"])
    with pytest.raises(ValueError, match=r"healthy: scans of \d+x\d+x\d+ and of .* prepare.crop=SIZE"):
        PredictionErrorScorer(*read_pretrained(run), SETTINGS).compare_with(tmp_path / "store")


def test_healthy_scans_of_other_voxels_are_refused(healthy: Path, tmp_path: Path) -> None:
    run = pretrained(tmp_path / "run", prepare=Store(healthy).settings, spacing=[[2.0] * 3] * 2)
    with pytest.raises(ValueError, match="voxels of 1 x 1 x 1 mm"):
        PredictionErrorScorer(*read_pretrained(run), SETTINGS).compare_with(healthy)


def test_a_map_without_a_score_has_no_column_for_it(healthy: Path, tmp_path: Path) -> None:
    scorer = LabelScorer(Segmenter(checkpoint(tmp_path / "run"), SETTINGS))
    store = Store(healthy)
    record = store.records[0]
    like = read_image(store.first_source(record))
    row = scorer.score_prepared("b", store.image("b"), record["chain"], like, tmp_path / "b.nii.gz")
    assert list(row) == ["id", "mean", "top", "peak", "x", "y", "z"]
    map = voxels(tmp_path / "b.nii.gz")
    assert map.shape == like.data.shape and float(row["peak"]) == pytest.approx(map.max(), rel=1e-5)
    at = np.linalg.inv(like.affine) @ [*(float(row[axis]) for axis in "xyz"), 1]
    assert map[tuple(np.rint(at[:3]).astype(int))] == pytest.approx(float(row["peak"]), rel=1e-5)


# ---- the maps ----


class Copying(nn.Module):
    """Knows what is hidden: returns the decoded patches themselves, or normalised."""

    def __init__(self, prepared=lambda patches: patches) -> None:
        super().__init__()
        self.encoder, self.prepared = asa_tiny(**ASA).encoder, prepared

    def forward(self, volume: Tensor, *, visible: Selection, decoded: Selection) -> Tensor:
        return self.prepared(patchify(volume, 8)[:, decoded.indices[0]])


@pytest.mark.parametrize("masked", [1, 3])
def test_a_network_that_returns_the_patches_predicts_the_scan_from_normalised_ones_too(masked: int) -> None:
    windows = torch.rand(2, 1, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PredictedPatches(Copying(), masked=masked)(windows), windows)
    known = PredictedPatches(Copying(normalised), normalised=True, masked=masked)(windows)
    torch.testing.assert_close(known, windows, atol=1e-4, rtol=0)
    assert (PredictedPatches(Copying(normalised), masked=masked)(windows) - windows).abs().max() > 0.1


@pytest.mark.parametrize(("patches", "predicted"), [(6, False), (7, True)])
def test_a_window_with_a_twentieth_of_tissue_is_predicted_and_one_with_less_stays(
    patches: int, predicted: bool
) -> None:
    window = torch.zeros(1, 1, 32, 32, 64)  # of 128 patches
    for k in range(patches):
        window[0, 0, 0, 8 * (k // 4), 8 * (k % 4)] = 1
    made = PredictedPatches(Copying(lambda patches: patches + 1))(window)
    assert (made != window).any() == predicted


class Repeating(nn.Module):
    """Inpaints what it is given, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.seen = sa_swin_tiny(**SWIN).encoder, []

    def forward(self, volume: Tensor, mirrored: Tensor) -> object:
        self.seen.append((volume, mirrored))
        return type("Output", (), {"volume": volume})


def test_a_voxel_is_inpainted_only_where_it_is_hidden_and_the_mirror_image_is_seen_whole() -> None:
    windows = 2 + torch.rand(2, 1, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    mirrored, network = windows.flip(-1), Repeating()
    found = InpaintedBoxes(network)(windows, mirrored)
    assert found.shape == windows.shape and found.max() <= 1 < windows.min()  # noise everywhere: no voxel is its own
    hidden = torch.stack([volume != windows for volume, _ in network.seen])
    assert (hidden.sum(dim=0) == 1).all() and all(torch.equal(mirror, mirrored) for _, mirror in network.seen)
    torch.testing.assert_close(hidden.float().mean(dim=(1, 2, 3, 4, 5)), torch.full((4,), 0.25))


@pytest.mark.parametrize("target", ["asa.models.masked_autoencoder.asa_tiny", "asa.models.sa_swin.sa_swin_tiny"])
def test_the_map_is_the_blurred_error_of_what_is_predicted_of_the_other_parts(tmp_path: Path, target: str) -> None:
    run = pretrained(tmp_path / "run", target, spacing=[[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    scorer = PredictionErrorScorer(*read_pretrained(run), SETTINGS)
    image = torch.rand(1, 32, 40, 64, generator=torch.Generator().manual_seed(1))
    image[:, :8] = 0
    found = scorer.compute(image)
    assert isinstance(scorer.network, PredictedPatches if "masked" in target else InpaintedBoxes)
    error = (sliding_window(scorer.network, image, SETTINGS) - image).abs()[0]
    sd = BLUR / (2 * np.sqrt(2 * np.log(2)))
    expected = torch.from_numpy(ndimage.gaussian_filter(error.numpy(), [sd / 1.5, sd, sd])) * (image[0] != 0)
    torch.testing.assert_close(found.map, expected, atol=2e-4, rtol=0)
    assert torch.equal(found.inside, image[0] != 0) and found.score != found.score
    whole = PredictionErrorScorer(*read_pretrained(pretrained(tmp_path / "n", normalised=True)), SETTINGS)
    assert whole.network.normalised and not getattr(scorer.network, "normalised", False)
    assert exported(whole.preprocessor.data)["normalised"]


def test_the_map_of_labels_is_what_the_background_leaves_or_the_largest_region(tmp_path: Path) -> None:
    image = torch.rand(1, 32, 32, 64, generator=torch.Generator().manual_seed(0))
    image[:, :, 20:] = 0
    classes = Segmenter(checkpoint(tmp_path / "classes"), SETTINGS)
    found, inside = LabelScorer(classes).compute(image), image[0] != 0
    torch.testing.assert_close(found.map, classes.probabilities(image)[1:].sum(dim=0) * inside, atol=1e-6, rtol=0)
    regions = Segmenter(
        checkpoint(tmp_path / "regions", out_channels=2, regions=[["sides", [1, 2]], ["left", [1]]]), SETTINGS
    )
    assert torch.equal(LabelScorer(regions).compute(image).map, regions.probabilities(image).amax(dim=0) * inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["masked", "inpainted", "sides", "labels"])
def test_the_maps_of_a_gpu_are_those_of_a_cpu(tmp_path: Path, kind: str) -> None:
    target = "asa.models.masked_autoencoder.asa_tiny" if kind == "masked" else "asa.models.sa_swin.sa_swin_tiny"
    run = checkpoint(tmp_path) if kind == "labels" else pretrained(tmp_path, target)

    def scorer(device: str) -> AnomalyScorer:
        settings = replace(SETTINGS, device=device, precision="fp32")
        if kind == "labels":
            return LabelScorer(Segmenter(run, settings))
        return (AsymmetryScorer if kind == "sides" else PredictionErrorScorer)(*read_pretrained(run), settings)

    image = torch.rand(1, 32, 32, 64, generator=torch.Generator().manual_seed(1))
    image[:, :8] = 0
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, expected = scorer("cuda").compute(image), scorer("cpu").compute(image)
    torch.testing.assert_close(found.map, expected.map, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.inside, expected.inside) and expected.map.max() > 0


# ---- asa-predict ----


def test_the_command_writes_maps_of_a_masked_autoencoder_and_of_labels_above_healthy(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = {"prepare": Store(healthy).settings}
    masked, tuned = pretrained(tmp_path / "masked", **alike), checkpoint(tmp_path / "tuned", **alike)
    a_scan(tmp_path)
    cpu = ("predict.device=cpu", "predict.overlap=0.25")
    for run, options in ((masked, ()), (masked, (f"healthy={healthy}",)), (tuned, (f"healthy={healthy}",))):
        out = tmp_path / f"{run.name}{len(options)}"
        given = (f"checkpoint={run}", f"input={tmp_path / 'a.nii.gz'}", f"out={out}", *cpu, *options)
        assert call(predict, monkeypatch, *given) == 0
        assert sorted(path.name for path in out.glob("[!.]*")) == ["a.nii.gz", "anomaly.csv"]
        (row,) = read_rows(out / "anomaly.csv")
        assert float(row["peak"]) == pytest.approx(voxels(out / "a.nii.gz").max(), rel=1e-4) and float(row["top"]) > 0
    scorer = LabelScorer(Segmenter(tuned, SETTINGS))
    scorer.compare_with(healthy)
    case, like = scorer.preprocessor.prepare({"t1": tmp_path / "a.nii.gz"})
    assert float(row["top"]) == pytest.approx(scorer.measure(torch.from_numpy(case.image), like).top, rel=1e-3)


@pytest.mark.parametrize("key", ["healthy", "input"])
def test_scans_that_were_stripped_in_another_way_are_taken_if_the_user_says_so(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, key: str
) -> None:
    run = pretrained(tmp_path / "masked", prepare={**Store(healthy).settings, "strip": "deepbet"})
    paths = {"input": a_scan(tmp_path), "out": tmp_path / "out", "checkpoint": run} | {key: healthy}
    given = (*(f"{name}={path}" for name, path in paths.items()), "predict.device=cpu")
    assert call(predict, monkeypatch, *given) == 1
    told = '(prepare.strip: "deepbet" there, "none" here): if no skull is left, give strip=none'
    assert told in capsys.readouterr().err
    assert call(predict, monkeypatch, *given, "strip=none") == 0
    assert (tmp_path / "out/anomaly.csv").is_file()
    manifest = read_tree(healthy)
    manifest["settings"]["strip"] = "deepbet"
    write_tree(tmp_path / "alike", manifest)  # in the way of the training scans: whatever strip= says of raw ones
    _, preprocessor = read_pretrained(run, strip="none")
    preprocessor.check_store(Store(tmp_path / "alike"), "")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("masked", ["map=both"], "map=both: choose asymmetry or prediction, or null"),
        ("masked", ["map=asymmetry"], "no SA-Swin, whose maps are of asymmetry: leave map= out"),
        ("masked", ["mirror=true"], "comes from one checkpoint, without mirror"),
        ("tuned", ["map=prediction"], "map=prediction is for a run of asa-pretrain"),
        ("tuned", ["healthy=HEALTHY", "uncertainty=entropy"], "uncertainty= is for label maps"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, kind: str, options: list[str], said: str
) -> None:
    run = (pretrained if kind == "masked" else checkpoint)(tmp_path / kind)
    options = [option.replace("HEALTHY", str(healthy)) for option in options]
    given = (f"checkpoint={run}", f"input={a_scan(tmp_path)}", f"out={tmp_path / 'out'}", *options)
    assert call(predict, monkeypatch, *given) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
