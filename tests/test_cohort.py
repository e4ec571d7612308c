"""Readers find scans where they lie; splits keep a person in one part."""

import json
from pathlib import Path

import pytest

from asa.data.cohort import Record, check_records, read_split, select, split_subjects, write_split
from asa.data.datasets import bids, folder, ibsr


def plant(root: Path, *names: str) -> Path:
    """Empty files: readers only look at names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def people(n: int, scans: int = 1) -> list[Record]:
    return [
        {"id": f"p{k:02d}_{scan}", "subject": f"p{k:02d}", "images": {"t1": f"/x/p{k}_{scan}.nii"}}
        for k in range(n)
        for scan in range(scans)
    ]


# ---------------------------------------------------------------------------------------------- folder


def test_the_wildcard_is_the_id_and_pairs_channels_and_label(tmp_path):
    plant(tmp_path, "b_T1.nii.gz", "a_T1.nii.gz", "a_FLAIR.nii.gz", "b_FLAIR.nii.gz", "seg/a.nii.gz", "seg/b.nii.gz")
    plant(tmp_path, "._a_T1.nii.gz", "b_T1.json", "seg/c.nii.gz")
    images = {"t1": "*_T1.nii.gz", "flair": "*_FLAIR.nii.gz"}
    found = folder.records(tmp_path, images=images, label="seg/*.nii.gz")
    assert found[0] == {
        "id": "a",
        "subject": "a",
        "images": {"t1": str(tmp_path / "a_T1.nii.gz"), "flair": str(tmp_path / "a_FLAIR.nii.gz")},
        "label": str(tmp_path / "seg/a.nii.gz"),
    }
    assert [record["id"] for record in found] == ["a", "b"]


def test_wildcards_join_and_a_repeated_text_counts_once(tmp_path):
    plant(tmp_path, "p1/v1/p1_T1.nii", "p1/v2/p1_T1.nii", "p2/v1/p2_T1.nii")
    found = folder.records(tmp_path, images={"t1": "*/*/*_T1.nii"}, subject=r"^(p\d+)")
    assert [(record["id"], record["subject"]) for record in found] == [
        ("p1_v1", "p1"),
        ("p1_v2", "p1"),
        ("p2_v1", "p2"),
    ]


def test_two_stars_reach_through_folders_of_any_depth(tmp_path):
    plant(tmp_path, "Utrecht/1/pre/T1.nii.gz", "Amsterdam/GE3T/3/pre/T1.nii.gz")
    plant(tmp_path, "Utrecht/1/wmh.nii.gz", "Amsterdam/GE3T/3/wmh.nii.gz")
    found = folder.records(tmp_path, images={"t1": "**/pre/T1.nii.gz"}, label="**/wmh.nii.gz")
    assert [record["id"] for record in found] == ["Amsterdam_GE3T_3", "Utrecht_1"]
    assert found[1]["label"].endswith("Utrecht/1/wmh.nii.gz")


def test_a_missing_partner_is_named(tmp_path):
    plant(tmp_path, "a_T1.nii", "b_T1.nii", "c_T1.nii", "a_seg.nii")
    with pytest.raises(ValueError, match=r"^b: no label for this and 1 other scans by '\*_seg.nii'"):
        folder.records(tmp_path, images={"t1": "*_T1.nii"}, label="*_seg.nii")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"images": {"t1": "*_T2.nii"}}, "no scans found: '\\*_T2.nii' below"),
        ({"images": {"t1": "a_T1.nii"}}, "no wildcard"),
        ({"images": {"t1": "*_T1.nii"}, "label": "*/*.nii"}, "as many wildcards"),
        ({"images": {"t1": "*_T1.nii"}, "subject": "x(.)"}, "finds no group 1"),
        ({"images": {"t1": "*.nii", "label": "*.nii"}, "label": "*.nii"}, "cannot be called 'label'"),
        ({}, "say what the images are called"),
        ({"table": "cohort.csv", "label": "*.nii"}, "leave out label"),
    ],
)
def test_globs_that_cannot_work_are_refused_with_a_way_out(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=reason):
        folder.records(plant(tmp_path, "a_T1.nii"), **settings)


def test_a_missing_folder_is_refused(tmp_path):
    for reader in (lambda root: folder.records(root, images={"t1": "*"}), bids.records, ibsr.records):
        with pytest.raises(FileNotFoundError, match="absent: no such folder"):
            reader(tmp_path / "absent")


def test_csv_and_json_tables_say_the_same(tmp_path):
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


def test_a_table_with_other_columns_takes_its_channels_from_images(tmp_path):
    (tmp_path / "a.csv").write_text("id,age,path\nx,61,x.nii\n")
    (found,) = folder.records(tmp_path, table="a.csv", images={"t1": "path"})
    assert found["subject"] == "x" and found["images"] == {"t1": str(tmp_path / "x.nii")}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,t1\nx,x.nii\n", "no column 'id'"),
        ("id,t1\n,x.nii\n", "row 1 has no id"),
        ("id,t1\nx,\n", "no path in column 't1'"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, reason):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        folder.records(tmp_path, table="a.csv")


# ---------------------------------------------------------------------------------------------- bids and ibsr


def test_bids_finds_sessions_and_runs_and_keeps_the_person_apart(tmp_path):
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
    assert [record["id"] for record in bids.records(tmp_path, suffix="T2w", channel="t2")] == ["sub-01"]
    assert [record["id"] for record in bids.records(tmp_path, session="2")] == ["sub-02_ses-2"]


def test_bids_asks_for_the_entity_that_tells_two_files_apart(tmp_path):
    anat = "sub-01/anat/sub-01"
    plant(tmp_path, f"{anat}_desc-preproc_T1w.nii.gz", f"{anat}_space-MNI_desc-preproc_T1w.nii.gz")
    with pytest.raises(ValueError, match=r"sub-01: both .* fit; choose one with space="):
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


def test_ibsr_names_a_missing_label(tmp_path):
    plant(tmp_path, "IBSR_01/IBSR_01_ana_strip.nii.gz")
    with pytest.raises(ValueError, match="no IBSR_01_segTRI_fill_ana"):
        ibsr.records(tmp_path)


# ---------------------------------------------------------------------------------------------- checks and splits


def test_cohorts_that_cannot_be_prepared_as_one_are_refused():
    one, two = people(2)
    for records, reason in (
        ([], "no scans found: here; check"),
        ([one, one], "2 scans have this id"),
        ([one, {**two, "images": {"t2": "x.nii"}}], r"has the channels \['t2'\], but p00_0 has \['t1'\]"),
        ([{**one, "id": "../x"}], "not usable as an id"),
        ([{**one, "images": {}}], "channels"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_records(records, source="here")
    check_records([one, two])


def test_every_subject_is_in_exactly_one_part_with_all_its_scans():
    cohort = people(20, scans=3)
    split = split_subjects(cohort, validation=0.1, test=5, seed=1)
    assert [len(split[part]) for part in ("train", "validation", "test")] == [13, 2, 5]
    assert sorted(subject for part in split.values() for subject in part) == sorted(
        {record["subject"] for record in cohort}
    )
    assert len(select(cohort, split["test"])) == 15


def test_a_split_follows_from_its_seed_and_not_from_the_order_of_the_records():
    cohort = people(30)
    assert split_subjects(cohort, test=5) == split_subjects(cohort[::-1], test=5)
    assert split_subjects(cohort, test=5) != split_subjects(cohort, test=5, seed=1)


def test_a_subject_that_joins_does_not_shuffle_the_others():
    before, after = split_subjects(people(20))["train"], split_subjects(people(21))["train"]
    assert [subject for subject in after if subject != "p20"] == before


@pytest.mark.parametrize(
    "sizes", [{"test": 4}, {"validation": 2, "test": 2}, {"test": 1.0}, {"test": -1}, {"validation": -0.1}]
)
def test_a_split_that_leaves_nothing_to_train_on_is_refused(sizes):
    with pytest.raises(ValueError, match="split: "):
        split_subjects(people(4), **sizes)


def test_a_split_survives_its_file(tmp_path):
    split = split_subjects(people(9), validation=2, test=2)
    write_split(tmp_path / "run/split.json", split)
    assert read_split(tmp_path / "run/split.json") == split
    (tmp_path / "short.json").write_text('{"train": ["a"], "test": ["b"]}')
    assert read_split(tmp_path / "short.json") == {"train": ["a"], "validation": [], "test": ["b"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"train": ["a"], "test": ["a"]}', "subject a is in train and in test"),
        ('{"train": ["a", "a"]}', "twice in train"),
        ('{"trian": ["a"]}', "unknown part 'trian'"),
        ('["a"]', "a split is JSON with lists"),
        ('{"train": ', "not valid JSON"),
    ],
)
def test_a_bad_split_file_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=rf"split.json: .*{reason}"):
        read_split(tmp_path / "split.json")


def test_selecting_keeps_the_order_of_the_subjects_and_names_the_missing():
    cohort = people(3, scans=2)
    assert [record["id"] for record in select(cohort, ["p02", "p00"])] == ["p02_0", "p02_1", "p00_0", "p00_1"]
    with pytest.raises(ValueError, match=r"2 of its subjects are not in the cohort \(x, y\)"):
        select(cohort, ["p01", "x", "y"])
