"""The page of an evaluation: self-contained, complete, the right cases, the right orientation."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageDraw

from asa.data.io.nifti import Volume, write_image, write_label
from asa.evaluation.summary import CaseRow, summarise
from asa.reporting.evaluation import label_panel, write_report
from asa.reporting.figures import (
    OPACITY,
    READABLE,
    TITLE,
    central_slices,
    label_colours,
    overlay_panel,
    reconstruction_panel,
    titled,
    with_legend,
)
from asa.tasks.evaluation import CaseFiles, evaluate_folder

AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])  # LAS, 2 mm slices


def write_cohort(root: Path, cases: int, noise: float = 0.06) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Cases that get worse with their number."""
    predictions, truths, images = root / "predictions", {}, {}
    predictions.mkdir(parents=True)
    generator = np.random.default_rng(0)
    truth = np.zeros((20, 24, 14), dtype=np.uint8)
    truth[3:17, 4:20, 2:12], truth[6:14, 8:16, 4:9] = 1, 2
    for k in range(cases):
        case_id = f"case{k}"
        prediction = np.where(generator.random(truth.shape) < noise * k, 0, truth).astype(np.uint8)
        truths[case_id], images[case_id] = root / f"{case_id}_truth.nii.gz", root / f"{case_id}_t1.nii.gz"
        like = Volume(truth, AFFINE, None)
        write_label(truths[case_id], truth, like)
        write_label(predictions / f"{case_id}.nii.gz", prediction, like)
        write_image(images[case_id], truth * 50.0, AFFINE)
    return predictions, truths, images


@pytest.fixture
def page_of(tmp_path):
    def page(cases: int, labels: dict[int, str] | None = None, with_images: bool = True) -> str:
        predictions, truths, images = write_cohort(tmp_path, cases)
        labels = {1: "csf", 2: "gm"} if labels is None else labels
        out = tmp_path / "out"
        evaluate_folder(predictions, truths, labels, "ibsr", out, images if with_images else None, progress=False)
        return (out / "report.html").read_text(encoding="utf-8")

    return page


def test_the_page_is_self_contained(page_of):
    page = page_of(3)
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r'src="([^"]{30})', page))
    assert page.count("<img") == 1 + 3  # the box plots, and each of three cases once


def test_the_page_prints_the_policy_its_truth_table_and_every_case(page_of):
    page = page_of(3)
    for text in ("policy ibsr", "both empty", "only truth empty", "only prediction empty", "95 % interval", "3 of 3"):
        assert text in page
    table = page[page.index("All cases") :]
    assert all(table.count(f">case{k}<") == 1 for k in range(3))


def test_the_page_says_what_its_means_are_over(page_of, tmp_path):
    assert "interval of the mean over cases:" in page_of(4)
    predictions, truths, _ = write_cohort(tmp_path / "visits", 4)
    subjects = {"case0": "a", "case1": "a", "case2": "b", "case3": "b"}
    out = tmp_path / "by_subject"
    evaluate_folder(predictions, truths, {1: "csf", 2: "gm"}, "ibsr", out, progress=False, subjects=subjects)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "interval of the mean over subjects:" in page and "The 4 cases are of 2 subjects" in page


def test_worst_and_best_cases_are_shown_in_order_and_only_once(page_of):
    titles = re.findall(r"<h3>(.*?) \(mean", page_of(6))
    assert titles == [
        "Worst case: case5",
        "Worst case, number 2: case4",
        "Best case: case0",
        "Best case, number 2: case1",
    ]


@pytest.mark.parametrize(
    ("cases", "expected"), [(1, ["The case: case0"]), (2, ["Worst case: case1", "Best case: case0"])]
)
def test_few_cases_are_shown_once(page_of, cases, expected):
    assert re.findall(r"<h3>(.*?) \(mean", page_of(cases)) == expected


def test_a_page_without_images_shows_the_label_maps(page_of):
    page = page_of(2, with_images=False)
    assert "<span>Truth</span><span>Prediction</span><span>Differences</span>" in page
    assert "<span>Image</span>" not in page


