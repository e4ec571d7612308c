"""Panels of volumes in three planes: grey slices, label overlays, marked sides; and titles and legends for pictures.

Volumes are RAS `(D, H, W)`: inferior->superior, posterior->anterior, left->right. They are drawn in the
radiological convention: the patient's right is on the viewer's left in axial and coronal slices (marked R and L),
anterior and superior are up, sagittal slices face left (marked A and P). Panels are RGB uint8 `(height, width, 3)`.
"""

import colorsys
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

READABLE = 900  # width in pixels that a picture is enlarged to for a title or a legend
TITLE = 30  # height in pixels of a line of them

_SIDES = (("R", "L"), ("R", "L"), ("A", "P"))  # of the axial, coronal and sagittal plane
GAP = 4  # pixels between tiles
OPACITY = 0.45  # of filled labels
_MASKED = np.array([52, 66, 92], dtype=np.uint8)  # colour of masked patches, unlike tissue and background

# Half of Okabe and Ito's palette, safe for colour-blind readers. The other half marks differences in the report.
_PALETTE = np.array([[86, 180, 233], [230, 159, 0], [0, 158, 115], [240, 228, 66]], dtype=np.uint8)

OUTLINE, MIDLINE = _PALETTE[0], _PALETTE[1]  # of the brain, and the mid-sagittal plane, in thumbnails

Index = tuple[int, int, int]
Lengths = tuple[float, float, float]
ColourBar = tuple[str, tuple[float, float], Callable[[np.ndarray, tuple[float, float]], np.ndarray]]  # with its range


def label_colours(count: int) -> np.ndarray:
    """Colours of labels, RGB uint8 `(count, 3)`: four safe for colour-blind readers, then evenly distributed hues."""
    hues = [colorsys.hsv_to_rgb((0.83 + k * 0.618034) % 1.0, 0.6, 0.95) for k in range(max(count - len(_PALETTE), 0))]
    extra = np.rint(np.array(hues).reshape(-1, 3) * 255).astype(np.uint8)
    return np.concatenate([_PALETTE, extra])[:count]


