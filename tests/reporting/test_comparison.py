"""Comparisons of evaluations: paired differences, runs that cannot be compared, tables and pages."""

import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scored import write_run

from asa.cli import evaluate as evaluate_command
from asa.data.io.files import write_digests, write_json
from asa.data.io.nifti import Volume, write_image, write_label
from asa.evaluation.comparison import HEADINGS, comparison_table, latex_table, markdown_table, read_run, verdict
from asa.evaluation.policies import get_policy
from asa.evaluation.statistics import detectable_difference, holm, smallest_holm, wilcoxon_p
from asa.evaluation.summary import describe
from asa.reporting import evaluation as reporting
from asa.reporting.figures import GAP
from asa.tasks.evaluation import compare_folders, evaluate_folder

LABELS = {1: "csf", 2: "gm"}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Twelve cases; the second run is better in every one on csf, the third differs by noise."""
    generator = np.random.default_rng(0)
    first = {label: generator.uniform(0.7, 0.9, 12).round(3).tolist() for label in ("csf", "gm")}
    better = {label: [value + 0.03 for value in values] for label, values in first.items()}
    other = {label: (np.array(values) + generator.normal(0, 0.01, 12)).tolist() for label, values in first.items()}
    return {
        "scratch": write_run(tmp_path / "scratch", first),
        "asa": write_run(tmp_path / "asa", better),
        "mae": write_run(tmp_path / "mae", other),
    }


def test_a_difference_is_the_mean_over_the_same_cases(folders, tmp_path):
    found = compare_folders(folders, tmp_path / "out").differences
    assert len(found) == 3 * 2 * 2  # metrics, regions, runs
    gain = found["dice", "csf", "asa"]
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.03, 0.03, 0.03))
    assert (gain.better, gain.worse, gain.used, gain.total) == (12, 0, 12, 12)
    assert gain.p == pytest.approx(2 / 2**12) and gain.p_holm == pytest.approx(12 * gain.p)
    distance = found["hd95_mm", "csf", "asa"]
    assert distance.mean == pytest.approx(-0.3) and (distance.better, distance.worse) == (12, 0)
    same = found["nsd_1mm", "gm", "mae"]
    assert (same.mean, same.p, same.better, same.worse) == (0.0, 1.0, 0, 0)
    assert found["dice", "gm", "mae"].p_holm > 0.05


def test_differences_that_are_equal_but_for_rounding_are_ties(tmp_path):
    before, after = [0.2, 0.3, 0.1, 0.7, 0.5, 0.9], [0.3, 0.4, 0.2, 0.6, 0.4, 0.8]  # six steps of 0.1
    folders = {"a": write_run(tmp_path / "a", {"csf": before}), "b": write_run(tmp_path / "b", {"csf": after})}
    assert len({y - x for x, y in zip(before, after, strict=True)}) > 2
    found = compare_folders(folders, tmp_path / "out").differences["dice", "csf", "b"]
    assert (found.better, found.worse, found.p) == (3, 3, 1.0)


def test_what_a_reader_of_an_evaluation_has_to_know_is_said_of_its_run(folders, tmp_path):
    file = folders["asa"] / "summary.json"
    summary = json.loads(file.read_text()) | {"notes": ["warning: <b>seen</b> in training"]}
    write_json(file, summary)
    write_digests(folders["asa"], ("cases.csv", "summary.json"))
    text = comparison_table(compare_folders(folders, tmp_path / "out"))
    assert text.splitlines()[-1] == "asa: warning: <b>seen</b> in training"
    found = {path.suffix: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert json.loads(found[".json"])["notes"] == {"asa": summary["notes"]}
    for page in (found[".md"], found[".html"], found[".tex"]):
        assert "seen" in page
    assert "<b>seen" not in found[".html"] and "<b>seen" not in found[".md"]


def test_differences_that_cancel_within_a_subject_are_ties(tmp_path):
    known = {f"case{k:02}": f"s{k // 3}" for k in range(24)}
    before = np.tile([0.3, 0.4, 0.5], 8)
    after = before + np.append(np.tile([0.1, 0.2, -0.3], 7), [0.2, 0.2, 0.2])
    runs = (("a", before), ("b", after))
    folders = {name: write_run(tmp_path / name, {"csf": dice.tolist()}, subjects=known) for name, dice in runs}
    found = compare_folders(folders, tmp_path / "out").differences["dice", "csf", "b"]
    assert (found.better, found.worse, found.used, found.p) == (1, 0, 8, 1.0)


def test_law_scans_of_one_subject_count_as_one(tmp_path):
    generator = np.random.default_rng(0)
    before, after = generator.uniform(0.5, 0.9, (2, 7)).round(3)
    once = {name: write_run(tmp_path / name, {"csf": dice}) for name, dice in (("a", before), ("b", after))}
    known = {f"case{k:02}": f"s{k // 3}" for k in range(21)}
    spread = np.array([-0.01, 0, 0.01])
    visits = {
        name: write_run(tmp_path / f"{name} often", {"csf": (dice[:, None] + spread).ravel()}, subjects=known)
        for name, dice in (("a", before), ("b", after))
    }
    one, often = (compare_folders(runs, tmp_path / str(len(runs["a"].name))) for runs in (once, visits))
    key = "dice", "csf", "b"
    for found in ("mean", "sd", "low", "high", "used", "total"):
        assert getattr(often.results[key], found) == pytest.approx(getattr(one.results[key], found))
    for found in ("mean", "low", "high", "detectable", "better", "worse", "p", "p_holm", "used", "total"):
        assert getattr(often.differences[key], found) == pytest.approx(getattr(one.differences[key], found))
    text = comparison_table(often)
    assert "on 7 subjects." in text and "The 21 cases are of 7 subjects" in text and "over subjects" in text
    order = {"b": visits["b"], "plain": write_run(tmp_path / "plain", {"csf": (before[:, None] + spread).ravel()})}
    for names in (["b", "plain"], ["plain", "b"]):  # whichever of the runs knows the subjects
        found = compare_folders({name: order[name] for name in names}, tmp_path / "-".join(names))
        assert found.several == 7 and {one.used for one in found.differences.values()} == {7}
    other = write_run(tmp_path / "c", {"csf": np.repeat(before, 3)}, subjects=known | {"case00": "s9"})
    with pytest.raises(ValueError, match="case case00 is of s0 and, in c, of s9"):
        compare_folders({"a": visits["a"], "c": other}, tmp_path / "refused")
    assert (visits["a"] / "cases.csv").read_text().splitlines()[-1].endswith(",s6")
    summary = json.loads((visits["a"] / "summary.json").read_text())
    assert (summary["cases"], summary["subjects"], summary["results"]["csf"]["dice"]["total"]) == (21, 7, 7)
    assert "subject" not in (once["a"] / "cases.csv").read_text()


def test_all_texts_begin_with_the_verdict_in_words(folders, tmp_path):
    flipped = {"asa": folders["asa"], "scratch": folders["scratch"], "mae": folders["mae"]}
    found = compare_folders(flipped, tmp_path / "out")
    behind = "scratch is behind asa: Dice -0.030 (95 % interval -0.030 to -0.030), mean of 2 regions, on 12 cases."
    assert comparison_table(found).startswith(behind) and markdown_table(found).startswith(behind)
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.split("</h1>")[1].strip().startswith(f'<p class="verdict">{behind}</p>')
    found = compare_folders({name: folders[name] for name in ("scratch", "asa", "mae")}, tmp_path / "out")
    first, second, *_ = comparison_table(found).splitlines()
    assert first.startswith("asa is ahead of scratch: Dice +0.030")
    assert second.startswith("mae and scratch: no difference is shown: Dice ")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["verdict"] == [first, second]
    alone = {name: write_run(tmp_path / f"one {name}", {"csf": [0.5]}) for name in "ab"}
    assert "b and a: too few cases to tell: Dice +0.000, on 1 case." in comparison_table(
        compare_folders(alone, tmp_path / "one")
    )


def test_a_lower_distance_is_ahead():
    (metric,) = (metric for metric in get_policy("ibsr").metrics if metric.name == "hd95_mm")
    found = verdict("b", "a", metric, 1, describe([-1.0, -1.1, -1.2]))
    assert found.startswith("b is ahead of a: HD95 (mm) -1.10 (95 % interval -")


def test_tests_that_can_never_be_significant_are_not_listed_and_this_is_said_once(folders, tmp_path):
    values = {label: [0.5, 0.52, 0.6, 0.61, 0.7, 0.72] for label in "abcdef"}
    better = {label: [value + 0.01 * k for k, value in enumerate(found, start=1)] for label, found in values.items()}
    runs = {"scratch": write_run(tmp_path / "s", values), "asa": write_run(tmp_path / "a", better)}
    found = compare_folders(runs, tmp_path / "few")
    assert found.smallest_p == pytest.approx(18 * 2 / 2**6)
    page = html.unescape((tmp_path / "few" / "comparison.html").read_text())
    for text in (comparison_table(found), markdown_table(found), latex_table(found), page):
        assert text.count("p is not listed: with 6 cases and 18 tests it cannot be below 0.562 after") == 1
        assert text.count("0.562") == 1 and "p (Holm)" not in text
    listed = compare_folders(folders, tmp_path / "out")
    assert listed.headings == HEADINGS and "not listed" not in comparison_table(listed)


def test_the_smallest_corrected_p_is_that_of_differences_of_one_sign():
    for pairs in ([6], [6, 6, 6], [5, 7, 0], [3]):
        p = [wilcoxon_p(np.arange(1.0, n + 1)) if n else math.nan for n in pairs]
        assert smallest_holm(pairs) == pytest.approx(np.nanmin(holm(p)))


def test_pairs_with_an_undefined_value_are_excluded_and_counted(tmp_path):
    values = [0.5, 0.6, 0.7, 0.8]
    folders = {
        "a": write_run(tmp_path / "a", {"csf": values}),
        "b": write_run(tmp_path / "b", {"csf": [0.0, *values[1:]]}),
    }
    found = compare_folders(folders, tmp_path / "out")
    assert (found.differences["dice", "csf", "b"].used, found.differences["hd95_mm", "csf", "b"].used) == (4, 3)
    assert found.differences["hd95_mm", "csf", "b"].total == 4
    assert "3 of 4" in comparison_table(found) and "fewer than 6 pairs" in comparison_table(found)
    none = {name: write_run(tmp_path / f"none {name}", {"csf": [0.0, 0.0]}) for name in folders}
    undefined = compare_folders(none, tmp_path / "none").differences["hd95_mm", "csf", "b"]
    assert math.isnan(undefined.mean) and math.isnan(undefined.p) and undefined.used == 0


def test_all_files_hold_the_same_rows(folders, tmp_path):
    found = compare_folders(folders, tmp_path / "out")
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == [f"comparison.{ending}" for ending in ("html", "json", "md", "tex")]
    assert files["comparison.md"] == markdown_table(found) and files["comparison.tex"] == latex_table(found)
    written = json.loads(files["comparison.json"])
    assert (written["compared_with"], written["cases"], len(written["results"])) == ("scratch", 12, 18)
    for text in (*files.values(), comparison_table(found)):
        assert "Wilcoxon" in text and "Holm" in text
    for text in (files["comparison.md"], html.unescape(files["comparison.html"]), comparison_table(found)):
        assert (
            "detectable" in text and "+0.030 (+0.030 to +0.030)" in text and "12 / 0 / 0" in text and "<0.001" in text
        )
    assert len({line.count("|") for line in files["comparison.md"].splitlines() if line.startswith("|")}) == 1


def test_the_latex_table_has_rows_of_equal_length_and_is_escaped(tmp_path):
    folders = {
        name: write_run(tmp_path / str(k), {"csf": [0.5 + k / 10, 0.6 + k / 10]})
        for k, name in enumerate(("a_b", "50 % & more"))
    }
    text = latex_table(compare_folders(folders, tmp_path / "out"))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3 * 2
    without_p = HEADINGS[:-2]  # of two cases
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(without_p) - 1}
    assert "$-$1.00 ($-$1.00 to $-$1.00)" in text  # a minus, not a hyphen
    assert r"a\_b" in text and r"50 \% \& more" in text and r"(95 \% interval)" in text


def test_names_from_tables_of_others_can_be_neither_tex_commands_nor_html(tmp_path):
    hostile = "a\n\\write18{ls}<script>"
    runs = {}
    for k, name in enumerate(("first", "second")):
        runs[name] = write_run(tmp_path / name, {"csf": [0.5 + k / 10, 0.6 + k / 10]})
    cases = runs["second"] / "cases.csv"
    cases.write_text(cases.read_text().replace("case00", f'"{hostile}"'))
    found = compare_folders(runs, tmp_path / "out", allow_missing=True)
    assert hostile in "".join(found.left_out)
    tex, markdown = latex_table(found), markdown_table(found)
    assert all(line.startswith("%") for line in tex.splitlines() if "write18" in line) and "write18" in tex
    assert "<script>" not in markdown and "&lt;script>" in markdown


def test_the_page_is_self_contained_and_escaped(tmp_path):
    folders = {name: write_run(tmp_path / str(k), {"csf": [0.5, 0.6 + k / 9]}) for k, name in enumerate(("a", "<b>"))}
    compare_folders(folders, tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script" not in page and "http" not in page and "<link" not in page and "<b>&lt;b&gt;" not in page
    assert page.count("<img") == 1 and "&lt;b&gt;" in page
    assert "only truth empty" in page and "policy ibsr" in page


def test_only_differences_significant_after_correction_are_bold(folders, tmp_path):
    compare_folders({name: folders[name] for name in ("scratch", "mae")}, tmp_path / "noise")
    assert '<td class="strong">' not in (tmp_path / "noise" / "comparison.html").read_text()
    compare_folders(folders, tmp_path / "out")
    significant = 2 * 2  # Dice and HD95 of both regions in the run that is better in every case
    assert (tmp_path / "out" / "comparison.html").read_text().count('<td class="strong">') == 2 * significant


def test_the_same_comparison_writes_the_same_bytes(folders, tmp_path):
    for name in ("one", "two"):
        compare_folders(folders, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_runs_that_cannot_be_compared_are_rejected_with_the_reason(folders, tmp_path):
    values = {"csf": [0.5, 0.6], "gm": [0.5, 0.6]}
    out, first = tmp_path / "out", folders["scratch"]
    others = {
        "different policy, ibsr and asa_paper": write_run(tmp_path / "paper", values, policy="asa_paper"),
        "different labels": write_run(tmp_path / "labels", {"csf": [0.5, 0.6]}),
        r"10 cases are not in every run: case02.*allow_missing=true": write_run(tmp_path / "fewer", values),
        r"truth of case case00 differs .* 500 voxels and 400 voxels": write_run(
            tmp_path / "truth", {"csf": [0.5] * 12, "gm": [0.5] * 12}, voxels=400
        ),
    }
    for reason, folder in others.items():
        with pytest.raises(ValueError, match=reason):
            compare_folders({"a": first, "b": folder}, out)
    with pytest.raises(ValueError, match="two evaluations or more"):
        compare_folders({"a": first}, out)
    with pytest.raises(FileNotFoundError, match=r"summary\.json: no such file; give folders of .* of label maps or"):
        compare_folders({"a": first, "b": tmp_path}, out)
    (folders["mae"] / "cases.csv").write_text("id,label,dice\n")
    with pytest.raises(ValueError, match="evaluate again"):
        read_run("mae", folders["mae"])
    assert not out.exists()


def test_common_cases_are_compared_on_request_and_the_others_are_named(folders, tmp_path):
    fewer = write_run(tmp_path / "fewer", {"csf": [0.5, 0.6], "gm": [0.5, 0.6]})
    found = compare_folders({"a": folders["scratch"], "b": fewer}, tmp_path / "out", allow_missing=True)
    assert found.case_ids == ("case00", "case01") and len(found.left_out) == 10
    assert found.results["dice", "csf", "a"].total == 2
    assert (
        "case11" in comparison_table(found)
        and "10 cases are not in every run" in (tmp_path / "out" / "comparison.html").read_text()
    )


def test_without_the_extra_the_tables_are_still_written(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="jinja2 is not installed"):
        compare_folders(folders, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_the_command_names_runs_by_folder_or_by_key(folders, tmp_path, monkeypatch, capsys):
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["asa-evaluate", *arguments])
        code = evaluate_command.main()
        return code, *capsys.readouterr()

    out = f"out={tmp_path / 'out'}"
    code, text, _ = command(f"compare=[{folders['scratch']},{folders['asa']}]", out)
    assert code == 0 and "run less scratch" in text
    code, text, _ = command(f"compare={{one: {folders['scratch']}, two: {folders['asa']}}}", out)
    assert code == 0 and "run less one" in text
    for arguments, reason in (
        ((f"compare=[{folders['asa']},{folders['asa']}]", out), "two folders of one name"),
        (("compare=3", out), "compare= is a list of folders"),
        ((f"compare=[{folders['asa']}]", "truth=x", out), "exclude each other"),
        ((f"truth='{folders['asa']}'", out), "predictions= and truth= have to be given"),
    ):
        code, _, error = command(*arguments)
        assert code == 1 and reason in error and error.count("\n") == 1


# --- detectable differences and overlays


def test_too_few_pairs_detect_nothing_and_others_their_smallest_difference(folders, tmp_path):
    found = compare_folders(folders, tmp_path / "out").differences["dice", "gm", "mae"]
    read = {name: read_run(name, folder).values for name, folder in folders.items()}
    pairs = [read["mae"][key]["dice"] - read["scratch"][key]["dice"] for key in read["mae"] if key[1] == "gm"]
    assert found.detectable == pytest.approx(detectable_difference(np.array(pairs)), rel=1e-5)
    few = {name: write_run(tmp_path / name, {"csf": [0.5, 0.6 + k / 10, 0.7]}) for k, name in enumerate("ab")}
    assert math.isnan(compare_folders(few, tmp_path / "few").differences["dice", "csf", "b"].detectable)
    assert "| none |" in (tmp_path / "few" / "comparison.md").read_text()


@pytest.fixture
def evaluated(tmp_path: Path) -> dict[str, Path]:
    """Three cases: the run "same" predicts the truth, "noisy" misses more of it from case to case."""
    truth = np.zeros((20, 24, 14), dtype=np.uint8)
    truth[3:17, 4:20, 2:12], truth[6:14, 8:16, 4:9] = 1, 2
    generator, like, truths, images = np.random.default_rng(0), Volume(truth, np.diag([-1.0, 1, 2, 1]), None), {}, {}
    for k in range(3):
        truths[f"case{k}"], images[f"case{k}"] = tmp_path / f"t{k}.nii.gz", tmp_path / f"i{k}.nii.gz"
        write_label(truths[f"case{k}"], truth, like)
        write_image(images[f"case{k}"], truth * 50.0, like.affine)
        for name, missed in (("same", 0.0), ("noisy", 0.1 * (k + 1))):
            prediction = np.where(generator.random(truth.shape) < missed, 0, truth).astype(np.uint8)
            write_label(tmp_path / name / f"case{k}.nii.gz", prediction, like)
    for name in ("same", "noisy"):
        evaluate_folder(tmp_path / name, truths, LABELS, "ibsr", tmp_path / f"{name} scores", images, progress=False)
    return {name: tmp_path / f"{name} scores" for name in ("same", "noisy")}


def test_overlays_show_every_run_on_the_same_slice(evaluated, tmp_path):
    comparison = compare_folders(evaluated, tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<img") == 1 + 2 and re.findall(r"<h3>(case\d), ", page) == ["case2", "case1"]  # largest losses
    assert "same 1.000, noisy 0." in page
    assert "<span>Truth</span><span>same</span><span>noisy</span>" in re.sub(r"\s", "", page)
    drawn = reporting._overlay(comparison, {"case": "case2", "region": "gm"})
    panel = imread(io.BytesIO(base64.b64decode(drawn["panel"].split(",")[1])))
    step = (panel.shape[1] + GAP) // 4
    image, truth, same, noisy = (panel[:, k * step : (k + 1) * step - GAP] for k in range(4))
    assert np.array_equal(truth, same) and not np.array_equal(truth, noisy) and not np.array_equal(truth, image)


def test_the_largest_losses_and_gains_are_drawn_each_case_once_for_the_region_of_its_difference():
    rows = [
        {"case": case_id, "kind": kind, "region": region}
        for case_id, kind, region in (
            ("a", "worse", "csf"), ("a", "worse", "gm"), ("b", "worse", "gm"), ("c", "worse", "gm"),
            ("b", "better", "csf"), ("c", "better", "csf"), ("c", "better", "gm"),
        )
    ]  # fmt: skip
    shown = [(row["case"], row["kind"], row["region"]) for row in reporting._shown(rows)]
    assert shown == [("a", "worse", "csf"), ("b", "worse", "gm"), ("c", "better", "csf")]


def test_without_the_files_a_comparison_has_no_overlays(evaluated, tmp_path):
    for path in (tmp_path / "noisy").iterdir():
        path.unlink()
    compare_folders(evaluated, tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<img") == 1 and "The same slices" not in page
