"""Which files of a folder are scans to predict: nnU-Net's layout, and never a label map."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from untrained import a_scan, checkpoint

import asa
from asa.data.datasets import bids
from asa.data.datasets.folder import recognise
from asa.inference.scans import raw_scans

LABEL_MAPS = [
    *("s1_seg.nii.gz", "s1_dseg.nii.gz", "s1_label-x_probseg.nii.gz", "s1_desc-brain_mask.nii.gz", "a_synthseg.nii"),
    *("aseg.mgz", "s1_mri_aseg.nii.gz", "aseg.auto_noCCseg.mgz", "aparc.DKTatlas+aseg.deep.mgz", "wmparc.mgz"),
    *("a_parc.nii.gz", "a_structures.nrrd", "a_tissues.mha", "a_lesions.nii", "a_Labels.nii", "a_manual.nii.gz"),
    *("a_regions.nii.gz", "a_atlas.nii", "a_parcellation.nii"),
    *("IBSR_01_segTRI_fill_ana.nii.gz", "IBSR_01_seg_ana.nii", "a_segTRI.nii", "truth.nii", "lh.ribbon.mgz"),
]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of nnU-Net: cases a, b with labels, c to predict."""
    root, scan = tmp_path / "Dataset001_X", a_scan(tmp_path)
    for folder, files in {"imagesTr": ("a_0000", "b_0000"), "labelsTr": ("a", "b"), "imagesTs": ("c_0000",)}.items():
        (root / folder).mkdir(parents=True)
        for name in files:
            shutil.copy(scan, root / folder / f"{name}.nii.gz")
    describe(root, "T1")
    return root


def describe(root: Path, *channels: str) -> None:
    about = {"channel_names": dict(enumerate(channels)), "labels": {"background": 0, "x": 1}, "numTraining": 2}
    (root / "dataset.json").write_text(json.dumps({**about, "file_ending": ".nii.gz"}))


def found(source: Path, *channels: str, **options: object) -> dict[str, dict[str, str]]:
    """Files of each scan by channel, relative to the source."""
    network = SimpleNamespace(
        channels=list(channels or ["t1"]), path="run", scans="run", check_channels=lambda images: None
    )
    scans = raw_scans(source, network, out=source / "out", **options)
    start = source if source.is_dir() else source.parent
    return {scan.id: {name: str(Path(path).relative_to(start)) for name, path in scan.files.items()} for scan in scans}


def test_a_dataset_of_nnunet_gives_its_new_scans_without_the_channel_in_the_ids(dataset: Path) -> None:
    assert found(dataset) == {"c": {"t1": "imagesTs/c_0000.nii.gz"}}
    assert found(dataset / "imagesTs") == {"c": {"t1": "c_0000.nii.gz"}}
    assert found(dataset / "imagesTr").keys() == {"a", "b"}
    assert found(dataset / "imagesTs" / "c_0000.nii.gz") == {"c": {"t1": "c_0000.nii.gz"}}


def test_a_dataset_without_new_scans_says_what_to_give(dataset: Path) -> None:
    shutil.rmtree(dataset / "imagesTs")
    with pytest.raises(ValueError, match=r"without imagesTs, its new scans: give input=.*/imagesTr"):
        found(dataset)
    with pytest.raises(ValueError, match=r"no image \(.*\) of a scan here, only label maps, like a\.nii\.gz"):
        found(dataset / "labelsTr")


def test_channels_are_taken_by_their_names_in_dataset_json(dataset: Path, tmp_path: Path) -> None:
    shutil.copy(a_scan(tmp_path), dataset / "imagesTs" / "c_0001.nii.gz")
    describe(dataset, "FLAIR", "T1")
    files = {"t1": "imagesTs/c_0001.nii.gz", "flair": "imagesTs/c_0000.nii.gz"}
    assert found(dataset, "t1", "flair") == {"c": files}
    with pytest.raises(ValueError, match=r"has the channels FLAIR, T1, and the network takes t1, t2: give input=.*Ts"):
        found(dataset, "t1", "t2")
    own = {"t1": "*_0001.nii.gz", "t2": "*_0000.nii.gz"}
    checked = SimpleNamespace(channels=["t1", "t2"], path="run", check_channels=lambda images: None)
    (scan,) = raw_scans(dataset / "imagesTs", checked, images=own, out=dataset / "out")
    assert scan.id == "c"


def test_label_maps_are_never_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = ["s1_T1w.nii.gz", "segment.nii.gz", "IBSR_01_ana.nii", "brainmask.mgz", "lesioned_T1.nrrd"]
    for name in (*scans, *LABEL_MAPS):
        (tmp_path / name).touch()
    for name in ("pair.hdr", "pair.img"):  # one scan
        (tmp_path / name).touch()
    assert found(tmp_path).keys() == {"pair", *(name.partition(".")[0] for name in scans)}
    assert found(tmp_path / "pair.img").keys() == {"pair"}
    assert f"left out: {len(LABEL_MAPS)} files that are label maps by their names" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only label maps, like s1_seg"):
        found(tmp_path / "s1_seg.nii.gz")


