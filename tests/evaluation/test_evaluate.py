"""Dice and HD95, values for empty masks, and the files of an evaluation."""

import csv
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import surface_distance
import torch
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import gaussian_filter
from stores import read_tree, write_tree

from asa.cli import evaluate as evaluate_command
from asa.data.io.nifti import Volume, read_label, write_image, write_label
from asa.evaluation.metrics import dice, hd95, surface_dice
from asa.evaluation.policies import POLICIES, Policy
from asa.evaluation.summary import CaseRow, cases_csv, summarise, summary_table
from asa.inference.segmentation import PredictSettings
from asa.ops.labels import IGNORED
from asa.reporting.figures import label_colours
from asa.tasks import segmentation
from asa.tasks.evaluation import evaluate_case, evaluate_folder

LABELS = {1: "csf", 2: "gm"}


def cube(low: tuple[int, int, int], side: int, size: int = 24) -> np.ndarray:
    mask = np.zeros((size, size, size), dtype=bool)
    mask[tuple(slice(k, k + side) for k in low)] = True
    return mask


def blobs(seed: int, shape: tuple[int, int, int] = (30, 26, 22)) -> tuple[np.ndarray, np.ndarray]:
    """Two smooth shapes that overlap in part, and touch the image's edge."""
    generator = np.random.default_rng(seed)
    field = gaussian_filter(generator.normal(size=shape), 3)
    other = field + 0.5 * gaussian_filter(generator.normal(size=shape), 3)
    return field > np.quantile(field, 0.8), other > np.quantile(other, 0.85)


def monai_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    first, second = (torch.from_numpy(mask)[None, None] for mask in (a, b))
    distance = compute_hausdorff_distance(
        first, second, include_background=True, percentile=95, spacing=[float(side) for side in spacing]
    )
    return float(distance)


# ---- Dice ----


def test_dice_of_known_overlaps():
    a = cube((4, 4, 4), 8)
    assert dice(a, a) == 1.0
    assert dice(a, cube((14, 14, 14), 8)) == 0.0
    assert dice(a, cube((8, 4, 4), 8)) == pytest.approx(0.5)  # half of each overlaps
    assert dice(a, ~a & False) == 0.0


def test_metrics_of_empty_masks_are_undefined():
    full, empty = cube((2, 2, 2), 3), np.zeros((24, 24, 24), dtype=bool)
    assert math.isnan(dice(empty, empty))
    assert all(math.isnan(hd95(a, b, (1, 1, 1))) for a, b in ((empty, empty), (full, empty), (empty, full)))


def test_masks_that_are_not_bool_or_differ_in_shape_are_rejected():
    a = cube((2, 2, 2), 3)
    with pytest.raises(ValueError, match="must be bool"):
        dice(a.astype(np.uint8), a)
    with pytest.raises(ValueError, match="one shape"):
        hd95(a, a[:-1], (1, 1, 1))
    with pytest.raises(ValueError, match="three positive"):
        hd95(a, a, (1, 0, 1))


