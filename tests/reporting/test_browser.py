"""Pages of asa-view in a headless Chromium: what NiiVue draws, and that it follows the sliders."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asa.cli import view
from asa.data.store import Store

pytestmark = pytest.mark.browser
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
SOFTWARE = (
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
)  # WebGL 2
LOCAL = ("file:", "data:", "blob:")
WAIT = 240_000  # ms: drawing in software takes seconds, on a busy machine more


@pytest.fixture
def page(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> Iterator[Any]:
    """The page of two scans of a store, drawn; `errors` are those of its script, and what it asked a network for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    niivue = request.config.getoption("--niivue")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH: see CONTRIBUTING.md")
    out, given = tmp_path / "page.html", [] if niivue is None else [f"viewer={niivue}"]
    assert view.main([f"input={store}", f"out={out}", "count=2", *given]) == 0
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(SOFTWARE))
        opened = browser.new_page(viewport={"width": 900, "height": 650})
        opened.errors = []
        opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("request", lambda one: None if one.url.startswith(LOCAL) else opened.errors.append(one.url))
        opened.goto(out.as_uri(), wait_until="commit", timeout=WAIT)
        opened.wait_for_selector("body[data-shown]", timeout=WAIT)
        yield opened
        browser.close()


def drawn(page: Any) -> np.ndarray:
    """The canvas `(H, W, 3)`, two frames after what was done last."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = page.locator("#view").screenshot(timeout=WAIT)
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=np.int16)


def colourful(picture: np.ndarray) -> float:
    """The fraction of pixels with a hue, as labels have and a scan has not."""
    return float((picture.max(axis=2) - picture.min(axis=2) > 40).mean())


def slide(page: Any, layer: str, value: float) -> None:
    """Move the slider of a layer."""
    slider = page.locator("#layers label", has_text=layer).locator("input")
    slider.evaluate("(one, value) => { one.value = value; one.dispatchEvent(new Event('input')); }", value)


def test_scans_and_labels_are_drawn_and_follow_their_sliders(page: Any, store: Path) -> None:
    shown = page.locator("#layers label").all_inner_texts()
    assert [text.strip() for text in shown] == [*Store(store).channels, "labels"]
    both = drawn(page)
    assert both.std() > 10 and (both.max(axis=2) > 40).mean() > 0.1  # not blank
    slide(page, "labels", 0)
    scan = drawn(page)
    assert colourful(both) > 0.05 > colourful(scan) and scan.std() > 10
    slide(page, "labels", 0.5)
    np.testing.assert_allclose(drawn(page), both, atol=2)  # as it was
    slide(page, "t1", 0)
    assert np.abs(drawn(page) - both).max() > 40
    assert page.errors == []


def test_another_scan_the_rendering_and_the_crosshair_change_the_picture(page: Any, store: Path) -> None:
    first, ids = drawn(page), [record["id"] for record in Store(store).records[:2]]
    place = page.locator("#where").inner_text()
    box = page.locator("#view").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 5, box["y"] + box["height"] / 5)
    page.wait_for_function("before => document.getElementById('where').textContent !== before", arg=place, timeout=WAIT)
    assert np.abs(drawn(page) - first).max() > 40
    page.select_option("#case", ids[1])
    page.wait_for_selector(f"body[data-shown={ids[1]}]", timeout=WAIT)
    second = drawn(page)
    assert np.abs(second - first).max() > 40
    page.check("#render")
    assert np.abs(drawn(page) - second).max() > 40
    assert page.errors == []


def test_each_layer_is_one_row_and_the_title_is_the_scan(page: Any, store: Path) -> None:
    rows = page.locator("#layers .layer")
    assert rows.count() == len(Store(store).channels) + 1
    for row in rows.all():
        parts = [row.locator(part).bounding_box() for part in ("[type=checkbox]", "i", "label span", "[type=range]")]
        middles = [part["y"] + part["height"] / 2 for part in parts]
        assert max(middles) - min(middles) < 4 and sorted(parts, key=lambda part: part["x"]) == parts
    assert page.locator("h1").inner_text() == page.title() == Store(store).records[0]["id"]
    both = drawn(page)
    rows.last.locator("[type=checkbox]").uncheck()
    assert colourful(both) > 0.05 > colourful(drawn(page))


def test_the_crosshair_is_thin_and_has_a_gap(page: Any) -> None:
    slide(page, "labels", 0)
    picture = drawn(page)
    yellow = (picture[..., 0] > 150) & (picture[..., 0] - picture[..., 2] > 80)
    assert yellow.any() and np.median(yellow.sum(axis=0)[yellow.any(axis=0)]) <= 6  # of two or three lines
    runs = np.diff(np.flatnonzero(yellow[:, yellow.sum(axis=0).argmax()]))
    assert runs.max() >= 10  # pixels of the gap, or of the space between two slices