@pytest.mark.parametrize("name", [name for name in LABEL_MAPS if name.startswith(("s1_", "a_"))])
def test_what_is_a_label_map_for_prediction_is_one_for_a_study(tmp_path: Path, name: str) -> None:
    word, _, ending = name.rpartition("_")[2].partition(".")
    for file in ("a_T1.nii.gz", name):
        (tmp_path / file).touch()
    settings = recognise(tmp_path, labelled=True)
    assert settings["data.images"] == {"t1": "*_T1.nii.gz"} and settings["data.label"] == f"*_{word}.{ending}"


def test_scans_of_a_bids_dataset_have_the_ids_that_its_reader_gives(tmp_path: Path) -> None:
    def touch(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.nii.gz").touch()

    touch("sub-1/ses-a/anat/sub-1_ses-a_run-1_T1w", "sub-1/ses-b/anat/sub-1_T1w", "sub-2/anat/sub-2_acq-x_T1w")
    touch("sub-2/anat/sub-2_dseg")
    ids = ["sub-1_ses-a_run-1", "sub-1_ses-b", "sub-2"]
    assert list(found(tmp_path)) == ids == [record["id"] for record in bids.records(tmp_path)]
    others = ("derivatives/sub-2/anat/sub-2_T1w", "sub-3/anat/scan", "sub-3/anat/sub-4_T1w", "sub-H-1/anat/sub-H-1_T1w")
    touch(*others)
    assert found(tmp_path).keys() == {*ids, *(name.replace("/", "_") for name in others)}
    touch("sub-2/anat/sub-2_acq-y_T1w")  # two scans would have one id
    assert {"sub-2_anat_sub-2_acq-x_T1w", "sub-2_anat_sub-2_acq-y_T1w"} < found(tmp_path).keys()


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    a_scan(tmp_path)
    (tmp_path / "UPPER.NII").touch()
    (tmp_path / "folder").symlink_to("/mnt/unmounted/disk")
    with pytest.warns(UserWarning, match="UPPER.NII: not searched") as caught:
        assert len(found(tmp_path)) == 1
    assert any("folder: not searched (a link that leads nowhere)" in str(one.message) for one in caught)


def test_results_inside_the_folder_are_no_scans_of_a_pattern_either(tmp_path: Path) -> None:
    scan = a_scan(tmp_path, "new")
    (tmp_path / "out").mkdir()
    shutil.copy(scan, tmp_path / "out" / "new.nii.gz")
    assert found(tmp_path, images={"t1": "**/*.nii.gz"}) == {"new": {"t1": "new.nii.gz"}}


def test_numbers_that_are_not_channels_stay_in_the_ids(tmp_path: Path) -> None:
    for name in ("s_0000", "s_0001"):
        a_scan(tmp_path, name)
    assert found(tmp_path).keys() == {"s_0000", "s_0001"}


def test_predicting_a_dataset_of_nnunet_writes_one_label_map_a_new_case(dataset: Path, tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run")
    asa.predict(run, dataset, tmp_path / "out", **{"predict.device": "cpu", "predict.overlap": 0})
    assert [path.name for path in sorted((tmp_path / "out").glob("*.nii.gz"))] == ["c.nii.gz"]


def test_from_python_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "run")
    a_scan(tmp_path / "scans")
    out = asa.predict("~/run", "~/scans", "~/out", **{"predict.device": "cpu", "predict.overlap": 0})
    assert out == tmp_path / "out" and (out / "a.nii.gz").is_file() and not (tmp_path / "~").exists()


def test_every_command_from_python_takes_a_folder_of_configurations(tmp_path: Path) -> None:
    calls = (asa.prepare, (tmp_path,)), (asa.predict, (None, tmp_path, tmp_path)), (asa.evaluate, (tmp_path,) * 3)
    for function, given in calls:
        with pytest.raises(ValueError, match="--config-dir nowhere: no such folder"):
            function(*given, config_dir="nowhere")


def test_scans_whose_content_git_annex_holds_are_counted_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint(tmp_path / "run")
    (tmp_path / "scans").mkdir()
    for name in "ab":
        (tmp_path / "scans" / f"{name}.nii.gz").symlink_to(".git/annex/objects/ab/MD5E-s1--x.nii.gz")
    with pytest.raises(ValueError, match="2 scans failed, listed above"):
        asa.predict(run, tmp_path / "scans", tmp_path / "out", **{"predict.device": "cpu"})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert line.startswith("a: failed: ") and line.endswith("in its dataset (2 scans like this one)")
