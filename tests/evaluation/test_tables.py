"""Predicted tables against a table of diagnoses: python -m asa evaluate policy=classification, policy=asymmetry."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from asa.config import compose
from asa.data.datasets.record import subject_of
from asa.data.io.tables import read_column, read_rows
from asa.evaluation.tables import evaluate_asymmetry, evaluate_classes, evaluate_numbers
from asa.inference.anomaly import COLUMNS
from asa.inference.whole_scans import class_cells, predictions_csv
from asa.tasks.evaluation import tables_of
from asa.tasks.prediction import add_rows
from asa.tasks.run import evaluate_task


def classes_csv(rows: list[tuple[str, str, str]], probabilities: np.ndarray) -> str:
    return predictions_csv("class", rows, [class_cells(["cn", "ad"], one) for one in probabilities])


def pairs_won(scores: list[float], positive: list[bool]) -> float:
    """The area under the ROC curve, by counting pairs."""
    won = [
        (one > other) + 0.5 * (one == other)
        for one, ill in zip(scores, positive, strict=True)
        for other, other_ill in zip(scores, positive, strict=True)
        if ill and not other_ill
    ]
    return sum(won) / len(won)


def asymmetry_table(folder: Path, scores: list[float]) -> None:
    """asymmetry.csv of the scans s0, s1, ...: `score` as given, `top` its opposite, the others constant."""
    folder.mkdir()
    rows = [(f"s{n}", score, 0.5, -score, 1.0, 0, 0, 0) for n, score in enumerate(scores)]
    add_rows(folder / "asymmetry.csv", {row[0]: dict(zip(COLUMNS, map(str, row), strict=True)) for row in rows})


def evaluate(tmp_path: Path, policy: str, truth: str) -> dict:
    (tmp_path / "truth.csv").write_text(truth)
    folders = {"predictions": tmp_path / "predicted", "truth": tmp_path / "truth.csv", "out": tmp_path / "out"}
    evaluate_task(compose("evaluate", [f"policy={policy}", *(f"{key}='{path}'" for key, path in folders.items())]))
    return json.loads((tmp_path / "out/summary.json").read_text())


def test_a_split_that_would_choose_rows_of_a_table_is_refused(tmp_path):
    config = compose("evaluate", ["policy=regression", "predictions=p", "truth=t.csv", "split_file=s.json", "out=o"])
    with pytest.raises(ValueError, match=r"split_file=s.json chooses scans of a store, and truth=t.csv is none"):
        tables_of(config, "predictions.csv")


def test_the_auc_of_asymmetry_counts_pairs_of_patients_and_healthy(tmp_path, capsys):
    scores, patient = [0.9, 0.2, 0.5, 0.5, 0.1, 0.7], [True, True, True, False, False, False]
    asymmetry_table(tmp_path / "predicted", [*scores, 0.3])
    rows = [f"s{n},{int(not ill)}" for n, ill in enumerate(patient)]
    summary = evaluate(tmp_path, "asymmetry", "\n".join(["id,health", *rows, "s6,"]))  # s6: health unknown
    assert (summary["patients"], summary["healthy"]) == (3, 3)
    results = summary["results"]
    assert results["score"]["auc"] == pytest.approx(pairs_won(scores, patient))
    assert results["top"]["auc"] == pytest.approx(1 - results["score"]["auc"])
    assert results["mean"]["auc"] == 0.5
    assert results["score"]["auc_low"] < results["score"]["auc"] < results["score"]["auc_high"]
    assert f"AUC of score  {results['score']['auc']:.3f} (" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "prefix"), [("id", "s"), ("subject", "s"), ("participant_id", "sub-")])
def test_scans_that_an_auc_leaves_out_are_counted(tmp_path, capsys, key, prefix):
    asymmetry_table(tmp_path / "predicted", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    table = (tmp_path / "predicted/asymmetry.csv").read_text().replace("\ns", f"\n{prefix}")
    (tmp_path / "predicted/asymmetry.csv").write_text(table)
    health = {0: "1", 1: "1", 3: "0", 4: "", 7: "1", 8: "0", 9: ""}  # 4 and 9 are of unknown health
    rows = [f"{prefix}{n},{value}" for n, value in health.items()]
    summary = evaluate(tmp_path, "asymmetry", "\n".join([f"{key},health", *rows]))
    counts = {"patients": 1, "healthy": 2, "without_health": 3, "without_prediction": 2}
    assert {name: summary[name] for name in counts} == counts
    shown = capsys.readouterr().out
    assert summary["notes"] == [] and "warning" not in shown
    assert "2 healthy scans and 1 of patients; left out are 3 scans without health, and 2 rows of" in shown


@pytest.mark.parametrize("theirs", [{"mine": 1}, [], {"policy": {}, "labels": {}, "regions": {}}])
def test_a_summary_of_something_else_is_not_replaced(tmp_path, theirs):
    (tmp_path / "predicted").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.json").write_text(json.dumps(theirs))
    for policy, table, truth in (
        ("classification", "id,subject,predicted,p_a,p_b\ns0,,a,0.9,0.1\ns1,,b,0.2,0.8\n", "id,class\ns0,a\ns1,b\n"),
        ("regression", "id,subject,predicted,training_mean,age\ns0,,9,15,\ns1,,21,15,\n", "id,age\ns0,9\ns1,20\n"),
    ):
        (tmp_path / "predicted/predictions.csv").write_text(table)
        with pytest.raises(ValueError, match=r"out/summary\.json: exists and is not of such an evaluation"):
            evaluate(tmp_path, policy, truth)
    asymmetry_table(tmp_path / "asymmetric", [0.1, 0.2])
    (tmp_path / "truth.csv").write_text("id,health\ns0,1\ns1,0\n")
    with pytest.raises(ValueError, match=r"out/summary\.json: exists and is not of such an evaluation"):
        evaluate_asymmetry(tmp_path / "asymmetric/asymmetry.csv", tmp_path / "truth.csv", tmp_path / "out")
    assert json.loads((tmp_path / "out/summary.json").read_text()) == theirs


def test_classes_and_asymmetry_of_scans_trained_on_are_called_optimistic_too(tmp_path, capsys):
    asymmetry_table(tmp_path / "predicted", [0.1, 0.2])
    classes = "id,subject,predicted,p_a,p_b\ns0,,a,0.9,0.1\ns1,,b,0.2,0.8\n"
    (tmp_path / "predicted/predictions.csv").write_text(classes)
    for name, policy, truth in (
        ("asymmetry.csv", "asymmetry", "id,health\ns0,1\ns1,0\n"),
        ("predictions.csv", "classification", "id,class\ns0,a\ns1,b\n"),
    ):
        header, *rows = (tmp_path / "predicted" / name).read_text().splitlines()
        seen = [f"{header},trained_on", f"{rows[0]},no", f"{rows[1]},yes", ""]
        (tmp_path / "predicted" / name).write_text("\n".join(seen))
        (note,) = evaluate(tmp_path, policy, truth)["notes"]
        shutil.rmtree(tmp_path / "out")
        assert "was trained on 1 of 2 scans (s1)" in note and note in capsys.readouterr().out


@pytest.mark.parametrize("truth", ["id,class\ns0,a\ns1,b\ns7,a\ns8,n/a\n", "id,age\ns0,10\ns1,20\ns7,30\ns8,\n"])
def test_rows_of_the_truth_without_a_prediction_are_counted(tmp_path, truth):
    (tmp_path / "truth.csv").write_text(truth)
    if "class" in truth:
        (tmp_path / "predictions.csv").write_text("id,subject,predicted,p_a,p_b\ns0,,a,0.9,0.1\ns1,,b,0.2,0.8\n")
        *_, notes = evaluate_classes(tmp_path / "predictions.csv", tmp_path / "truth.csv", tmp_path)
    else:
        (tmp_path / "predictions.csv").write_text("id,subject,predicted,training_mean,age\ns0,,9,15,\ns1,,21,15,\n")
        *_, notes = evaluate_numbers(tmp_path / "predictions.csv", tmp_path / "truth.csv", tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["without_prediction"] == 1
    assert notes == ["1 row of the truth without a prediction"]


def test_rows_by_session_are_counted_by_scan(tmp_path):
    rows = "".join(f"sub-{n}_ses-{k},sub-{n},{20 + n},15,\n" for n in (1, 2) for k in (1, 2))
    (tmp_path / "predictions.csv").write_text(f"id,subject,predicted,training_mean,age\n{rows}")
    known = "".join(f"sub-{n}\tses-{k}\t{20 + n + k}\n" for n in (1, 2, 3) for k in (1, 2))
    (tmp_path / "truth.tsv").write_text(f"participant_id\tsession_id\tage\n{known}")
    scores, *_ = evaluate_numbers(tmp_path / "predictions.csv", tmp_path / "truth.tsv", tmp_path)
    assert (scores.scans, scores.subjects, scores.mae) == (4, 2, 1.5)
    assert json.loads((tmp_path / "summary.json").read_text())["without_prediction"] == 2


def test_scores_on_scans_that_the_network_was_trained_on_are_called_optimistic(tmp_path):
    rows = ["s0,,9,15,,1a,yes", "s1,,21,15,,1a,no", "s2,,12,15,,2b,", "s3,,12,15,,2b,yes"]
    table = "\n".join(["id,subject,predicted,training_mean,age,network,trained_on", *rows, ""])
    (tmp_path / "predictions.csv").write_text(table)
    (tmp_path / "truth.csv").write_text("id,age\ns0,10\ns1,20\ns2,30\n")
    *_, notes = evaluate_numbers(tmp_path / "predictions.csv", tmp_path / "truth.csv", tmp_path)
    warning, note = notes  # of the scans that are scored
    assert warning.startswith("warning: the network") and "was trained on 1 of 3 scans (s0): scores on" in warning
    assert note == "note: predicted by 2 networks (scans of each: 1a 2, 2b 1): right for a cross-validation alone"
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] == notes
    (tmp_path / "truth.csv").write_text("id,age\ns1,20\n")
    assert evaluate_numbers(tmp_path / "predictions.csv", tmp_path / "truth.csv", tmp_path)[2] == []


def test_scans_of_one_subject_are_resampled_together(tmp_path):
    """Copies of every scan do not narrow the interval, if the table names their subjects."""
    scores = [0.9, 0.2, 0.5, 0.4, 0.1, 0.7]
    header, rows = "id,subject,health", [f"s{n},p{n % 6},{int(n % 6 > 2)}" for n in range(12)]
    asymmetry_table(tmp_path / "predicted", scores * 2)
    named = evaluate(tmp_path, "asymmetry", "\n".join([header, *rows]))["results"]["score"]
    alone = "\n".join(["id,health", *(f"s{n},{int(n > 2)}" for n in range(6))])
    asymmetry_table(tmp_path / "predicted_once", scores)
    (tmp_path / "predicted").rename(tmp_path / "twice")
    (tmp_path / "predicted_once").rename(tmp_path / "predicted")
    assert named == evaluate(tmp_path, "asymmetry", alone)["results"]["score"]


def test_the_scores_of_predicted_classes(tmp_path, capsys):
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
    (tmp_path / "predicted").mkdir()
    table = classes_csv([(f"s{n}", "", "") for n in range(4)], probabilities)
    (tmp_path / "predicted/predictions.csv").write_text(table)
    summary = evaluate(tmp_path, "classification", "subject,class\ns0,cn\ns1,cn\ns2,ad\ns3,ad\nelsewhere,ad\n")
    assert summary["classes"] == ["cn", "ad"]
    assert summary["confusion"] == [[1, 1], [1, 1]] and summary["balanced_accuracy"] == 0.5
    assert summary["auc"] == pytest.approx(pairs_won([0.1, 0.6, 0.7, 0.2], [False, False, True, True]))
    assert "cn: 1 as cn, 1 as ad" in capsys.readouterr().out


def test_scans_of_a_subject_are_resampled_together_by_the_predicted_table_or_their_ids(tmp_path):
    asymmetry_table(tmp_path / "predicted", [0.9, 0.2, 0.5, 0.4] * 2)
    table = tmp_path / "predicted/asymmetry.csv"
    header, *rows = table.read_text().splitlines()
    named = "\n".join([f"{header},subject", *(f"{row},p{n % 4}" for n, row in enumerate(rows))])
    results = []
    for text, truth in (
        (named, [f"s{n},{n % 4 // 2}" for n in range(8)]),
        (re.sub(r"s(\d),", lambda of: f"ds_sub-{int(of[1]) % 4}_ses-{of[1]},", "\n".join([header, *rows])),
         [f"ds_sub-{n % 4}_ses-{n},{n % 4 // 2}" for n in range(8)]),
    ):  # fmt: skip
        table.write_text(text)
        results.append(evaluate(tmp_path, "asymmetry", "\n".join(["id,health", *truth]))["results"]["score"])
    table.write_text(named)
    results.append(evaluate(tmp_path, "asymmetry", "subject,health\np0,0\np1,0\np2,1\np3,1\n")["results"]["score"])
    assert results[0] == results[1] == results[2]
    table.write_text("\n".join([header, *rows[:4]]))
    once = evaluate(tmp_path, "asymmetry", "\n".join(["id,health", *(f"s{n},{n // 2}" for n in range(4))]))
    assert once["results"]["score"] == results[0]  # copies do not narrow the interval


@pytest.mark.parametrize(
    ("id", "subject"),
    [
        ("sub-01_ses-2", "sub-01"), ("adni_sub-01_T1w", "adni_sub-01"), ("a_b_sub-1_anat_sub-1_T1w", "a_b_sub-1"),
        ("PT001_sub_1_ses_2_t1", "PT001_sub_1"), ("s03_T1", "s03_T1"), ("mysub-1_x", "mysub-1_x"),
        ("a_subject_1", "a_subject_1"), ("sub-_x", "sub-_x"), ("sub-01-x", "sub-01-x"),
        ("OAS1_0001_MR1", "OAS1_0001"), ("OAS2_0001_MR2_mpr-1", "OAS2_0001"), ("OAS30001_MR_d0129", "OAS30001"),
        ("OAS1_00011_MR1", "OAS1_00011_MR1"), ("002_S_0295_M06", "002_S_0295"), ("x_OAS42105_d1", "x_OAS42105"),
        ("ADNI_002_S_0295_MR_S13408_I1", "ADNI_002_S_0295"), ("1002_S_0295_M06", "1002_S_0295_M06"),
        ("BraTS-GLI-00005-100", "BraTS-GLI-00005"), ("BraTS-GLI-00005-101_seg", "BraTS-GLI-00005"),
        ("BraTS2021_00005", "BraTS2021_00005"), ("BraTS-GLI-00005", "BraTS-GLI-00005"),
    ],
)  # fmt: skip
def test_an_id_tells_its_subject_by_names_of_bids_and_of_large_cohorts(id, subject):
    assert subject_of(id) == subject


def test_a_table_of_the_users_is_not_replaced(tmp_path):
    (tmp_path / "predicted").mkdir()
    table = classes_csv([("s0", "", ""), ("s1", "", "")], np.array([[0.9, 0.1], [0.4, 0.6]]))
    (tmp_path / "predicted/predictions.csv").write_text(table)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scans.csv").write_text("id,class,age\ns0,cn,40\n")
    with pytest.raises(ValueError, match=r"scans.csv: exists and is no table of asa-evaluate"):
        evaluate(tmp_path, "classification", "id,class\ns0,cn\ns1,ad\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scans.csv"]
    (tmp_path / "out/scans.csv").unlink()
    for _ in range(2):
        evaluate(tmp_path, "classification", "id,class\ns0,cn\ns1,ad\n")


@pytest.mark.parametrize(
    ("policy", "truth", "message"),
    [
        ("asymmetry", "id,health\ns0,2\ns1,0\n", "a health of '2': give 1 for healthy"),
        ("asymmetry", "id,health\ns0,1\ns1,1\n", "all 2 scans are of health 1: an AUC needs both"),
        ("asymmetry", "Subject,health\ns0,1\n", "truth.csv: its column Subject has to be called subject: rename it"),
        ("asymmetry", "id,Health\ns0,1\n", "its column Health has to be called health"),
        ("asymmetry", "id,Subject,health\ns0,a,1\n", "its column Subject has to be called subject"),
        ("asymmetry", "id,health\n", "truth.csv: has no rows: fill it in"),
        ("asymmetry", "id,class\ns0,ad\n", "the columns are id, class; give id, subject or participant_id, and health"),
        ("asymmetry", "id,health\nelsewhere,1\n", "no id of its 1 rows is one of the scans, like s0"),
        ("classification", "id,class\ns0,ftd\n", "the class 'ftd' is none of the network's: cn, ad"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, policy, truth, message):
    asymmetry_table(tmp_path / "predicted", [0.1, 0.2])
    table = classes_csv([("s0", "", ""), ("s1", "", "")], np.full((2, 2), 0.5))
    (tmp_path / "predicted/predictions.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, policy, truth)
    assert not (tmp_path / "out").exists()


def test_a_parquet_of_numbers_reads_as_its_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"subject": [1, 2, 10], "health": [1.0, None, 0.0], "age": [60.5, 70.0, 80.0]})
    parquet.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("subject,health,age\n1,1,60.5\n2,,70\n10,0,80\n")
    assert read_rows(tmp_path / "t.parquet") == read_rows(tmp_path / "t.csv")
    scans = [{"id": name, "subject": name} for name in ("001", "002", "010")]
    with pytest.warns(UserWarning, match="1 is taken for 001"):
        assert read_column(tmp_path / "t.parquet", "health", scans) == {"001": "1", "010": "0"}


def test_tables_that_are_not_there_are_named(tmp_path):
    (tmp_path / "predicted").mkdir()
    with pytest.raises(FileNotFoundError, match=r"asymmetry.csv or .*anomaly.csv: no such table; predictions= is"):
        evaluate(tmp_path, "asymmetry", "id,health\n")
    with pytest.raises(ValueError, match="truth= has to be given: predictions=FOLDER"):
        evaluate_task(compose("evaluate", ["policy=asymmetry", f"predictions='{tmp_path}'", "out=x"]))
