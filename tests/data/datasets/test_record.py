"""The records of a reader are checked before preprocessing."""

import pytest

from asa.data.datasets.record import Record, check_records, sorted_records


def scan(id: str, **images: str | None) -> Record:
    return {"id": id, "subject": id, "images": images}


def test_a_scan_with_an_unusable_id_does_not_take_that_of_another():
    good, bad = sorted_records([scan("._c1", t1="a.nii"), scan("c1", t1="b.nii")], source="here")
    assert good["id"] == "c1" and "problem" not in good
    assert bad["id"] == "c1_" and "not usable as an id" in bad["problem"]


def test_inconsistent_records_are_refused():
    one, two = scan("a", t1="a.nii", flair=None), scan("b", t1=None, flair="b.nii")
    for records, reason in (
        ([], "no scans found: here; check"),
        ([one, one], "2 scans have this id"),
        ([one, scan("b", t2="b.nii")], r"b: has the channels \['t2'\], but a has \['t1', 'flair'\]"),
        ([one, scan("b", flair="b.nii", t1=None)], "in the same order"),
        ([scan("../x", t1="x.nii")], "not usable as an id"),
        ([scan("a\tb", t1="x.nii")], "control characters"),
        ([scan(" a", t1="x.nii")], "blanks at its ends"),
        ([scan("caf\udce9", t1="x.nii")], "not usable as an id, because it names files: it is not in UTF-8"),
        ([scan("a" * 201, t1="x.nii")], "longer than 200 bytes"),
        ([scan("a")], "channels"),
        ([scan("a", **{"t1\nt2": "x.nii"})], r"the channel 't1\\nt2' has line breaks"),
        ([one, scan("b", t1=None, flair=None)], r"b: no image of t1, flair \(searched for here\); add it"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_records(records, source="here")
    check_records([one, two])
