"""Policies: empty masks, the challenges' own definitions, surface elements, lesions."""

import math
import pickle
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
import surface_distance
from scipy.ndimage import binary_dilation, gaussian_filter, generate_binary_structure
from scipy.ndimage import label as components
from surface_distance import lookup_tables

from asa.data.io.nifti import Volume
from asa.evaluation import metrics
from asa.evaluation.metrics import (
    IN_SLICE,
    hd95,
    hd95_by_area,
    hd95_pooled,
    lesion_f1,
    lesion_recall,
    lesionwise_dice,
    lesionwise_hd95,
    sensitivity,
    surface_dice,
    surface_element_areas,
    volume_difference,
)
from asa.evaluation.policies import POLICIES, tumour_regions
from asa.tasks.evaluation import evaluate_case, evaluate_folder

UNIT = (1.0, 1.0, 1.0)
NAN = math.nan


def volume(data: np.ndarray, spacing: tuple[float, float, float] = UNIT) -> Volume:
    return Volume(data.astype(np.uint8), np.diag([*spacing, 1.0]), None)


def box(low: tuple[int, int, int], side: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((size, size, size), dtype=bool)
    mask[tuple(slice(k, k + side) for k in low)] = True
    return mask


def masks(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Two masks and a spacing: noise of any density, or smooth shapes, in boxes down to one voxel thick."""
    generator = np.random.default_rng(seed)
    shape, spacing = generator.integers(1, 14, 3), generator.choice([0.1, 0.5, 0.94, 1.0, 1.5, 3.0], 3)
    field = generator.random((2, *shape))
    if seed % 2:
        field[0] = gaussian_filter(field[0], 2)
        field[1] = field[0] + 0.2 * gaussian_filter(field[1], 2)
    a, b = (one >= np.quantile(one, generator.random()) for one in field)
    return a, b, tuple(spacing.tolist())


# ---- truth tables ----

TABLES = {
    "ibsr": {"dice": (1, 0, 0), "hd95_mm": (0, NAN, NAN), "nsd_1mm": (1, 0, 0)},
    "brats21": {
        "dice": (1, 0, 0),
        "hd95_mm": (0, 373.13, 373.13),
        "nsd_1mm": (1, 0, 0),
        "sensitivity": (1, 0, 0),
    },
    "brats23_lesion": {
        "lesion_dice": (1, 0, 0),
        "lesion_hd95_mm": (0, 374, 374),
        "dice": (1, 0, 0),
        "sensitivity": (1, 0, 0),
    },
    "wmh2017": {
        "dice": (1, 0, 0),
        "hd95_mm": (0, NAN, NAN),
        "volume_difference_percent": (0, NAN, 100),
        "lesion_recall": (1, 1, 0),
        "lesion_f1": (1, 0, 0),
    },
    "asa_paper": {"dice": (1, 0, 0), "hd95_voxels": (0, 373.12866, 373.12866)},
    "asa_paper_brats": {"dice": (1, 0, 0), "hd95_voxels": (0, 373.12866, 373.12866)},
}


def test_every_policy_has_a_truth_table_in_this_file():
    assert TABLES.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_a_policy_scores_empty_masks_as_its_truth_table_states(name):
    labels = {1: "necrosis", 2: "oedema", 3: "enhancing"} if "brats" in name else {1: "lesion"}
    value = max(labels)
    full, nothing = volume(value * box((4, 4, 4), 6)), volume(box((0, 0, 0), 0))
    cases = [(nothing, nothing), (full, nothing), (nothing, full)]  # both empty, the truth, the prediction
    printed = POLICIES[name].truth_table()
    assert [title for title, _ in printed] == ["both empty", "only truth empty", "only prediction empty"]
    for index, (prediction, truth) in enumerate(cases):
        for row in evaluate_case(prediction, truth, labels, name, case_id="a"):
            expected = {metric: values[index] for metric, values in TABLES[name].items()}
            assert row.values == pytest.approx(expected, nan_ok=True)
            for text, value in zip(printed[index][1], expected.values(), strict=True):
                assert text.split()[0] == ("undefined" if math.isnan(value) else f"{value:g}")


# Metrics that do not see a missed or an invented region, by their definition.
BLIND = {("volume_difference_percent", "missed"), ("lesion_recall", "invented")}


def overlaps() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions and truths with a voxel in common: random ones, and the worst in an image of BraTS at the end."""
    for seed in range(30):
        one, other, _ = masks(seed)
        one[0, 0, 0] = other[0, 0, 0] = True
        yield one, other
    truth, prediction = np.zeros((2, 240, 240, 155), dtype=bool)
    truth[0, 0, 0] = prediction[0, 0, 0] = prediction[-1, -1, -1] = True
    yield prediction, truth
    yield truth, prediction


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_missed_or_invented_region_scores_better_than_any_overlap(policy):
    large = box((4, 4, 4), 6)  # 216 mm3, which counts as a lesion
    nothing = np.zeros_like(large)
    pairs = list(overlaps())
    for metric in policy.metrics:
        # With voxels of 64 mm3 every true lesion counts; the image of BraTS would then be a metre wide.
        spacing, chosen = ((4.0, 4.0, 4.0), pairs[:-2]) if metric.exception else (UNIT, pairs)
        sign = 1 if metric.higher_is_better else -1
        worst = min(sign * metric(prediction, truth, spacing) for prediction, truth in chosen)
        for kind, prediction, truth in (("missed", nothing, large), ("invented", large, nothing)):
            score = sign * metric(prediction, truth, spacing)
            if (metric.name, kind) not in BLIND:
                assert math.isnan(score) or score <= worst, (metric.name, kind)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_first_metric_by_which_cases_are_ranked_sees_both(policy):
    assert (policy.metrics[0].truth_empty, policy.metrics[0].prediction_empty) == (0, 0)
    assert policy.metrics[0].higher_is_better


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_perfect_prediction_scores_perfectly_and_policies_can_be_pickled(policy):
    truth = box((4, 4, 4), 6)
    for metric in pickle.loads(pickle.dumps(policy)).metrics:
        assert metric(truth, truth, (1.0, 1.0, 3.0)) == metric.both_empty


def test_tumour_regions_follow_the_label_values_of_either_year():
    assert tumour_regions({1: "a", 2: "b", 4: "c"}) == {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    assert tumour_regions({1: "a", 2: "b", 3: "c"}) == {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    with pytest.raises(ValueError, match=r"declared are \[1, 2\]: give regions="):
        POLICIES["brats21"].regions_of({1: "a", 2: "b"})
    own = POLICIES["brats21"].of_cohort({"WT": [1, 2]}, [])
    assert own.regions_of({1: "a", 2: "b"}) == {"WT": (1, 2)}


def test_wmh2017_ignores_other_pathology_and_rejects_it_as_a_label(tmp_path):
    truth, prediction = np.zeros((2, 12, 12, 6), dtype=np.uint8)
    truth[2:5, 2:5, 2:4], truth[7:10, 7:10, 2:4] = 1, 2
    prediction[truth > 0] = 1  # the other pathology too
    (row,) = evaluate_case(volume(prediction), volume(truth), {1: "wmh"}, "wmh2017", case_id="a")
    assert row.values == {
        "dice": 1, "hd95_mm": 0, "volume_difference_percent": 0, "lesion_recall": 1, "lesion_f1": 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="label 2 is declared as other and ignored"):
        evaluate_folder(tmp_path, {}, {1: "wmh", 2: "other"}, "wmh2017", tmp_path)


# ---- overlap and volume ----


def test_sensitivity_and_volume_difference_have_closed_forms():
    truth, prediction = box((4, 4, 4), 4), box((6, 4, 4), 4)
    assert sensitivity(prediction, truth) == 0.5
    assert volume_difference(prediction, truth) == 0.0
    assert volume_difference(box((4, 4, 4), 5), truth) == pytest.approx(100 * (125 - 64) / 64)
    empty = box((0, 0, 0), 0)
    assert sensitivity(empty, truth) == 0.0 and volume_difference(empty, truth) == 100.0
    assert math.isnan(sensitivity(truth, empty)) and math.isnan(volume_difference(truth, empty))


# ---- surface elements ----


@pytest.mark.parametrize("spacing", [UNIT, (0.7, 1.1, 3.0)])
def test_areas_of_surface_elements_equal_those_of_the_surface_distance_package(spacing):
    theirs = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    reversed_bits = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
    np.testing.assert_allclose(surface_element_areas(*spacing), theirs[reversed_bits], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_nsd_and_hd95_by_area_equal_those_of_the_surface_distance_package(seed):
    a, b, spacing = masks(seed)
    theirs = surface_distance.compute_surface_distances(a, b, spacing)
    for tolerance in (0.0, 0.1, 0.5, 1.0, 2.0):
        expected = surface_distance.compute_surface_dice_at_tolerance(theirs, tolerance)
        assert surface_dice(a, b, spacing, tolerance) == pytest.approx(expected, rel=0, abs=1e-6)
    expected = surface_distance.compute_robust_hausdorff(theirs, 95)
    assert hd95_by_area(a, b, spacing) == pytest.approx(expected, rel=0, abs=1e-6)


def test_nsd_is_the_fraction_of_the_surface_within_the_tolerance():
    # Two adjacent slabs across the whole image: only the two faces that touch are within the tolerance.
    a, b = np.zeros((2, 12, 40, 40), dtype=bool)
    a[2:4], b[4:6] = True, True
    assert surface_dice(a, b, (1.0, 1.0, 1.0), 0.0) == pytest.approx(0.5, abs=0.06)
    assert surface_dice(a, b, (1.0, 1.0, 1.0), 2.0) == 1.0
    assert surface_dice(a, a, (1.0, 2.0, 3.0), 0.0) == 1.0
    assert surface_dice(box((1, 1, 1), 2), box((15, 15, 15), 2), UNIT, 1.0) == 0.0


@pytest.mark.parametrize("axis", range(3))
def test_hd95_by_area_of_a_shifted_slab_is_its_shift(axis):
    spacing = (1.0, 2.0, 3.5)
    a, b = np.zeros((2, 20, 20, 20), dtype=bool)
    a[(slice(None),) * axis + (slice(4, 5),)] = True
    b[(slice(None),) * axis + (slice(9, 10),)] = True
    assert hd95_by_area(a, b, spacing) == pytest.approx(5 * spacing[axis])


@pytest.mark.parametrize(("count", "expected"), [(19, 1.0), (18, 5.0)])
def test_hd95_by_area_is_the_distance_within_which_95_percent_of_the_surface_lies(count, expected, monkeypatch):
    distances = np.array([5.0] * (20 - count) + [1.0] * count)
    monkeypatch.setattr(metrics, "_distances_and_areas", lambda *_: [(distances, np.full(20, 0.25))])
    assert hd95_by_area(box((1, 1, 1), 2), box((1, 1, 1), 2), UNIT) == expected


def test_a_surface_at_the_tolerance_is_within_it():
    a, b = np.zeros((2, 12, 12, 12), dtype=bool)
    a[:4], b[:6] = True, True
    assert surface_dice(a, b, UNIT, 1.99) < 0.9 and surface_dice(a, b, UNIT, 2.0) == 1.0


def test_surface_metrics_of_an_empty_mask_are_undefined():
    full, empty = box((2, 2, 2), 3), box((0, 0, 0), 0)
    for a, b in ((empty, empty), (full, empty), (empty, full)):
        assert math.isnan(surface_dice(a, b, UNIT, 1.0)) and math.isnan(hd95_by_area(a, b, UNIT))
        assert math.isnan(hd95(a, b, UNIT, IN_SLICE)) and math.isnan(hd95_pooled(a, b, UNIT))


def test_pooled_hd95_is_below_that_of_the_worse_direction():
    a = box((2, 2, 2), 12)
    b = a | box((15, 15, 15), 4)  # an island: far from a, while all of a is near b
    assert hd95_pooled(a, b, UNIT) < hd95(a, b, UNIT)
    assert hd95_pooled(a, a, UNIT) == 0.0


def test_the_hd95_of_the_paper_ignores_the_spacing():
    truth, prediction = box((4, 4, 4), 6), box((4, 4, 6), 6)
    rows = [
        evaluate_case(volume(prediction, spacing), volume(truth, spacing), {1: "wm"}, "asa_paper", case_id="a")[0]
        for spacing in (UNIT, (1.0, 1.0, 3.0))
    ]
    assert rows[0].values == rows[1].values and rows[0].values["hd95_voxels"] == 2.0


# ---- WMH 2017 ----


def challenge_wmh(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float, float]:
    """HD95, recall and F1 with SimpleITK, step by step as the challenge describes them."""
    images = [
        sitk.GetImageFromArray(np.pad(mask, 1).transpose(2, 1, 0).astype(np.uint8)) for mask in (prediction, truth)
    ]
    points, labelled = [], []
    for image in images:
        edge = sitk.GetArrayFromImage(sitk.Subtract(image, sitk.BinaryErode(image, (1, 1, 0)))).transpose(2, 1, 0)
        points.append(np.argwhere(edge) * spacing)
        connected = sitk.ConnectedComponentImageFilter()
        connected.SetFullyConnected(True)
        labelled.append(sitk.GetArrayFromImage(connected.Execute(image)))
    distances = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    far = max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))
    both = (labelled[0] > 0) & (labelled[1] > 0)
    precision, recall = (len(np.unique(one[both])) / one.max() for one in labelled)
    return far, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_wmh_metrics_equal_those_of_the_challenge(seed):
    generator = np.random.default_rng(seed)
    field = gaussian_filter(generator.normal(size=(26, 24, 9)), (1.5, 1.5, 0.7))
    other = field + 0.6 * gaussian_filter(generator.normal(size=field.shape), (1.5, 1.5, 0.7))
    prediction, truth = other > np.quantile(other, 0.93), field > np.quantile(field, 0.9)
    far, recall, f1 = challenge_wmh(prediction, truth, (0.96, 0.96, 3.0))
    assert hd95(prediction, truth, (0.96, 0.96, 3.0), IN_SLICE) == pytest.approx(far, rel=0, abs=1e-6)
    assert lesion_recall(prediction, truth) == pytest.approx(recall) and recall < 1
    assert lesion_f1(prediction, truth) == pytest.approx(f1)


IN_MM = (hd95, hd95_by_area, hd95_pooled, partial(surface_dice, tolerance=1.0), lesionwise_dice, lesionwise_hd95)


@pytest.mark.parametrize(
    "metric",
    [
        *(metrics.dice, sensitivity, volume_difference, lesion_recall, lesion_f1),
        *(partial(metric, spacing=UNIT) for metric in IN_MM),
    ],
)
def test_metrics_take_masks_of_one_shape(metric):
    mask = box((1, 1, 1), 8)
    metric(mask, mask)
    for prediction, truth in ((mask, mask[:1]), (mask[0], mask[0]), (mask[0], mask)):  # numpy would broadcast them
        with pytest.raises(ValueError, match="masks must be 3-D and of one shape"):
            metric(prediction, truth)
    with pytest.raises(ValueError, match="masks must be bool, got uint8 and bool"):
        metric(mask.astype(np.uint8), mask)


def test_lesion_metrics_count_lesions_and_not_voxels():
    truth = box((1, 1, 1), 8) | box((12, 12, 12), 1) | box((13, 13, 13), 1) | box((17, 1, 1), 1)
    assert lesion_recall(box((1, 1, 1), 1), truth) == pytest.approx(1 / 3)  # a corner connects the two single voxels
    assert lesion_recall(box((13, 13, 13), 1), truth) == pytest.approx(1 / 3)
    prediction = box((1, 1, 1), 1) | box((3, 3, 3), 1) | box((1, 17, 1), 1) | box((1, 17, 17), 1)
    assert lesion_f1(prediction, truth) == pytest.approx(2 * (1 / 3) * (2 / 4) / (1 / 3 + 2 / 4))


# ---- BraTS 2023 ----


def challenge_lesions(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """Lesion-wise Dice and HD95 on whole volumes, step by step as the challenge describes them."""
    across_edges, touching = generate_binary_structure(3, 2), np.ones((3, 3, 3))
    lesions = components(binary_dilation(truth, across_edges, 3), touching)[0] * truth
    found, count = components(prediction, touching)
    seen: set[int] = set()
    scores, distances = [], []
    for number in np.unique(lesions[lesions > 0]):
        lesion = lesions == number
        matched = set(np.unique(found[binary_dilation(lesion, across_edges, 3)])) - {0}
        seen |= matched
        if lesion.sum() * np.prod(spacing) <= 50:
            continue
        own = np.isin(found, list(matched))
        scores.append(2 * (own & lesion).sum() / (own.sum() + lesion.sum()))
        if own.any():
            surfaces = surface_distance.compute_surface_distances(lesion, own, spacing)
            distances.append(surface_distance.compute_robust_hausdorff(surfaces, 95))
        else:
            distances.append(374.0)
    false = count - len(seen)
    total = len(scores) + false
    return (sum(scores) / total, (sum(distances) + 374.0 * false) / total) if total else (1.0, 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_lesionwise_metrics_equal_those_of_the_challenge(seed):
    generator = np.random.default_rng(seed)
    field = gaussian_filter(generator.normal(size=(40, 36, 30)), 2)
    other = field + 0.7 * gaussian_filter(generator.normal(size=field.shape), 2)
    prediction, truth = other > np.quantile(other, 0.985), field > np.quantile(field, 0.98)
    spacing = UNIT if seed % 2 else (1.0, 0.8, 2.0)
    expected = challenge_lesions(prediction, truth, spacing)
    assert lesionwise_dice(prediction, truth, spacing) == pytest.approx(expected[0], rel=0, abs=1e-6)
    assert lesionwise_hd95(prediction, truth, spacing) == pytest.approx(expected[1], rel=0, abs=1e-6)
    assert 0 < expected[0] < 1


def test_a_small_true_lesion_is_not_scored_and_a_false_one_is():
    large, small, far = box((1, 1, 1), 5), box((16, 1, 1), 3), box((1, 14, 14), 2)
    assert lesionwise_dice(large, large | small, UNIT) == 1.0  # 27 mm3 missed
    assert lesionwise_dice(large, large | small, (1.0, 1.0, 2.0)) == 0.5  # 54 mm3 missed
    assert lesionwise_dice(large | far, large, UNIT) == 0.5
    assert lesionwise_hd95(large | far, large, UNIT) == pytest.approx(374 / 2)
    assert (lesionwise_dice(~large & large, small, UNIT), lesionwise_hd95(~large & large, small, UNIT)) == (1.0, 0.0)


def test_an_exception_to_the_truth_table_is_printed_with_it():
    (exception,) = POLICIES["brats23_lesion"].exceptions()
    assert exception.startswith("Lesion Dice, Lesion HD95: ") and "50 mm3" in exception
    small, nothing = volume(3 * box((4, 4, 4), 2)), volume(box((0, 0, 0), 0))
    labels = {1: "necrosis", 2: "oedema", 3: "enhancing"}
    values = evaluate_case(nothing, small, labels, "brats23_lesion", case_id="a")[0].values
    assert (values["lesion_dice"], values["lesion_hd95_mm"]) == (1.0, 0.0)


def test_true_lesions_that_nearly_touch_are_one_lesion():
    truth = box((2, 2, 2), 5) | box((2, 2, 11), 5)  # four voxels apart: dilated by three they meet
    assert lesionwise_dice(box((2, 2, 2), 5), truth, UNIT) == pytest.approx(2 / 3)
    apart = box((2, 2, 1), 5) | box((2, 2, 14), 5)
    assert lesionwise_dice(box((2, 2, 1), 5), apart, UNIT) == 0.5