def test_names_are_escaped(page_of):
    page = page_of(1, labels={1: "<b>csf</b>", 2: "gm & more"})
    assert "<b>csf</b>" not in page
    assert "&lt;b&gt;csf&lt;/b&gt;" in page and "gm &amp; more" in page


def test_undefined_values_are_marked_with_the_reason(tmp_path):
    predictions, truths, _ = write_cohort(tmp_path, 1)
    write_label(
        predictions / "case0.nii.gz",
        np.zeros((20, 24, 14), dtype=np.uint8),
        Volume(np.zeros((20, 24, 14)), AFFINE, None),
    )
    evaluate_folder(predictions, truths, {1: "csf", 2: "gm"}, "ibsr", tmp_path / "out", progress=False)
    page = (tmp_path / "out" / "report.html").read_text()
    table = page[page.index("All cases") :]
    assert table.count("undefined</span>") == 2 and table.count("prediction empty") == 2
    assert "0 of 1" in page


def test_a_missing_extra_is_named_after_the_numbers_are_written(tmp_path, monkeypatch):
    predictions, truths, _ = write_cohort(tmp_path, 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("asa 0.1: an earlier evaluation")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'jinja2 is not installed.*pip install "asa-mri\[report\]"') as error:
        evaluate_folder(predictions, truths, {1: "csf", 2: "gm"}, "ibsr", out, progress=False)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in out.iterdir()) == ["cases.csv", "digests.json", "summary.json"]


def test_an_image_on_another_grid_is_rejected(tmp_path):
    predictions, truths, images = write_cohort(tmp_path, 1)
    write_image(images["case0"], np.ones((20, 24, 15)), AFFINE)
    with pytest.raises(ValueError, match="case case0: image and truth"):
        evaluate_folder(predictions, truths, {1: "csf", 2: "gm"}, "ibsr", tmp_path / "out", images, progress=False)


def test_many_labels_list_the_worst_first(tmp_path):
    predictions, truths, _ = write_cohort(tmp_path, 1)
    labels = {k: f"region {k}" for k in range(1, 15)}
    rows = [
        CaseRow("case0", name, {"dice": k / 20, "hd95_mm": math.nan, "nsd_1mm": 0.5}, 5, 5, 0.1, 0.1)
        for k, name in labels.items()
    ]
    files = [CaseFiles("case0", predictions / "case0.nii.gz", truths["case0"])]
    write_report(tmp_path / "page.html", summarise(rows, labels), files)
    page = (tmp_path / "page.html").read_text()
    assert "and 4 better ones" in page and "slices through region 1." in page


# ---- figures ----


def test_axial_and_coronal_slices_have_the_patients_right_on_the_left():
    volume = np.zeros((20, 22, 24))
    volume[:, :, 18:] = 1.0  # W runs left->right: the patient's right
    panel = overlay_panel(volume, [], at=(10, 11, 20))
    axial, coronal = panel[:22, :24, 0], panel[26 : 26 + 20, :24, 0]
    for tile in (axial, coronal):
        assert tile[12, :6].min() == 255 and tile[12, 6:].max() == 0


def test_superior_is_up_and_sagittal_slices_face_left():
    volume = np.zeros((20, 22, 24))
    volume[16:] = 1.0  # superior
    volume[:, 19:] = 0.5  # anterior
    panel = overlay_panel(volume, [], at=(2, 3, 12))
    coronal, sagittal = panel[26:46, :24, 0], panel[50:70, 1:23, 0]
    assert coronal[3, 12] == 255 and coronal[4, 12] == 0
    assert sagittal[1, 11] == 255 and 100 < sagittal[12, 0] < 160 and sagittal[12, 11] == 0
    axial = panel[:22, :24, 0]
    assert 100 < axial[0, 12] < 160 and axial[21, 12] == 0


