"""The quality control page: one row per scan, failures first, escaped names, correct thumbnails."""

import csv
import io
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from asa.data.preprocessing.scan import ScanQuality, Thumbnail
from asa.reporting.figures import MIDLINE, OUTLINE, encode_png, thumbnail_row
from asa.reporting.quality_control import QualityControlReport

D, H, W = 40, 48, 32
SIDE = 96  # two pixels a voxel
GAP = 4


def planes(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return volume[D // 2], volume[:, H // 2], volume[:, :, W // 2]


def box_thumbnails(midline=((15.5, 15.5), (15.5, 15.5))) -> Thumbnail:
    brain = np.zeros((D, H, W), dtype=bool)
    brain[8:30, 10:40, 6:26] = True
    gray = np.where(brain, 100, 0).astype(np.uint8)
    return Thumbnail(planes(gray), planes(brain), (1.0, 1.0, 1.0), midline)


def scan(id="sub-01", reason="", warnings=(), facts=None, thumbnail=None, subject="s", site="") -> ScanQuality:
    return ScanQuality(id, subject, site, reason, list(warnings), facts or {}, thumbnail)


def report(folder: Path, *scans: ScanQuality, settings=None) -> tuple[str, list[dict[str, str]]]:
    """The page and the table of a quality control."""
    writer = QualityControlReport(folder)
    for one in scans:
        writer.add(one)
    writer.finish(settings or {})
    return (folder / "quality_control.html").read_text(), list(
        csv.DictReader(io.StringIO((folder / "quality_control.csv").read_text()))
    )


def drawn(row: np.ndarray, colour: np.ndarray, plane: int) -> np.ndarray:
    """Where a cell of a thumbnail row holds a colour."""
    cell = row[:, plane * (SIDE + GAP) :][:, :SIDE]
    return (cell == colour).all(axis=-1)


# ------------------------------------------------------------------------------------------ thumbnails


def test_the_outline_lies_on_the_border_of_the_mask():
    thumbnail = box_thumbnails()
    row = thumbnail_row(thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, side=SIDE)
    for plane, mask in enumerate(thumbnail.brain):
        inside = mask[::-1, ::-1].repeat(2, axis=0).repeat(2, axis=1)
        core = inside.copy()
        core[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        top, left = (SIDE - inside.shape[0]) // 2, (SIDE - inside.shape[1]) // 2
        expected = np.zeros((SIDE, SIDE), dtype=bool)
        expected[top : top + inside.shape[0], left : left + inside.shape[1]] = inside & ~core
        np.testing.assert_array_equal(drawn(row, OUTLINE, plane), expected)


@pytest.mark.parametrize("ends", [(15.5, 15.5), (4.0, 4.0), (10.0, 22.0)])
def test_the_mid_sagittal_plane_is_drawn_at_its_position(ends):
    thumbnail = box_thumbnails(midline=(ends, (20.0, 20.0)))
    row = thumbnail_row(
        thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, midline=thumbnail.midline, side=SIDE
    )
    for plane, length, (first, last) in ((0, H, ends), (1, D, (20.0, 20.0))):
        y, x = np.nonzero(drawn(row, MIDLINE, plane))
        assert len(y) > length  # more than half of two pixels a voxel
        along = length - 1 - ((y - (SIDE - 2 * length) // 2 + 0.5) / 2 - 0.5)  # superior and anterior are up
        across = W - 1 - ((x - (SIDE - 2 * W) // 2 + 0.5) / 2 - 0.5)  # the patient's right is on the left
        np.testing.assert_allclose(across, first + (last - first) * along / (length - 1), atol=0.26)
    assert not drawn(row, MIDLINE, 2).any()


@pytest.mark.parametrize("midline", [None, ((-9.0, -5.0), (90.0, 90.0)), ((math.nan, 1.0), (math.nan, math.nan))])
def test_a_plane_outside_the_slices_is_not_drawn(midline):
    thumbnail = box_thumbnails(midline)
    row = thumbnail_row(
        thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, midline=thumbnail.midline, side=SIDE
    )
    assert not any(drawn(row, MIDLINE, plane).any() for plane in range(3))


def test_slices_have_true_proportions_for_any_voxel_size():
    for depth in (1.0, 2.0):
        thumbnail = replace(box_thumbnails(), spacing=(depth, 1.0, 1.0))
        row = thumbnail_row(thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, side=SIDE)
        assert row.shape == (SIDE, 3 * SIDE + 2 * GAP, 3)
        filled = np.argwhere(drawn(row, OUTLINE, 1))
        height, width = np.ptp(filled, axis=0) + 1
        assert height / width == pytest.approx(22 * depth / 20, rel=0.06)


def test_the_patients_right_and_anterior_are_on_the_left_of_the_image():
    thumbnail = box_thumbnails(None)
    for values in thumbnail.grey[:2]:
        values[:, 20:] = 250  # right
    thumbnail.grey[2][:, 30:] = 250  # front
    row = thumbnail_row(thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, side=SIDE)
    for plane in range(3):
        columns = np.nonzero((row[30:, plane * (SIDE + GAP) :][:, :SIDE] == 250).all(axis=-1))[1]
        assert columns.size and columns.max() < SIDE / 2 + 4


# ---------------------------------------------------------------------------------------------- the page


def test_every_scan_has_a_row_and_every_readable_scan_a_thumbnail(tmp_path):
    page, table = report(
        tmp_path, *(scan(f"sub-{k}", thumbnail=None if k == 2 else box_thumbnails()) for k in (3, 1, 2))
    )
    assert [row["id"] for row in table] == ["sub-1", "sub-2", "sub-3"]
    assert page.count("<article") == 3 and "could not be read" in page
    sources = re.findall(r'<img loading="lazy" src="([^"]+)"', page)
    assert sources == ["thumbnails/sub-1.png", "thumbnails/sub-3.png"]
    assert all((tmp_path / source).read_bytes().startswith(b"\x89PNG") for source in sources)


def test_thumbnails_are_written_at_once_and_the_arrays_are_not_kept(tmp_path):
    writer = QualityControlReport(tmp_path)
    writer.add(scan("a", thumbnail=box_thumbnails()))
    thumbnail = box_thumbnails()
    row = thumbnail_row(thumbnail.grey, thumbnail.brain, spacing=thumbnail.spacing, midline=thumbnail.midline)
    assert (tmp_path / "thumbnails/a.png").read_bytes() == encode_png(row)
    assert all(kept.thumbnail is None for kept in writer._scans.values())


def test_failed_scans_come_first_then_those_with_warnings(tmp_path):
    page, table = report(
        tmp_path,
        scan("a"),
        scan("b", warnings=["odd", "dark"]),
        scan("c", reason="cut"),
        scan("d"),
        scan("e", "x"),
    )
    order = re.findall(r'class="status">\W*(\w+)</span>(\w)<', page)
    assert order == [("failed", "c"), ("failed", "e"), ("warning", "b"), ("good", "a"), ("good", "d")]
    assert [row["status"] for row in table] == ["good", "warning", "failed", "good", "failed"]
    assert table[1]["warnings"] == "odd; dark" and table[2]["reason"] == "cut"
    for count, word in ((2, "failed"), (1, "with warnings"), (2, "good")):
        assert f"<b>{count}</b>{word}</a>" in page


def test_names_and_reasons_are_escaped(tmp_path):
    evil = "<script>alert('x')</script> \"&"
    id = "a&b #1 50% 'q' <i>"
    page, table = report(
        tmp_path, scan(id, evil, [evil], {evil: evil}, box_thumbnails(), evil, evil), settings={evil: evil, "n": [evil]}
    )
    assert "<script" not in page and "<i>" not in page
    (source,) = re.findall(r'src="([^"]+)"', page)
    assert not set(source) & set("&#<>' ") and (tmp_path / unquote(source)).is_file()
    assert unquote(source) == f"thumbnails/{id}.png"
    assert table[0] == dict.fromkeys(("subject", "site", "reason", "warnings", evil), evil) | {
        "id": id,
        "status": "failed",
    }


def test_a_file_name_that_is_not_valid_unicode_is_supported(tmp_path):
    page, table = report(tmp_path, scan("caf\udce9", thumbnail=box_thumbnails()))
    assert "thumbnails/caf%E9.png" in page and (tmp_path / "thumbnails/caf\udce9.png").is_file()
    assert table[0]["id"] == "caf\\udce9"


def test_the_table_has_every_fact_in_order_of_first_appearance(tmp_path):
    _, table = report(
        tmp_path,
        scan("b", facts={"new": 3, "shape": "4x4x4"}),
        scan("a", facts={"shape": "5x5x5", "yaw_degrees": 1.5}),
    )
    assert list(table[0])[6:] == ["shape", "yaw_degrees", "new"]
    assert [list(row.values())[6:] for row in table] == [["5x5x5", "1.5", ""], ["4x4x4", "", "3"]]


def test_values_that_are_not_finite_are_empty_cells(tmp_path):
    facts = {"a_mm": math.nan, "b_mm": math.inf, "c": None, "d": np.float32(math.nan), "e": np.float32(0.1)}
    page, table = report(tmp_path, scan(facts=facts))
    assert list(table[0].values())[6:] == ["", "", "", "", "0.1"]
    assert not re.search(r"\b(nan|inf|None)\b", page[page.index("<main>") :], re.IGNORECASE)


def test_the_summary_lists_medians_and_ranges_and_links_to_the_extreme_scans(tmp_path):
    yaws = {"a": 0.5, "b": -7.25, "c": 2.0, "d": math.nan}
    facts = {
        id: {"yaw_degrees": yaw, "brain_ml": 1400.4, "seconds_strip": 30 + k}
        for k, (id, yaw) in enumerate(yaws.items())
    }
    page, _ = report(tmp_path, *(scan(id, facts=facts[id]) for id in yaws), scan("e", reason="cut"))
    found = page[page.index("Measurements") : page.index("Time per stage")]
    times = page[page.index("Time per stage") : page.index("<article")]
    assert ">yaw<" in found and "<b>0.5°</b>" in found and "<td>3</td>" in found
    assert '<a href="#scan-1">\N{MINUS SIGN}7.2°</a>' in found and '<a href="#scan-2">2.0°</a>' in found
    assert "<b>1400 ml</b>" in found and "strip" not in found
    assert ">strip<" in times and "<b>31.5 s</b>" in times and '<a href="#scan-3">33.0 s</a>' in times
    assert re.search(r'id="scan-1">.*?</span>b<', page, re.DOTALL)


def test_the_page_is_self_contained_and_states_its_limits(tmp_path):
    page, _ = report(
        tmp_path, scan(thumbnail=box_thumbnails()), settings={"check": "only", "spacing": 1.0, "strip": None}
    )
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert "left-right flip cannot be seen" in page and "orientation codes" in page
    assert "<dt>spacing</dt><dd>1.0</dd>" in page and "<dt>strip</dt><dd>null</dd>" in page


def test_the_order_in_which_scans_finish_does_not_matter(tmp_path):
    scans = [scan(f"s{k}", facts={f"f{k}": k}, warnings=["w"] * (k % 2)) for k in range(5)]
    assert report(tmp_path / "one", *scans) == report(tmp_path / "two", *scans[::-1])


# -------------------------------------------------------------------------------------------- the folder


def test_an_earlier_quality_control_is_removed_when_another_starts(tmp_path):
    report(tmp_path, scan("old", thumbnail=box_thumbnails()))
    (tmp_path / "thumbnails/.cut.png.part").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    writer = QualityControlReport(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "quality_control.html", "thumbnails"]
    assert not list((tmp_path / "thumbnails").iterdir())
    assert "not finished" in (tmp_path / "quality_control.html").read_text()
    writer.add(scan("new", thumbnail=box_thumbnails()))
    QualityControlReport(tmp_path)  # as after an interruption
    assert not list((tmp_path / "thumbnails").iterdir())


def test_a_folder_with_other_content_is_rejected_and_not_changed(tmp_path):
    image = tmp_path / "thumbnails" / "mine.png"
    image.parent.mkdir()
    image.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"not empty, and not an earlier quality control; give a new folder"):
        QualityControlReport(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [image]
    with pytest.raises(ValueError, match=r"mine\.png: is a file"):
        QualityControlReport(image)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib.figure"])
def test_a_missing_extra_is_named_before_the_work_starts(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module} is not installed.*pip install "asa-mri\[report\]"'):
        QualityControlReport(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_numbers_of_voxels_are_whole_in_the_page_and_a_label_may_be_called_like_a_unit(tmp_path: Path) -> None:
    scans = [scan(f"s{k}", facts={"voxels_lesion_mm": 1000 + k}, thumbnail=box_thumbnails()) for k in range(3)]
    page, _ = report(tmp_path / "qc", *scans)
    assert "voxels lesion mm" in page and not re.search(r"100\d(\.\d| mm)", page)
    assert all(page.count(f">{1000 + k}<") >= 2 for k in range(3))  # over the cohort, and of each scan


@pytest.mark.parametrize("count", [3, 148])
def test_the_sizes_of_many_labels_are_folded_and_none_is_lost(tmp_path: Path, count: int) -> None:
    sizes = {f"voxels_label{k}": 1000 + k for k in range(count)}
    scans = [scan(f"s{k}", facts={"brain_ml": 1200.0, **sizes}, thumbnail=box_thumbnails()) for k in range(2)]
    page, table = report(tmp_path / "qc", *scans)
    assert all(table[0][key] == str(size) for key, size in sizes.items())
    folded = re.findall(r"<details.*?</details>", page, flags=re.DOTALL)
    shown = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert all(page.count(f"voxels label{k}<") == 3 for k in range(count))  # over the cohort, and of each scan
    assert "brain volume" in shown and page.count("<details") == page.count("</details>")
    if count == 3:
        assert not folded and "voxels label0" in shown
    else:
        assert len(folded) == 3 and "voxels label" not in shown
        assert shown.index("<img") < 14000  # characters of style and headings: the first picture is near the top
