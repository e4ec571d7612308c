"""One self-contained page on an evaluation: tables, box plots, worst and best cases in three planes.

jinja2 and matplotlib (the `report` extra) are imported when a report is written, so that the numbers need
neither.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from asa.data.io.files import write_whole
from asa.data.io.nifti import check_same_geometry, read_image, read_label, spacing_of, to_ras
from asa.errors import require
from asa.evaluation.measures import Measure
from asa.evaluation.metrics import bounding_box
from asa.evaluation.statistics import LEVEL, RESAMPLES
from asa.evaluation.summary import Findings, Row, Summary, data_notes, number_text, statistic_cells
from asa.reporting.figures import central_slices, encode_png, hex_colour, label_colours, overlay_panel

SHOWN = 2  # worst cases with a figure, and as many best ones
PANEL_WIDTH = 1160  # pixels
OPEN_ROWS = 60  # a longer table of cases begins folded
WORST_ROWS = 10  # labels listed above a case's figure, the worst first
PLOT_COLUMNS = 3  # metrics side by side in a figure
MARGIN = 4  # voxels around the head in a figure

# The half of Okabe and Ito's palette that labels do not use first.
DIFFERENCES = {
    "missed (truth only)": (213, 94, 0),
    "added (prediction only)": (0, 114, 178),
    "another label": (204, 121, 167),
}


@dataclass(frozen=True)
class CaseFiles:
    """Where the volumes of one case are; a missing prediction or image is None."""

    case_id: str
    prediction: Path | None
    truth: Path
    image: Path | None = None


def write_report(path: Path, summary: Summary, cases: Sequence[CaseFiles]) -> None:
    """Write the page: one HTML file without links or scripts.

    Args:
        path: the file, made whole or not at all.
        summary: what was found.
        cases: files of every case of the summary; those of the worst and best cases are read again.

    Raises:
        ImportError: the `report` extra is not installed.
        ValueError: an image does not lie on its truth's grid.
    """
    require_extra(path)
    files = {case.case_id: case for case in cases}
    page = render(
        "evaluation.html.j2",
        **page_values(summary),
        notes=data_notes(summary),
        shown=[_case_figure(title, files[id], summary) for title, id in titled(summary, _extremes(summary))],
        cases=_case_table(summary),
    )
    write_whole(path, page.encode())


def page_values(findings: Findings) -> dict[str, Any]:
    """What the pages on all kinds of evaluation print: results, how they were computed, box plots."""
    results = list(findings.results.items())
    return {
        "summary": findings,
        "policy": findings.policy,
        "results": [
            (metric, [(label, statistic_cells(found[metric.name], metric.digits)) for label, found in results])
            for metric in findings.policy.metrics
        ],
        "level": f"{LEVEL:.0%}".replace("%", " %"),
        "resamples": f"{RESAMPLES:,}",
        "plots": data_uri(_box_plots(findings)),
        "folded": len(findings.rows) > OPEN_ROWS,
    }


def require_extra(path: Path) -> None:
    """Check that the packages that draw a page are installed.

    Raises:
        ImportError: the `report` extra is not installed.
    """
    for module in ("jinja2", "matplotlib.figure"):
        require(module, "report", f"{path} (the other files are written)")


def render(template: str, **values: Any) -> str:
    """One of this folder's templates with its values filled in, escaped for HTML."""
    import jinja2

    from asa import __version__

    folder = resources.files("asa.reporting") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=__version__, **values)


def scores(findings: Findings) -> dict[str, float]:
    """Mean of the policy's first metric over the regions of each case, if one is defined; the worst case first."""
    metric = findings.policy.metrics[0]
    values: dict[str, list[float]] = {}
    for row in findings.rows:
        if not math.isnan(row.values[metric.name]):
            values.setdefault(row.case_id, []).append(row.values[metric.name])
    means = {case_id: float(np.mean(found)) for case_id, found in values.items()}
    order = sorted(means, key=lambda case_id: (_badness(metric, means[case_id]), case_id), reverse=True)
    return {case_id: means[case_id] for case_id in order}