def test_native_orientation_does_not_change_the_panel(tmp_path):
    # The same head stored as LAS and as RAS must give the same page.
    pages = []
    for name, flip in (("las", -1), ("ras", 1)):
        root = tmp_path / name
        predictions, truths, images = write_cohort(root, 1)
        affine = np.diag([1.0 * flip, 1.0, 2.0, 1.0])
        affine[0, 3] = 19.0 if flip < 0 else 0.0
        truth = np.zeros((20, 24, 14), dtype=np.uint8)
        truth[3:6, 4:20, 2:12] = 1
        image = np.random.default_rng(0).random(truth.shape)
        stored_truth, stored_image = truth[::flip], image[::flip]
        like = Volume(stored_truth, affine, None)
        for path in (truths["case0"], predictions / "case0.nii.gz"):
            write_label(path, stored_truth, like)
        write_image(images["case0"], stored_image, affine)
        evaluate_folder(predictions, truths, {1: "csf"}, "ibsr", root / "out", images, progress=False)
        pages.append((root / "out" / "report.html").read_text())
    assert pages[0] == pages[1]


def test_voxels_are_drawn_in_true_proportions():
    panel = overlay_panel(np.random.default_rng(0).random((10, 20, 20)), [], spacing=(3.0, 1.0, 1.0))
    assert panel.shape == (20 + 4 + 30 + 4 + 30, 20, 3)
    wide = overlay_panel(np.ones((10, 20, 20)), [np.ones((10, 20, 20), dtype=int)], tile_width=80)
    assert wide.shape[1] == 2 * 80 + 4


def test_labels_are_filled_with_an_opaque_edge():
    labels = np.zeros((30, 30, 30), dtype=int)
    labels[10:20, 10:20, 10:20] = 2
    panel = overlay_panel(None, [labels], at=(15, 15, 15))
    colour = label_colours(2)[1]
    assert np.array_equal(panel[10, 15], colour)
    assert np.abs(panel[15, 15].astype(int) - OPACITY * colour).max() <= 1
    assert not panel[25, 15].any()


def test_label_colours_differ():
    assert len({tuple(colour) for colour in label_colours(60).tolist()}) == 60
    assert np.array_equal(label_colours(60)[:3], label_colours(3))


def test_a_panel_is_of_the_region_in_the_truth_or_else_in_the_predictions(tmp_path):
    here, there = (slice(2, 6),) * 3, (slice(14, 18),) * 3
    truth, prediction = np.zeros((2, 20, 20, 20), dtype=np.uint8)
    truth[here], truth[2, 2:6, 2:6], truth[there] = 1, 2, 3
    prediction[there], prediction[14, 14:18, 14:18] = 1, 4
    files = [(name, tmp_path / f"{name}.nii") for name in ("truth", "prediction")]
    for (_, file), data in zip(files, (truth, prediction), strict=True):
        write_label(file, data, Volume(data, np.eye(4), None))
    for region, drawn in ((1, ["a", "b"]), (4, ["a", "c", "d"])):
        found = label_panel("x", files, None, labels={1: "a", 2: "b", 3: "c", 4: "d"}, ignored=[], region=[region])
        assert [name for name, _ in found["labels"]] == drawn, region


def test_central_slices_intersect_the_mask():
    ring = np.zeros((20, 20, 20), dtype=bool)
    ring[5, 2:18, 2:18] = True
    ring[5, 4:16, 4:16] = False
    for axis, index in enumerate(central_slices(ring)):
        assert ring.take(index, axis).any()
    both = np.zeros((9, 9, 20), dtype=bool)
    both[4, 4, 2:5] = both[4, 4, 14:19] = True
    assert central_slices(both) == (4, 4, 16)  # in the larger part, not on the midline between both


def test_an_empty_mask_has_the_slices_of_the_middle_next_to_the_midline():
    assert central_slices(np.zeros((20, 22, 25), dtype=bool)) == (10, 11, 10)


def test_the_sides_are_marked_in_the_upper_corners_where_they_fit():
    panel = overlay_panel(np.zeros((60, 60, 60)), [])
    for plane in range(3):
        tile = panel[plane * 64 :][:60]
        assert (tile[:15, :15] > 200).any() and (tile[:15, -15:] > 200).any()
        assert not tile[15:].any() and not tile[:, 15:-15].any()
    assert not overlay_panel(np.zeros((12, 12, 12)), []).any()


