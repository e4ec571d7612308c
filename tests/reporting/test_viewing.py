"""Pages for looking at a store, at predictions and at reconstructions."""

import base64
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import LABELS
from stores import read_tree, write_tree

from asa.cli import evaluate, pretrain, view
from asa.data.io.nifti import read_image, read_label, write_image, write_label
from asa.data.store import Store
from asa.inference.scans import raw_scans
from asa.reporting.viewing import Layer, write_viewer

CODE = "(function(a,b){b((a=self).niivue={})})(this,function(){});"  # no NiiVue: what is drawn is not tested here
SMALL = ("model=asa_tiny", "crop=32", "+model.embed_dim=24", "+model.num_heads=2", "model.decoder_depth=1")


@pytest.fixture
def viewer(tmp_path: Path) -> Path:
    """A file that looks like NiiVue's."""
    path = tmp_path / "niivue.umd.js"
    path.write_text(CODE)
    return path


def cases_of(page: Path) -> dict[str, dict[str, Any]]:
    """The layers of each case of a page, by name."""
    found = re.search(r"^const cases = new Map\((.*)\);  //", page.read_text(), flags=re.MULTILINE)
    assert found is not None and CODE in page.read_text()
    return {id: {layer["name"]: layer for layer in layers} for id, layers in json.loads(found[1])}


