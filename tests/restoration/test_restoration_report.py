"""The page of restored images, and comparisons of such evaluations."""

import csv
import html
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from asa.cli import evaluate as evaluate_command
from asa.evaluation.comparison import latex_table
from asa.evaluation.policies import restoration_policy
from asa.restoration.evaluation import _fitted, error_map, error_scale, evaluate_pictures, image_panel
from asa.restoration.images import write_picture
from asa.tasks.evaluation import compare_folders

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")


def write_cohort(root: Path, cases: int, *, channels: int = 1, gain: float = 1.0, seed: int = 0) -> Path:
    """Clean images, degraded ones of half the size, and restored ones that get worse with their number."""
    generator = np.random.default_rng(seed)
    for k in range(cases):
        clean = generator.random((channels, 24, 20)).round(2)
        noise = np.random.default_rng(k).normal(0, 0.02 * gain * (k + 1), clean.shape)
        write_picture(root / "clean" / f"case{k}.png", clean)
        write_picture(root / "low" / f"case{k}.png", clean[:, ::2, ::2])
        write_picture(root / "restored" / f"case{k}.png", clean + noise)
    return root


def evaluated(root: Path, **settings) -> Path:
    evaluate_pictures(root / "restored", root / "clean", root / "scores", **settings)
    return root / "scores"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_is_self_contained_and_shows_the_worst_and_the_median_case(tmp_path: Path, channels: int) -> None:
    root = write_cohort(tmp_path, 5, channels=channels)
    page = (evaluated(root, inputs=root / "low") / "report.html").read_text()
    assert "<script" not in page and "http" not in page and "<link" not in page
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r'src="([^"]{30})', page))
    titles = re.findall(r"<h3>(.*?) \(PSNR", page)
    assert titles == ["Worst case: case4", "Worst case, number 2: case3", "Median case: case2"]
    assert page.count("<img") == 1 + 3
    assert page.count("<span>Input</span><span>Output</span><span>Truth</span><span>Error</span>") == 3
    for text in ("Restoration report", "policy restoration", "the files&#39; whole range, as 0 to 1", "5 of 5"):
        assert text in page
    assert all(page[page.index("All cases") :].count(f">case{k}<") == 1 for k in range(5))


def test_a_page_without_degraded_images_has_no_column_for_them(tmp_path: Path) -> None:
    page = (evaluated(write_cohort(tmp_path, 1)) / "report.html").read_text()
    assert "<span>Output</span><span>Truth</span><span>Error</span>" in page and "<span>Input</span>" not in page
    assert "The case: case0 (PSNR" in page and "The input, upscaled" not in page


def test_clean_images_that_were_not_restored_are_counted(tmp_path: Path) -> None:
    root = write_cohort(tmp_path, 3)
    (root / "restored" / "case1.png").unlink()
    with pytest.raises(ValueError, match="no prediction of case1: predict"):
        evaluated(root)
    page = (evaluated(root, allow_missing=True) / "report.html").read_text()
    assert "1 clean images without a prediction" in page and "2 of 2" in page


def test_images_of_one_subject_count_as_one(tmp_path: Path) -> None:
    root = write_cohort(tmp_path, 4)
    found = json.loads((evaluated(root, subject="^(case[01]|case.)") / "summary.json").read_text())
    assert (found["cases"], found["results"]["image"]["psnr"]["total"]) == (4, 4)
    rows = list(csv.DictReader((root / "scores" / "cases.csv").open()))
    for case in "23":
        (root / "restored" / f"case{case}.png").rename(root / "restored" / f"b{case}.png")
        (root / "clean" / f"case{case}.png").rename(root / "clean" / f"b{case}.png")
    psnr = json.loads((evaluated(root, subject="^([a-z]+)") / "summary.json").read_text())["results"]["image"]["psnr"]
    assert psnr["total"] == 2
    for path in [*(root / "restored").iterdir(), *(root / "clean").iterdir()]:
        path.rename(path.with_name(f"sub-{path.stem[0]}_ses-{path.stem}.png"))
    named = json.loads((evaluated(root) / "summary.json").read_text())["results"]["image"]["psnr"]
    assert named == psnr, "ids like those of BIDS name their subject"
    for path in [*(root / "restored").iterdir(), *(root / "clean").iterdir()]:
        path.rename(path.with_name(path.name.partition("ses-")[2]))
    evaluated(root, subject="^([a-z]+)")
    pairs = np.array([float(row["psnr"]) for row in rows]).reshape(2, 2).mean(axis=1)
    assert psnr["mean"] == pytest.approx(pairs.mean()) and psnr["sd"] == pytest.approx(pairs.std(ddof=1))
    assert [row["subject"] for row in csv.DictReader((root / "scores" / "cases.csv").open())] == ["b"] * 2 + [
        "case"
    ] * 2


