"""A page to look at volumes in a browser: linked slices, and a slider of opacity for each layer, drawn by NiiVue."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asa.reporting.figures import label_colours
from asa.reporting.pages import require_report_extra, write_page

OPACITY = {"gray": 1.0, "labels": 0.5, "plasma": 0.0}  # at first, by the kind of a layer
HOW = "asa-view --help says how to get it"


@dataclass(frozen=True)
class Layer:
    """A volume of a case.

    Args:
        name: beside its slider.
        nifti: bytes of a NIfTI file, compressed or not.
        kind: "gray" for images, "labels" for label maps, "plasma" for values such as probabilities.
        labels: name of each value of a label map.
    """

    name: str
    nifti: bytes
    kind: str = "gray"
    labels: Mapping[int, str] | None = None


def write_viewer(path: Path, viewer: Path, title: str, cases: Mapping[str, Sequence[Layer]]) -> None:
    """Write the page: one HTML file that fetches nothing.

    Args:
        viewer: NiiVue's `niivue.umd.js`, copied into the page.
        cases: the layers of each case, the lowest first.

    Raises:
        FileNotFoundError: no such `viewer`.
        ValueError: `viewer` is another file.
        ImportError: without the `report` extra.
    """
    require_report_extra("asa-view")
    if not viewer.is_file():
        raise FileNotFoundError(f"{viewer}: no such file; viewer= is NiiVue's niivue.umd.js: {HOW}")
    code = viewer.read_text(errors="replace")
    if ".niivue={}" not in code or "</script" in code.lower():
        raise ValueError(f"{viewer}: not NiiVue's niivue.umd.js: {HOW}")
    shown = {id: [_as_json(layer) for layer in layers] for id, layers in cases.items()}
    write_page(path, "viewer.html.j2", title=title, cases=shown, code=code)


def _as_json(layer: Layer) -> dict[str, object]:
    """A layer as the page's script reads it."""
    compressed = layer.nifti[:2] == b"\x1f\x8b"
    found: dict[str, object] = {
        "name": layer.name,
        "file": f"{layer.name}.nii{'.gz' if compressed else ''}",
        "data": base64.b64encode(layer.nifti).decode("ascii"),
        "colormap": layer.kind if layer.labels is None else "gray",
        "opacity": OPACITY[layer.kind],
        "labels": None,
    }
    if layer.labels is not None:
        colours = label_colours(len(layer.labels)).tolist()
        red, green, blue = ([0, *(colour[k] for colour in colours)] for k in range(3))
        values, names = [0, *layer.labels], ["", *layer.labels.values()]
        alpha = [0, *[255] * len(colours)]
        found["labels"] = {"R": red, "G": green, "B": blue, "A": alpha, "I": values, "labels": names}
    return found
