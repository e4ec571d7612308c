"""Collections of many datasets below one folder: FOMO-MRI and OpenMind, as small phantoms of their layouts."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import asa
from asa.data.datasets import fomo, openmind
from asa.data.io.nifti import write_image
from asa.data.store import Store
from asa.ops.labels import IGNORED
from asa.tasks.pretraining import Pretraining
from asa.tasks.run import configure

CSV = "unique_id,image_path,modality,anon_mask_path,anat_mask_path,age,sex,manufacturer\n"


def plant(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def ids(found: list) -> list[str]:
    return [record["id"] for record in found]


# ---- FOMO-MRI ----


def test_images_of_equal_names_in_two_datasets_are_two_scans_of_two_people(tmp_path: Path) -> None:
    plant(tmp_path, "PT001_A/sub_1/ses_1/t1.nii.gz", "PT001_A/sub_1/ses_2/t1.nii.gz", "PT002_B/sub_1/ses_1/t1.nii.gz")
    found = fomo.records(tmp_path)
    assert ids(found) == ["PT001_A_sub_1_ses_1_t1", "PT001_A_sub_1_ses_2_t1", "PT002_B_sub_1_ses_1_t1"]
    assert [record["subject"] for record in found] == ["PT001_A_sub_1", "PT001_A_sub_1", "PT002_B_sub_1"]
    assert found[2]["site"] == "PT002_B"
    assert found[2]["images"] == {"t1": str(tmp_path / "PT002_B/sub_1/ses_1/t1.nii.gz")}
    assert ids(fomo.records(tmp_path, datasets=["PT002_B"])) == ["PT002_B_sub_1_ses_1_t1"]
    assert ids(fomo.records(tmp_path / "PT002_B")) == ["PT002_B_sub_1_ses_1_t1"]


def test_only_the_chosen_sequences_are_read_with_all_of_their_scans(tmp_path: Path) -> None:
    session = "PT001_A/sub_1/ses_1"
    names = ("t1", "t1_2", "t1c", "t2", "flair", "dwi_trace", "t2_10")
    plant(tmp_path, *(f"{session}/{name}.nii.gz" for name in names), f"{session}/._t1.nii.gz", f"{session}/t1.json")
    stem = "PT001_A_sub_1_ses_1"
    assert ids(fomo.records(tmp_path)) == [f"{stem}_t1", f"{stem}_t1_2"]
    mixed = fomo.records(tmp_path, sequences=["t2", "dwi_trace", "t1c"])
    assert ids(mixed) == [f"{stem}_dwi_trace", f"{stem}_t1c", f"{stem}_t2", f"{stem}_t2_10"]
    assert {channel for record in mixed for channel in record["images"]} == {"mri"}
    with pytest.raises(ValueError, match=r"no scans found: .*/swi.nii.gz below .* images of dwi_trace, flair, t1, t1c"):
        fomo.records(tmp_path, sequences=["swi"])
    with pytest.raises(ValueError, match=r"data.sequences=t1: give a list of one or more, like \[t1\]"):
        fomo.records(tmp_path, sequences="t1")


def test_the_layout_of_the_large_collection_is_read_too(tmp_path: Path) -> None:
    plant(
        tmp_path,
        "PT028_A/sub-1/ses-1/anat/sub-1_ses-1_run-2_T1w.nii.gz",
        "PT028_A/sub-1/ses-1/anat/sub-1_ses-1_T2w.nii.gz",
        "PT030_OpenNeuro/ds000031/sub-01/ses-07/anat/sub-01_ses-07_T1w.nii.gz",
        "PT030_OpenNeuro/ds000031/sub-01/ses-07/dwi/sub-01_ses-07_dwi.nii.gz",
    )
    found = fomo.records(tmp_path)
    assert ids(found) == ["PT028_A_sub-1_ses-1_run-2_T1w", "PT030_OpenNeuro_ds000031_sub-01_ses-07_T1w"]
    assert [record["subject"] for record in found] == ["PT028_A_sub-1", "PT030_OpenNeuro_ds000031_sub-01"]
    assert list(found[0]["images"]) == ["t1"]


def test_images_that_the_mapping_lists_and_that_are_not_here_are_counted(tmp_path: Path) -> None:
    plant(tmp_path, "PT001_A/sub_1/ses_1/t1.nii.gz")
    rows = [
        ("PT001_A", "sub_1", "t1"),
        ("PT001_A", "sub_2", "t1_2"),
        ("PT001_A", "sub_2", "t2"),
        ("PT3", "sub_1", "t1"),
    ]
    lines = [f"{dataset}\t{subject}\tses_1\t{name}.nii.gz\t/from/here" for dataset, subject, name in rows]
    header = "dataset\tparticipant_id\tsession_id\tfilename\toriginal_path"
    (tmp_path / "mapping.tsv").write_text("\r\n".join([header, *lines, ""]))
    with pytest.warns(UserWarning, match=r"mapping.tsv: 2 of its 3 images are not here, like PT001_A/sub_2/ses_1/t1_2"):
        assert len(fomo.records(tmp_path)) == 1
    with pytest.warns(UserWarning, match="1 of its 2 images"):
        fomo.records(tmp_path, datasets=["PT001_A"])
    (tmp_path / "mapping.tsv").write_text(f"{header}\n/PT9\tsub_1\tses_1\tt1.nii.gz\t\n")  # an absolute path
    with pytest.warns(UserWarning, match="1 of its 1 images are not here, like /PT9/sub_1/ses_1/t1"):
        assert len(fomo.records(tmp_path)) == 1


def test_images_outside_the_layout_and_subjects_without_the_sequence_are_counted(tmp_path: Path) -> None:
    plant(tmp_path, "PT1/sub_1/ses_1/t1.nii.gz", "PT1/sub_1/ses_1/t2.nii.gz", "PT1/sub_2/ses_1/t1.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(fomo.records(tmp_path)) == 2
    plant(tmp_path, "PT1/sub_3/ses_1/t2.nii.gz", "PT1/sub_4/ses_1/t1.nii", "PT1/sub_5/t1.nii.gz", "PT2/t1.nii.gz")
    with (
        pytest.warns(UserWarning, match="3 images are left out, being no .* like PT1/sub_4/ses_1/t1.nii"),
        pytest.warns(UserWarning, match="1 of 3 subjects have no t1, like PT1_sub_3"),
    ):
        assert len(fomo.records(tmp_path)) == 2
    with pytest.warns(UserWarning, match="2 images are left out"):
        fomo.records(tmp_path, datasets=["PT1"])


def test_names_that_nothing_has_are_told(tmp_path: Path) -> None:
    plant(tmp_path, "PT001_A/sub_1/ses_1/t1.nii.gz", "PT002_B/sub_1/ses_1/t1.nii.gz")
    with pytest.warns(UserWarning, match="has nothing of PT02_B, flaair: check the names"):
        assert len(fomo.records(tmp_path, datasets=["PT001_A", "PT02_B"], sequences=["t1", "flaair"])) == 1


def test_datasets_are_a_list_and_no_part_of_a_name(tmp_path: Path) -> None:
    plant(tmp_path, "PT001_A/sub_1/ses_1/t1.nii.gz")
    with pytest.raises(ValueError, match=r"data.datasets=XPT001_APT003_C: give a list, like \[XPT001_APT003_C\]"):
        fomo.records(tmp_path, datasets="XPT001_APT003_C")


# ---- OpenMind ----


def test_the_table_names_images_their_datasets_and_masks(tmp_path: Path) -> None:
    images = {
        "ds000001/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": ("T1w", "ds000001/sub-01/ses-1/anat/anon.nii.gz"),
        "ds000002/sub-01/anat/sub-01_T1w.nii.gz": ("T1w", ""),
        "ds000002/sub-02/anat/sub-02_T1w.nii.gz": ("T1w", ""),
        "ds000002/sub-01/dwi/sub-01_dwi__Data/FA.nii.gz": ("FA", ""),
    }
    rows = [f"u{k},{path},{kind},{mask},,31.5,F,Siemens" for k, (path, (kind, mask)) in enumerate(images.items())]
    (tmp_path / "openneuro_metadata.csv").write_text(CSV + "\n".join(rows))
    here = [name for name in images if "sub-02" not in name]
    plant(tmp_path / "OpenMind", *here)
    with pytest.warns(UserWarning, match="1 of 3 images of the table are not here"):
        found = openmind.records(tmp_path)
    assert found == [
        {
            "id": "ds000001_sub-01_ses-1_T1w",
            "subject": "ds000001_sub-01",
            "site": "ds000001",
            "images": {"t1": str(tmp_path / "OpenMind" / here[0])},
            "label": str(tmp_path / "OpenMind/ds000001/sub-01/ses-1/anat/anon.nii.gz"),
        },
        {
            "id": "ds000002_sub-01_T1w",
            "subject": "ds000002_sub-01",
            "site": "ds000002",
            "images": {"t1": str(tmp_path / "OpenMind" / here[1])},
        },
    ]
    assert ids(openmind.records(tmp_path, modalities=["FA"])) == ["ds000002_sub-01_dwi_FA"]
    with pytest.warns(UserWarning, match="has nothing of Fa, but FA, T1w"):
        openmind.records(tmp_path, modalities=["T1w", "Fa"])
    assert "label" not in openmind.records(tmp_path, modalities=["T1w", "FA"], masks=False)[0]
    with pytest.raises(ValueError, match="no scans found: images of T2w in .*csv, which has FA, T1w, below"):
        openmind.records(tmp_path, modalities=["T2w"])
    (tmp_path / "openneuro_metadata.csv").write_text("image_path,modality\na,T1w\n")
    with pytest.raises(ValueError, match="has no column anon_mask_path: is it the table of OpenMind"):
        openmind.records(tmp_path)


def test_an_image_without_dataset_and_subject_is_named_with_its_table(tmp_path: Path) -> None:
    plant(tmp_path / "OpenMind", "a.nii.gz")
    (tmp_path / "openneuro_metadata.csv").write_text(CSV + "u0,a.nii.gz,T1w,,,,,")
    with pytest.raises(ValueError, match=r"openneuro_metadata.csv: image_path is a.nii.gz, and not DATASET/SUBJECT"):
        openmind.records(tmp_path)


def write_head(root: Path, name: str, seed: int, *, defaced: bool) -> None:
    """A ball with noise, and for a defaced one the mask of its front, which is 0."""
    axes = np.meshgrid(*[np.linspace(-1.1, 1.1, n) for n in (40, 44, 42)], indexing="ij")
    ball = np.sqrt(sum(axis**2 for axis in axes)) < 1
    image = np.where(ball, 500 + np.random.default_rng(seed).normal(0, 60, ball.shape), 0).astype(np.float32)
    face = (axes[1] > 0.5) & (axes[2] < 0)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    if defaced:
        image[face] = 0
        write_image(root / name.replace("T1w", "mask"), face.astype(np.float32), np.eye(4))
    write_image(root / name, image, np.eye(4))


def test_patches_with_defaced_voxels_do_not_count_in_pretraining(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for k, dataset in enumerate(("ds000001", "ds000002", "ds000003")):
        image = f"{dataset}/sub-01/anat/sub-01_T1w.nii.gz"
        write_head(tmp_path / "OpenMind", image, k, defaced=k > 0)
        rows.append(f"u{k},{image},T1w,{image.replace('T1w', 'mask') if k else ''},,,,")
    (tmp_path / "openneuro_metadata.csv").write_text(CSV + "\n".join(rows))
    asa.prepare(tmp_path / "store", data="openmind", **{"data.root": str(tmp_path)})
    write_head(tmp_path / "fomo", "PT001_A/sub_1/ses_1/t1.nii.gz", 9, defaced=False)
    asa.prepare(tmp_path / "store", data="fomo", ignored=[1], **{"data.root": str(tmp_path / "fomo")})
    store = Store(tmp_path / "store")
    assert store.ignored == [1] and store.labels == {} and store.records.ids[0] == "PT001_A_sub_1_ses_1_t1"
    label = store.label("ds000002_sub-01_T1w")
    assert label is not None and set(np.unique(label)) == {0, IGNORED}
    assert store.label("ds000001_sub-01_T1w") is None
    given = {
        "data.store": str(tmp_path / "store"),
        "out": str(tmp_path / "run"),
        "crop": 32,
        "data.split.validation": 0,
    }
    task = Pretraining(configure("pretrain", given | {"model": "asa_tiny", "method": "asa"}))
    method = asa.config.build(task.config["method"])
    task.load_init(method)
    assert "voxels of the values [1] in the label maps do not count in the loss" in capsys.readouterr().out
    crops = task.dataset(method)
    *whole, first, second = (crops[crops.ids.index(id), 0] for id in store.records.ids)
    assert not any(sample["excluded"].any() for sample in whole) and all(
        0 < sample["excluded"].sum() < 64 for sample in (first, second)
    )