def test_masked_patches_differ_in_colour_from_tissue_and_background():
    volume = np.random.default_rng(0).random((16, 16, 16))
    masked = volume.copy()
    masked[:, :8] = np.nan
    panel = reconstruction_panel(volume, masked, volume, volume)
    assert panel.shape == (16 * 3 + 2 * 4, 16 * 4 + 3 * 4, 3)
    tile = panel[:16, 20:36]
    grey = (tile == tile[..., :1]).all(axis=-1)
    assert grey[:8].all() and not grey[8:].any()  # anterior is up and stays visible


def test_the_prediction_is_drawn_with_the_grey_window_of_the_input():
    volume = np.linspace(0.0, 1.0, 16**3).reshape(16, 16, 16)
    panel = reconstruction_panel(volume, volume, 0.5 * volume, volume)
    input_tile, prediction_tile = panel[:16, :16, 0].astype(int), panel[:16, 40:56, 0].astype(int)
    assert np.abs(prediction_tile - input_tile / 2).max() <= 2


def test_arrays_of_different_shapes_are_rejected():
    with pytest.raises(ValueError, match="one shape"):
        overlay_panel(np.zeros((4, 4, 4)), [np.zeros((4, 4, 5), dtype=int)])
    with pytest.raises(ValueError, match="no colour"):
        overlay_panel(None, [np.full((4, 4, 4), 3)], colours=[label_colours(2)])


def test_each_column_of_a_picture_has_its_title_above_it() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    drawn = titled(picture, ["image", "", "prediction"])
    assert np.array_equal(drawn[TITLE::10, ::10], picture) and drawn.shape == (TITLE + 600, READABLE, 3)
    ink = [bool(part.any()) for part in np.split(drawn[:TITLE], 3, axis=1)]
    assert ink == [True, False, True]
    assert titled(np.zeros((10, 3 * READABLE, 3), np.uint8), ["x"]).shape == (TITLE + 10, 3 * READABLE, 3)


def test_a_reconstruction_has_titles_colour_bars_and_the_colour_of_masked_patches(
    monkeypatch,
) -> None:
    volume = np.random.default_rng(0).normal(size=(12, 12, 12))
    masked, written = np.where(volume > 0, np.nan, volume), []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: (written.append(a[2]), text(*a, **k))[1])
    titles = ["input", "masked", "prediction", "importance"]
    panel = reconstruction_panel(volume, masked, volume, volume - volume.min(), titles=titles)
    high = np.percentile(volume - volume.min(), 99.5)
    assert {*titles, f"prepared intensity:  {volume.min():.2g}", "importance:  0", f"{high:.2g}"} <= set(written)
    bars = panel[-TITLE:][TITLE // 2]
    grey = (bars[:, 0] == bars[:, 1]) & (bars[:, 1] == bars[:, 2])
    assert (bars[grey] > 0).any() and (bars[~grey, 0] >= bars[~grey, 2]).all() and (~grey).sum() > 2 * TITLE
    assert READABLE / 2 < panel.shape[1] <= 1600
    assert (reconstruction_panel(volume, volume, volume, volume, titles=titles).shape[0]) == panel.shape[0] - TITLE


def test_a_legend_has_each_name_after_its_colour_in_as_many_rows_as_it_needs() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    colours = np.array([[9, 8, 7], [250, 3, 4], [1, 99, 2]], np.uint8)
    drawn = with_legend(picture, ["csf", "grey matter", "white matter"], colours)
    assert np.array_equal(drawn[:600:10, ::10], picture) and drawn.shape == (600 + TITLE, READABLE, 3)
    first = [np.argwhere((drawn[600:] == colour).all(axis=2))[0, 1] for colour in colours]
    assert first[0] < first[1] < first[2]
    for left, right in zip(first, [*first[1:], READABLE], strict=True):
        assert (drawn[600:, left + TITLE : right] > 200).any()  # the white of its name
    many = with_legend(picture, [f"structure {k}" for k in range(20)], np.full((20, 3), 77, np.uint8))
    assert (many.shape[0] - 600) % TITLE == 0 and many.shape[0] > 600 + TITLE and many.shape[1] == READABLE
    assert titled(drawn, ["x"]).shape == (TITLE + len(drawn), READABLE, 3)
