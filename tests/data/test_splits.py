"""Splits keep a subject in one part, use all subjects, and are determined by their seed."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from asa.data.datasets.record import Record
from asa.data.splits import PARTS, keep_labelled, make_joint_split, make_split, read_split, select, write_split
from asa.tasks.volumes import open_store

SITES = ("Utrecht", "Singapore", "Amsterdam_GE3T")


def people(n: int, scans: int = 1) -> list[Record]:
    """Subjects p00, p01, ... with a number of scans each, at three sites in turn."""
    return [
        {
            "id": f"p{k:02d}_{scan}",
            "subject": f"p{k:02d}",
            "site": SITES[k % 3],
            "images": {"t1": f"/x/p{k}_{scan}.nii"},
        }
        for k in range(n)
        for scan in range(scans)
    ]


def sizes(split: dict[str, list[str]]) -> list[int]:
    return [len(split[part]) for part in PARTS]


# ---------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_split_uses_every_subject_once_and_keeps_its_scans_together(seed):
    rng = np.random.default_rng(seed)
    cohort = []
    for k in rng.permutation(10**6)[: rng.integers(12, 60)]:
        scans, site = rng.integers(1, 4), SITES[rng.integers(3)]
        cohort += [{"id": f"{k}_{scan}", "subject": f"s{k}", "site": site} for scan in range(scans)]
    rng.shuffle(cohort)
    validation = rng.choice([0, 0.1, 0.3]) if seed % 2 else int(rng.integers(3))
    ways = [
        {"validation": validation, "test": 0.2},
        {"ratio": [float(weight) for weight in rng.uniform(1, 4, 3)]},
        {"folds": int(rng.integers(2, 6)), "fold": 1, "validation": validation},
        {"site": cohort[0]["site"], "validation": validation},
    ]
    for way in ways:
        split = make_split(cohort, **way, seed=seed)
        parts = [select(cohort, split[part]) for part in PARTS]
        assert list(split) == list(PARTS) and split["train"]
        assert sorted(record["id"] for part in parts for record in part) == sorted(record["id"] for record in cohort)
        homes = [{record["subject"] for record in part} for part in parts]
        assert not homes[0] & homes[1] and not homes[0] & homes[2] and not homes[1] & homes[2], way
        assert split == make_split(cohort[::-1], **way, seed=seed)


def test_another_seed_gives_another_split():
    cohort = people(30)
    for way in ({"test": 5}, {"ratio": [7, 1, 2]}, {"folds": 5, "fold": 0}, {"site": "Utrecht"}):
        assert make_split(cohort, **way) != make_split(cohort, **way, seed=1)


def test_an_added_subject_does_not_change_the_order_of_the_others():
    for way in ({}, {"site": "Singapore"}):
        before, after = (make_split(people(n), **way)["train"] for n in (20, 21))
        assert [subject for subject in after if subject != "p20"] == before


def test_splits_do_not_change_between_versions():
    split = make_split(people(8), validation=0.25, test=2)  # runs are repeated by their seed
    assert split == {
        "train": ["p07", "p03", "p04", "p06"],
        "validation": ["p02", "p00"],
        "test": ["p05", "p01"],
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratio": [7, 1, 2], "folds": 5, "fold": 0}, "ratio and folds contradict each other"),
        ({"ratio": [7, 1, 2], "site": "Utrecht"}, "ratio and site contradict each other"),
        ({"folds": 5, "fold": 0, "site": "Utrecht"}, "folds and site contradict each other"),
        ({"folds": 5}, "folds=5 and fold=None go together"),
        ({"fold": 0}, "folds=None and fold=0 go together"),
    ],
)
def test_options_that_contradict_each_other_are_named(options, reason):
    with pytest.raises(ValueError, match=f"split: {reason}"):
        make_split(people(12), **options)


# ---------------------------------------------------------------------------------------------- sizes and ratios


def test_an_int_is_a_number_of_subjects_and_a_float_a_fraction_of_all():
    assert sizes(make_split(people(20, scans=3), validation=0.1, test=5)) == [13, 2, 5]
    assert sizes(make_split(people(40), validation=0.25, test=0.5)) == [10, 10, 20]  # not of those that are not tested
    assert sizes(make_split(people(4), validation=0.01, test=0.01)) == [2, 1, 1]  # at least one


@pytest.mark.parametrize(
    "wrong",
    [{"test": 4}, {"validation": 2, "test": 2}, {"test": 1.0}, {"test": -1}, {"validation": -0.1}, {"test": "2"}],
)
def test_a_split_without_training_subjects_is_refused(wrong):
    with pytest.raises(ValueError, match="split: "):
        make_split(people(4), **wrong)


@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [
        (18, [12, 0, 6], [12, 0, 6]),
        (60, [36, 0, 24], [36, 0, 24]),
        (1251, [7, 1, 2], [876, 125, 250]),
        (10, [0.7, 0.1, 0.2], [7, 1, 2]),
        (10, [1, 1, 1], [4, 3, 3]),
        (11, [1, 1, 1], [4, 4, 3]),
        (5, [1, 0, 0], [5, 0, 0]),
    ],
)
def test_a_ratio_is_rounded_by_largest_remainders(n, ratio, expected):
    cohort = [{"id": str(k), "subject": str(k)} for k in range(n)]
    assert sizes(make_split(cohort, ratio=ratio, validation=0.1, test=0.2)) == expected


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [
        ([7, 3], "three weights"),
        ("712", "three weights"),
        ([7, -1, 2], "three weights"),
        ([0, 1, 1], "train above 0"),
        ([7, "x", 2], "three weights"),
        ([1, float("nan"), 1], "three weights"),
        ([70, 1, 2], "leaves validation without any of 9 subjects"),
    ],
)
def test_an_invalid_ratio_is_refused(ratio, reason):
    with pytest.raises(ValueError, match=f"split: ratio=.*{reason}"):
        make_split(people(9), ratio=ratio)


# ---------------------------------------------------------------------------------------------- folds and sites


@pytest.mark.parametrize(("n", "folds"), [(20, 5), (23, 5), (7, 7), (9, 2)])
def test_folds_are_disjoint_cover_all_and_differ_by_one_subject_at_most(n, folds):
    tested = [make_split(people(n), folds=folds, fold=fold, test=0.2)["test"] for fold in range(folds)]
    assert sorted(subject for part in tested for subject in part) == [f"p{k:02d}" for k in range(n)]
    assert max(map(len, tested)) - min(map(len, tested)) <= 1


def test_validation_is_drawn_from_the_subjects_that_are_not_tested():
    assert sizes(make_split(people(20), folds=5, fold=4, validation=0.25)) == [12, 4, 4]
    assert sizes(make_split(people(21), site="Utrecht", validation=2)) == [12, 2, 7]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"folds": 1, "fold": 0}, "folds=1 must be from 2 to the number of subjects, 9"),
        ({"folds": 10, "fold": 0}, "folds=10 must be from 2"),
        ({"folds": 5, "fold": 5}, "fold=5 must be from 0 to 4"),
        ({"folds": 5, "fold": -1}, "fold=-1 must be from 0 to 4"),
        ({"folds": 3, "fold": 0, "validation": 6}, "and leave one for training"),
    ],
)
def test_invalid_folds_are_refused(options, reason):
    with pytest.raises(ValueError, match=f"split: .*{reason}"):
        make_split(people(9), **options)


def test_leaving_a_site_out_tests_on_that_site_only():
    cohort = people(12, scans=2)
    split = make_split(cohort, site="Utrecht", validation=1, test=0.2)
    assert {record["site"] for record in select(cohort, split["test"])} == {"Utrecht"}
    assert "Utrecht" not in {record["site"] for part in PARTS[:2] for record in select(cohort, split[part])}


def test_sites_that_cannot_be_left_out_are_refused():
    cohort = people(6, scans=2)
    with pytest.raises(ValueError, match="no site Rome; the sites are Amsterdam_GE3T, Singapore, Utrecht"):
        make_split(cohort, site="Rome")
    with pytest.raises(ValueError, match="subject p00 was scanned at Utrecht and at Rome"):
        make_split([cohort[0], {**cohort[1], "site": "Rome"}, *cohort[2:]], site="Utrecht")
    with pytest.raises(ValueError, match="needs the site of every scan, and x has none"):
        make_split([*cohort, {"id": "x", "subject": "x"}], site="Utrecht")
    with pytest.raises(ValueError, match="leave one for training"):
        make_split(cohort[:2], site="Utrecht")


# ---------------------------------------------------------------------------------------------- few labels


def test_labelled_subsets_are_nested_and_keep_the_other_parts():
    split = make_split(people(20), validation=3, test=4)
    subsets = [keep_labelled(split, labelled) for labelled in (1, 0.1, 3, 0.5, 12, 1.0)]
    assert [len(subset["train"]) for subset in subsets] == [1, 1, 3, 6, 12, 13]
    for fewer, more in itertools.pairwise(subsets):
        assert more["train"][: len(fewer["train"])] == fewer["train"]
    assert all(subset["test"] == split["test"] and subset["validation"] == split["validation"] for subset in subsets)
    assert len(keep_labelled(split, 0.001)["train"]) == 1


@pytest.mark.parametrize("labelled", [0, -1, 6, 0.0, 1.1, "3"])
def test_an_impossible_number_of_labels_is_refused(labelled):
    with pytest.raises(ValueError, match=rf"data.labelled={labelled}, but the split has 5 training subjects"):
        keep_labelled(make_split(people(5)), labelled)


def test_a_resumed_run_keeps_its_subjects(store: Path, tmp_path: Path):
    data = {"store": str(store), "split_file": None, "split": {"test": 1, "seed": 0}, "labelled": 0.6}
    _, split, parts = open_store(data, tmp_path)
    assert sizes(split) == [2, 0, 1] and [record["subject"] for record in parts["train"]] == split["train"]
    write_split(tmp_path / "split.json", split)
    (tmp_path / "checkpoints/step-1").mkdir(parents=True)
    assert open_store({**data, "split": {"test": 2, "seed": 5}}, tmp_path)[1] == split


def test_a_split_file_takes_precedence_over_the_options(store: Path, tmp_path: Path):
    (tmp_path / "mine.json").write_text(json.dumps({"train": ["s3", "s0"], "test": ["s1"]}))
    data = {"store": str(store), "split_file": tmp_path / "mine.json", "split": {"test": 2}, "labelled": 0.5}
    assert open_store(data, tmp_path)[1] == {"train": ["s3"], "validation": [], "test": ["s1"]}


# ---------------------------------------------------------------------------------------------- files and records


def test_a_split_is_the_same_after_writing_and_reading(tmp_path):
    split = make_split(people(9), validation=2, test=2)
    write_split(tmp_path / "run/split.json", split)
    assert read_split(tmp_path / "run/split.json") == split
    (tmp_path / "short.json").write_text('{"train": ["a"], "test": ["b"]}')
    assert read_split(tmp_path / "short.json") == {"train": ["a"], "validation": [], "test": ["b"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"train": ["a"], "test": ["a"]}', "subject a is in train and in test"),
        ('{"train": ["a", "a"]}', "twice in train"),
        ('{"train": [1], "test": ["1"]}', "in train and in test"),
        ('{"trian": ["a"]}', "unknown part 'trian'"),
        ('["a"]', "a split is JSON with lists"),
        ('{"train": ', "not valid JSON"),
    ],
)
def test_a_bad_split_file_is_refused_by_name(tmp_path, text, reason):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=rf"split.json: .*{reason}"):
        read_split(tmp_path / "split.json")


def test_law_the_cases_of_a_fold_of_nnunet_are_those_of_their_subjects(tmp_path):
    records = [{"id": f"p{k}-{visit}", "subject": f"p{k}"} for k in range(3) for visit in (1, 2)]
    folds = [{"train": ["p2-1", "p0-1", "p0-2"], "val": ["p1-1", "p1-2"]}, {"train": ["p0-1"], "val": ["p0-2"]}]
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    split = read_split(tmp_path / "folds.json", 0, records)
    assert split == {"train": ["p2", "p0"], "validation": [], "test": ["p1"]}
    assert len(select(records, split["test"])) == 2
    with pytest.raises(
        ValueError, match=r"fold 1 has cases of subject p0 in train and in val: .* data.subject='\(\.\*"
    ):
        read_split(tmp_path / "folds.json", 1, records)


def test_selection_keeps_the_order_of_subjects_and_names_missing_ones():
    cohort = people(3, scans=2)
    assert [record["id"] for record in select(cohort, ["p02", "p00"])] == ["p02_0", "p02_1", "p00_0", "p00_1"]
    with pytest.raises(ValueError, match=r"2 of its subjects are not in the cohort \(x, y\)"):
        select(cohort, ["p01", "x", "y"])


def test_of_several_cohorts_each_is_divided_and_a_subject_is_held_out_in_all_of_them() -> None:
    groups = [[{"id": f"{k}", "subject": f"p{k}"} for k in range(start, start + 20)] for start in (0, 12)]
    options = {"validation": 0.2, "test": 3, "seed": 1}
    own = [make_split(group, **options) for group in groups]
    joint = make_joint_split(groups, **options)
    tested, validated = ({subject for one in own for subject in one[name]} for name in ("test", "validation"))
    assert set(joint["test"]) == tested and set(joint["validation"]) == validated - tested
    assert sorted(subject for part in joint.values() for subject in part) == sorted({f"p{k}" for k in range(32)})
    assert validated & tested or any(set(one["train"]) & (tested | validated) for one in own)  # some are shared
    assert make_joint_split(groups[:1], **options) == own[0] and make_joint_split(groups[::-1], **options) == joint
