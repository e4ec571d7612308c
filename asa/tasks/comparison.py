"""Two or more evaluations of the same cases, compared case by case with the first of them.

OUT/comparison.json   every mean and paired difference with its interval and p
OUT/comparison.md     the same as a Markdown table
OUT/comparison.tex    the same as a LaTeX table (booktabs)
OUT/comparison.html   both for reading, with a figure (needs the `report` extra)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa.data.io.files import check_digest, read_json, write_json, write_whole
from asa.data.io.tables import read_rows
from asa.errors import reason_of
from asa.evaluation.comparison import Comparison, Run, compare_runs, latex_table, markdown_table
from asa.evaluation.policies import RESTORATION, WHOLE
from asa.reporting.comparison import write_comparison


def compare_folders(folders: Mapping[str, Path], out: Path, *, allow_missing: bool = False) -> Comparison:
    """Compare evaluations with the first of them and write the tables and the page.

    Args:
        folders: name -> folder that `evaluate_folder` or `evaluate_pictures` wrote, two or more; the others are
            compared with the first.
        out: folder for the results, made if missing.
        allow_missing: compare the cases that all of them have, instead of refusing when they differ.

    Raises:
        FileNotFoundError: a folder that holds no evaluation.
        ValueError: evaluations that cannot be compared: another policy, other regions, cases or truths.
        ImportError: the `report` extra is not installed; all but the page is written all the same.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two evaluations or more, got {len(folders)}: compare=[RUN_A, RUN_B]")
    comparison = compare_runs([read_run(name, Path(folder)) for name, folder in folders.items()], allow_missing)
    page = Path(out) / "comparison.html"
    page.unlink(missing_ok=True)  # should the new one fail, an old one must not stand beside new numbers
    write_json(page.with_suffix(".json"), comparison.as_json())
    write_whole(page.with_suffix(".md"), markdown_table(comparison).encode())
    write_whole(page.with_suffix(".tex"), latex_table(comparison).encode())
    write_comparison(page, comparison)
    return comparison


def read_run(name: str, folder: Path) -> Run:
    """An evaluation from its folder.

    Raises:
        FileNotFoundError: no summary.json or cases.csv in it.
        ValueError: files that have changed since, do not belong together, or are not of an evaluation.
    """
    for file in ("summary.json", "cases.csv"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file; give folders that asa-evaluate wrote")
        try:
            check_digest(folder / file)
        except ValueError as error:  # or its evaluation was killed between the two
            raise ValueError(f"{error}; or evaluate again") from None
    summary, rows = read_json(folder / "summary.json"), read_rows(folder / "cases.csv")
    try:
        return _run(name, folder, summary, rows)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: not an evaluation ({reason_of(error)}): evaluate again") from None


def _run(name: str, folder: Path, summary: Any, rows: list[dict[str, str]]) -> Run:
    metrics = [metric["name"] for metric in summary["policy"]["metrics"]]
    images = summary["policy"]["name"] == RESTORATION
    setting = {"policy": summary["policy"]["name"], "metrics": metrics}
    if images:
        setting |= {"data range": summary["data_range"], "regions": [WHOLE]}
    else:
        setting |= {"labels": summary["labels"], "regions": summary["regions"]}
        setting |= {"ignored labels": summary["policy"]["ignored"]}
    truth = "truth" if images else "voxels_true"
    regions = {row.setdefault("label", WHOLE) for row in rows}
    if regions != set(setting["regions"]) or not {*metrics, truth} <= set(rows[0]):
        raise ValueError(f"{folder}: cases.csv is not of the evaluation in summary.json: evaluate again")
    values = {(row["id"], row["label"]): {metric: float(row[metric]) for metric in metrics} for row in rows}
    unit = "" if images else " voxels"
    truths = {(row["id"], row["label"]): f"{row[truth]}{unit}" for row in rows}
    files = summary.get("files", {})
    if any(not isinstance(path, str | None) for paths in files.values() for path in paths.values()):
        raise ValueError(f"{folder}: files in summary.json are not paths: evaluate again")
    return Run(name, setting, values, truths, files)