# ---- HD95 ----


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 4.0)])
@pytest.mark.parametrize("seed", range(5))
def test_hd95_equals_monais(seed, spacing):
    a, b = blobs(seed)
    assert hd95(a, b, spacing) == pytest.approx(monai_hd95(a, b, spacing), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("axis", range(3))
def test_hd95_of_a_shifted_slab_is_its_shift(axis):
    # A slab across the whole image, one voxel thick: every surface voxel lies exactly the shift away.
    spacing = (1.0, 2.0, 3.5)
    a, b = np.zeros((2, 20, 20, 20), dtype=bool)
    a[(slice(None),) * axis + (4,)] = True
    b[(slice(None),) * axis + (9,)] = True
    assert hd95(a, b, spacing) == pytest.approx(5 * spacing[axis])


def test_hd95_of_a_shifted_cube_has_a_closed_form():
    # The 16 voxels of the leading face lie one step beyond the other cube: over 5 % of the 56 on its surface.
    a, b = cube((4, 4, 4), 4), cube((5, 4, 4), 4)
    assert hd95(a, b, (1, 1, 1)) == pytest.approx(1.0)
    assert hd95(a, b, (3, 1, 1)) == pytest.approx(3.0)


def test_hd95_of_concentric_spheres_is_the_difference_of_their_radii():
    distance = np.linalg.norm(np.indices((40, 40, 40)) - 19.5, axis=0)
    assert hd95(distance < 10, distance < 16, (0.5, 0.5, 0.5)) == pytest.approx(3.0, abs=0.5)


@pytest.mark.parametrize(
    ("shift", "expected"), [((3, 0, 0), 3.0), ((0, 4, 0), 2.0), ((3, 4, 2), math.sqrt(9 + 4 + 64))]
)
def test_hd95_of_single_voxels_is_the_distance_of_their_centres(shift, expected):
    assert hd95(cube((5, 5, 5), 1), cube(tuple(5 + k for k in shift), 1), (1.0, 0.5, 4.0)) == pytest.approx(expected)


def test_hd95_is_a_percentile_and_not_the_maximum():
    a = cube((2, 2, 2), 12)
    b = a.copy()
    b[23, 23, 23] = True  # one stray voxel among hundreds of surface voxels
    assert hd95(a, b, (1, 1, 1)) == 0.0


def test_hd95_of_identical_masks_is_zero_and_order_does_not_matter():
    a, b = blobs(7)
    assert hd95(a, a, (1.0, 2.0, 3.0)) == 0.0
    assert hd95(a, b, (1.0, 2.0, 3.0)) == hd95(b, a, (1.0, 2.0, 3.0))


def test_hd95_scales_with_the_spacing_and_ignores_empty_surroundings():
    a, b = blobs(3)
    assert hd95(a, b, (2, 4, 6)) == pytest.approx(2 * hd95(a, b, (1, 2, 3)))
    assert hd95(np.pad(a, 5), np.pad(b, 5), (1, 2, 3)) == hd95(a, b, (1, 2, 3))


@pytest.mark.parametrize("seed", range(5))
def test_hd95_is_within_a_voxel_diagonal_of_the_surface_distance_package(seed):
    # Its surface elements are voxel corners: each lies half a diagonal from the centre of one of our surface voxels,
    # and the other way round: distances differ by at most a diagonal. (Weights by area move its percentile a little.)
    a, b = (np.pad(mask, 2) for mask in blobs(seed))
    spacing = (1.0, 1.0, 2.0)
    distances = surface_distance.compute_surface_distances(a, b, spacing)
    theirs = surface_distance.compute_robust_hausdorff(distances, 95)
    assert abs(hd95(a, b, spacing) - theirs) <= math.sqrt(6)


# ---- a case under a policy ----


def volume(data: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    return Volume(data, np.diag([*spacing, 1.0]), None)


def test_the_policy_defines_the_values_of_empty_masks():
    nothing, truth = np.zeros((2, 12, 12, 12), dtype=np.uint8)
    truth[2:5, 2:5, 2:5] = 1
    values = {}
    for name, prediction, true in (("missed", nothing, truth), ("added", truth, nothing), ("both", nothing, nothing)):
        values[name] = evaluate_case(volume(prediction), volume(true), {1: "lesion"}, case_id="a")[0].values
    assert values["both"] == {"dice": 1.0, "hd95_mm": 0.0, "nsd_1mm": 1.0}
    for name in ("missed", "added"):
        assert values[name]["dice"] == values[name]["nsd_1mm"] == 0.0
        assert math.isnan(values[name]["hd95_mm"])


def test_rows_carry_sizes_in_voxels_and_ml():
    truth = np.zeros((10, 10, 10), dtype=np.uint8)
    truth[:5], truth[5:] = 1, 2
    prediction = truth.copy()
    prediction[5] = 1
    csf, gm = evaluate_case(volume(prediction, (1, 2, 2)), volume(truth, (1, 2, 2)), LABELS, case_id="a")
    assert (csf.voxels_predicted, csf.voxels_true, gm.voxels_predicted) == (600, 500, 400)
    assert (csf.ml_predicted, csf.ml_true) == (pytest.approx(2.4), pytest.approx(2.0))
    assert csf.values["dice"] == pytest.approx(1000 / 1100)


def test_undeclared_label_values_are_rejected_and_named():
    truth = np.ones((6, 6, 6), dtype=np.uint8)
    strange = truth.copy()
    strange[0, 0, :2] = 7
    with pytest.raises(ValueError, match=r"case a: the prediction .* 7 \(2 voxels\); declared are 1 csf, 2 gm"):
        evaluate_case(volume(strange), volume(truth), LABELS, case_id="a")
    with pytest.raises(ValueError, match=r"case a: the truth .* 7"):
        evaluate_case(volume(truth), volume(strange), LABELS, case_id="a")


@pytest.mark.parametrize("labels", [{}, {0: "background", 1: "csf"}, {1: "csf", 2: "csf"}])
def test_invalid_label_declarations_are_rejected(labels):
    truth = volume(np.ones((6, 6, 6), dtype=np.uint8))
    with pytest.raises(ValueError, match="labels must name each foreground value once"):
        evaluate_case(truth, truth, labels, case_id="a")


def test_an_unknown_policy_is_rejected_and_the_policies_are_listed():
    with pytest.raises(ValueError, match=r"unknown policy 'brats': choose one of .*ibsr"):
        summarise([], LABELS, "brats")


def test_a_policy_may_join_labels_and_ignore_others():
    # As in a lesion challenge: nested regions, and a pathology that is excluded from scoring.
    policy = Policy(
        name="nested",
        description="",
        metrics=POLICIES["ibsr"].metrics,
        regions=lambda labels: {"whole": (1, 2), "core": (1,)},
        ignored=(3,),
    )
    truth = np.zeros((8, 8, 8), dtype=np.uint8)
    truth[:2], truth[2:4], truth[4:6] = 1, 2, 3
    prediction = np.where(truth == 3, 1, truth).astype(np.uint8)
    whole, core = evaluate_case(
        volume(prediction), volume(truth), {1: "core", 2: "oedema", 3: "other"}, policy, case_id="a"
    )
    assert (whole.label, whole.voxels_true, whole.values["dice"]) == ("whole", 256, 1.0)
    assert (core.label, core.voxels_predicted, core.values["dice"]) == ("core", 128, 1.0)


# ---- a cohort's own regions and ignored labels ----

TUMOUR = {1: "necrosis", 2: "oedema", 4: "enhancing"}
REGIONS = {"WT": [1, 2, 4], "TC": [1, 4], "ET": [4]}


def test_ignored_voxels_do_not_change_the_scores():
    generator = np.random.default_rng(0)
    truth, prediction = generator.integers(0, 3, (2, 12, 12, 12)).astype(np.uint8)
    prediction[prediction == 2] = 0
    (row,) = evaluate_case(
        volume(prediction), volume(truth), {1: "wmh"}, POLICIES["ibsr"].of_cohort({}, [2]), case_id="a"
    )
    kept = truth != 2
    agree = np.count_nonzero((prediction[kept] == 1) & (truth[kept] == 1))
    sizes = np.count_nonzero(prediction[kept] == 1), np.count_nonzero(truth[kept] == 1)
    assert (row.voxels_predicted, row.voxels_true) == sizes
    assert row.values["dice"] == pytest.approx(2 * agree / sum(sizes))
    other = np.where(kept, prediction, 1 - prediction).astype(np.uint8)  # another prediction in the ignored voxels
    policy = POLICIES["ibsr"].of_cohort({}, [2])
    assert evaluate_case(volume(other), volume(truth), {1: "wmh"}, policy, case_id="a") == [row]


def test_an_ignored_value_in_a_prediction_is_undeclared():
    truth = np.ones((6, 6, 6), dtype=np.uint8)
    truth[0] = 2
    policy = POLICIES["ibsr"].of_cohort({}, [2])
    with pytest.raises(ValueError, match=r"the prediction holds undeclared label values: 2 \(36 voxels\)"):
        evaluate_case(volume(truth), volume(truth), {1: "wmh"}, policy, case_id="a")


def test_regions_join_labels_in_the_cohorts_order():
    truth = np.zeros((12, 12, 12), dtype=np.uint8)
    truth[2:8], truth[3:7, 3:9, 3:9], truth[4:6, 4:8, 4:8] = 2, 4, 1
    prediction = np.where(truth == 2, 4, truth).astype(np.uint8)
    policy = POLICIES["ibsr"].of_cohort(REGIONS, [])
    rows = evaluate_case(volume(prediction), volume(truth), TUMOUR, policy, case_id="a")
    assert [row.label for row in rows] == ["WT", "TC", "ET"]
    for row, values in zip(rows, REGIONS.values(), strict=True):
        a, b = np.isin(prediction, values), np.isin(truth, values)
        nsd = surface_dice(a, b, (1, 1, 1), 1.0)
        assert row.values == {"dice": dice(a, b), "hd95_mm": hd95(a, b, (1, 1, 1)), "nsd_1mm": nsd}
    assert rows[0].values["dice"] == 1.0 > rows[1].values["dice"]


@pytest.mark.parametrize("regions", [{"WT": [1, 3]}, {"WT": []}, {"WT": 1}, {"WT": "12"}])
def test_a_region_of_undeclared_labels_is_rejected(regions):
    with pytest.raises(ValueError, match="regions: WT"):
        POLICIES["ibsr"].of_cohort(regions, []).regions_of(TUMOUR)


def test_validation_excludes_ignored_voxels(monkeypatch):
    truth = np.random.default_rng(0).choice([0, 1, IGNORED], (1, 8, 8, 8)).astype(np.uint8)
    predicted = torch.from_numpy(truth[0] != 0).long()  # class 1 everywhere but in the background
    logits = torch.nn.functional.one_hot(predicted, 3).permute(3, 0, 1, 2).float()
    monkeypatch.setattr(segmentation, "sliding_window", lambda *_: logits)
    source = SimpleNamespace(image=lambda _: np.ones((1, 8, 8, 8), np.float16), label=lambda _: truth)
    numbers, panels = segmentation.validate_segmentation(
        SimpleNamespace(model=None, label_map=lambda logits: logits.argmax(dim=0)),
        source,
        ["a"],
        {"wmh": [1], "absent": [2]},
        PredictSettings(),
        ["wmh", "absent"],
    )
    assert numbers == {"dice": 1.0, "dice_wmh": 1.0, "dice_absent": 1.0} and len(panels) == 1


def test_the_validation_panel_shows_the_labelled_region_wherever_it_lies(monkeypatch):
    truth = np.zeros((1, 16, 16, 16), np.uint8)
    truth[0, 1:3, 12:14, 2:4] = 1  # no middle slice intersects it
    logits = torch.zeros(2, 16, 16, 16)
    monkeypatch.setattr(segmentation, "sliding_window", lambda *_: logits)
    source = SimpleNamespace(image=lambda _: np.ones((1, 16, 16, 16), np.float16), label=lambda _: truth)
    method = SimpleNamespace(model=None, label_map=lambda logits: logits.argmax(dim=0))
    _, panels = segmentation.validate_segmentation(
        method, source, ["a"], {"lesion": [1]}, PredictSettings(), ["lesion"]
    )
    (panel,) = panels.values()
    enlarged = panel.shape[1] // 56  # three tiles of 16 voxels, and two gaps of 4
    rows = (panel == label_colours(1)[0]).all(axis=2).any(axis=1)[::enlarged]
    assert all(rows[part * 20 : part * 20 + 16].any() for part in range(3))  # in each of the three planes
    assert rows[56:].any()  # and in the legend


# ---- statistics ----


def rows_of(values: list[float], label: str = "csf") -> list[CaseRow]:
    return [
        CaseRow(f"{k:02}", label, {"dice": v, "hd95_mm": v, "nsd_1mm": v}, 1, 1, 0.1, 0.1) for k, v in enumerate(values)
    ]


def test_undefined_values_count_in_total_and_not_in_used():
    found = summarise(rows_of([0.5, math.nan, 0.7]), {1: "csf"}).results["csf"]["dice"]
    assert (found.used, found.total) == (2, 3)
    assert found.mean == pytest.approx(0.6)
    assert found.sd == pytest.approx(math.sqrt(0.02))


def test_one_value_has_no_sd_and_no_value_has_no_mean():
    one = summarise(rows_of([0.5]), {1: "csf"}).results["csf"]["dice"]
    assert (one.mean, one.median, one.used) == (0.5, 0.5, 1)
    assert math.isnan(one.sd) and math.isnan(one.low) and math.isnan(one.high)
    none = summarise(rows_of([math.nan]), {1: "csf"}).results["csf"]["dice"]
    assert math.isnan(none.mean) and (none.used, none.total) == (0, 1)


def test_the_interval_is_seeded_and_does_not_depend_on_other_labels():
    values = list(np.random.default_rng(0).normal(0.8, 0.1, 40))
    alone = summarise(rows_of(values), {1: "csf"})
    together = summarise([*rows_of([0.1, 0.9], "gm"), *rows_of(values)], LABELS)
    assert alone.results["csf"] == together.results["csf"] == summarise(rows_of(values), {1: "csf"}).results["csf"]


def test_the_interval_is_that_of_a_large_sample():
    values = np.random.default_rng(1).normal(0.7, 0.05, 200)
    found = summarise(rows_of(list(values)), {1: "csf"}).results["csf"]["dice"]
    error = values.std(ddof=1) / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


# ---- a folder ----


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Three small cases, LAS and anisotropic: identical, shifted, and with one label missed."""
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    predictions, truths, images = tmp_path / "predictions", {}, {}
    for k, case_id in enumerate(("case-a", "case-b", "case-c")):
        truth = np.zeros((16, 18, 12), dtype=np.uint8)
        truth[3:12, 3:12, 2:10], truth[5:9, 5:9, 4:7] = 1, 2
        prediction = np.roll(truth, 1, axis=0) if k == 1 else truth.copy()
        if k == 2:
            prediction[prediction == 2] = 1
        image = tmp_path / f"{case_id}_t1.nii.gz"
        write_image(image, truth * 40.0 + 5.0, affine)
        like = Volume(truth, affine, None)
        truths[case_id], images[case_id] = tmp_path / f"{case_id}_truth.nii.gz", image
        write_label(truths[case_id], truth, like)
        predictions.mkdir(exist_ok=True)
        write_label(predictions / f"{case_id}.nii.gz", prediction, like)
    return predictions, truths, images


def test_evaluating_a_folder_writes_rows_a_summary_and_a_page(cohort, tmp_path):
    predictions, truths, images = cohort
    out = tmp_path / "new" / "out"
    summary = evaluate_folder(predictions, truths, LABELS, "ibsr", out, images, progress=False)

    assert sorted(path.name for path in out.iterdir()) == ["cases.csv", "digests.json", "report.html", "summary.json"]
    with (out / "cases.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["id"], row["label"]) for row in table] == [(i, n) for i in sorted(truths) for n in ("csf", "gm")]
    assert float(table[0]["dice"]) == 1.0 and float(table[0]["hd95_mm"]) == 0.0
    missed = table[-1]
    assert (float(missed["dice"]), missed["hd95_mm"]) == (0.0, "nan")
    assert (missed["voxels_predicted"], missed["voxels_true"]) == ("0", "48")
    assert float(missed["ml_true"]) == pytest.approx(0.096)

    written = json.loads((out / "summary.json").read_text())
    for case_id, files in written.pop("files").items():
        assert files["prediction"] == str((predictions / f"{case_id}.nii.gz").absolute())
        assert (files["truth"], files["image"]) == (str(truths[case_id].absolute()), str(images[case_id].absolute()))
    assert written == json.loads(json.dumps(summary.as_json()))
    assert written["policy"]["name"] == "ibsr"
    assert written["policy"]["metrics"][1]["empty_masks_count_as"]["prediction_empty"] is None
    hausdorff = written["results"]["gm"]["hd95_mm"]
    assert (hausdorff["used"], hausdorff["total"]) == (2, 3)
    assert hausdorff["mean"] == pytest.approx((0.0 + 1.0) / 2)  # identical, and shifted by one voxel of 1 mm


def test_the_terminal_table_prints_the_policy_and_every_count(cohort, tmp_path):
    predictions, truths, _ = cohort
    text = summary_table(evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", progress=False))
    assert "policy ibsr" in text and "both empty" in text and "HD95 (mm)" in text
    assert "2 of 3" in text and "3 of 3" in text
    assert len({len(line) for line in text.split("\n\n")[1].splitlines()}) == 1  # columns are aligned


def test_the_same_evaluation_writes_the_same_bytes(cohort, tmp_path):
    predictions, truths, images = cohort
    for name in ("one", "two"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / name, images, progress=False)
    for name in ("cases.csv", "summary.json", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_worker_processes_give_the_same_rows(cohort, tmp_path):
    predictions, truths, _ = cohort
    one = evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "a", progress=False)
    two = evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "b", progress=False, workers=2)
    assert one.as_json() == two.as_json()
    assert (tmp_path / "a" / "cases.csv").read_bytes() == (tmp_path / "b" / "cases.csv").read_bytes()


def test_cases_that_do_not_match_are_listed(cohort, tmp_path):
    predictions, truths, images = cohort
    renamed = {f"{id}_seg": path for id, path in truths.items()}
    with pytest.raises(ValueError, match=r"for 3 of 3 cases: case-a_seg.*the folder holds case-a, .*pattern='"):
        evaluate_folder(predictions, renamed, LABELS, "ibsr", tmp_path / "out", progress=False)
    (predictions / "case-b.nii.gz").rename(predictions / "case-x.nii.gz")
    with pytest.raises(ValueError, match=r"no ID\.nii\.gz for 1 of 3 cases: case-b"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", progress=False)
    del truths["case-b"]
    with pytest.raises(ValueError, match="1 predictions without a truth: case-x"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", progress=False)
    del images["case-c"]
    (predictions / "case-x.nii.gz").unlink()
    with pytest.raises(ValueError, match="no image for case-c"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", images, progress=False)
    assert not (tmp_path / "out").exists()


def test_allowed_missing_predictions_are_counted_and_named(cohort, tmp_path):
    predictions, truths, images = cohort
    (predictions / "case-a.nii.gz").rename(predictions / "case-x.nii.gz")
    out = tmp_path / "out"
    summary = evaluate_folder(predictions, truths, LABELS, "ibsr", out, images, progress=False, allow_missing=True)
    assert (summary.missing, summary.unmatched) == (("case-a",), ("case-x",))
    assert (summary.results["csf"]["dice"].used, summary.results["csf"]["dice"].total) == (2, 3)
    assert (out / "cases.csv").read_text().splitlines()[1].startswith("case-a,csf,nan,nan,nan,,")
    page = (out / "report.html").read_text()
    assert "without a prediction" in page and "without a truth" in page
    assert "case-a" in summary_table(summary) and "case-x" in summary_table(summary)


def test_a_failing_case_leaves_nothing_written(cohort, tmp_path):
    predictions, truths, _ = cohort
    bad = predictions / "case-c.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    out = tmp_path / "out"
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"case-c\.nii\.gz"):
            evaluate_folder(predictions, truths, LABELS, "ibsr", out, progress=False, workers=workers)
    assert not out.exists()


def test_another_grid_is_rejected_and_the_case_is_named(cohort, tmp_path):
    predictions, truths, _ = cohort
    truth = read_label(truths["case-b"])
    write_label(predictions / "case-b.nii.gz", truth.data, Volume(truth.data, np.diag([-1.0, 1.0, 2.5, 1.0]), None))
    with pytest.raises(ValueError, match="case case-b: prediction and truth"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", progress=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_regions_and_ignored_labels_are_named_next_to_the_numbers(cohort, tmp_path, workers):
    predictions, truths, images = cohort
    like = read_label(truths["case-b"])
    marked = like.data.copy()
    marked[13:15, 3:12, 2:10] = 3
    write_label(truths["case-b"], marked, like)
    with pytest.raises(ValueError, match="undeclared label values: 3"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", progress=False)
    summary = evaluate_folder(
        predictions, truths, LABELS, "ibsr", tmp_path / "out", images, progress=False,
        regions={"all": [1, 2], "core": [2]}, ignored=[3], workers=workers,
    )  # fmt: skip
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["regions"] == {"all": [1, 2], "core": [2]} and written["policy"]["ignored"] == [3]
    assert list(written["results"]) == ["all", "core"]
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (summary_table(summary), page):
        assert "regions: all = csf + gm; core = gm" in text and "label 3 is ignored" in text
    assert "ignored (3)" in page
    with pytest.raises(ValueError, match="label 2 is declared as gm and ignored"):
        evaluate_folder(predictions, truths, LABELS, "ibsr", tmp_path / "out", progress=False, ignored=[2])


def test_a_missing_prediction_of_a_truth_with_ignored_voxels_is_counted(cohort, tmp_path):
    predictions, truths, _ = cohort
    for case_id in ("case-a", "case-b"):
        (predictions / f"{case_id}.nii.gz").unlink()
    summary = evaluate_folder(
        predictions, truths, {1: "csf"}, "ibsr", tmp_path / "out", progress=False, ignored=[2], allow_missing=True
    )
    assert summary.missing == ("case-a", "case-b")
    assert [(row.voxels_predicted, row.voxels_true) for row in summary.rows[:2]] == [(None, 600)] * 2
    assert (summary.results["csf"]["dice"].mean, summary.results["csf"]["dice"].used) == (1.0, 1)


def test_patterns_are_proposed_for_label_maps_of_one_folder_each_and_for_nothing_else(tmp_path):
    for name in ("p/s0_pred.nii.gz", "p/s1_pred.nii.gz", "t/s0_seg.nii.gz", "t/s0_T1.nii.gz", "t/s1_seg.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    truths = {path.name.partition(".")[0]: path for path in (tmp_path / "t").iterdir()}
    with pytest.raises(
        ValueError, match=r"predictions='.*/p/\*_pred\.nii\.gz' pattern='\*_seg\.nii\.gz' would match 2 of"
    ):
        evaluate_folder(tmp_path / "p", truths, {1: "x"}, "ibsr", tmp_path / "out")
    (tmp_path / "t" / "deep").mkdir()
    deep = truths | {"s9_seg": tmp_path / "t" / "deep" / "s9_seg.nii.gz"}
    with pytest.raises(
        ValueError, match=r"with files in several folders, give both predictions= and pattern= with \*\*"
    ):
        evaluate_folder(tmp_path / "p", deep, {1: "x"}, "ibsr", tmp_path / "out")


def test_a_store_defines_its_ignored_labels_and_regions(raw, store, tmp_path, monkeypatch, capsys):
    predictions, own = tmp_path / "predictions", tmp_path / "store"
    predictions.mkdir()
    manifest = read_tree(store)
    manifest |= {"labels": {"1": "csf", "5": "wm"}, "ignored": [2], "regions": {"brain": [1, 5]}}
    write_tree(own, manifest)
    for record in manifest["records"]:
        truth = read_label(record["sources"]["label"]["path"])
        write_label(predictions / f"{record['id']}.nii.gz", np.where(truth.data == 2, 1, truth.data), truth)
    arguments = [f"predictions={predictions}", f"out={tmp_path / 'out'}"]
    for truth, more, results in (
        (own, [], ["brain"]),
        (own, ["regions={}"], ["csf", "wm"]),
        (raw, ["pattern=*_seg.nii.gz", "labels={1: csf, 5: wm}", "ignored=[2]", "regions={white: [5]}"], ["white"]),
    ):
        monkeypatch.setattr("sys.argv", ["asa-evaluate", f"truth={truth}", *arguments, *more])
        assert evaluate_command.main() == 0
        assert "label 2 is ignored" in capsys.readouterr().out
        found = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
        assert {name: found[name]["dice"]["mean"] for name in found} == dict.fromkeys(results, 1.0)
    monkeypatch.setattr("sys.argv", ["asa-evaluate", f"truth={own}", *arguments, "regions={white: [2]}"])
    assert evaluate_command.main() == 1
    assert "regions: white joins 2, which is not a declared label value" in capsys.readouterr().err


def test_labels_that_changed_since_they_were_prepared_are_said(raw, store, tmp_path, monkeypatch, capsys):
    predictions, own = tmp_path / "predictions", tmp_path / "store"
    predictions.mkdir()
    manifest = read_tree(store)
    for record in manifest["records"]:
        source = record["sources"]["label"]
        copy = tmp_path / f"{record['id']}_seg.nii.gz"
        copy.write_bytes(Path(source["path"]).read_bytes())
        (predictions / f"{record['id']}.nii.gz").write_bytes(copy.read_bytes())
        source["path"] = str(copy)
    write_tree(own, manifest)
    arguments = [f"predictions={predictions}", f"truth={own}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["asa-evaluate", *arguments])
    assert evaluate_command.main() == 0 and "changed since" not in capsys.readouterr().out
    assert "notes" not in json.loads((tmp_path / "out" / "summary.json").read_text())
    truth = read_label(tmp_path / "s1_seg.nii.gz")
    write_label(tmp_path / "s1_seg.nii.gz", np.where(truth.data == 2, 1, truth.data), truth)
    assert evaluate_command.main() == 0
    note = (
        "warning: 1 label map has changed since asa-prepare (s1): scores are against the new ones, and "
        f"{own} holds the old ones: run asa-prepare again"
    )
    assert note in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["notes"] == [note]


# ---- the wrong side ----

SIDED = {1: "left_x", 2: "right_x", 3: "Right-Y", 4: "lh-y", 9: "stem"}


def test_the_wrong_side_is_a_fraction_of_voxels_with_a_side_in_both_maps(tmp_path: Path) -> None:
    truth = np.tile(np.array([1, 1, 1, 1, 2, 2, 3, 9, 9, 0], dtype=np.uint8), (2, 2, 1))
    found = np.tile(np.array([1, 2, 3, 9, 2, 0, 4, 1, 9, 1], dtype=np.uint8), (2, 2, 1))
    # x and y are other labels of the same side or not: only the side counts.
    expected = {"left_x": 2 / 3, "right_x": 0.0, "Right-Y": 1.0, "lh-y": math.nan, "stem": math.nan}
    affine = np.eye(4)
    for folder, data in (("truth", truth), ("found", found)):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / "like.nii.gz", truth.astype(np.float32), affine)
        write_label(tmp_path / folder / "a.nii.gz", data, read_label(tmp_path / "like.nii.gz"))
    volumes = [read_label(tmp_path / folder / "a.nii.gz") for folder in ("found", "truth")]
    rows = evaluate_case(*volumes, SIDED, case_id="a")
    assert {row.label: row.wrong_side for row in rows} == pytest.approx(expected, nan_ok=True)
    assert [row.wrong_side for row in evaluate_case(volumes[1], volumes[1], SIDED, case_id="a")][:3] == [0, 0, 0]

    summary = evaluate_folder(
        tmp_path / "found", {"a": tmp_path / "truth" / "a.nii.gz"}, SIDED, "ibsr", tmp_path / "out", progress=False,
        regions={"x": [1, 2], "stem": [9]},
    )  # fmt: skip
    assert summary.wrong_side["x"].mean == pytest.approx(2 / 4) and list(summary.wrong_side) == ["x"]
    with (tmp_path / "out" / "cases.csv").open() as file:
        assert [row["wrong_side"] for row in csv.DictReader(file)] == ["0.500000", "nan"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["wrong_side"]["x"]["mean"] == 0.5
    assert re.search(r"wrong side +mean.*\nx +0\.5000 ", summary_table(summary))


def test_labels_without_a_side_have_no_column_for_it() -> None:
    volume = Volume(np.array([[[1, 2, 0]]], dtype=np.uint8), np.eye(4), None)
    summary = summarise(evaluate_case(volume, volume, LABELS, case_id="a"), LABELS)
    assert "wrong" not in summary_table(summary) and "wrong_side" not in summary.as_json()
    assert cases_csv(summary).splitlines()[0].endswith("ml_true")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("labels={gm: 1}", "labels= are values and their names, like labels={1: csf, 2: gm}, got {'gm': 1}"),
        ("labels={1: gm, 2: null}", "labels= are values and their names"),
        ("ignored=2", "ignored= is a list of label values, like ignored=[2], got 2"),
    ],
)
def test_wrong_declarations_are_said(cohort, tmp_path: Path, setting: str, message: str, capsys) -> None:
    predictions, truths, *_ = cohort
    own = {"labels": "{1: csf}", **dict([setting.split("=", 1)])}
    folder = next(iter(truths.values())).parent
    given = [f"predictions={predictions}", f"truth={folder}", f"out={tmp_path / 'out'}"]
    assert evaluate_command.main([*given, *(f"{key}={value}" for key, value in own.items())]) == 1
    assert message in capsys.readouterr().err
