from asa.data.datasets.freesurfer import aseg_labels
from asa.ops.labels import pairs_by_name, side_of


def test_labels_are_a_pair_where_their_names_differ_in_the_side_alone() -> None:
    names = ["left_putamen", "wm", "R Thalamus", "right_putamen", "L thalamus", "lh-x", "rh-y", "Right-Vessel", "csf"]
    assert pairs_by_name(names) == [["left_putamen", "right_putamen"], ["L thalamus", "R Thalamus"]]
    assert pairs_by_name(["caudate_l", "caudate_r", "corpus_callosum"]) == [["caudate_l", "caudate_r"]]


def test_words_of_a_name_may_begin_with_capitals() -> None:
    pairs = [["leftPutamen", "rightPutamen"], ["LThalamus", "RThalamus"], ["caudateL", "caudateR"]]
    pairs += [["PallidumLeft", "PallidumRight"], ["lAmygdala", "rAmygdala"]]
    assert pairs_by_name([name for pair in pairs for name in pair]) == pairs
    assert not any(map(side_of, ["LGN", "Lesion", "GlobusPallidus", "CSF", "WMH", "cerebellumGM", "Rim", "ROI"]))


def test_all_labels_of_freesurfer_that_have_a_side_are_in_a_pair_with_the_left_one_first() -> None:
    names = list(aseg_labels().values())
    pairs = pairs_by_name(names)
    assert {name for pair in pairs for name in pair} == {name for name in names if side_of(name)}
    assert len(pairs) == 16 and all(left.startswith("Left-") for left, _ in pairs)