def test_small_errors_are_not_rounded_away(tmp_path: Path) -> None:
    for name, value in (("clean", 0.5), ("restored", 0.502)):
        write_picture(tmp_path / name / "a.png", np.full((1, 16, 16), value), (0, 3e-6))
    (row,) = csv.DictReader((evaluated(tmp_path) / "cases.csv").open())
    assert float(row["rmse"]) == pytest.approx(6e-9, rel=0.01)


def test_predictions_of_which_only_some_store_a_window_are_refused(tmp_path: Path) -> None:
    for name, window in (("a", (-1000, 1000)), ("b", None)):
        write_picture(tmp_path / "clean" / f"{name}.png", np.full((1, 16, 16), 0.5), (-1000, 1000))
        write_picture(tmp_path / "restored" / f"{name}.png", np.full((1, 16, 16), 0.5), window)
    with pytest.raises(ValueError, match="stores the window -1000 to 1000, and .*b.png none"):
        evaluated(tmp_path)


def test_a_table_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    root = write_cohort(tmp_path, 2)
    table = evaluated(root) / "cases.csv"
    evaluated(root)
    table.write_text("id,truth2\ncase0,mine\n")
    with pytest.raises(ValueError, match=r"cases\.csv: exists and is no table of asa-evaluate"):
        evaluated(root)
    assert "mine" in table.read_text()


def test_errors_are_drawn_on_one_stated_scale(tmp_path: Path) -> None:
    truth = np.full((3, 10, 10), 0.5)
    small, large = ({"Truth": truth, "Output": truth + error} for error in (0.01, -0.04))
    assert np.allclose(error_map(large), 0.04) and error_scale([small, large]) == pytest.approx(0.04)
    assert error_scale([{"Truth": truth, "Output": truth}]) == 1.0  # no error: any scale
    for name, value in (("clean", 0.5), ("restored", 0.54)):
        write_picture(tmp_path / name / "a.png", np.full((1, 16, 16), value))
    page = (evaluated(tmp_path) / "report.html").read_text()
    assert "0 to 0.04 of the range" in page


def test_images_are_enlarged_by_whole_factors_or_averaged_to_the_width() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert np.array_equal(_fitted(image, 13), image.repeat(2, axis=0).repeat(2, axis=1))
    small = _fitted(image, 3)
    blocks = image.reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    assert small.shape == (2, 3, 3) and np.abs(small - blocks).max() <= 0.5


def test_degraded_images_that_do_not_match_are_rejected(tmp_path: Path) -> None:
    root = write_cohort(tmp_path, 2)
    write_picture(root / "low" / "case0.png", np.zeros((3, 12, 10)))
    with pytest.raises(ValueError, match=r"case0\.png: has 3 channels, its clean image 1"):
        evaluated(root, inputs=root / "low")
    (root / "low" / "case0.png").unlink()
    with pytest.raises(ValueError, match="no image case0, of which there is a prediction"):
        evaluated(root, inputs=root / "low")


