"""Predictions as a BIDS derivative: names, places, sidecars, and what its validator says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from untrained import DATA, SETTINGS, a_scan, call, checkpoint, predicted, voxels

from asa.cli import evaluate, predict, view
from asa.data.datasets import bids
from asa.data.io.files import sha256_of
from asa.data.io.nifti import read_image, write_label
from asa.data.io.tables import read_rows
from asa.data.preprocessing.cohort import prepare_cohort
from asa.data.preprocessing.settings import CohortSettings
from asa.data.splits import write_split
from asa.data.store import Store
from asa.inference.layout import BidsDerivative, abbreviations, bids_root, label_maps_of, probabilities_of, source_of
from asa.inference.segmentation import Segmenter
from asa.training.checkpoint_files import find_weights

VALIDATOR = shutil.which("bids-validator-deno", path=Path(sys.executable).parent) or shutil.which("bids-validator-deno")
SCANS = ("sub-01/ses-1/anat/sub-01_ses-1_acq-mprage_T1w", "sub-01/ses-2/anat/sub-01_ses-2_T1w", "sub-b/anat/sub-b_T1w")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three T1w of two subjects, and a FLAIR that is no channel."""
    root = tmp_path / "my dataset"
    about = {"Name": "three heads", "BIDSVersion": "1.10.0", "DatasetType": "raw", "DatasetDOI": "doi:10.1/x"}
    for name in (*SCANS, "sub-b/anat/sub-b_FLAIR"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        a_scan((root / name).parent, Path(name).name)
    (root / "dataset_description.json").write_text(json.dumps(about))
    (root / "README").write_text("Ellipsoids of noise.\n")
    return root


def issues(root: Path) -> dict[str, list[str]]:
    """Code -> files, of the errors that the validator of the standard finds."""
    if VALIDATOR is None:
        pytest.skip("bids-validator-deno is not installed: pip install bids-validator-deno")
    command = [VALIDATOR, "--format", "json", "--ignoreWarnings", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found: dict[str, list[str]] = {}
    for issue in json.loads(done.stdout)["issues"]["issues"]:
        if issue.get("severity") == "error":
            found.setdefault(issue["code"], []).append(issue.get("location", ""))
    return found


def test_a_derivative_is_named_placed_and_described_as_bids_has_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(tmp_path / "run"), dataset / "derivatives" / "asa"
    flags = ("layout=bids", "probabilities=true", "uncertainty=entropy", "predict.device=cpu")
    assert call(predict, monkeypatch, f"checkpoint={run}", f"input={dataset}", f"out={out}", *flags) == 0
    assert issues(out) == {}

    stems = [name.removesuffix("_T1w") for name in SCANS]
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    expected = [".bidsignore", "dataset_description.json", "dseg.tsv", "volumes.csv"]
    for stem in stems:
        expected += [f"{stem}_dseg.nii.gz", f"{stem}_dseg.json", f"{stem}_uncertainty.nii.gz"]
        for label in ("background", "leftX", "rightX", "middle"):
            short = "BG" if label == "background" else label
            expected += [f"{stem}_label-{short}_probseg.nii.gz", f"{stem}_label-{short}_probseg.json"]
    assert written == sorted(expected)

    about = json.loads((out / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative" and about["GeneratedBy"][0]["Name"] == "asa"
    assert about["DatasetLinks"] == {"raw": "../.."} and about["SourceDatasets"] == [
        {"URL": "../..", "DOI": "doi:10.1/x"}
    ]
    table = [line.split("\t") for line in (out / "dseg.tsv").read_text().splitlines()]
    assert table == [
        ["index", "name", "abbreviation"],
        ["0", "background", "BG"],
        ["1", "left_x", "leftX"],
        ["2", "right_x", "rightX"],
        ["5", "middle", "middle"],
    ]
    for stem, name in zip(stems, SCANS, strict=True):
        sidecar = json.loads((out / f"{stem}_dseg.json").read_text())
        assert sidecar["Sources"] == [f"bids:raw:{name}.nii.gz"] and sidecar["Manual"] is False
        (network,) = sidecar["GeneratedBy"]["Networks"]
        assert network == {"Name": "run", "SHA256": sha256_of(find_weights(run))}
        label = nibabel.load(out / f"{stem}_dseg.nii.gz")
        assert np.array_equal(label.affine, nibabel.load(dataset / f"{name}.nii.gz").affine)
    # What an earlier prediction wrote beside its label maps goes with them.
    assert call(predict, monkeypatch, f"checkpoint={run}", f"input={dataset}", f"out={out}", flags[0], flags[3]) == 0
    left = {path.relative_to(out).as_posix() for path in out.rglob("sub-*") if path.is_file()}
    assert left == {f"{stem}_dseg.{ending}" for stem in stems for ending in ("nii.gz", "json")}


def test_both_layouts_hold_the_same_voxels(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = checkpoint(tmp_path / "run"), tmp_path / "asa"
    flags = ("layout=bids", "probabilities=true", "predict.device=cpu", "predict.overlap=0.25")
    assert call(predict, monkeypatch, f"checkpoint={run}", f"input={dataset}", f"out={out}", *flags) == 0
    rows = {row["id"]: row for row in read_rows(out / "volumes.csv")}
    assert list(rows) == ["sub-01_ses-1", "sub-01_ses-2", "sub-b"]  # as asa-prepare data=bids calls them
    for row, name in zip(rows.values(), SCANS, strict=True):
        expected = predicted(Segmenter(run, SETTINGS), dataset / f"{name}.nii.gz", tmp_path / "p")
        assert row["file"] == f"{name.removesuffix('_T1w')}_dseg.nii.gz"
        assert np.array_equal(voxels(out / row["file"]), expected) and len(np.unique(expected)) > 2
        stem, names = row["file"].removesuffix("_dseg.nii.gz"), ("BG", "leftX", "middle", "rightX")
        for label, file in zip(names, ("background", "left_x", "middle", "right_x"), strict=True):
            probability = voxels(out / f"{stem}_label-{label}_probseg.nii.gz")
            assert np.array_equal(probability, voxels(tmp_path / "p" / f"{file}.nii.gz"))
        written = {name: out / f"{stem}_label-{name}_probseg.nii.gz" for name in names}
        assert probabilities_of(out, row["id"], out / row["file"]) == written
        (dataset / name).with_name("prediction.nii.gz").unlink()


@pytest.mark.parametrize("channel", ["T1", "T1w"])
def test_a_channel_named_as_in_nnunet_or_bids_is_found(
    channel: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(tmp_path / "run", channels=[channel]), dataset / "derivatives" / "asa"
    flags = ("layout=bids", "predict.device=cpu", "predict.overlap=0.25")
    assert call(predict, monkeypatch, f"checkpoint={run}", f"input={dataset}", f"out={out}", *flags) == 0
    assert [row["id"] for row in read_rows(out / "volumes.csv")] == ["sub-01_ses-1", "sub-01_ses-2", "sub-b"]


def test_channels_give_the_name_what_they_share_and_are_all_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anat, out = tmp_path / "raw" / "sub-1" / "anat", tmp_path / "asa"
    anat.mkdir(parents=True)
    names = ["sub-1_acq-a_run-2_T1w", "sub-1_acq-b_run-2_FLAIR"]
    for name in names:
        a_scan(anat, name)
    layout = BidsDerivative(out, Segmenter(checkpoint(tmp_path / "run"), SETTINGS).outputs, {}, probabilities=False)
    layout.begin({"any": [str(anat / f"{name}.nii.gz") for name in names]})
    assert layout.label_map("any") == out / "sub-1" / "anat" / "sub-1_run-2_dseg.nii.gz"
    layout.describe("any")
    sidecar = json.loads((out / "sub-1" / "anat" / "sub-1_run-2_dseg.json").read_text())
    assert sidecar["Sources"] == [f"bids:raw:sub-1/anat/{name}.nii.gz" for name in names]


def test_a_derivative_is_evaluated_and_added_to(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, store, out = tmp_path / "truth", tmp_path / "store", tmp_path / "asa"
    for name in SCANS:
        like = read_image(dataset / f"{name}.nii.gz")
        label = np.random.default_rng(1).choice([0, 1, 2, 5], like.data.shape)
        write_label(truth / f"{name.replace('T1w', 'dseg')}.nii.gz", label, like)
    records = bids.records(dataset, label="dseg", label_root=truth)
    assert not prepare_cohort(
        records, store, CohortSettings(labels=DATA["labels"], duplicates="keep"), progress=False
    ).failures
    run = checkpoint(tmp_path / "run", prepare=Store(store).settings)
    write_split(run / "split.json", {"train": [], "validation": ["sub-b"], "test": ["sub-01"]})
    with monkeypatch.context() as patch:
        patch.setattr("asa.inference.layout.matching_files", None)  # the folder is not searched for each scan
        for part in ("test", "validation"):
            common = (f"checkpoint={run}", f"out={out}", "layout=bids", "predict.device=cpu")
            assert call(predict, patch, *common, f"input={store}", f"part={part}") == 0
    assert set(label_maps_of(out)) == {"sub-01_ses-1", "sub-01_ses-2", "sub-b"}
    arguments = (f"predictions={out}", f"truth={store}", f"out={tmp_path / 'scores'}")
    assert call(evaluate, monkeypatch, *arguments) == 0
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["cases"] == 3
    sources = json.loads((out / "sub-b" / "anat" / "sub-b_dseg.json").read_text())["Sources"]
    assert sources == ["bids:raw:sub-b/anat/sub-b_T1w.nii.gz"]  # the true label map is none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "flat"}, "layout=flat: choose bids"),
        ({"input": "{loose}", "images": "{t1: '*.nii.gz'}"}, "is not named and placed as BIDS has it"),
        ({"out": "{raw}"}, "is not empty and not a derivative of asa-predict"),
        ({"out": "{loose}"}, "is not empty and not a derivative of asa-predict"),
        (
            {"images": "{t1: '**/*.nii.gz'}"},
            "sub-b_FLAIR.nii.gz and sub-b_T1w.nii.gz would both give sub-b_dseg.nii.gz",
        ),
        ({"checkpoint": "{other}"}, "holds another dataset, or predictions of other labels"),
    ],
)
def test_what_cannot_be_a_derivative_is_refused_and_nothing_is_changed(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    (tmp_path / "loose").mkdir()
    a_scan(tmp_path / "loose", "head")
    segmenter = Segmenter(checkpoint(tmp_path / "run"), SETTINGS)
    layout = BidsDerivative(tmp_path / "asa", segmenter.outputs, segmenter.described(), False)
    layout.begin({"b": [str(dataset / f"{SCANS[2]}.nii.gz")]})
    other = checkpoint(tmp_path / "other", labels={1: "x", 2: "y", 5: "z"}, lateral_pairs=[])
    places = {"raw": dataset, "loose": tmp_path / "loose", "other": other}
    settings = {"checkpoint": tmp_path / "run", "input": dataset, "out": tmp_path / "asa", "layout": "bids"} | change
    if change.get("input"):
        settings["input"] = places["loose"]
    named = {key: places.get(str(value).strip("{}"), value) for key, value in settings.items()}
    before = sorted(tmp_path.rglob("*"))
    assert call(predict, monkeypatch, *(f"{key}={value}" for key, value in named.items())) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_scans_of_a_derivative_are_found_in_its_dataset(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, viewer = checkpoint(tmp_path / "run"), tmp_path / "out", tmp_path / "niivue.umd.js"
    given = (f"checkpoint={run}", f"input={dataset}", "layout=bids", "predict.device=cpu")
    assert call(predict, monkeypatch, *given, f"out={out}") == 0
    assert {source_of(path) for path in label_maps_of(out).values()} == {f"{name}.nii.gz" for name in SCANS}
    viewer.write_text("(function(a,b){b((a=self).niivue={})})(this,function(){});")
    page = tmp_path / "page.html"
    assert call(view, monkeypatch, f"input={out}", f"images={dataset}", f"viewer={viewer}", f"out={page}") == 0
    assert page.read_text().count('"name": "image"') == len(SCANS)


def test_label_maps_of_another_softwares_derivative_have_the_ids_of_its_scans(tmp_path: Path) -> None:
    names = ["sub-01_ses-1_space-T1w_dseg", "sub-01_ses-2_dseg", "sub-b_run-2_desc-aseg_dseg"]
    (tmp_path / "dataset_description.json").write_text("{}")
    for name in names:
        (tmp_path / name[: name.index("_")] / "anat").mkdir(parents=True, exist_ok=True)
        (tmp_path / name[: name.index("_")] / "anat" / f"{name}.nii.gz").touch()
    assert list(label_maps_of(tmp_path)) == ["sub-01_ses-1", "sub-01_ses-2", "sub-b_run-2"]
    (tmp_path / "sub-b" / "anat" / "sub-b_run-2_dseg.nii.gz").touch()
    with pytest.raises(ValueError, match="both .* are of sub-b_run-2: leave one there"):
        label_maps_of(tmp_path)


def test_labels_get_abbreviations_that_file_names_can_hold() -> None:
    names = ["background", "csf", "GM", "left_putamen", "Area 4p", "WT"]
    assert list(abbreviations(names).values()) == ["BG", "CSF", "GM", "leftPutamen", "Area4p", "WT"]
    for wrong in (["a b", "aB"], ["é"]):
        with pytest.raises(ValueError, match="rename the label"):
            abbreviations(wrong)


@pytest.mark.parametrize("name", ["sub-1/anat/sub-2_T1w", "sub-1/ses-1/anat/sub-1_T1w", "anat/sub-1_T1w", "sub-1_T1w"])
def test_a_scan_in_another_place_than_its_name_says_has_no_dataset(name: str) -> None:
    with pytest.raises(ValueError, match="not named and placed as BIDS has it"):
        bids_root(Path("/data") / f"{name}.nii.gz")
    assert bids_root(Path("/data/sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz")) == Path("/data")


def test_the_validator_finds_a_label_map_that_is_not_named_as_bids_has_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(tmp_path / "run"), tmp_path / "asa"
    call(predict, monkeypatch, f"checkpoint={run}", f"input={dataset}", f"out={out}", "layout=bids")
    assert issues(out) == {}
    anat = out / "sub-b" / "anat"
    (anat / "sub-b_dseg.nii.gz").rename(anat / "sub-b_labels.nii.gz")
    assert {"NOT_INCLUDED", "SIDECAR_WITHOUT_DATAFILE"} <= issues(out).keys()
