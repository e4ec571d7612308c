"""Numbers that are none: what is not finite, or cannot be what its author meant, becomes no result."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from untrained import DATA, WINDOW, a_scan, call

from asa.cli import embed, predict
from asa.config import build
from asa.data.io.tables import read_header, read_rows
from asa.inference.layout import Layout
from asa.inference.scans import Scan, predict_each
from asa.restoration.images import write_picture
from asa.training.checkpoint import save_checkpoint

VIT = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}
SCANS = {"channels": ["t1"], "prepare": {"crop": "foreground"}}
CLASSIFIER = {"_target_": "asa.models.classifier.asa_classifier_tiny", **VIT}
TASKS = {
    "segmentation": (
        {"_target_": "asa.models.unet.unet_tiny", "out_channels": 4, "feature_size": 4, "img_size": WINDOW},
        DATA,
    ),
    "classification": ({**CLASSIFIER, "classes": 2}, {**SCANS, "classes": ["a", "b"]}),
    "regression": (
        {"_target_": "asa.models.classifier.asa_regressor_tiny", **VIT, "mean": 50.0, "sd": 9.0},
        {**SCANS, "number": {"column": "age", "mean": 50.0, "sd": 9.0}},
    ),
    "pretraining": ({"_target_": "asa.models.sa_swin.sa_swin_tiny"}, {"channels": ["t1"], "prepare": {"midway": True}}),
    "restoration": (
        {"_target_": "asa.restoration.rat.rat_tiny", "in_channels": 1},
        {"window": None, "regions": None, "subject": None},
    ),
}


def trained(folder: Path, task: str, value: float | None = None) -> Path:
    """An untrained network of a task; every weight is `value`, if it is given."""
    model, data = TASKS[task]
    torch.manual_seed(0)
    shell = nn.Module()
    shell.model = build(model)
    for parameter in shell.parameters() if value is not None else ():
        nn.init.constant_(parameter, value)
    save_checkpoint(folder, 1, shell, {"model": model, "task": task, "data": data}, {}, keep=1)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_network_whose_output_is_not_finite_predicts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    a_scan(scans)
    if task == "restoration":
        pytest.importorskip("PIL")
        scans = tmp_path / "images"
        write_picture(scans / "a.png", np.random.default_rng(0).uniform(size=(1, 32, 32)))
    for name, value, code in (("finite", None, 0), ("nan", float("nan"), 1), ("huge", 1e30, 1)):
        run, out = trained(tmp_path / name, task, value), tmp_path / f"out-{name}"
        arguments = [f"checkpoint={run}", f"input={scans}", f"out={out}", "predict.device=cpu"]
        assert call(predict, monkeypatch, *arguments) == code
        shown = "".join(capsys.readouterr())
        assert ("a: failed: the network's output has values that are not finite" in shown) == bool(code), shown
        assert [path.name for path in out.glob("*a*.*") if path.suffix in (".gz", ".png")] == [] or code == 0


def test_features_that_are_not_finite_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, scan = trained(tmp_path / "run", "classification", float("nan")), a_scan(tmp_path)
    arguments = [f"checkpoint={run}", f"input={scan}", f"out={tmp_path}/out", "device=cpu"]
    assert call(embed, monkeypatch, *arguments) == 1
    assert "a: failed: the network's output has values that are not finite" in "".join(capsys.readouterr())
    assert not (tmp_path / "out" / "features.csv").exists()


def test_a_prepared_scan_that_is_not_finite_is_named_and_the_others_are_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Recorder:
        seen: ClassVar[list[str]] = []
        preprocessor = type("Any", (), {"channels": ["t1"]})

        def predict_stored(self, id: str, *prepared: object) -> None:
            self.seen.append(id)

        def finish(self, found: object) -> str:
            return "done"

    def prepared(value: float):
        image = np.zeros((1, 4, 4, 4), np.float16)
        image[0, 1, 2, 3] = value
        return lambda: (image, {}, None)

    values = {"a": float("nan"), "b": 1.0, "c": float("inf")}
    scans = [Scan(id, {}, prepared(value)) for id, value in values.items()]
    with pytest.raises(ValueError, match="2 scans failed"):
        predict_each(Recorder(), scans, Layout(tmp_path))
    assert Recorder.seen == ["b"]
    assert "a: failed: the prepared scan has values that are not finite" in "".join(capsys.readouterr())


@pytest.mark.parametrize(("name", "text", "line"), [
    ("t.csv", "id,age,sex\ns0,20,5,m\n", 2), ("t.csv", "id,age,sex\ns0,20,m\ns1,20,5,m\n", 3),
    ("t.csv", "id,f_0,f_1\ns0,0,123,0,456\n", 2), ("t.csv", "id,age\ns0,20,\n", 2), ("t.csv", "id,age\ns0\n", 2),
    ("t.tsv", "id\tage\n\ns0\t20\t5\n", 3), ("t.csv", 'id,age\n"s\n0",20,5\n', 3),
])  # fmt: skip
def test_a_row_with_another_number_of_cells_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, line: int
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: line {line} has \d cells, and the table \d columns: "):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.csv", "id;age\ns0;20,5\n", "separated by semicolons, and have to be by commas"),
        ("t.csv", "id\tage\ns0\t20\n", "separated by tabs, and have to be by commas"),
        ("t.TSV", "id,age\ns0,20\n", "separated by commas, and have to be by tabs"),
    ],
)
def test_columns_separated_otherwise_are_named(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: its columns are {reason}"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("text", ["id,age,\ns0,20,\n", 'id,age\n\ns0,"20"\n\n', "id,age,note\ns0,20,\n"])
def test_empty_cells_and_lines_are_no_missing_cells(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert [(row["id"], row["age"]) for row in read_rows(tmp_path / "t.csv")] == [("s0", "20")]


def parquet(path: Path, **columns: object) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table(columns), path, compression="zstd")
    return path


def test_a_parquet_that_unpacks_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = arrow.array(np.zeros(1_500_000))
    bombs = [
        parquet(tmp_path / "rows.parquet", id=rows, age=rows),
        parquet(tmp_path / "nested.parquet", id=arrow.array([[0] * 3_000_000])),
        parquet(tmp_path / "long.parquet", id=arrow.array(["x" * 50_000_000, "y" * 50_000_000])),
    ]
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda *_: pytest.fail("was read"))
    for path in bombs:
        assert path.stat().st_size < 100_000
        with pytest.raises(ValueError, match=rf"^{path}: \d+ cells and \d+ bytes in a file of \d+: write it as CSV"):
            read_rows(path)


def test_a_long_text_that_is_repeated_takes_its_memory_once(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    texts = arrow.DictionaryArray.from_arrays(arrow.array(np.zeros(100_000, np.int32)), ["x" * 1_000_000])
    path = parquet(tmp_path / "t.parquet", id=texts)  # 100 GB of text
    rows = read_rows(path)
    assert len(rows) == 100_000 and len({id(row["id"]) for row in rows}) == 1


def test_parquet_holds_what_csv_does(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", id=["a", "b ", None], age=[1, None, 3], x=[0.5, float("nan"), None])
    expected = [("a", "1", "0.5"), ("b", "", ""), ("", "3", "")]
    assert [tuple(row.values()) for row in read_rows(path)] == expected
    assert read_rows(parquet(tmp_path / "none.parquet", id=np.array([], dtype=str))) == []
    path.write_bytes(path.read_bytes()[:-9] + b"xxxxxPAR1")
    for read in (read_rows, read_header):
        with pytest.raises(ValueError, match=rf"^{path}: not a Parquet file"):
            read(path)