def _extremes(summary: Summary) -> list[tuple[str, int, str]]:
    """Title, rank and id of the cases to show: the worst first, then the best, none of them twice."""
    order = list(scores(summary))
    worst = order[: min(SHOWN, (len(order) + 1) // 2)]
    best = order[len(worst) :][::-1][:SHOWN]
    ranked = [("Worst case", k, case_id) for k, case_id in enumerate(worst, start=1)]
    return ranked + [("Best case", k, case_id) for k, case_id in enumerate(best, start=1)]


def titled(findings: Findings, ranked: Sequence[tuple[str, int, str]]) -> list[tuple[str, str]]:
    """Titles, with rank and score, and ids of the cases to show, given as (title, rank, id)."""
    metric, found = findings.policy.metrics[0], scores(findings)
    titles = []
    for title, k, case_id in ranked if len(found) > 1 else [("The case", 1, case_id) for case_id in found]:
        place = title if k == 1 else f"{title}, number {k}"
        score = number_text(found[case_id], metric.digits)
        mean = "mean " if len(findings.results) > 1 else ""
        titles.append((f"{place}: {case_id} ({mean}{metric.title} {score})", case_id))
    return titles


def _badness(metric: Measure, value: float) -> float:
    """Larger is worse; an undefined value is least of all."""
    if math.isnan(value):
        return -math.inf
    return -value if metric.higher_is_better else value


def _case_figure(title: str, files: CaseFiles, summary: Summary) -> dict[str, Any]:
    """Everything the page says about one case: its numbers, its panel, what the panel shows."""
    metric = summary.policy.metrics[0]
    rows = [row for row in summary.rows if row.case_id == files.case_id]
    rows.sort(key=lambda row: _badness(metric, row.values[metric.name]), reverse=True)
    focus = rows[0].label

    volumes, spacing = _case_volumes(files)
    truth, prediction, image = volumes["truth"], volumes["prediction"], volumes.get("image")
    region = np.isin(truth, summary.regions[focus]) | np.isin(prediction, summary.regions[focus])
    if not region.any():
        region |= truth != 0
    at = central_slices(region) if region.any() else tuple(side // 2 for side in truth.shape)
    maps = [_ordinals(truth, summary), _ordinals(prediction, summary)]
    names = list(_drawn_names(summary).values())
    colours = label_colours(len(names))
    columns = ["Image", "Truth", "Prediction", "Differences"][image is None :]
    panel = overlay_panel(
        image,
        [*maps, _differences(truth, prediction, summary.policy.ignored)],
        colours=[colours, colours, np.array(list(DIFFERENCES.values()), dtype=np.uint8)],
        at=at,
        spacing=spacing,
        tile_width=PANEL_WIDTH // len(columns),
    )
    drawn = {int(k) for values in maps for axis in range(3) for k in np.unique(values.take(at[axis], axis))}
    return {
        "title": title,
        "id": files.case_id,
        "focus": focus,
        "columns": columns,
        "panel": data_uri(encode_png(panel)),
        "width": panel.shape[1],
        "labels": [(names[k - 1], hex_colour(colours[k - 1])) for k in sorted(drawn - {0})],
        "differences": [(name, hex_colour(colour)) for name, colour in DIFFERENCES.items()],
        "rows": [(row.label, value_cells(row, summary), row.empty) for row in rows[:WORST_ROWS]],
        "hidden": max(len(rows) - WORST_ROWS, 0),
    }


def _case_volumes(files: CaseFiles) -> tuple[dict[str, np.ndarray], tuple[float, float, float]]:
    """A case's volumes as RAS `(D, H, W)`, cut to the head, and their voxel size along D, H, W in mm."""
    assert files.prediction is not None, "a case without a prediction has no score and is not drawn"
    truth = read_label(files.truth)
    native = {"truth": truth.data, "prediction": read_label(files.prediction).data}
    if files.image is not None:
        image = read_image(files.image)
        check_same_geometry(image, truth, f"case {files.case_id}: image and truth")
        native["image"] = image.data
    volumes = {name: to_ras(data, truth.affine)[0].transpose(2, 1, 0) for name, data in native.items()}
    width, height, depth = spacing_of(to_ras(truth.data, truth.affine)[1]).tolist()
    box = _head_box(volumes)
    return {name: volume[box] for name, volume in volumes.items()}, (depth, height, width)


def _head_box(volumes: Mapping[str, np.ndarray]) -> tuple[slice, ...]:
    """The box of all that is not background, with a margin."""
    filled = (volumes["truth"] != 0) | (volumes["prediction"] != 0)
    if "image" in volumes:
        filled |= volumes["image"] > volumes["image"].min()
    if not filled.any():
        return (slice(None),) * 3
    return tuple(slice(max(side.start - MARGIN, 0), side.stop + MARGIN) for side in bounding_box(filled))


def _drawn_names(summary: Summary) -> dict[int, str]:
    """Label value -> name in the legend: the declared labels, and those that are ignored in the truth."""
    extra = [value for value in summary.policy.ignored if value not in summary.labels]
    return summary.labels | {value: f"ignored ({value})" for value in extra}


def _ordinals(data: np.ndarray, summary: Summary) -> np.ndarray:
    """Label values as their place among those drawn, from 1; background stays 0."""
    values = np.array([0, *_drawn_names(summary)])
    order = np.argsort(values)
    return order[np.searchsorted(values[order], data)]


def _differences(truth: np.ndarray, prediction: np.ndarray, ignored: Sequence[int]) -> np.ndarray:
    """Where two label maps differ: 1 missed, 2 added, 3 another label, as in `DIFFERENCES`."""
    kind = np.zeros(truth.shape, dtype=np.int64)
    kind[(truth != 0) & (prediction == 0)] = 1
    kind[(truth == 0) & (prediction != 0)] = 2
    kind[(truth != 0) & (prediction != 0) & (truth != prediction)] = 3
    kind[np.isin(truth, ignored)] = 0
    return kind


def _case_table(summary: Summary) -> list[dict[str, Any]]:
    table: dict[str, list[dict[str, Any]]] = {case_id: [] for case_id in summary.case_ids}
    for row in summary.rows:
        table[row.case_id].append(
            {
                "label": row.label,
                "values": value_cells(row, summary),
                "voxels": ["none" if n is None else f"{n:,}" for n in (row.voxels_predicted, row.voxels_true)],
                "ml": ["none" if v is None else f"{v:,.2f}" for v in (row.ml_predicted, row.ml_true)],
                "note": row.empty,
            }
        )
    return [{"id": case_id, "rows": rows} for case_id, rows in table.items()]


def value_cells(row: Row, findings: Findings) -> list[str]:
    """The values of a case as text for a table."""
    return [number_text(row.values[metric.name], metric.digits) for metric in findings.policy.metrics]


def _box_plots(summary: Findings) -> bytes:
    """Box plots of each metric, labels from top to bottom, every case as a point; PNG."""
    from matplotlib.figure import Figure

    metrics, labels = summary.policy.metrics, list(summary.results)
    lines, columns = plot_grid(len(metrics))
    height = 1.0 + len(labels) * (0.55 if len(labels) <= 12 else 0.26)
    figure = Figure(figsize=(11.6, lines * height), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for spare_axis in axes[len(metrics) :]:
        spare_axis.set_axis_off()
    for axis, metric in zip(axes, metrics, strict=False):
        groups = []
        for label in labels:
            values = [row.values[metric.name] for row in summary.rows if row.label == label]
            groups.append([value for value in values if not math.isnan(value)])
        places = np.arange(len(labels))
        line = {"color": "#374151", "linewidth": 1.1}
        axis.boxplot(
            groups,
            positions=places,
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            showmeans=True,
            boxprops=line,
            whiskerprops=line,
            capprops=line,
            medianprops={"color": "#b45309", "linewidth": 1.8},
            meanprops={
                "marker": "D",
                "markersize": 4.5,
                "markerfacecolor": "white",
                "markeredgecolor": "#374151",
            },
        )
        generator = np.random.default_rng(0)  # the same page for the same numbers
        for place, values in zip(places, groups, strict=True):
            offset = place + generator.uniform(-0.16, 0.16, len(values))
            axis.scatter(
                values, offset, s=22, color="#0284c7", alpha=0.75, edgecolors="white", linewidths=0.4, zorder=4
            )
        axis.set_yticks(places, labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)
        axis.set_xlabel(metric.heading)
        low, high = axis.get_xlim()
        spare = max(50 * 10.0**-metric.digits - (high - low), 0.0) / 2  # do not blow up a difference that means nothing
        axis.set_xlim(low - spare, high + spare)
        axis.ticklabel_format(axis="x", useOffset=False)
        plain_axis(axis)
    return png_of(figure)


def plain_axis(axis: Any) -> None:
    """Vertical lines and a bottom edge: what the plots of all pages have."""
    axis.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def png_of(figure: Any) -> bytes:
    """A matplotlib figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def plot_grid(plots: int) -> tuple[int, int]:
    """Lines and columns for so many plots, as even as possible."""
    lines = math.ceil(plots / PLOT_COLUMNS)
    return lines, math.ceil(plots / lines)


def data_uri(png: bytes) -> str:
    """A picture as text that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