def test_a_missing_extra_is_named_after_the_numbers_are_written(tmp_path: Path, monkeypatch) -> None:
    root = write_cohort(tmp_path, 2)
    evaluated(root)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'jinja2 is not installed.*pip install "asa-mri\[report\]"'):
        evaluated(root)
    assert sorted(path.name for path in (root / "scores").iterdir()) == ["cases.csv", "digests.json", "summary.json"]


def test_metrics_of_restored_images_have_their_range_as_bounds() -> None:
    psnr, ssim, rmse = restoration_policy((-1000, 1500)).metrics
    assert (psnr.bounds, ssim.bounds, rmse.bounds) == ((0, 100), (-1, 1), (0, math.inf))
    assert rmse.digits == 1 and restoration_policy(None).metrics[2].digits == 4


# ------------------------------------------------------------------------------------------ comparisons


def test_evaluations_of_restored_images_are_compared_case_by_case(tmp_path: Path, monkeypatch, capsys) -> None:
    folders = {}
    for name, gain in (("plain", 1.0), ("better", 0.5)):
        write_cohort(tmp_path / name, 7, gain=gain)
        arguments = [
            f"{key}={tmp_path / name / folder}" for key, folder in (("predictions", "restored"), ("out", name))
        ]
        monkeypatch.setattr(
            sys, "argv", ["asa", *arguments, f"truth={tmp_path / name / 'clean'}", "policy=restoration"]
        )
        assert evaluate_command.main() == 0
        folders[name] = tmp_path / name / name
    out = tmp_path / "comparison"
    monkeypatch.setattr(sys, "argv", ["asa", f"compare=[{folders['plain']},{folders['better']}]", f"out={out}"])
    assert evaluate_command.main() == 0
    assert "PSNR (dB)" in capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    assert (found["policy"], found["cases"], len(found["results"])) == ("restoration", 7, 3 * 2)
    by_metric = {one["metric"]: one["difference"] for one in found["results"] if "difference" in one}
    scores = {
        name: [float(line.split(",")[1]) for line in (folder / "cases.csv").read_text().splitlines()[1:]]
        for name, folder in folders.items()
    }
    gains = np.subtract(scores["better"], scores["plain"])
    assert by_metric["psnr"]["mean"] == pytest.approx(gains.mean()) and (gains > 0).all()
    assert (by_metric["rmse"]["better"], by_metric["rmse"]["worse"]) == (7, 0) and by_metric["rmse"]["mean"] < 0
    assert by_metric["psnr"]["p"] == pytest.approx(2 / 2**7)
    assert by_metric["psnr"]["p_holm"] == pytest.approx(3 * 2 / 2**7)
    page = html.unescape((out / "comparison.html").read_text())
    for text in (page, (out / "comparison.md").read_text(), (out / "comparison.tex").read_text()):
        assert "SSIM" in text and "7 / 0 / 0" in text
    assert "empty mask" not in page and "the files' whole range, as 0 to 1" in page


def test_images_of_another_range_or_another_truth_are_not_compared(tmp_path: Path) -> None:
    first = evaluated(write_cohort(tmp_path / "a", 3))
    other = evaluated(write_cohort(tmp_path / "b", 3, seed=1))
    ranged = evaluated(write_cohort(tmp_path / "c", 3), window=(0, 65535))
    with pytest.raises(ValueError, match="truth of case case0 differs between a and b"):
        compare_folders({"a": first, "b": other}, tmp_path / "out")
    with pytest.raises(ValueError, match="different data range, None and"):
        compare_folders({"a": first, "b": ranged}, tmp_path / "out")
    text = latex_table(compare_folders({"a": first, "b": first}, tmp_path / "out"))
    assert text.count(r"\midrule") == 3


def test_no_error_is_drawn_black_and_the_largest_white() -> None:
    truth = np.zeros((1, 40, 40))
    output = truth + np.where(np.arange(40) < 20, 0.0, 0.5)
    panel = image_panel({"Output": output, "Truth": truth}, 0.5)
    error = panel[:, -panel.shape[1] // 3 + 20 :]
    assert (error[5:-5, 10] == 0).all() and (error[5:-5, -10] == 255).all()