def central_slices(mask: np.ndarray) -> Index:
    """Slices `(d, h, w)` through the centre of a mask `(D, H, W)`, which they meet; of an empty one through the middle.

    The centre is the median position on each axis; along W, that of the half that contains more of the mask. The
    median over both hemispheres would be the midline, where there is little to see.
    """
    if not mask.any():
        return _default_slices(mask.shape)
    middle = mask.shape[2] // 2
    left, right = np.count_nonzero(mask[..., :middle]), np.count_nonzero(mask[..., middle:])
    depths, heights, _ = np.nonzero(mask)
    widths = np.nonzero(mask[..., :middle])[2] if left > right else np.nonzero(mask[..., middle:])[2] + middle
    depth, height, width = (int(np.sort(axis)[(len(axis) - 1) // 2]) for axis in (depths, heights, widths))
    return depth, height, width


def overlay_panel(
    image: np.ndarray | None,
    labels: Sequence[np.ndarray],
    *,
    colours: Sequence[np.ndarray] | None = None,
    at: Index | None = None,
    spacing: Lengths = (1.0, 1.0, 1.0),
    tile_width: int | None = None,
) -> np.ndarray:
    """Draw an image and, next to it, one copy per label map with the labels filled and outlined, in three planes.

    Args:
        image: grey values `(D, H, W)`, or None to draw the labels on black.
        labels: integer maps of the same shape; value k > 0 has the colour in row k - 1, 0 is not drawn.
        colours: for each label map RGB uint8 `(K, 3)`; None: `label_colours`.
        at: slices `(d, h, w)`; by default the middle, for the sagittal plane next to the midline.
        spacing: voxel size along D, H, W in mm; slices are drawn in true proportions.
        tile_width: width of a column in pixels; by default a pixel has the smallest voxel size.
    """
    shape = _common_shape([*labels] if image is None else [image, *labels])
    tables = [label_colours(int(values.max(initial=0))) for values in labels] if colours is None else colours
    at = _default_slices(shape) if at is None else at
    window = (0.0, 1.0) if image is None else _window(image)
    volume = np.zeros(shape, dtype=np.float32) if image is None else image
    pitch = min(spacing) if tile_width is None else max(shape[1] * spacing[1], shape[2] * spacing[2]) / tile_width
    rows = []
    for plane in range(3):
        grey = _grey(_resize(_slice(volume, plane, at), plane, spacing, pitch), window)
        drawn = (_resize(_slice(values, plane, at), plane, spacing, pitch, labels=True) for values in labels)
        filled = [_blend(grey, values, table, OPACITY) for values, table in zip(drawn, tables, strict=True)]
        rows.append(filled if image is None else [grey, *filled])
    return _grid(rows)


def reconstruction_panel(
    input: np.ndarray,
    masked: np.ndarray,
    prediction: np.ndarray,
    importance: np.ndarray,
    *,
    titles: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw input, masked input, prediction and importance, each `(D, H, W)`, side by side, in three planes.

    The first three have the grey window of the input, so that a wrong intensity is visible; NaN, the masked patches,
    is slate blue. Importance is drawn from black over red and yellow to white, on its own scale. With `titles` of the
    columns, colour bars and the colour of masked patches are drawn below.
    """
    at, window = _default_slices(_common_shape([input, masked, prediction, importance])), _window(input)
    scores = (float(np.nanmin(importance)), float(np.nanpercentile(importance, 99.5)))
    drawn = ((input, _grey, window), (masked, _grey, window), (prediction, _grey, window), (importance, heat, scores))
    panel = _grid([[draw(_slice(volume, k, at), limits) for volume, draw, limits in drawn] for k in range(3)])
    if titles is None:
        return panel
    if np.isnan(masked).any():
        panel = with_legend(panel, ["masked"], _MASKED[None])
    bars = [("prepared intensity", window, _grey), (titles[-1], scores, heat)]
    return titled(_with_colour_bars(panel, bars), titles)


def thumbnail_row(
    slices: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    spacing: Lengths,
    midline: Sequence[tuple[float, float]] | None = None,
    side: int = 192,
) -> np.ndarray:
    """Draw one scan's three slices side by side, with the inner edge of the brain and the mid-sagittal plane (dashed).

    All three have one scale and true proportions; the longest side of the volume fills a cell of `side` pixels.

    Args:
        slices: axial (H, W), coronal (D, W) and sagittal (D, H) slice, uint8; `masks` are bool, of the same shapes.
        spacing: voxel size along D, H, W in mm.
        midline: the mid-sagittal plane in voxels along W: (at h = 0, at h = H - 1) on the axial slice and (at d = 0,
            at d = D - 1) on the coronal one.
    """
    shape = (len(slices[1]), *slices[0].shape)  # D H W
    pitch = max(size * step for size, step in zip(shape, spacing, strict=True)) / side
    cells = []
    for plane, (values, mask) in enumerate(zip(slices, masks, strict=True)):
        level = np.rint(_resize(values[::-1, ::-1], plane, spacing, pitch)).astype(np.uint8)
        inside = _resize(mask[::-1, ::-1], plane, spacing, pitch, labels=True)
        tile = _blend(level[..., None], inside, OUTLINE[None], opacity=0.0)
        if midline is not None and plane < 2:
            _draw_midline(tile, values.shape, midline[plane])
        cells.append(_cell(tile, side, side, _SIDES[plane]))
    return with_gaps(cells, axis=1)


def titled(picture: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """A picture (H, W, 3) enlarged to a readable size, by whole factors, with a title above each of its columns."""
    large, font = _readable(picture), ImageFont.load_default(TITLE * 0.6)
    bar = Image.new("RGB", (large.shape[1], TITLE))
    for column, title in enumerate(titles):
        middle = ((column + 0.5) * bar.width / len(titles), TITLE / 2)
        ImageDraw.Draw(bar).text(middle, title, font=font, anchor="mm")
    return np.concatenate([np.asarray(bar), large])


def with_legend(picture: np.ndarray, names: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) enlarged as by `titled`, and below it the names of labels, each after its colour (RGB)."""
    large, font = _readable(picture), ImageFont.load_default(TITLE * 0.6)
    square, places, right, row = TITLE // 2, [], 0, 0
    for name in names:
        width = 2 * square + round(font.getlength(name)) + square
        if right + width > large.shape[1] and right:
            right, row = 0, row + 1
        places.append((right, row * TITLE))
        right += width
    bar = Image.new("RGB", (large.shape[1], (row + 1) * TITLE))
    draw = ImageDraw.Draw(bar)
    for name, colour, (x, y) in zip(names, colours, places, strict=True):
        draw.rectangle((x, y + square // 2, x + square, y + square // 2 + square), fill=tuple(map(int, colour)))
        draw.text((x + 2 * square, y + TITLE / 2), name, font=font, anchor="lm")
    return np.concatenate([large, np.asarray(bar)])


def _with_colour_bars(picture: np.ndarray, bars: Sequence[ColourBar]) -> np.ndarray:
    """A picture (H, W, 3) enlarged as by `titled`, and below it colour bars: name, first value, colours, last value."""
    large, font = _readable(picture), ImageFont.load_default(TITLE * 0.6)
    line, x, side = Image.new("RGB", (large.shape[1], TITLE)), 0, TITLE // 2
    draw = ImageDraw.Draw(line)
    for name, (low, high), colours in bars:
        first, last = f"{name}:  {low:.2g}", f"{high:.2g}"
        draw.text((x, TITLE / 2), first, font=font, anchor="lm")
        x += side + round(font.getlength(first))
        ramp = colours(np.linspace(low, high, 4 * TITLE)[None], (low, high)).repeat(side, axis=0)
        line.paste(Image.fromarray(ramp), (x, side // 2))
        x += side + 4 * TITLE
        draw.text((x, TITLE / 2), last, font=font, anchor="lm")
        x += side + round(font.getlength(last)) + TITLE
    return np.concatenate([large, np.asarray(line)])


def _readable(picture: np.ndarray) -> np.ndarray:
    factor = max(round(READABLE / picture.shape[1]), 1)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def with_gaps(tiles: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate RGB tiles along an axis with a black gap between neighbours."""
    shape = list(tiles[0].shape)
    shape[axis] = GAP
    gap = np.zeros(shape, dtype=np.uint8)
    return np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=axis)


def encode_png(panel: np.ndarray) -> bytes:
    """A panel as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "png")
    return buffer.getvalue()


def hex_colour(colour: Sequence[int] | np.ndarray) -> str:
    """A colour for CSS, like `#56b4e9`."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _common_shape(volumes: Sequence[np.ndarray]) -> tuple[int, ...]:
    shapes = {volume.shape for volume in volumes}
    if len(shapes) != 1 or volumes[0].ndim != 3:
        raise ValueError(f"a panel takes (D, H, W) arrays of one shape, got {sorted(shapes)}")
    return volumes[0].shape


def _default_slices(shape: tuple[int, ...]) -> Index:
    # The midline itself shows little but the longitudinal fissure.
    return shape[0] // 2, shape[1] // 2, shape[2] * 2 // 5


def _slice(volume: np.ndarray, plane: int, at: Index) -> np.ndarray:
    """One slice as drawn: rows from the top, columns from the viewer's left."""
    return np.take(volume, at[plane], axis=plane)[::-1, ::-1]


def _resize(values: np.ndarray, plane: int, spacing: Lengths, pitch: float, labels: bool = False) -> np.ndarray:
    """Resample a slice to square pixels of `pitch` mm: linearly, or labels to the nearest voxel."""
    sides = [side for axis, side in enumerate(spacing) if axis != plane]
    height, width = (max(round(length * side / pitch), 1) for length, side in zip(values.shape, sides, strict=True))
    image = Image.fromarray(values.astype(np.int32 if labels else np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR))


def _window(image: np.ndarray) -> tuple[float, float]:
    """Values drawn black and white: the minimum, and the 99.5th percentile of the values above it."""
    values = image[np.isfinite(image)].astype(np.float32)
    if not values.size:
        raise ValueError("an image without a finite value cannot be drawn")
    low = float(values.min())
    above = values[values > low]
    return low, float(np.percentile(above, 99.5)) if above.size else low + 1.0


def _scaled(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    return np.clip((values.astype(np.float32) - low) / max(high - low, 1e-12), 0.0, 1.0)


def _grey(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    masked = np.isnan(values)
    level = np.rint(_scaled(np.where(masked, window[0], values), window) * 255).astype(np.uint8)
    return np.where(masked[..., None], _MASKED, level[..., None])


def heat(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values `(height, width)` on a scale from black over red and yellow to white, as RGB uint8."""
    ramp = 3.0 * _scaled(values, window)[..., None] - np.array([0.0, 1.0, 2.0], dtype=np.float32)
    return np.rint(np.clip(ramp, 0.0, 1.0) * 255).astype(np.uint8)


def _blend(grey: np.ndarray, values: np.ndarray, table: np.ndarray, opacity: float) -> np.ndarray:
    """Fill labels with their colour and draw their inner edge opaque; RGB `(height, width, 3)`."""
    if values.max(initial=0) > len(table):
        raise ValueError(f"label {values.max()} has no colour: there are {len(table)} colours")
    padded = np.pad(values, 1, mode="edge")
    core = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.logical_or.reduce([core != other for other in neighbours])
    weight = np.where(edge, 1.0, opacity) * (values > 0)
    colour = np.concatenate([np.zeros((1, 3), dtype=np.uint8), table])[values]
    return np.rint(grey * (1 - weight[..., None]) + colour * weight[..., None]).astype(np.uint8)


def _grid(planes: list[list[np.ndarray]]) -> np.ndarray:
    """One row of tiles per plane, centred in columns of one width, with the sides marked."""
    width = max(tile.shape[1] for row in planes for tile in row)
    rows = [[_cell(tile, len(tile), width, sides) for tile in row] for row, sides in zip(planes, _SIDES, strict=True)]
    return with_gaps([with_gaps(row, axis=1) for row in rows], axis=0)


def _cell(tile: np.ndarray, height: int, width: int, sides: tuple[str, str]) -> np.ndarray:
    """A tile in the middle of a black cell, with a letter in each of the upper corners, if they fit."""
    cell = Image.new("RGB", (width, height))
    cell.paste(Image.fromarray(tile), ((width - tile.shape[1]) // 2, (height - tile.shape[0]) // 2))
    size = max(round(width / 128), 1)
    margin = 3 * size
    if height >= 7 * size + 2 * margin and width >= 10 * size + 4 * margin:
        draw, font = ImageDraw.Draw(cell), ImageFont.load_default(10 * size)
        draw.text((margin, margin), sides[0], font=font, anchor="lt")
        draw.text((width - margin, margin), sides[1], font=font, anchor="rt")
    return np.asarray(cell)


def _draw_midline(tile: np.ndarray, shape: tuple[int, ...], ends: tuple[float, float]) -> None:
    """Draw a dashed line down a tile of a slice of this shape, whose first and last row it meets at `ends`."""
    (rows, columns), (height, width) = shape, tile.shape[:2]
    y = np.flatnonzero(np.arange(height) % 8 < 5)
    row = rows - 0.5 - (y + 0.5) * rows / height  # upside down in the tile
    position = ends[0] + (ends[1] - ends[0]) * row / max(rows - 1, 1)
    x = np.rint((columns - 0.5 - position) * width / columns - 0.5)
    visible = (x >= 0) & (x < width)
    tile[y[visible], x[visible].astype(int)] = MIDLINE
