"""From scans with a planted age and site to features, and from these to what a linear map reads."""

import csv
import html
import json
import math
import re
import shutil
import sys
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet
import pytest
from stores import read_tree, with_subjects, write_tree

from asa import features
from asa.cli import embed, evaluate, prepare, pretrain
from asa.data.io.nifti import write_image
from asa.data.io.tables import read_rows, write_numbers
from asa.data.splits import read_split
from asa.data.store import Store
from asa.inference.features import FeatureExtractor
from asa.reporting.plots import _probe_figure, write_probe

SCANS = 16
SMALL = ("model=asa_tiny", "crop=32", "+model.embed_dim=24", "+model.num_heads=2", "model.decoder_depth=1")
QUICK = ("train.steps=1", "train.batch_size=2", "optim.warmup=0", "loader.workers=0", "train.device=cpu")


def brain(path: Path, ventricle: float, noise: float, seed: int) -> None:
    """A ball with a dark middle; `ventricle` is its radius."""
    axes = np.meshgrid(*[np.linspace(-1.05, 1.05, 32)] * 3, indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    image = np.where(radius < ventricle, 300.0, 900.0) + np.random.default_rng(seed).normal(0, noise, radius.shape)
    write_image(path, np.where(radius < 1, image.clip(min=1), 0), np.diag([4.0, 4.0, 4.0, 1.0]))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans with older subjects' larger ventricles, and one site's noise; a store, a run, and a table."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["subject,age,sex,site"]
    for k in range(SCANS):
        age, site = 20 + 4 * ((5 * k) % SCANS), k % 2
        brain(folder / "raw" / f"s{k:02}_T1.nii.gz", 0.1 + age / 120, 20 + 150 * site, k)
        lines.append(f"s{k:02},{age},{'fm'[k // 2 % 2]},{'AB'[site]}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    store = [f"data.root={folder / 'raw'}", "data=folder", "data.images={t1: '*_T1.nii.gz'}", f"out={folder / 'store'}"]
    assert prepare.main(store) == 0
    assert pretrain.main([f"data.store={folder / 'store'}", f"out={folder / 'run'}", *SMALL, *QUICK]) == 0
    return folder


def embedded(cohort: Path, out: Path, *settings: str) -> dict[str, dict[str, str]]:
    """The table of an asa-embed."""
    given = (f"checkpoint={cohort / 'run'}", f"out={out}", "device=cpu", *settings)
    assert embed.main([*given]) == 0
    with (out / "features.csv").open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_the_features_of_a_store_come_without_warnings(cohort: Path, tmp_path: Path, capsys) -> None:
    capsys.readouterr()
    embedded(cohort, tmp_path, f"input={cohort / 'store'}")
    assert "warning" not in (printed := capsys.readouterr().out) and f": {SCANS} scans" in printed
    with pytest.raises(FileNotFoundError, match=r"^nothere.nii: no such file; check the path, or leave this scan out$"):
        features("nothere.nii", cohort / "run", device="cpu")


def test_a_table_may_lie_in_the_folder_of_the_scans(cohort: Path, tmp_path: Path) -> None:
    shutil.copy(cohort / "raw" / "s00_T1.nii.gz", tmp_path)
    assert embedded(cohort, tmp_path, f"input={tmp_path}").keys() == {"s00_T1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.csv", "s00_T1.nii.gz"]


def test_a_crop_that_leaves_much_of_the_head_out_is_told_with_one_that_does_not(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded(cohort, tmp_path, f"input={cohort / 'store'}", "img_size=16")
    told = [line for line in capsys.readouterr().out.splitlines() if "of the head is outside" in line]
    assert len(told) == SCANS and all("the 16 x 16 x 16 voxels that are read: img_size=[" in line for line in told)


def test_a_volume_without_a_head_is_not_said_to_be_outside_the_crop(cohort: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureExtractor(cohort / "run", device="cpu").tokens(np.zeros((1, 48, 48, 48), np.float32))


def vector(row: dict[str, str], part: str) -> np.ndarray:
    return np.array([float(value) for name, value in row.items() if name.startswith(f"{part}_")])


def test_a_row_is_the_mean_of_the_heads_tokens_for_a_store_and_for_raw_scans(cohort: Path, tmp_path: Path) -> None:
    stored = embedded(cohort, tmp_path / "a", f"input={cohort / 'store'}")
    raw = embedded(cohort, tmp_path / "b", f"input={cohort / 'raw'}", "images={t1: '*_T1.nii.gz'}")
    assert len(stored) == len(raw) == SCANS
    volume = np.asarray(Store(cohort / "store").image("s03"), dtype=np.float32)
    extractor = FeatureExtractor(cohort / "run", device="cpu")
    image, tokens = extractor.crop(volume)[0], features(cohort / "raw" / "s03_T1.nii.gz", cohort / "run", device="cpu")
    total, weight = np.zeros(24), 0.0
    for d, h, w in np.ndindex(4, 4, 4):  # patches of 8^3 of a crop of 32^3
        inside = (image[8 * d : 8 * d + 8, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] != 0).mean()
        total, weight = total + inside * tokens[:, d, h, w], weight + inside
    np.testing.assert_allclose(vector(stored["s03"], "whole"), total / weight, atol=2e-3)
    np.testing.assert_allclose(vector(raw["s03"], "whole"), vector(stored["s03"], "whole"), atol=2e-3)


def test_each_scan_is_an_array_too(cohort: Path, tmp_path: Path) -> None:
    rows = embedded(cohort, tmp_path, f"input={cohort / 'store'}", "arrays=true")
    assert sorted(path.stem for path in tmp_path.glob("*.npy")) == sorted(rows)
    for id, row in rows.items():
        array = np.load(tmp_path / f"{id}.npy", allow_pickle=False)
        assert array.dtype == np.float32 and array.shape == (24,)
        np.testing.assert_allclose(array, vector(row, "whole"), rtol=1e-5)


def test_a_part_of_the_runs_split_is_embedded(cohort: Path, tmp_path: Path) -> None:
    rows = embedded(cohort, tmp_path, f"input={cohort / 'store'}", "part=validation")
    assert sorted(rows) == sorted(read_split(cohort / "run" / "split.json")["validation"])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_scans_embedded_later_are_added(ending: str, cohort: Path, tmp_path: Path) -> None:
    table, raw = tmp_path / f"f.{ending}", tmp_path / "raw"
    raw.mkdir()
    for id in ("s03", "s04"):
        shutil.copy(cohort / "raw" / f"{id}_T1.nii.gz", raw / f"{id}.nii.gz")
    given = (f"checkpoint={cohort / 'run'}", "device=cpu", f"out={table}")
    assert embed.main([*given, f"input={raw / 's04.nii.gz'}"]) == 0
    (before,) = read_rows(table)
    assert embed.main([*given, f"input={raw / 's03.nii.gz'}"]) == 0
    (first, second), whole = read_rows(table), table.read_bytes()
    assert first["id"] == "s03" and first["whole_0"] != before["whole_0"] and second == before
    write_image(raw / "s05.nii.gz", np.full((4, 4, 4), np.nan), np.eye(4))
    assert embed.main([*given, f"input={raw / 's05.nii.gz'}"]) == 1
    assert table.read_bytes() == whole


def test_folds_are_of_the_stores_subjects(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subjects = {f"s{k:02}": f"p{k // 2}" for k in range(SCANS)}
    copy = with_subjects(cohort / "store", tmp_path / "store", subjects)
    for _ in range(2):
        rows = embedded(cohort, tmp_path, f"input={copy}")
    assert {id: row["subject"] for id, row in rows.items()} == subjects
    (tmp_path / "t.csv").write_text((cohort / "table.csv").read_text().replace("subject,", "id,"))
    given = (f"predictions={tmp_path}", f"truth={tmp_path / 't.csv'}", "policy=probe", "column=age", "folds=2")
    assert evaluate.main([*given, f"out={tmp_path / 'out'}"]) == 0
    assert f"{SCANS} scans of {SCANS // 2} subjects" in capsys.readouterr().out
    given = (f"checkpoint={cohort / 'run'}", f"input={copy}", f"out={tmp_path / 'f.parquet'}", "device=cpu")
    assert embed.main([*given]) == 0
    assert list(read_rows(tmp_path / "f.parquet")[0]) == [name for name in rows["s00"] if name != "subject"]


def test_a_folder_of_scans_needs_no_pattern(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    shutil.copy(cohort / "raw" / "s03_T1.nii.gz", tmp_path / "raw" / "=s03.nii.gz")
    assert list(embedded(cohort, tmp_path / "out", f"input={tmp_path / 'raw'}")) == ["'=s03"]  # a spreadsheet's text


def test_the_difference_of_the_sides_is_left_minus_right_and_both_want_midway(
    cohort: Path, tmp_path: Path, capsys
) -> None:
    row = embedded(cohort, tmp_path, f"input={cohort / 'store'}", "of=sides")["s00"]
    assert "prepared without prepare.midway=true" in capsys.readouterr().err
    np.testing.assert_allclose(vector(row, "left") - vector(row, "right"), vector(row, "difference"), atol=1e-4)


def test_the_features_of_a_label_are_the_mean_over_its_voxels(cohort: Path, tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    raw.mkdir()
    for id in ("s00", "s01"):
        shutil.copy(cohort / "raw" / f"{id}_T1.nii.gz", raw)
        label = np.zeros((32, 32, 32), np.uint8)
        label[8:20, 10:22, 10:22], label[9:12, 20:25, 12:20] = 3, 7
        nibabel.save(nibabel.Nifti1Image(label, np.diag([4.0, 4.0, 4.0, 1.0])), raw / f"{id}_seg.nii.gz")
    given = [f"data.root={raw}", "data=folder", "data.images={t1: '*_T1.nii.gz'}", "data.label='*_seg.nii.gz'"]
    assert prepare.main([*given, "labels={3: a, 7: b}", f"out={store}"]) == 0
    row = embedded(cohort, tmp_path / "out", f"input={store}", "of=labels")["s01"]
    extractor = FeatureExtractor(cohort / "run", device="cpu")
    tokens = extractor.tokens(np.asarray(Store(store).image("s01"), dtype=np.float32))
    classes = extractor.crop(np.asarray(Store(store).label("s01"), dtype=np.float32))[0]
    for name, index in (("a", 1), ("b", 2)):
        total, weight = np.zeros(24), 0.0
        for d, h, w in np.ndindex(4, 4, 4):
            part = (classes[8 * d : 8 * d + 8, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] == index).mean()
            total, weight = total + part * tokens[:, d, h, w], weight + part
        np.testing.assert_allclose(vector(row, name), total / weight, atol=2e-3)
    assert {column.partition("_")[0] for column in row} == {"id", "a", "b"}


@pytest.mark.parametrize("ending", ["parquet", "tsv"])
def test_a_table_of_another_kind_holds_the_same_and_is_probed(ending: str, cohort: Path, tmp_path: Path) -> None:
    rows = embedded(cohort, tmp_path, f"input={cohort / 'store'}", "of=sides")
    table = tmp_path / f"features.{ending}"
    assert embed.main([f"checkpoint={cohort / 'run'}", f"input={cohort / 'store'}", f"out={table}", "of=sides"]) == 0
    other = {row["id"]: row for row in read_rows(table)}
    assert list(other) == list(rows) and list(other["s00"]) == list(rows["s00"])
    for id, row in rows.items():
        np.testing.assert_allclose(vector(other[id], "left"), vector(row, "left"), rtol=1e-5, atol=1e-6)
    given = (f"truth={cohort / 'table.csv'}", "policy=probe", "folds=4", "column=age")
    for source, out in ((tmp_path, "a"), (table, "b")):
        assert evaluate.main([*given, f"predictions={source}", f"out={tmp_path / out}"]) == 0
    one, two = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("a", "b"))
    assert two.keys() == one.keys() and two["r2"] == pytest.approx(one["r2"], rel=1e-3)


def test_parquet_keeps_types_and_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_numbers(path, ["x", "y"], {"a": [1 / 3, math.nan], "=b": [2.0, 3.0]})
    table = pyarrow.parquet.read_table(path)
    assert [str(field.type) for field in table.schema] == ["string", "float", "float"]
    assert table["x"].to_pylist() == [float(np.float32(1 / 3)), 2.0] and table["y"].null_count == 1
    assert read_rows(path) == [
        {"id": "a", "x": str(float(np.float32(1 / 3))), "y": ""},
        {"id": "=b", "x": "2", "y": "3"},  # as a CSV has them
    ]
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match="t.parquet: not a Parquet file"):
        read_rows(path)


def test_parquet_without_its_package_names_the_extra_before_any_scan(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    given = (f"checkpoint={cohort / 'run'}", f"input={cohort / 'store'}", f"out={tmp_path / 'f.parquet'}")
    assert embed.main([*given]) == 1
    captured = capsys.readouterr()
    assert 'pip install "asa-mri[parquet]"' in captured.err and "scan" not in captured.out


def test_a_planted_age_is_read_and_a_planted_site_raises_an_alarm(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded(cohort, tmp_path / "features", f"input={cohort / 'store'}")
    given = (f"predictions={tmp_path / 'features'}", f"truth={cohort / 'table.csv'}", "policy=probe", "folds=4")
    assert evaluate.main([*given, "column=age", "site=site", "group=sex", f"out={tmp_path / 'age'}"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "age" / "summary.json").read_text())
    assert summary["r2"] > 0.5 and summary["high"] < summary["of_the_mean"]
    assert summary["groups"].keys() == {"f", "m"} and summary["groups"]["f"]["gap"].keys() == {"gap", "low", "high"}
    assert summary["site"]["low"] > 0.5
    assert "ALARM: the features tell sites apart" in printed and "  sex f: mean absolute error" in printed
    rows = list(csv.DictReader((tmp_path / "age" / "predictions.csv").open(newline="")))
    assert [row["id"] for row in rows] == [f"s{k:02}" for k in range(SCANS)] and float(rows[0]["age"]) == 20
    page = html.unescape((tmp_path / "age" / "report.html").read_text())
    (score,) = (line for line in printed.splitlines() if line.startswith("age: "))
    assert score in page.split("<section>")[0] and '<p class="warning">ALARM' in page
    assert page.count("<img") == 1 and "predicted - true by site" in page


def test_the_figure_of_a_probe_has_predicted_against_true_and_residuals_by_site() -> None:
    truth, predicted = np.array([20.0, 30.0, 40.0, 50.0]), np.array([22.0, 31.0, 38.0, 49.0])
    left, right = _probe_figure("age", truth, predicted, ("site", ["A", "B", "A", "B"])).axes
    assert np.array_equal(left.collections[0].get_offsets(), np.stack([truth, predicted], axis=1))
    assert left.get_ylabel() == "age, predicted" and np.array_equal(left.lines[0].get_xdata(), [20, 50])
    drawn = [points.get_offsets()[:, 0].tolist() for points in right.collections]
    assert drawn == [[2, -2], [1, -1]] and [text.get_text() for text in right.get_yticklabels()] == ["A (2)", "B (2)"]
    assert right.get_xlabel() == "age, predicted - true" and right.get_ylabel() == "site"


def test_a_probe_of_classes_has_a_table_of_predicted_and_true(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_probe(page, "sex", ["AUC"], ["f", "f", "m"], np.array(["f", "m", "m"]), None)
    rows = re.findall(r'<td class="text">(\w)</td><td>(\d)</td><td>(\d)</td>', page.read_text())
    assert rows == [("f", "1", "1"), ("m", "0", "1")] and "<img" not in page.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "column= has to be given"),
        ({"column": "height"}, "the columns are subject, age, sex, site"),
        ({"column": "age", "folds": "40"}, "from 2 to that of the subjects, 16"),
        ({"column": "age", "probe": "tree"}, "choose ridge, logistic or knn"),
        ({"column": "age", "probe": "logistic"}, "age has 16 values: choose ridge or knn"),
    ],
)
def test_a_probe_that_cannot_be_done_is_named(
    cohort: Path, tmp_path: Path, settings: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded(cohort, tmp_path / "features", f"input={cohort / 'store'}")
    given = {"predictions": str(tmp_path / "features"), "truth": str(cohort / "table.csv"), "policy": "probe"}
    given |= {"out": str(tmp_path / "out"), **settings}
    assert evaluate.main([f"{key}={value}" for key, value in given.items()]) == 1
    assert message in capsys.readouterr().err


def test_a_feature_that_is_no_number_is_named_with_its_scan(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "features.csv").write_text("id,whole_0\n" + "".join(f"s{k:02},{k}\n" for k in range(3)) + "s03,\n")
    given = (f"predictions={tmp_path}", f"truth={cohort / 'table.csv'}", "policy=probe", "column=age", "folds=2")
    assert evaluate.main([*given, f"out={tmp_path / 'out'}"]) == 1
    assert "s03: whole_0 is '' and not a number" in capsys.readouterr().err


@pytest.mark.parametrize("probe", ["ridge", "logistic"])
@pytest.mark.parametrize("cell", ["NA", "nan"])
def test_a_column_in_which_only_some_are_numbers_is_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str, probe: str
) -> None:
    (tmp_path / "features.csv").write_text("id,whole_0\n" + "".join(f"s{k},{k}\n" for k in range(4)))
    (tmp_path / "t.csv").write_text(f"id,age\ns0,20\ns1,30\ns2,{cell}\ns3,30\n")
    given = (f"predictions={tmp_path}", f"truth={tmp_path / 't.csv'}", "policy=probe", "column=age", "folds=2")
    assert evaluate.main([*given, f"probe={probe}", f"out={tmp_path / 'out'}"]) == 1
    assert f"t.csv: s2: age is '{cell}' and not a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("20,5", "30,25", "41,0", "30,5"), "t.tsv: age is '20,5': write decimals with a point"),
        (("a", "b", "c", "d"), "t.tsv: each age is of one subject, like 'a': classes have to repeat"),
    ],
)
def test_classes_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: tuple[str, ...], message: str
) -> None:
    (tmp_path / "features.csv").write_text("id,whole_0\n" + "".join(f"s{k},{k}\n" for k in range(4)))
    (tmp_path / "t.tsv").write_text("id\tage\n" + "".join(f"s{k}\t{cell}\n" for k, cell in enumerate(cells)))
    given = (f"predictions={tmp_path}", f"truth={tmp_path / 't.tsv'}", "policy=probe", "column=age", "folds=2")
    assert evaluate.main([*given, f"out={tmp_path / 'out'}"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert evaluate.main([*given[:2], "policy=regression", "group=sex", f"out={tmp_path / 'out'}"]) == 1
    assert "group= is for policy=probe: leave it out" in capsys.readouterr().err


def test_features_that_no_scan_has_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ages = "".join(f"s{k},{20 + k}\n" for k in range(6))
    (tmp_path / "t.csv").write_text(f"id,age\n{ages}")
    given = (f"predictions={tmp_path}", f"truth={tmp_path / 't.csv'}", "policy=probe", "column=age", "folds=2")
    for header, cells in (("whole_0", ""), ("whole_0,Left-Vent_0,Left-Vent_1", ",,")):
        rows = "".join(f"s{k},{k}{cells}\n" for k in range(6))
        (tmp_path / "features.csv").write_text(f"id,{header}\n{rows}s9,9{cells.replace(',', ',1')}\n")
        assert evaluate.main([*given, f"out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("left out, as no scan has their features: Left-Vent\n") == 1
    one, other = (line for line in printed.splitlines() if line.startswith("age: "))
    assert one == other
    (tmp_path / "features.csv").write_text("id,whole_0\ns0,\ns1,\n")
    assert evaluate.main([*given, f"out={tmp_path / 'out'}"]) == 1
    assert "features.csv: has no features of the scans in" in capsys.readouterr().err


def test_a_table_of_the_users_is_not_replaced(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(cohort / "table.csv", tmp_path)
    write_numbers(tmp_path / "table.parquet", ["age"], {"s00": [20.0]})
    for name in ("table.csv", "table.parquet"):
        before = (tmp_path / name).read_bytes()
        given = (f"checkpoint={cohort / 'run'}", f"input={cohort / 'store'}", f"out={tmp_path / name}", "device=cpu")
        assert embed.main([*given]) == 1
        assert f"{name}: exists and is no table of asa-embed" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before


def test_arrays_and_predictions_of_others_are_not_replaced(cohort: Path, tmp_path: Path, capsys) -> None:
    given = (f"checkpoint={cohort / 'run'}", "device=cpu", "arrays=true")
    scan = f"input={cohort / 'raw' / 's03_T1.nii.gz'}"
    (tmp_path / "s03_T1.npy").write_bytes(b"mine")
    assert embed.main([*given, scan, f"out={tmp_path}"]) == 1
    assert "s03_T1.npy: exists and is of no scan in features.csv" in capsys.readouterr().err
    assert (tmp_path / "s03_T1.npy").read_bytes() == b"mine" and not (tmp_path / "features.csv").exists()
    for _ in range(2):  # its own are
        assert embed.main([*given, scan, f"out={tmp_path / 'out'}"]) == 0

    (tmp_path / "features.csv").write_text("id,whole_0\n" + "".join(f"s{k:02},{k}\n" for k in range(SCANS)))
    probe = (f"predictions={tmp_path}", f"truth={cohort / 'table.csv'}", "policy=probe", "column=age", "folds=2")
    mine, out = "id,subject,age,predicted,training_mean\ns00,s00,20,30,40\n", tmp_path / "probe"
    out.mkdir()
    (out / "predictions.csv").write_text(mine)
    assert evaluate.main([*probe, f"out={out}"]) == 1
    assert "predictions.csv: exists and is no table of asa-evaluate" in capsys.readouterr().err
    assert (out / "predictions.csv").read_text() == mine and not (out / "summary.json").exists()
    (out / "predictions.csv").unlink()
    for _ in range(2):
        assert evaluate.main([*probe, f"out={out}"]) == 0


def test_a_store_prepared_in_another_way_is_refused_with_what_fits(cohort: Path, tmp_path: Path, capsys) -> None:
    manifest = read_tree(cohort / "store")
    manifest["settings"]["margin"] += 1
    write_tree(tmp_path / "store", manifest)
    given = (f"checkpoint={cohort / 'run'}", f"input={tmp_path / 'store'}", f"out={tmp_path}", "device=cpu")
    assert embed.main([*given]) == 1
    assert "predict the raw scans, or a store that was prepared as they were" in capsys.readouterr().err


def test_parts_that_are_not_there_are_refused(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = (f"checkpoint={cohort / 'run'}", f"input={cohort / 'store'}", f"out={tmp_path}", "device=cpu")
    for of, message in (("labels", "needs the labels of a store"), ("halves", "choose whole, sides or labels")):
        assert embed.main([*given, f"of={of}"]) == 1
        assert message in capsys.readouterr().err
