"""What a checkpoint says of its training scans is checked before it is used."""

from typing import Any

import pytest

from asa.data.preprocessing.settings import PrepareSettings
from asa.inference.preprocessing import check_metadata

GOOD: dict[str, Any] = {
    "channels": ["t1"],
    "labels": {"1": "left", "2": "right", "5": "other"},
    "regions": [["both", [1, 2]]],
    "lateral_pairs": [["left", "right"]],
    "join_sides": True,
    "range": {"brain_ml": [900.0, 900.0]},
    "spacing": [[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]],
    "overlap": 0.0,
    "prepare": PrepareSettings().as_json(),
}


def test_what_asa_writes_is_taken() -> None:
    check_metadata("run", GOOD)
    check_metadata("run", {"channels": ["t1"], "prepare": {}})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("channels", [], "no channels"),
        ("channels", ["t1", "t1"], "are not different names"),
        ("channels", "t1", "are not different names"),
        ("labels", {"1": "left", "2": "right", "3": "left"}, "are not different names"),
        ("labels", {"one": "left", "2": "right"}, "invalid literal"),
        ("labels", {"1": "left", "2": "other"}, "is not a pair of labels"),
        ("regions", [["both", 3]], "a region joins 3"),
        ("regions", [["both", [1, "2"]]], "a region joins"),
        ("lateral_pairs", [["left", 2]], "is not a pair of labels"),
        ("range", {"brain_ml": [900.0, 899.0]}, "range="),
        ("spacing", [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], "spacing="),
        ("spacing", [[1.0, 1.0, 1.0], [1.0, 1.0, float("inf")]], "spacing="),
        ("spacing", [[1.0, 1.0, 1.0]], "spacing="),
        ("overlap", -0.1, "overlap=-0.1"),
        ("overlap", 1.0, "overlap=1.0"),
        ("prepare", {"strip": "nothing"}, "strip"),
        ("prepare", {"unknown": 1}, "unknown"),
    ],
)
def test_anything_else_is_refused_with_the_entry(key: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^run: its metadata of the training scans is not usable .*{reason}"):
        check_metadata("run", {**GOOD, key: value})


def test_sides_that_are_exchanged_are_labels_whether_joined_or_not() -> None:
    data = {**GOOD, "join_sides": False, "lateral_pairs": [["left", "elsewhere"]]}
    with pytest.raises(ValueError, match=r"\['left', 'elsewhere'\] is not a pair of labels"):
        check_metadata("run", data)