def array_of(layer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of a layer, (x, y, z), and its affine."""
    data = base64.b64decode(layer["data"])
    assert layer["file"].endswith(".gz") == (data[:2] == b"\x1f\x8b")
    image = nib.Nifti1Image.from_bytes(gzip.decompress(data) if layer["file"].endswith(".gz") else data)
    return np.asarray(image.dataobj), image.affine


def test_an_id_of_any_name_is_a_scan_of_the_page_and_their_order_is_kept(viewer: Path, tmp_path: Path) -> None:
    ids, layer = ["b", "__proto__", "10", "9", "constructor"], Layer("t1", b"")
    write_viewer(tmp_path / "page.html", viewer, "ids", {id: [layer] for id in ids})
    assert list(cases_of(tmp_path / "page.html")) == ids
    assert "cases[" not in (tmp_path / "page.html").read_text()  # an object would have keys of its own


def test_a_stores_scans_are_shown_in_their_stored_space(store: Path, viewer: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert view.main([f"input={store}", f"out={out}", f"viewer={viewer}", "count=2"]) == 0
    opened, cases = Store(store), cases_of(out)
    assert list(cases) == [record["id"] for record in opened.records[:2]]
    for record in opened.records[:2]:
        layer = cases[record["id"]][opened.channels[0]]
        voxels, affine = array_of(layer)
        expected = opened.image(record["id"])[0]
        assert np.array_equal(voxels, expected.transpose(2, 1, 0).astype(np.float32))
        np.testing.assert_allclose(affine, record["chain"]["stored_affine"], atol=1e-5)
        assert layer["labels"] is None and layer["opacity"] == 1


def test_predictions_are_shown_over_their_scans_with_their_probabilities(viewer: Path, tmp_path: Path) -> None:
    affine, rng = np.diag([1.0, 2.0, 1.5, 1.0]), np.random.default_rng(0)
    scan, labels = rng.random((4, 5, 6)), rng.integers(0, 3, (4, 5, 6))
    write_image(tmp_path / "scans" / "a.nii", scan, affine)
    write_image(tmp_path / "predictions" / "a.nii.gz", labels, affine, dtype=np.uint8)
    write_image(tmp_path / "predictions" / "probabilities" / "a" / "gm.nii.gz", scan, affine)
    out = tmp_path / "page.html"
    inputs = (f"input={tmp_path / 'predictions'}", f"images={tmp_path / 'scans'}")
    assert view.main([*inputs, f"out={out}", f"viewer={viewer}"]) == 0
    (layers,) = cases_of(out).values()
    assert list(layers) == ["image", "prediction", "p(gm)"]
    for name, path in (("image", "scans/a.nii"), ("prediction", "predictions/a.nii.gz")):
        voxels, found = array_of(layers[name])
        assert np.array_equal(voxels, read_image(tmp_path / path).data) and np.array_equal(found, affine)
    shown = layers["prediction"]["labels"]
    assert shown["I"] == [0, 1, 2] and shown["labels"] == ["", "1", "2"] and shown["A"] == [0, 255, 255]
    assert layers["p(gm)"]["opacity"] == 0


@pytest.mark.parametrize(
    ("images", "file", "id"),
    [
        ("new", "new/sub-1/anat/sub-1_T1w.nii.gz", "sub-1"),
        ("new/**/*_T1w.nii.gz", "new/sub-1/anat/sub-1_T1w.nii.gz", "sub-1_anat_sub-1"),
        ("new", "new/a_0000.nii.gz", "a"),
        ("new", "new/imagesTs/a_0000.nii.gz", "a"),
        ("new", "new/x/mri/T1.mgz", "x_mri_T1"),
    ],
)
def test_the_folder_that_was_predicted_has_the_scans_of_its_predictions(
    viewer: Path, tmp_path: Path, images: str, file: str, id: str
) -> None:
    scan = np.random.default_rng(0).random((4, 5, 6), np.float32)
    write_image(tmp_path / file, scan, np.eye(4))
    if "imagesTs" in file:
        about = {"channel_names": {"0": "T1"}, "labels": {"background": 0}, "file_ending": ".nii.gz", "numTraining": 0}
        (tmp_path / "new" / "dataset.json").write_text(json.dumps(about))
    network = SimpleNamespace(channels=["t1"], path="run", scans="run", check_channels=lambda images: None)
    pattern = {"t1": "**/*_T1w.nii.gz"} if "*" in images else None
    assert [scan.id for scan in raw_scans(tmp_path / "new", network, images=pattern, out=tmp_path / "out")] == [id]
    write_image(tmp_path / "predictions" / f"{id}.nii.gz", np.ones((4, 5, 6)), np.eye(4), dtype=np.uint8)
    inputs = (f"input={tmp_path / 'predictions'}", f"images={tmp_path / images}", f"viewer={viewer}")
    assert view.main([*inputs, f"out={tmp_path / 'page.html'}"]) == 0
    assert np.array_equal(array_of(cases_of(tmp_path / "page.html")[id]["image"])[0], scan)
    (tmp_path / "predictions" / f"{id}.nii.gz").rename(tmp_path / "predictions" / "other.nii.gz")
    assert view.main([*inputs, f"out={tmp_path / 'other.html'}"]) == 1


def test_truth_differences_and_scores_are_shown_where_they_are_known(
    store: Path, raw: Path, viewer: Path, tmp_path: Path
) -> None:
    for shift, id in enumerate(("s0", "s1", "s2")):  # s2 is the worst
        like = read_label(raw / f"{id}_seg.nii.gz")
        write_label(tmp_path / "maps" / f"{id}.nii.gz", np.roll(like.data, 2 * shift, axis=1), like)
    out, maps = tmp_path / "page.html", tmp_path / "maps"
    truth = ["allow_missing=true", f"truth={store}", f"out={tmp_path / 'evaluation'}"]
    assert evaluate.main([f"predictions={maps}", *truth]) == 0
    scored = [f"input={maps}", f"evaluation={tmp_path / 'evaluation'}", f"out={out}", f"viewer={viewer}", "count=2"]
    assert view.main(scored) == 0
    cases = cases_of(out)
    assert list(cases) == ["s2", "s1"]
    table = re.findall(r'data-id="(.*?)">.*?<td>([\d.]+)</td><td>(\w+) ([\d.]+)</td>', out.read_text())
    assert [id for id, *_ in table] == ["s2", "s1"] and float(table[0][1]) < float(table[1][1]) < 1
    assert all(region in LABELS.values() and float(worst) < float(mean) for _, mean, region, worst in table)

    assert view.main([f"input={maps}", f"images={store}", f"out={out}", f"viewer={viewer}"]) == 0
    of_the_store = cases_of(out)
    assert list(of_the_store) == ["s0", "s1", "s2"] and "data-id" not in out.read_text()
    for layers in (cases["s2"], of_the_store["s2"]):
        assert list(layers) == ["image", "truth", "prediction", "difference"]
        true, found, different = (array_of(layers[name])[0] for name in ("truth", "prediction", "difference"))
        assert np.array_equal(true, read_label(raw / "s2_seg.nii.gz").data)
        assert np.array_equal(different != 0, true != found)
        assert np.array_equal(different == 1, (true != 0) & (found == 0))
        assert [layers[name]["opacity"] for name in layers] == [1, 0, 0.5, 0]
        assert layers["truth"]["labels"]["labels"] == ["", *LABELS.values()]
        assert layers["difference"]["labels"]["labels"][2] == "added (prediction only)"


def test_niivue_comes_with_nilearn(store: Path, tmp_path: Path) -> None:
    assert view.main([f"input={store}", f"out={tmp_path / 'page.html'}", "count=1"]) == 0
    assert "isRadiologicalConvention" in (tmp_path / "page.html").read_text().split("const cases")[0]


@pytest.mark.parametrize("place", ["store", "probabilities"])
def test_a_file_that_is_no_image_does_not_get_into_a_page(
    store: Path, viewer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    secret, other, out = tmp_path / "id_rsa", tmp_path / "other", tmp_path / "page.html"
    secret.write_text("a key of the user's")
    manifest = read_tree(store)
    id = manifest["records"][0]["id"]
    manifest["records"][0]["sources"]["t1"]["path"] = str(secret)
    write_tree(other, manifest)
    predictions = tmp_path / "predictions"
    write_image(predictions / f"{id}.nii.gz", np.ones((4, 5, 6)), np.eye(4), dtype=np.uint8)
    if place == "probabilities":
        (predictions / "probabilities" / id).mkdir(parents=True)
        (predictions / "probabilities" / id / "gm.nii.gz").symlink_to(secret)
    images = (f"images={other}",) if place == "store" else ()
    assert view.main([f"input={predictions}", f"out={out}", f"viewer={viewer}", *images]) == 1
    assert not out.exists() and len(capsys.readouterr().err.splitlines()) == 1


def test_a_reconstruction_shows_what_was_masked(store: Path, viewer: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "page.html"
    quick = ("train.steps=1", "train.batch_size=2", "optim.warmup=0", "loader.workers=0", "train.device=cpu")
    assert pretrain.main([f"data.store={store}", f"out={run}", *SMALL, *quick, "data.split.validation=1"]) == 0
    assert view.main([f"input={run}", f"out={out}", f"viewer={viewer}"]) == 0
    (layers,) = cases_of(out).values()
    image, masked, prediction = (array_of(layers[name])[0] for name in ("input", "masked", "prediction"))
    visible = masked != 0
    assert visible.any() and np.array_equal(image[visible], prediction[visible])
    assert not np.array_equal(image, prediction) and layers["importance"]["opacity"] == 0


def test_names_of_others_are_text_in_a_page(viewer: Path, tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script>"
    write_viewer(tmp_path / "page.html", viewer, bad, {bad: [Layer(bad, b"", "labels", {1: bad})]})
    assert bad not in (tmp_path / "page.html").read_text()
    assert cases_of(tmp_path / "page.html")[bad][bad]["labels"]["labels"] == ["", bad]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "missing"}, "no such folder"),
        ({"input": "."}, "neither a store nor a run"),
        ({"out": "page"}, "ends with .html"),
        ({"viewer": "none.js"}, "no such file; viewer= is NiiVue's"),
        ({"viewer": "other.js"}, "not NiiVue's"),
        ({"ids": "[nobody]"}, "no 'nobody'"),
        ({"input": ".", "evaluation": "missing"}, "summary.json: no such file"),
        ({"evaluation": "run"}, "evaluation= is for label maps"),
        ({"images": "."}, "is a store: leave it out"),
        ({"input": "run", "evaluation": "run"}, "run is a run: leave it out"),
        ({"count": "0"}, "from 1"),
    ],
)
def test_what_cannot_be_shown_is_named(
    settings: dict[str, str],
    message: str,
    store: Path,
    viewer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.js").write_text("alert()")
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/summary.json").write_text("{}")
    given = {"input": str(store), "out": "page.html", "viewer": str(viewer)} | settings
    assert view.main([f"{key}={value}" for key, value in given.items()]) == 1
    assert message in capsys.readouterr().err and not Path("page.html").exists()
