"""Readers find scans where they lie, and say what a scan lacks."""

import importlib.util
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from asa.config import CONFIG_DIR, build, compose
from asa.data.datasets import bids, brats, cq500, folder, fomo, freesurfer, ibsr, nnunet, openmind, wmh
from asa.data.datasets.folder import recognise
from asa.data.datasets.record import check_records
from asa.data.io.files import matching_files
from asa.data.io.nifti import read_label
from asa.data.phantom import reader as phantom
from asa.data.phantom.anatomy import STRUCTURES

PHANTOM_ASEG = (2, 3, 4, 10, 11, 12, 16, 17, 24, 41, 42, 43, 49, 50, 51, 53)


def plant(root: Path, *names: str) -> Path:
    """Empty files: readers only look at names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# ---------------------------------------------------------------------------------------------- folder


def test_the_wildcard_is_the_id_and_pairs_channels_and_label(tmp_path):
    plant(tmp_path, "b_T1.nii.gz", "a_T1.nii.gz", "a_FLAIR.nii.gz", "b_FLAIR.nii.gz", "seg/a.nii.gz", "seg/b.nii.gz")
    plant(tmp_path, "._a_T1.nii.gz", "b_T1.json", "seg/c.nii.gz")
    images = {"t1": "*_T1.nii.gz", "flair": "*_FLAIR.nii.gz"}
    with pytest.warns(UserWarning, match="1 of 3 label maps by 'seg/.*' belong to no scan, like c"):
        found = folder.records(tmp_path, images=images, label="seg/*.nii.gz")
    assert found[0] == {
        "id": "a",
        "subject": "a",
        "images": {"t1": str(tmp_path / "a_T1.nii.gz"), "flair": str(tmp_path / "a_FLAIR.nii.gz")},
        "label": str(tmp_path / "seg/a.nii.gz"),
    }
    assert [record["id"] for record in found] == ["a", "b"]


def test_label_maps_among_the_scans_of_a_pattern_are_warned_about(tmp_path):
    plant(tmp_path, "a.nii.gz", "a_seg.nii.gz", "b.nii.gz", "b_seg.nii.gz")
    with pytest.warns(UserWarning, match=r"2 of 4 files by '\*.nii.gz' are label maps by their names, like a_seg"):
        folder.records(tmp_path, images={"t1": "*.nii.gz"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pattern in ("*_seg.nii.gz", "[ab].nii.gz"):  # all of them, and none
            folder.records(tmp_path, images={"t1": pattern})


def test_law_label_maps_that_a_pattern_of_images_takes_in_are_no_scans(tmp_path):
    plant(tmp_path, "a.nii.gz", "a_seg.nii.gz", "b.nii.gz", "b_seg.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recognise(tmp_path, labelled=True)
        records = folder.records(tmp_path, images=found["data.images"], label=found["data.label"])
    assert [(record["id"], Path(record["label"]).name) for record in records] == [
        ("a", "a_seg.nii.gz"),
        ("b", "b_seg.nii.gz"),
    ]
    with pytest.raises(ValueError, match=r"2 \*.nii.gz, 2 \*_seg.nii.gz; one image a scan were expected"):
        recognise(tmp_path, labelled=False)
    plant(tmp_path / "other", "c_T1.nii.gz", "c.nii.gz")  # where that of the label maps is the wider one
    with pytest.warns(UserWarning, match="1 of 2 label maps by .* belong to no scan, like c_T1"):
        (record,) = folder.records(tmp_path / "other", images={"t1": "*_T1.nii.gz"}, label="*.nii.gz")
    assert record["images"]["t1"].endswith("c_T1.nii.gz") and record["label"].endswith("c.nii.gz")


def test_wildcards_join_and_a_repeated_text_counts_once(tmp_path):
    plant(tmp_path, "p1/v1/p1_T1.nii", "p1/v2/p1_T1.nii", "p2/v1/p2_T1.nii")
    found = folder.records(tmp_path, images={"t1": "*/*/*_T1.nii"}, subject=r"^(p\d+)")
    assert [(record["id"], record["subject"]) for record in found] == [
        ("p1_v1", "p1"),
        ("p1_v2", "p1"),
        ("p2_v1", "p2"),
    ]


def test_sessions_of_a_subject_are_known_by_ids_like_those_of_bids(tmp_path):
    plant(tmp_path, "sub-01_ses-1_T1.nii", "sub-01_ses-2_T1.nii", "s2_ses-1_T1.nii")
    found = folder.records(tmp_path, images={"t1": "*_T1.nii"})
    assert [record["subject"] for record in found] == ["s2_ses-1", "sub-01", "sub-01"]
    (tmp_path / "t.csv").write_text("id,subject,t1\nsub-01_ses-1,x,a.nii\nsub-02_ses-1,,b.nii\n")
    assert [record["subject"] for record in folder.records(tmp_path, table="t.csv")] == ["x", "sub-02"]


@pytest.mark.parametrize(
    ("glob", "subjects"),
    [
        ("sub-*/ses-*/anat/*_T1w.nii", ["sub-01", "sub-01"]),
        ("sub-*/ses-*/anat/sub-*_T1w.nii", ["sub-01", "sub-01"]),
        ("*/*/anat/*_T1w.nii", ["sub-01", "sub-01"]),
        ("**/*_T1w.nii", ["data_sub-01"] * 2 + ["sub-01"] * 4),
        ("data/sub-*_T1w.nii", ["sub-01", "sub-01"]),
        ("sub-*.nii", ["sub-01", "sub-01"]),
        ("x_*.nii", ["sub-01", "sub-01"]),
    ],
)
def test_law_sessions_of_a_subject_are_of_one_person_whatever_the_pattern_leaves_out(tmp_path, glob, subjects):
    for session in ("sub-01_ses-1", "sub-01_ses-2"):
        plant(tmp_path, f"{session.replace('_', '/')}/anat/{session}_T1w.nii", f"data/{session}_T1w.nii")
        plant(tmp_path, f"{session}_T1w.nii", f"x_{session}.nii")
    found = folder.records(tmp_path, images={"t1": glob})
    assert sorted(record["subject"] for record in found) == sorted(subjects)


def test_law_a_folder_whose_name_begins_with_a_dot_is_not_searched_by_two_stars(tmp_path):
    plant(tmp_path, "a/T1.nii", ".git/annex/objects/b/T1.nii", "a/.cache/T1.nii")
    (tmp_path / ".git/annex/objects/c").symlink_to("/mnt/unmounted/disk")
    assert matching_files(tmp_path, "**/*.nii") == [tmp_path / "a/T1.nii"]
    assert matching_files(tmp_path, ".git/**/*.nii") == [tmp_path / ".git/annex/objects/b/T1.nii"]


def test_two_stars_reach_through_folders_of_any_depth(tmp_path):
    plant(tmp_path, "Utrecht/1/pre/T1.nii.gz", "Amsterdam/GE3T/3/pre/T1.nii.gz")
    plant(tmp_path, "Utrecht/1/wmh.nii.gz", "Amsterdam/GE3T/3/wmh.nii.gz")
    found = folder.records(tmp_path, images={"t1": "**/pre/T1.nii.gz"}, label="**/wmh.nii.gz")
    assert [record["id"] for record in found] == ["Amsterdam_GE3T_3", "Utrecht_1"]
    assert found[1]["label"].endswith("Utrecht/1/wmh.nii.gz")


def test_folders_behind_links_are_found_and_a_loop_is_named(tmp_path):
    plant(tmp_path / "disk", "b/v1/b_T1.nii", "site/c_T1.nii")
    plant(tmp_path / "root", "a/v1/a_T1.nii")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "disk" / "b")
    (tmp_path / "root" / "a" / "v2").symlink_to(tmp_path / "disk" / "site")
    for glob in ("**/*_T1.nii", "*/*/*_T1.nii"):
        found = folder.records(tmp_path / "root", images={"t1": glob})
        assert sorted(Path(record["images"]["t1"]).name for record in found) == ["a_T1.nii", "b_T1.nii", "c_T1.nii"]
    (tmp_path / "disk" / "b" / "up").symlink_to(tmp_path / "root")
    with pytest.warns(UserWarning, match="root/b/up: not searched .a link to a folder that contains it"):
        assert len(folder.records(tmp_path / "root", images={"t1": "**/*_T1.nii"})) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    plant(tmp_path, "a/a_T1.nii", "b/b_T1.nii")
    (tmp_path / "b").chmod(0)
    with pytest.warns(UserWarning, match="b: not searched .Permission denied"):
        assert len(folder.records(tmp_path, images={"t1": "*/*_T1.nii"})) == 1
    (tmp_path / "b").chmod(0o700)


def test_links_that_lead_nowhere_and_names_in_capitals_are_counted(tmp_path):
    plant(tmp_path, "s1/a_T1.nii.gz", "s2/a_T1.NII.GZ", "s2/.A_T1.nii.gz", "s2/b_T2.nii.gz")
    for name in ("s3", "s4", ".s5"):
        (tmp_path / name).symlink_to("/mnt/unmounted/disk")
    (tmp_path / "README").symlink_to(".git/annex/objects/ab/MD5E-s1/MD5E-s1")
    (tmp_path / "s6").symlink_to("s6")  # to itself
    for glob in ("*/*_T1.nii.gz", "**/*_T1.nii.gz"):
        with pytest.warns(UserWarning, match="not searched") as caught:
            (found,) = folder.records(tmp_path, images={"t1": glob})
        assert found["images"]["t1"] == str(tmp_path / "s1/a_T1.nii.gz")
        assert sorted(str(one.message) for one in caught) == [
            f"{tmp_path}/s2/a_T1.NII.GZ: not searched (its capitals are not those of *_T1.nii.gz)",
            f"{tmp_path}/s3: not searched (a link that leads nowhere), and 2 more",
        ]


def test_every_reader_names_the_folder_that_a_link_does_not_reach(tmp_path):
    one = "sub-1/ses-1/anat/sub-1_ses-1_T1w.nii"
    plant(tmp_path, f"bids/{one}", "bids/sub-2/anat/sub-2_T1w.nii", "brats/BraTS2021_00001/BraTS2021_00001_t1.nii.gz")
    plant(tmp_path, "ibsr/IBSR_01/IBSR_01_ana_strip.nii", "wmh/Utrecht/0/pre/T1.nii.gz", "fs/a/mri/T1.mgz")
    plant(tmp_path, "fs/unfinished/scripts/x", "fs/notes.txt", "fs/.cache/x")
    links = {
        "bids/sub-3": bids,
        "bids/sub-1/ses-2": bids,
        "brats/BraTS2021_00002": brats,
        "ibsr/IBSR_02": ibsr,
        "wmh/Utrecht/2": wmh,
        "fs/b": freesurfer,
    }
    for name, reader in links.items():
        (tmp_path / name).symlink_to("/mnt/unmounted/disk")
        root = tmp_path / name.partition("/")[0]
        with pytest.warns(UserWarning, match=f"{name}: not searched .a link that leads nowhere.$"):
            reader.records(root, **({"label": None} if reader is freesurfer else {}))
        (tmp_path / name).unlink()
    with pytest.warns(UserWarning, match="fs: 1 folders are left out, which have no folder mri, like unfinished"):
        assert len(freesurfer.records(tmp_path / "fs")) == 1


def test_one_odd_scan_has_a_problem_and_the_others_are_found(tmp_path):
    plant(tmp_path, "a1_T1.nii", "b2_T1.nii", "x_T1.nii")
    (tmp_path / os.fsdecode(b"caf\xe9_T1.nii")).touch()  # Latin-1
    found = folder.records(tmp_path, images={"t1": "*_T1.nii"}, subject=r"(.)\d")
    assert [record["id"] for record in found] == ["a1", "b2", "caf", "x"]
    assert [record.get("problem", "")[:30] for record in found[:2]] == ["", ""]
    assert "'caf\\udce9': not usable as an id" in found[2]["problem"] or "finds no group 1" in found[2]["problem"]
    assert "finds no group 1" in found[3]["problem"]
    check_records(found)
    (tmp_path / "a.csv").write_text("id,t1\nx,x.nii\ny,y.nii\ny,z.nii\n../w,w.nii\n")
    found = folder.records(tmp_path, table="a.csv")
    assert [(record["id"], "problem" in record) for record in found] == [("w", True), ("x", False), ("y", True)]


def test_a_missing_file_is_none_and_a_missing_label_has_its_expected_path(tmp_path):
    plant(tmp_path, "1/a_T1.nii", "1/a_T2.nii", "1/a_seg.nii", "1/b_T1.nii", "c_T1.nii")
    found = folder.records(tmp_path, images={"t1": "**/*_T1.nii", "t2": "**/*_T2.nii"}, label="**/*_seg.nii")
    assert [record["images"]["t2"] for record in found] == [str(tmp_path / "1/a_T2.nii"), None, None]
    assert [record["label"] for record in found] == [
        str(tmp_path / name) for name in ("1/a_seg.nii", "1/b_seg.nii", "c_seg.nii")
    ]


def test_a_scan_without_the_first_channel_is_refused_because_it_has_no_id(tmp_path):
    plant(tmp_path, "a_T1.nii", "a_T2.nii", "b_T2.nii")
    with pytest.raises(ValueError, match=r"^b: no t1 for this and 0 other scans with t2 by '\*_T1.nii'"):
        folder.records(tmp_path, images={"t1": "*_T1.nii", "t2": "*_T2.nii"})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"images": {"t1": "*_T2.nii"}}, "no scans found: '\\*_T2.nii' below"),
        ({"images": {"t1": "a_T1.nii"}}, "no wildcard"),
        ({"images": {"t1": "*_T1.nii"}, "label": "*/*.nii"}, "as many wildcards"),
        (
            {"images": {"t1": "*_T1.nii"}, "label": "*_sge.nii"},
            "label: .* matches none of the scans .* data.label=null",
        ),
        ({"images": {"t1": "*_T1.nii", "t2": "*_T3.nii"}}, "t2: glob .* matches none of the scans"),
        ({"images": {"t1": "*_T1.nii"}, "subject": "x(.)"}, "finds no group 1"),
        ({"images": {"t1": "*.nii", "label": "*.nii"}, "label": "*.nii"}, "cannot be called 'label'"),
        ({}, "give the names of the images"),
        ({"table": "cohort.csv", "label": "*.nii"}, "leave out data.label"),
    ],
)
def test_invalid_globs_are_refused_with_a_remedy(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=reason):
        folder.records(plant(tmp_path, "a_T1.nii"), **settings)


def test_a_link_without_content_is_a_file_that_is_named_and_no_missing_channel(tmp_path):
    about = {"channel_names": {"0": "t1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii"}
    plant(tmp_path, "nnunet/labelsTr/c.nii")
    (tmp_path / "nnunet/dataset.json").write_text(json.dumps(about))
    listed = {"dataset": {"c": {"images": ["imagesTr/c_0000.nii"], "label": "labelsTr/c.nii"}}}
    plant(tmp_path, "listed/labelsTr/c.nii")
    (tmp_path / "listed/dataset.json").write_text(json.dumps(about | listed))
    readers = {
        "nnunet/imagesTr/c_0000.nii": nnunet,
        "listed/imagesTr/c_0000.nii": nnunet,
        "fs/a/mri/T1.mgz": freesurfer,
        "brats/BraTS2021_00001/BraTS2021_00001_t1.nii.gz": brats,
        "ibsr/IBSR_01/IBSR_01_ana_strip.nii.gz": ibsr,
        "wmh/Utrecht/0/pre/T1.nii.gz": wmh,
    }
    for name, reader in readers.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to("../.git/annex/objects/a/b/X/X")
        (found,) = reader.records(tmp_path / name.partition("/")[0])
        assert found["images"]["t1"] == str(tmp_path / name) and "problem" not in found


def test_files_of_one_name_in_two_folders_are_channels_of_one_scan(tmp_path):
    plant(tmp_path, "low/p1_a.nii.gz", "low/p1_b.nii.gz", "full/p1_a.nii.gz", "full/p1_b.nii.gz", "low/p2_a.nii.gz")
    images = {"input": "low/*.nii.gz", "target": "full/*.nii.gz"}
    found = folder.records(tmp_path, images=images, subject=r"(p\d)_")
    assert [(record["id"], record["subject"]) for record in found] == [("p1_a", "p1"), ("p1_b", "p1"), ("p2_a", "p2")]
    names = {"input": str(tmp_path / "low/p1_b.nii.gz"), "target": str(tmp_path / "full/p1_b.nii.gz")}
    assert found[1]["images"] == names and found[2]["images"]["target"] is None


def test_a_missing_folder_is_refused(tmp_path):
    readers = (
        lambda root: folder.records(root, images={"t1": "*"}),
        *(module.records for module in (bids, brats, cq500, fomo, ibsr, openmind, wmh)),
    )
    for reader in readers:
        with pytest.raises(FileNotFoundError, match="absent: no such folder"):
            reader(tmp_path / "absent")


def test_csv_and_json_tables_give_the_same_records(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\ufeffid,subject,site,label,t1,flair\nx2,x,Rome,,img/2.nii,img/2f.nii\nx1,x,,seg/1.nii,img/1.nii,/far/1f.nii\n"
    )
    rows = [
        {"id": "x2", "subject": "x", "site": "Rome", "label": None, "t1": "img/2.nii", "flair": "img/2f.nii"},
        {"id": "x1", "subject": "x", "label": "seg/1.nii", "t1": "img/1.nii", "flair": "/far/1f.nii"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = folder.records(tmp_path, table="a.csv")
    assert found == folder.records("/elsewhere", table=tmp_path / "a.json")
    assert found == [
        {
            "id": "x1",
            "subject": "x",
            "images": {"t1": str(tmp_path / "img/1.nii"), "flair": "/far/1f.nii"},
            "label": str(tmp_path / "seg/1.nii"),
        },
        {
            "id": "x2",
            "subject": "x",
            "images": {"t1": str(tmp_path / "img/2.nii"), "flair": str(tmp_path / "img/2f.nii")},
            "site": "Rome",
        },
    ]


def test_a_table_needs_no_root_and_globs_do(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("id,t1\nx,x.nii.gz\n")
    monkeypatch.chdir(tmp_path)
    assert folder.records(None, table="a.csv") == folder.records(tmp_path, table="a.csv")
    with pytest.raises(ValueError, match=r"data\.root has to be given, or a table"):
        folder.records(None, images={"t1": "*.nii.gz"})


def test_a_table_with_other_columns_takes_its_channels_from_images(tmp_path):
    (tmp_path / "a.csv").write_text("id,age,path\nx,61,x.nii\n")
    (found,) = folder.records(tmp_path, table="a.csv", images={"t1": "path"})
    assert found["subject"] == "x" and found["images"] == {"t1": str(tmp_path / "x.nii")}


def test_an_empty_cell_is_a_missing_image_or_an_unlabelled_scan(tmp_path):
    (tmp_path / "a.csv").write_text("id,label,t1,flair\nx,,,xf.nii\ny,ys.nii,y.nii,\n")
    (tmp_path / "a.json").write_text(
        '[{"id": "x", "flair": "xf.nii"}, {"id": "y", "label": "ys.nii", "t1": "y.nii", "flair": null}]'
    )
    x, y = folder.records(tmp_path, table="a.csv")
    assert x["images"] == {"t1": None, "flair": str(tmp_path / "xf.nii")} and "label" not in x
    assert y["images"] == {"t1": str(tmp_path / "y.nii"), "flair": None} and y["label"] == str(tmp_path / "ys.nii")
    again = folder.records(tmp_path, table="a.json", images={"t1": "t1", "flair": "flair"})
    assert again == [x, y]
    with pytest.raises(ValueError, match=r"no column 't2' with data.images \(columns are id, label, t1, flair\)"):
        folder.records(tmp_path, table="a.csv", images={"t1": "t1", "t2": "t2"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,t1\nx,x.nii\n", "no column 'id'"),
        ("id,t1\n,x.nii\n", "row 1 has no id"),
        ("id,t1\nx,\n", "x: no image of t1"),
        ("id,site\nx,\n", "no column 't1' with data.images"),
        ("ID,t1\nx,x.nii\n", r"a\.csv: its column ID has to be called id: rename it"),
        ("id,Subject,t1\nx,y,x.nii\n", "its column Subject has to be called subject"),
        ('id,t1\nx,"x.nii\ny,y.nii\nz,z.nii\n', r"a\.csv: not a table of text"),  # a quote without its end
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, reason):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        folder.records(tmp_path, table="a.csv")


# ---------------------------------------------------------------------------------------------- bids


def test_bids_finds_sessions_and_runs_of_each_subject(tmp_path):
    plant(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T1w.json",
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.nii",
        "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz",
        "sub-02/ses-2/func/sub-02_ses-2_task-rest_bold.nii.gz",
        "derivatives/tool/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
    )
    found = bids.records(tmp_path)
    assert [(record["id"], record["subject"]) for record in found] == [
        ("sub-01", "sub-01"),
        ("sub-02_ses-1_run-1", "sub-02"),
        ("sub-02_ses-2", "sub-02"),
    ]
    assert found[0]["images"] == {"t1": str(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")}
    assert [record["id"] for record in bids.records(tmp_path, channels={"t2": "T2w"})] == ["sub-01"]
    assert [record["id"] for record in bids.records(tmp_path, session="2")] == ["sub-02_ses-2"]


def test_bids_names_the_entity_that_distinguishes_two_files(tmp_path):
    anat = "sub-01/anat/sub-01"
    plant(tmp_path, f"{anat}_desc-preproc_T1w.nii.gz", f"{anat}_space-MNI_desc-preproc_T1w.nii.gz")
    with pytest.raises(
        ValueError, match=r"both .* match; for all scans choose 'data.entities={space: null}' or .*{space: MNI}"
    ):
        bids.records(tmp_path)
    (found,) = bids.records(tmp_path, space="MNI", desc="preproc")
    assert "space-MNI" in found["images"]["t1"]


def test_clinica_t1_linear_is_read(tmp_path):
    name = "sub-A/ses-M00/t1_linear/sub-A_ses-M00_space-MNI152NLin2009cSym_desc-Crop_res-1x1x1_T1w.nii.gz"
    (found,) = bids.records(plant(tmp_path, f"subjects/{name}"))
    assert found["id"] == "sub-A_ses-M00" and found["images"]["t1"].endswith(name)


def test_an_empty_bids_tree_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no scans found: sub-\*/\[ses-\*/\]anat/\*_T1w.nii\[.gz\] with desc-x below"):
        bids.records(tmp_path, desc="x")


def test_bids_channels_of_a_session_make_one_scan_and_a_missing_one_is_none(tmp_path):
    plant(tmp_path, *(f"sub-01/ses-{k}/anat/sub-01_ses-{k}_T1w.nii.gz" for k in (1, 2)))
    plant(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_run-1_FLAIR.nii.gz", "sub-02/anat/sub-02_FLAIR.nii")
    found = bids.records(tmp_path, channels={"t1": "T1w", "flair": "FLAIR"})
    assert [(record["id"], record["subject"]) for record in found] == [
        ("sub-01_ses-1", "sub-01"),
        ("sub-01_ses-2", "sub-01"),
        ("sub-02", "sub-02"),
    ]
    assert [[bool(path) for path in record["images"].values()] for record in found] == [[1, 1], [1, 0], [0, 1]]
    assert all(list(record["images"]) == ["t1", "flair"] for record in found)


def test_bids_tells_of_contrasts_that_are_not_read(tmp_path):
    names = ["sub-1_T1w", "sub-1_FLAIR", "sub-1_acq-2_FLAIR", "sub-1_PDw", "sub-2_T1w", "sub-2_FLAIR", "sub-3_T2w"]
    plant(tmp_path, *(f"{name[:5]}/anat/{name}.nii.gz" for name in names))
    with pytest.warns(UserWarning, match="only the T1w") as warned:
        assert [record["id"] for record in bids.records(tmp_path)] == ["sub-1", "sub-2"]
    (text,) = (str(one.message) for one in warned if "only the T1w" in str(one.message))
    assert "of 2 scans some also have FLAIR (2), PDw (1): for these too, give" in text and "T2w" not in text
    node = compose("prepare", ["data=bids", "out=x", f"data.root={tmp_path}", text.split("'")[1]])["data"]
    assert node["channels"] == {"t1": "T1w", "flair": "FLAIR", "pd": "PDw"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*only the T1w")
        bids.records(tmp_path, channels={"t1": "T1w", "flair": "FLAIR"}, entities={"acq": None})


def test_bids_asks_for_the_run_and_a_file_without_one_is_the_only_run(tmp_path):
    plant(tmp_path, *(f"sub-01/anat/sub-01_{name}.nii.gz" for name in ("run-1_T1w", "run-2_T1w", "FLAIR")))
    channels = {"t1": "T1w", "flair": "FLAIR"}
    with pytest.raises(ValueError, match=r"sub-01: both .* match; for all scans choose .*{run: 1}' or .*{run: 2}'"):
        bids.records(tmp_path, channels=channels)
    (found,) = bids.records(tmp_path, channels=channels, run="2")
    assert [Path(path).name for path in found["images"].values()] == ["sub-01_run-2_T1w.nii.gz", "sub-01_FLAIR.nii.gz"]


def test_bids_takes_the_run_that_is_asked_for_before_a_file_without_one(tmp_path):
    plant(tmp_path, *(f"sub-01/anat/sub-01_{name}.nii.gz" for name in ("run-1_T1w", "T1w", "FLAIR")))
    channels = {"t1": "T1w", "flair": "FLAIR"}
    with pytest.raises(ValueError, match=r"choose 'data.entities={run: null}' or 'data.entities={run: 1}'"):
        bids.records(tmp_path, channels=channels)
    for run, name in (("1", "sub-01_run-1_T1w.nii.gz"), (None, "sub-01_T1w.nii.gz")):
        (found,) = bids.records(tmp_path, channels=channels, entities={"run": run})
        assert [Path(path).name for path in found["images"].values()] == [name, "sub-01_FLAIR.nii.gz"]


@pytest.mark.parametrize("names", [("desc-a_dseg", "desc-b_dseg"), ("seg-x_dseg", "dseg"), ("atlas-A_res-2_dseg",) * 2])
def test_bids_advice_about_several_label_maps_finds_them(tmp_path, names):
    files = [f"sub-1_{name}.nii.gz" for name in dict.fromkeys(names)]
    files += ["sub-1_atlas-B_res-2_dseg.nii.gz"] * (len(files) == 1)
    plant(tmp_path, *(f"sub-1/anat/{file}" for file in ("sub-1_T1w.nii.gz", *files)))
    with pytest.raises(ValueError, match=r"^sub-1: both .* match; for all scans choose") as error:
        bids.records(tmp_path, label="dseg")
    pattern = r"data\.(?:label=\S*dseg|entities=\{.*?\})"
    advice = [["data.label=dseg", one] for one in re.findall(pattern, str(error.value))]
    nodes = [compose("prepare", ["data=bids", "out=x", f"data.root={tmp_path}", *one])["data"] for one in advice]
    assert sorted(Path(record["label"]).name for node in nodes for record in build(node)) == sorted(files)


def test_bids_a_required_run_is_one_scan_of_a_session_with_its_label_map(tmp_path):
    anat = "sub-01/anat/sub-01"
    plant(tmp_path, f"{anat}_run-1_T1w.nii.gz", f"{anat}_T1w.nii.gz", f"{anat}_dseg.nii.gz")
    (found,) = bids.records(tmp_path, run="1", label="dseg")
    assert (found["id"], found["subject"], Path(found["images"]["t1"]).name) == (
        "sub-01_run-1", "sub-01", "sub-01_run-1_T1w.nii.gz"
    )  # fmt: skip
    assert found["label"] == str(tmp_path / f"{anat}_dseg.nii.gz")
    assert [record["id"] for record in bids.records(tmp_path)] == ["sub-01", "sub-01_run-1"]


def test_bids_label_maps_that_name_a_desc_belong_to_images_of_another(tmp_path):
    anat = "sub-01/anat/sub-01"  # as fMRIPrep writes them
    plant(tmp_path, f"{anat}_desc-preproc_T1w.nii.gz", f"{anat}_desc-aseg_dseg.nii.gz", f"{anat}_dseg.nii.gz")
    (found,) = bids.records(tmp_path, desc="preproc", label="desc-aseg_dseg")
    assert found["label"] == str(tmp_path / f"{anat}_desc-aseg_dseg.nii.gz")


def test_bids_names_with_hyphens_in_a_value_are_told_and_not_cut(tmp_path):
    names = ("sub-HC-01/anat/sub-HC-01_T1w.nii.gz", "sub-HC-02/anat/sub-HC-02_T1w.nii.gz")
    plant(tmp_path, *names, "sub-03/anat/sub-03_T1w.nii.gz")
    good, *others = bids.records(tmp_path)
    assert good["id"] == "sub-03" and "problem" not in good
    assert [(one["id"], one["subject"]) for one in others] == [("sub-HC-01",) * 2, ("sub-HC-02",) * 2]
    assert all("sub-HC-0" in one["problem"] and "is no entity of BIDS" in one["problem"] for one in others)


def test_bids_a_session_that_only_the_folders_name_is_one(tmp_path):
    plant(tmp_path, *(f"sub-01/ses-{k}/anat/sub-01_T1w.nii.gz" for k in (1, 2)))
    assert [record["id"] for record in bids.records(tmp_path)] == ["sub-01_ses-1", "sub-01_ses-2"]


@pytest.mark.parametrize("tree", ["", "derivatives/manual/"])
def test_bids_label_maps_lie_in_the_tree_or_in_another_and_a_missing_one_has_its_place(tmp_path, tree):
    anat = "sub-{0}/anat/sub-{0}_space-MNI"
    plant(tmp_path, *(f"{anat.format(k)}_desc-preproc_T1w.nii.gz" for k in ("01", "02")))
    plant(tmp_path, f"{tree}{anat.format('01')}_dseg.nii.gz", f"{tree}sub-01/anat/sub-01_dseg.nii.gz")
    found = bids.records(tmp_path, label="dseg", label_root=tmp_path / tree, space="MNI", desc="preproc")
    assert [record["label"] for record in found] == [
        str(tmp_path / tree / f"{anat.format('01')}_dseg.nii.gz"),
        str(tmp_path / tree / f"{anat.format('02')}_desc-preproc_dseg.nii.gz"),
    ]


def test_bids_without_any_label_map_names_the_derivatives_that_have_them(tmp_path, recwarn):
    plant(tmp_path, *(f"sub-{k}/anat/sub-{k}_T1w.nii.gz" for k in "ab"))
    plant(tmp_path, *(f"derivatives/{name}/sub-a/anat/sub-a_dseg.nii.gz" for name in ("manual", "other")))
    plant(tmp_path, "derivatives/brains/sub-a/anat/sub-a_mask.nii.gz")
    bids.records(tmp_path, label="dseg", label_root=tmp_path / "derivatives" / "manual")
    assert not recwarn.list
    roots = " or ".join(f"data.label_root={tmp_path}/derivatives/{name}" for name in ("manual", "other"))
    with pytest.warns(UserWarning, match=f"no label map .*_dseg.nii.gz here: give {roots}$"):
        bids.records(tmp_path, label="dseg")


def test_bids_takes_the_site_from_the_participants(tmp_path):
    plant(tmp_path, *(f"sub-{k}/anat/sub-{k}_T1w.nii.gz" for k in "abc"))
    assert not any("site" in record for record in bids.records(tmp_path))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsite\nsub-a\t3\tRome\nsub-b\t4\tn/a\n")
    assert [record.get("site") for record in bids.records(tmp_path)] == ["Rome", None, None]


def test_bids_one_subject_with_two_files_has_a_problem_and_any_entity_can_be_given_or_excluded(tmp_path):
    plant(tmp_path, *(f"sub-{k}/anat/sub-{k}_T1w.nii.gz" for k in range(1, 6)))
    plant(
        tmp_path, "sub-6/anat/sub-6_acq-hires_T1w.nii.gz", "sub-6/anat/sub-6_rec-01_T1w.nii.gz", "sub-7/func/x.nii.gz"
    )
    with pytest.warns(UserWarning, match="1 of 7 subjects have no T1w in anat, like sub-7"):
        found = bids.records(tmp_path)
    assert [record["id"] for record in found if "problem" in record] == ["sub-6"] and len(found) == 6
    with pytest.warns(UserWarning, match="acq-hires leaves out 5 of 6 scans, like sub-1"):
        assert [record["id"] for record in bids.records(tmp_path, acq="hires")] == ["sub-6"]
    for advice in re.findall(r"'(data\.entities=.*?)'", found[5]["problem"]):
        node = compose("prepare", ["data=bids", "out=x", f"data.root={tmp_path}", advice])["data"]
        one = {record["id"]: Path(record["images"]["t1"]).name for record in build(node) if "problem" not in record}
        if advice.endswith("{rec: 01}"):
            assert one == {"sub-6": "sub-6_rec-01_T1w.nii.gz"}
        if advice.endswith("{acq: null}"):  # the others, which have no acq-, are kept
            assert one == {f"sub-{k}": f"sub-{k}_T1w.nii.gz" for k in range(1, 6)} | {
                "sub-6": "sub-6_rec-01_T1w.nii.gz"
            }
    with pytest.raises(ValueError, match="acq has a value of its own, hires"):
        bids.records(tmp_path, acq="hires", entities={"acq": None})


@pytest.mark.parametrize(
    ("rows", "matched"),
    [
        ("1\tRome\r\n2\tOslo\r\n", True),
        ("001\tRome\n002\tOslo\n", True),
        ("sub-001\tRome\nsub-002\tOslo\n", True),
        ("\ufeffRome01\tRome\nOslo02\tOslo\n", False),
        ("01.0\tRome\n02.0\tOslo\n", True),
        ("SUB-001\tRome\nSub-002\tOslo\n", True),
        ("1\tRome\n01\tOslo\n", False),
    ],
)
def test_participants_are_matched_without_sub_and_zeros_and_otherwise_named(tmp_path, rows, matched):
    plant(tmp_path, *(f"sub-00{k}/anat/sub-00{k}_T1w.nii.gz" for k in (1, 2)))
    bom = "\ufeff" if rows.startswith("\ufeff") else ""
    (tmp_path / "participants.tsv").write_text(f"{bom}participant_id\tsite\n{rows.removeprefix(bom)}", newline="")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bids.records(tmp_path)
    assert [record.get("site") for record in found] == (["Rome", "Oslo"] if matched else [None, None])
    told = " ".join(str(one.message) for one in caught)
    if not matched:
        assert "2 of its 2 names match none here" in told and "2 here are not in it, like sub-001" in told
    else:
        assert ("so 1 is taken for sub-001" in told) == rows.startswith("1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "participant_id,site\nsub-a,Rome\n",
            "its columns, by tabs, are participant_id,site, not participant_id",
        ),
        ("participant_id;site\nsub-a;Rome\n", "are participant_id;site, not"),
        ("subject\tsite\nsub-a\tRome\n", "are subject, site, not"),
        ("Participant_ID\tSite\nsub-a\tRome\nsub-a\tOslo\n", r"1 rows give .* another site, like sub-a \(Rome, Oslo\)"),
    ],
)
def test_participants_without_a_site_for_each_subject_are_told(tmp_path, text, reason):
    plant(tmp_path, "sub-a/anat/sub-a_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text(text)
    with pytest.warns(UserWarning, match=reason):
        (found,) = bids.records(tmp_path)
    assert found.get("site") == ("Rome" if "ID" in text else None)


def test_participants_that_are_missing_are_counted(tmp_path):
    plant(tmp_path, *(f"sub-{k}/anat/sub-{k}_T1w.nii.gz" for k in "ab"))
    (tmp_path / "participants.tsv").write_text("participant_id\tsite\nsub-a\tRome\nsub-c\tOslo\n")
    with pytest.warns(
        UserWarning, match="1 of its 2 names match none here, like sub-c, and 1 here are not in it, like sub-b"
    ):
        assert [record.get("site") for record in bids.records(tmp_path)] == ["Rome", None]


def test_derivatives_are_read_by_giving_one_as_the_root(tmp_path):
    plant(tmp_path, *(f"derivatives/{tool}/sub-1/anat/sub-1_desc-x_T1w.nii.gz" for tool in ("one", "two")))
    with pytest.raises(ValueError, match=r"give its folder as data.root: derivatives/one or derivatives/two"):
        bids.records(tmp_path)
    assert bids.records(tmp_path / "derivatives/two")[0]["id"] == "sub-1"


# ---------------------------------------------------------------------------------------------- ibsr


@pytest.mark.parametrize("ending", [".nii.gz", ".img"])
@pytest.mark.parametrize("above", ["", "IBSR_nifti_stripped/"])
def test_ibsr_pairs_stripped_scans_with_their_labels(tmp_path, ending, above):
    for name in ("IBSR_01", "IBSR_18"):
        plant(
            tmp_path,
            *(f"{above}{name}/{name}_{what}{ending}" for what in ("ana", "ana_strip", "segTRI_fill_ana", "segTRI_ana")),
        )
    found = ibsr.records(tmp_path)
    assert [record["id"] for record in found] == ["IBSR_01", "IBSR_18"]
    assert found[0]["images"]["t1"].endswith(f"IBSR_01_ana_strip{ending}")
    assert found[0]["label"].endswith(f"IBSR_01_segTRI_fill_ana{ending}")
    assert ibsr.records(tmp_path, label="plain")[1]["label"].endswith(f"IBSR_18_segTRI_ana{ending}")
    assert "label" not in ibsr.records(tmp_path, label=None)[0]


def test_ibsr_names_the_place_of_a_missing_label_and_refuses_a_folder_without_its_image(tmp_path):
    plant(tmp_path, "IBSR_01/IBSR_01_ana_strip.nii.gz")
    (found,) = ibsr.records(tmp_path)
    assert found["label"] == str(tmp_path / "IBSR_01/IBSR_01_segTRI_fill_ana.nii.gz")
    plant(tmp_path, "IBSR_02/IBSR_02_ana.nii.gz")
    first, second = ibsr.records(tmp_path)
    assert "problem" not in first
    assert "IBSR_02: no image of t1 (searched for IBSR_NN/IBSR_NN_ana_strip" in second["problem"]
    with pytest.raises(ValueError, match="no scans found: IBSR_NN/IBSR_NN_ana_strip"):
        ibsr.records(tmp_path / "IBSR_02")


# ---------------------------------------------------------------------------------------------- brats


def brain(name: str, *endings: str) -> list[str]:
    return [f"{name}/{name}{ending}.nii.gz" for ending in endings]


@pytest.mark.parametrize("above", ["", "TrainingData/"])
@pytest.mark.parametrize(
    ("year", "first", "second"),
    [(2021, "BraTS2021_00000", "BraTS2021_01666"), (2023, "BraTS-GLI-00000-000", "BraTS-MEN-00004-001")],
)
def test_brats_of_both_years_gives_the_same_channels_in_the_same_order(tmp_path, above, year, first, second):
    endings = [*brats.CHANNELS[year].values(), brats.LABEL_FILES[year]]
    plant(tmp_path, *(f"{above}{file}" for name in (second, first) for file in brain(name, *endings)))
    found = brats.records(tmp_path, year=year)
    assert [record["id"] for record in found] == [first, second]
    assert list(found[0]["images"]) == ["t1", "t1ce", "t2", "flair"]
    files = [*found[0]["images"].values(), found[0]["label"]]
    assert files == [str(tmp_path / above / file) for file in brain(first, *endings)]
    assert "label" not in brats.records(tmp_path, year=year, label=False)[0]


def test_brats_time_points_are_scans_of_one_subject(tmp_path):
    plant(tmp_path, *brain("BraTS-GLI-00007-000", "-t1n"), *brain("BraTS-GLI-00007-001", "-t1n"))
    assert [record["subject"] for record in brats.records(tmp_path, year=2023)] == ["BraTS-GLI-00007"] * 2


def test_brats_says_which_modality_a_scan_lacks_and_where_its_label_has_to_be(tmp_path):
    plant(tmp_path, *brain("BraTS2021_00001", "_t1", "_flair"))
    (found,) = brats.records(tmp_path)
    assert [channel for channel, path in found["images"].items() if path is None] == ["t1ce", "t2"]
    assert found["label"] == str(tmp_path / "BraTS2021_00001/BraTS2021_00001_seg.nii.gz")
    (tmp_path / "BraTS2021_00002").mkdir()
    plant(tmp_path, "BraTS2021_00003_old/x.nii.gz")
    with pytest.warns(UserWarning, match="1 folders with other names are left out, like BraTS2021_00003_old"):
        first, second = brats.records(tmp_path)
    assert first == found and "BraTS2021_00002: no image of t1, t1ce, t2, flair" in second["problem"]


def test_brats_years_are_told_by_their_names_and_never_mixed(tmp_path):
    plant(tmp_path / "old", *brain("BraTS2021_00001", "_t1"))
    plant(tmp_path / "new", *brain("BraTS-GLI-00001-000", "-t1n"))
    for root, year, reason in (
        (tmp_path / "new", 2021, "has a name of 2023, .* use data=brats23"),
        (tmp_path / "old", 2023, "has a name of 2021, .* use data=brats,"),
        (tmp_path, 2021, "keep the years in separate folders"),
        (tmp_path, 2022, "choose 2021, or 2023"),
        (
            tmp_path / "old/BraTS2021_00001",
            2021,
            "no scans found: BraTS2021_00000/BraTS2021_00000_t1.nii.gz, ... below",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            brats.records(root, year=year)


# ---------------------------------------------------------------------------------------------- freesurfer


def test_law_freesurfer_time_points_of_one_bids_subject_are_one_subject(tmp_path):
    plant(tmp_path, *volumes(*(f"sub-1_ses-{k}" for k in (1, 2, 3)), "sub-1_base"))
    (tmp_path / "sub-1_base" / "base-tps").write_text("sub-1_ses-1\nsub-1_ses-2\n")
    with pytest.warns(UserWarning, match="longitudinal templates"):
        assert {record["subject"] for record in freesurfer.records(tmp_path)} == {"sub-1"}


def volumes(*folders: str, files: tuple[str, ...] = ("T1.mgz", "norm.mgz", "aseg.mgz", "aparc+aseg.mgz")) -> list[str]:
    return [f"{folder}/mri/{file}" for folder in folders for file in files]


@pytest.mark.parametrize("times", ["base-tps", "base-tps.fastsurfer"])
def test_freesurfer_subjects_are_folders_and_longitudinal_ones_are_grouped(tmp_path, times):
    plant(tmp_path, *volumes("a", "b1", "b2", "b", "b1.long.b", "b2.long.b", "fsaverage", "sub-9_ses-1", "sub-9_ses-2"))
    plant(tmp_path, "a/surf/lh.white", "notes/readme.txt", *volumes("no_image", files=("aseg.mgz",)))
    (tmp_path / "b" / times).write_text("b1\nb2\n")
    with pytest.warns(UserWarning, match="folders are left out") as caught:
        found = freesurfer.records(tmp_path)
    assert {record["id"]: record["subject"] for record in found if "problem" not in record} == {
        "a": "a", "b1": "b", "b2": "b", "sub-9_ses-1": "sub-9", "sub-9_ses-2": "sub-9"
    }  # fmt: skip
    assert found[0]["images"] == {"t1": str(tmp_path / "a/mri/T1.mgz")}
    assert found[0]["label"] == str(tmp_path / "a/mri/aseg.mgz")
    assert [record["id"] for record in found if "problem" in record] == ["no_image"]
    told = " ".join(str(one.message) for one in caught)
    for reason in (
        "which are averages, like fsaverage",
        "longitudinal templates, like b",
        "2 folders .* are longitudinal",
    ):
        assert re.search(reason, told)
    with pytest.warns(UserWarning, match="are not longitudinal"):
        found = freesurfer.records(tmp_path, stream="long", image="norm", label="aparc+aseg")
    assert [(record["id"], record["subject"]) for record in found] == [("b1.long.b", "b"), ("b2.long.b", "b")]
    assert found[0]["images"]["t1"].endswith("norm.mgz") and found[0]["label"].endswith("aparc+aseg.mgz")
    with pytest.raises(ValueError, match="choose cross or long"):
        freesurfer.records(tmp_path, stream="both")


def test_fastsurfers_folders_are_read(tmp_path):
    plant(tmp_path, *volumes("a", "b", files=("orig.mgz", "orig_nu.mgz", "aparc.DKTatlas+aseg.deep.mgz", "mask.mgz")))
    node = compose("prepare", ["data=fastsurfer", "out=x", f"data.root={tmp_path}"])["data"]
    first, second = build(node)
    assert first["images"]["t1"].endswith("a/mri/orig_nu.mgz") and second["label"].endswith("deep.mgz")
    assert "label" not in build({**node, "label": None})[0]


def test_freesurfers_labels_have_its_names_and_sides_in_pairs():
    aseg = freesurfer.label_scheme().labels
    known = {2: "Left-Cerebral-White-Matter", 53: "Right-Hippocampus", 16: "Brain-Stem", 58: "Right-Accumbens-area"}
    known |= {46: "Right-Cerebellum-White-Matter", 255: "CC_Anterior", 28: "Left-VentralDC", 5: "Left-Inf-Lat-Vent"}
    assert known.items() <= aseg.items() and len(set(aseg.values())) == len(aseg) == 45
    parcels = freesurfer.label_scheme(label="aparc.DKTatlas+aseg.deep").labels
    known = {1002: "ctx-lh-caudalanteriorcingulate", 2035: "ctx-rh-insula", 1024: "ctx-lh-precentral"}
    assert known.items() <= parcels.items() and aseg.items() <= parcels.items()
    white = freesurfer.label_scheme(label="wmparc").labels
    assert white[4035] == "wm-rh-insula" and white[5001] == "Left-UnsegmentedWhiteMatter" and len(white) <= 254
    for labels in (aseg, parcels, white):
        lefts = [name for name in labels.values() if re.search(r"^Left-|-lh-", name)]
        mirrored = {name.replace("Left-", "Right-").replace("-lh-", "-rh-") for name in lefts}
        assert mirrored == {name for name in labels.values() if re.search(r"^Right-|-rh-", name)}
    with pytest.raises(ValueError, match=r"data.label=lesions: labels=dataset knows aseg"):
        freesurfer.label_scheme(label="lesions")


# ---------------------------------------------------------------------------------------------- wmh


def lesions(*folders: str) -> list[str]:
    return [f"{folder}/{file}.nii.gz" for folder in folders for file in ("orig/T1", "pre/T1", "pre/FLAIR", "wmh")]


def test_wmh_can_be_read_with_t1_alone_as_in_the_asa_paper(tmp_path):
    root = plant(tmp_path, *lesions("Utrecht/0"))
    (both,), (one,) = wmh.records(root), wmh.records(root, channels=["t1"])
    assert list(both["images"]) == ["t1", "flair"] and one["images"] == {"t1": both["images"]["t1"]}
    with pytest.raises(ValueError, match=r"data.channels=\['t2'\]: choose from \[t1, flair\]"):
        wmh.records(root, channels=["t2"])


def test_wmh_knows_the_sites_of_the_first_release(tmp_path):
    found = wmh.records(plant(tmp_path, *lesions("Utrecht/0", "Singapore/50", "GE3T/100", "Amsterdam/GE3T/100")))
    assert [(record["id"], record["site"]) for record in found] == [
        ("Amsterdam_GE3T_100", "Amsterdam_GE3T"),
        ("GE3T_100", "GE3T"),
        ("Singapore_50", "Singapore"),
        ("Utrecht_0", "Utrecht"),
    ]
    assert found[3] == {
        "id": "Utrecht_0",
        "subject": "Utrecht_0",
        "site": "Utrecht",
        "images": {
            "t1": str(tmp_path / "Utrecht/0/pre/T1.nii.gz"),
            "flair": str(tmp_path / "Utrecht/0/pre/FLAIR.nii.gz"),
        },
        "label": str(tmp_path / "Utrecht/0/wmh.nii.gz"),
    }
    assert "label" not in wmh.records(tmp_path, label=False)[0]


def test_wmh_reads_training_and_test_of_the_later_release_with_ids_that_name_files(tmp_path):
    plant(tmp_path, *lesions("training/Utrecht/0", "test/Utrecht/1", "test/Amsterdam/Philips_VU .PETMR_01./160"))
    plant(tmp_path, "additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz")
    sites = {record["id"]: record["site"] for record in wmh.records(tmp_path)}
    assert sites == {
        "Amsterdam_Philips_VU_PETMR_01_160": "Amsterdam_Philips_VU_PETMR_01",
        "Utrecht_0": "Utrecht",
        "Utrecht_1": "Utrecht",
    }
    assert [record["id"] for record in wmh.records(tmp_path / "training")] == ["Utrecht_0"]


def test_wmh_says_what_a_scan_lacks_and_refuses_a_root_too_high_or_too_low(tmp_path):
    (found,) = wmh.records(plant(tmp_path / "a", "Utrecht/0/pre/FLAIR.nii.gz"))
    assert found["images"]["t1"] is None and found["label"] == str(tmp_path / "a/Utrecht/0/wmh.nii.gz")
    with pytest.raises(ValueError, match="too deep below the root; give the folder that holds Utrecht"):
        wmh.records(plant(tmp_path / "b", *lesions("wmh/Amsterdam/GE3T/100")))
    with pytest.raises(ValueError, match=r"no scans found: \[training/\|test/\]SITE/SUBJECT/pre/T1.nii.gz below"):
        wmh.records(tmp_path / "a/Utrecht")


# ---------------------------------------------------------------------------------------------- phantom


needs_template = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn, which carries the template, is not here"
)


@needs_template
@pytest.mark.parametrize(
    ("config", "ids", "channels"),
    [
        ("t1", ["sub-001", "sub-002"], ["t1"]),
        ("ibsr", ["IBSR_01", "IBSR_02"], ["t1"]),
        ("wmh", ["Singapore_2", "Utrecht_1"], ["t1", "flair"]),
        ("brats", ["BraTS2021_00001", "BraTS2021_00002"], ["t1", "t1ce", "t2", "flair"]),
        ("freesurfer", ["subject_001", "subject_002"], ["t1"]),
    ],
)
def test_phantoms_go_through_the_readers_of_the_real_data_and_are_made_once(tmp_path, config, ids, channels):
    root = tmp_path / "people"
    node = compose("prepare", [f"data=phantom/{config}", "out=x", "data.subjects=2", "data.resolution=8"])["data"]
    found = build({**node, "root": str(root)})
    assert [record["id"] for record in found] == ids and list(found[0]["images"]) == channels
    for record in found:
        assert all(path and Path(path).is_file() for path in record["images"].values())
        assert config == "t1" or Path(record["label"]).is_file()
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert build({**node, "root": str(root)}) == found
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


@needs_template
def test_the_freesurfer_phantom_has_freesurfers_values_on_their_sides(tmp_path):
    (one,) = phantom.records(tmp_path, kind="freesurfer", subjects=1, resolution=4.0)
    label = read_label(one["label"])
    assert set(np.unique(label.data)) == {0, *PHANTOM_ASEG}
    for left, right in ((17, 53), (2, 41)):
        x = [(label.affine @ [*np.argwhere(label.data == value).mean(axis=0), 1])[0] for value in (left, right)]
        assert x[0] < -5 and x[1] > 5  # RAS+
    names = freesurfer.label_scheme().labels
    assert set(PHANTOM_ASEG) <= names.keys()


@needs_template
def test_a_phantom_cohort_is_completed_and_never_another_one_than_asked_for(tmp_path):
    settings = {"kind": "ibsr", "resolution": 8.0, "seed": 3}
    (first,) = phantom.records(tmp_path, subjects=1, **settings)
    Path(first["label"]).unlink()
    assert phantom.records(tmp_path, subjects=2, **settings)[0] == first and Path(first["label"]).is_file()
    with pytest.raises(ValueError, match="holds 2 subjects, not data.subjects=1; give data.subjects=2"):
        phantom.records(tmp_path, subjects=1, **settings)
    with pytest.raises(ValueError, match="holds another phantom cohort .seed differ"):
        phantom.records(tmp_path, subjects=2, **{**settings, "seed": 4})


# ---------------------------------------------------------------------------------------------- configurations


def test_configurations_declare_the_labels_of_their_readers():
    names = sorted(
        str(path.relative_to(CONFIG_DIR / "data").with_suffix("")) for path in (CONFIG_DIR / "data").rglob("*.yaml")
    )
    configs = {name: compose("prepare", [f"data={name}", "out=x"]) for name in names}
    labelled = {
        "ibsr": ({1: "csf", 2: "gm", 3: "wm"}, [], {}),
        "wmh": ({1: "wmh"}, [2], {}),
        "brats": (brats.LABELS[2021], [], {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}),
        "brats23": (brats.LABELS[2023], [], {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}),
    }
    labelled |= {f"phantom/{name}": labelled[name] for name in ("ibsr", "wmh", "brats")}
    labelled["openmind"] = (None, [1], {})
    labelled["phantom/structures"] = (STRUCTURES, [], {})
    labelled["phantom/freesurfer"] = ({value: freesurfer.aseg_labels()[value] for value in PHANTOM_ASEG}, [], {})
    labelled |= dict.fromkeys(("nnunet", "freesurfer", "fastsurfer"), ("dataset", [], {}))
    assert names == sorted([*labelled, "bids", "cq500", "folder", "fomo", "phantom/t1"])
    for name, config in configs.items():
        labels, ignored, regions = labelled.get(name, (None, [], {}))
        assert config["labels"] == labels, name
        assert (config["ignored"], config["regions"] or {}) == (ignored, regions), name
        assert config["data"]["root"] is None, name


READERS = (
    "bids",
    "brats",
    "brats23",
    "cq500",
    "fastsurfer",
    "folder",
    "fomo",
    "freesurfer",
    "ibsr",
    "nnunet",
    "openmind",
    "phantom/t1",
    "wmh",
)


@pytest.mark.parametrize("name", READERS)
def test_every_key_of_a_configuration_is_a_keyword_of_its_reader(tmp_path, name):
    node = compose("prepare", [f"data={name}", "out=x"])["data"]
    with pytest.raises((FileNotFoundError, ValueError)) as error:  # of the reader: there is no such folder
        build({**node, "root": str(tmp_path / "absent"), **({"subjects": 0} if name.startswith("phantom") else {})})
    assert "unexpected keyword" not in str(error.value)


@pytest.mark.parametrize(
    ("first", "second", "globs"),
    [
        (["1015_SS.nii.gz", "1016_SS.nii.gz"], ["1015_tissues.nii.gz", "1016_tissues.nii.gz"], ("*_SS", "*_tissues")),
        (["1015.nii.gz", "1016.nii.gz"], ["1015_tissues.nii.gz", "1016_tissues.nii.gz"], ("*", "*_tissues")),
        (["a-1_T1_x.nii.gz", "a-2_T1_x.nii.gz"], ["a-1_T1_y.nii.gz", "a-2_T1_y.nii.gz"], ("*_x", "*_y")),
        (["pred_a_b.nii.gz", "pred_c_d.nii.gz"], ["a_b-true.nii.gz", "c_d-true.nii.gz"], ("pred_*", "*-true")),
        (["a_x.nii.gz", "b_x.nii.gz", "c_x.nii.gz"], ["c_y.nii.gz", "d_y.nii.gz"], ("*_x", "*_y")),
        (["x.nii.gz"], ["y.nii.gz"], None),
    ],
)
def test_the_longest_words_that_two_folders_share_are_found(first, second, globs) -> None:
    found = folder.matching_globs(first, second)
    assert globs is None if found is None else [f"{glob}.nii.gz" for glob in globs] == list(found[:2])
