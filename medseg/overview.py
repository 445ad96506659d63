"""One picture of a segmented case: three planes, further slices, volumes and expected Dice; files are for writers.

It never says whose case it is: neither a name nor a path is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke

from medseg.config import COLOURS
from medseg.grid import Grid
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.views import edges, interpolated, standing, window

Plane = npt.NDArray[Any]
Quality = Mapping[str, Mapping[str, float | None]]

WIDTH, HEIGHT = 1440, 1080
RESEARCH_USE = "Research use; not reviewed"
# of an estimate below this the number stands out
LOW_DICE = 0.7
MOST_LABELS = 13
_DPI = 100
_MARGIN, _GAP = 24, 12
_PAPER, _BACKDROP, _INK, _FAINT, _RULE, _ALARM = "#0d1014", "#000000", "#e9edf1", "#94a0ab", "#2a323a", "#f2b134"
_CASING = "#0d0f12"
_TEXT_CASING: list[AbstractPathEffect] = [withStroke(linewidth=2.4, foreground="#000000d0")]
_TINT = 0.22
# of the views from near: room around all labels, and at least so much of the body
_ROOM, _LEAST_MM = 1.5, 50.0
# a direction that leans this far to a second side (cosine, 14 degrees) is called by both letters
_LEANING = 0.24
# of so many voxels the grey range is measured
_GREY_VOXELS = 4_000_000
_LEAST_GREY = 1e-4
_STRIP = (2, 4)
_NAMES = ("sagittal", "coronal", "axial")
_SIDES = ("RL", "AP", "HF")


def draw_overview(
    image: npt.NDArray[Any],
    segmentation: Segmentation,
    *,
    quality: Quality,
    warnings: Sequence[str],
    maker: str,
) -> npt.NDArray[np.uint8]:
    """RGB (rows, columns, 3) of a case: `image` (*grid.shape) with the outlines of `segmentation`, and what is known.

    A volume is shown in the three planes with most of all labels, seen from the feet, from the front and from the left,
    at the right proportions whatever its spacing, and in slices through the extent of the labels; a plane [row, column]
    lies as it is. `quality` by name:
    `expected`, `low`, `high`; `maker`: the model in words. The same input gives the same pixels.
    """
    page = _Page()
    page.headline(maker)
    scene = _scene(image, segmentation)
    if segmentation.grid.spatial_dims == 2:
        page.show(scene.flat(), _Box(_MARGIN, 100, 880, 880), scene.style)
        table = _Box(_MARGIN + 880 + 2 * _GAP, 100, WIDTH - 2 * _MARGIN - 880 - 2 * _GAP, 880)
    else:
        side = (WIDTH - 2 * _MARGIN - 2 * _GAP) // 3
        for n, axis in enumerate((2, 1, 0)):
            page.show(scene.near(axis), _Box(_MARGIN + n * (side + _GAP), 100, side, side), scene.style)
        top, rows, columns = 100 + side + 2 * _GAP, *_STRIP
        # as high as the page has room for
        small = (HEIGHT - 40 - top - (rows - 1) * _GAP) // rows
        for n, cut in enumerate(scene.strip(rows * columns)):
            row, column = divmod(n, columns)
            page.show(
                cut, _Box(_MARGIN + column * (small + _GAP), top + row * (small + _GAP), small, small), scene.style
            )
        left = _MARGIN + columns * (small + _GAP) + _GAP
        table = _Box(left, top, WIDTH - _MARGIN - left, HEIGHT - 40 - top)
    page.table(table, segmentation, quality, warnings)
    page.footline(segmentation.grid)
    return page.pixels()


@dataclass(frozen=True)
class _Box:
    """A place on the page in pixels from its upper left corner."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class _Style:
    """Values with their colours, and black and white of the image."""

    colours: Mapping[int, str]
    grey: tuple[float, float]


@dataclass(frozen=True)
class _Cut:
    """What one tile shows: planes [row, column], the size of a pixel (height, width), and the part that is shown.

    `start`: its upper left corner (down, across), `size` (down, across), in the unit of `pixel`. `letters`: left,
    right, top, bottom.
    """

    image: Plane
    labels: Plane
    pixel: tuple[float, float]
    start: tuple[float, float]
    size: tuple[float, float]
    letters: tuple[str, str, str, str]
    caption: str

    def fitted(self, box: _Box) -> _Cut:
        """The same middle, with the proportions of `box`: more is shown along one side."""
        down, across = self.size
        scale = max(down / box.height, across / box.width)
        size = (box.height * scale, box.width * scale)
        middle = [s + n / 2 for s, n in zip(self.start, self.size)]
        start = (middle[0] - size[0] / 2, middle[1] - size[1] / 2)
        return _Cut(self.image, self.labels, self.pixel, start, size, self.letters, self.caption)


@dataclass(frozen=True, eq=False)
class _Scene:
    """A case standing upright: axes nearest to x, y, z in RAS."""

    image: Plane
    labels: Plane
    grid: Grid
    extent: tuple[slice, ...]
    style: _Style

    def flat(self) -> _Cut:
        """A picture as it lies in its file."""
        pixel = self.grid.spacing_mm
        size = (self.labels.shape[0] * pixel[0], self.labels.shape[1] * pixel[1])
        return _Cut(self.image, self.labels, (pixel[0], pixel[1]), (0.0, 0.0), size, ("",) * 4, "")

    def near(self, axis: int) -> _Cut:
        """The plane with most of all labels across `axis`, as far as there are some, with room around."""
        counts = [np.count_nonzero(plane) for plane in np.moveaxis(self.labels, axis, 0)]
        index = int(np.argmax(counts)) if any(counts) else self.labels.shape[axis] // 2
        whole = self._cut(axis, index, f"{_NAMES[axis]}, {index + 1} of {self.labels.shape[axis]}")
        if not any(counts):
            return whole
        across, up = (a for a in range(3) if a != axis)
        start, size = [], []
        # both axes run backwards on the page
        for a, full in zip((up, across), whole.size):
            mm = self.grid.spacing_mm[a]
            low, high = (self.labels.shape[a] - edge for edge in (self.extent[a].stop, self.extent[a].start))
            wanted = min(max((high - low) * mm * _ROOM, _LEAST_MM), full)
            start.append(min(max((low + high) / 2 * mm - wanted / 2, 0.0), full - wanted))
            size.append(wanted)
        return _Cut(
            whole.image,
            whole.labels,
            whole.pixel,
            (start[0], start[1]),
            (size[0], size[1]),
            whole.letters,
            whole.caption,
        )

    def strip(self, count: int) -> list[_Cut]:
        """Whole planes along the axis with the largest steps, evenly through the extent of the labels."""
        # of equal steps the one from the feet
        axis = max((2, 1, 0), key=lambda a: round(self.grid.spacing_mm[a], 3))
        low, high = self.extent[axis].start, self.extent[axis].stop - 1
        places = sorted({round(p) for p in np.linspace(low, high, min(count, high - low + 1)).tolist()})
        return [self._cut(axis, n, f"{n + 1} of {self.labels.shape[axis]}") for n in places]

    def _cut(self, axis: int, index: int, caption: str) -> _Cut:
        across, up = (a for a in range(3) if a != axis)
        planes = [np.moveaxis(layer, axis, 0)[index][::-1, ::-1].T for layer in (self.image, self.labels)]
        pixel = (self.grid.spacing_mm[up], self.grid.spacing_mm[across])
        size = (planes[1].shape[0] * pixel[0], planes[1].shape[1] * pixel[1])
        directions = self.grid.affine[:3, :3] / np.asarray(self.grid.spacing_mm)
        left, top = directions[:, across], directions[:, up]
        letters = (_letters(left), _letters(-left), _letters(top), _letters(-top))
        return _Cut(planes[0], planes[1], pixel, (0.0, 0.0), size, letters, caption)


def _letters(direction: npt.NDArray[np.float64]) -> str:
    """The side of the body that a RAS direction points to, with the second nearest where it leans to it."""
    order = np.argsort(-np.abs(direction), kind="stable")[:2]
    named = [_SIDES[a][0 if direction[a] > 0 else 1] for a in order if abs(direction[a]) > _LEANING]
    return "".join(named)


def _scene(image: npt.NDArray[Any], segmentation: Segmentation) -> _Scene:
    labels, grid = segmentation.array, segmentation.grid
    if grid.spatial_dims == 3:
        order, flips, grid = standing(grid)
        image, labels = (layer.transpose(order)[flips] for layer in (image, labels))
    extent = _extent(labels)
    sparse = (slice(None, None, max(1, round((image.size / _GREY_VOXELS) ** (1 / image.ndim)))),) * image.ndim
    near = extent or sparse
    grey = window(image[near], labels[near] != 0)
    if grey[1] - grey[0] < _LEAST_GREY * max(1.0, abs(grey[0])):
        # what is labelled, and the box around it, has one value
        grey = window(image[sparse], np.zeros(image[sparse].shape, bool))
    colours = {s.value: _colour(s, n) for n, s in enumerate(segmentation.segments)}
    whole = tuple(slice(0, n) for n in labels.shape)
    return _Scene(image, labels, grid, extent or whole, _Style(colours, grey))


def _extent(labels: Plane) -> tuple[slice, ...] | None:
    """The box around all labels; None where there are none."""
    box = []
    for axis in range(labels.ndim):
        found = np.flatnonzero(labels.any(axis=tuple(a for a in range(labels.ndim) if a != axis)))
        if not len(found):
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def _colour(segment: SegmentInfo, number: int) -> str:
    return segment.colour or COLOURS[number % len(COLOURS)]


class _Page:
    """A canvas in pixels from the upper left corner: grounds of tiles, and lines and words over them."""

    def __init__(self) -> None:
        self._figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, frameon=False)
        self._ground = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        self._ground[:] = _rgb(_PAPER)

    def headline(self, maker: str) -> None:
        """Title, who made it, and what it is not."""
        self._write("Segmentation summary", _MARGIN, 32, size=20, weight="bold")
        self._write(_short(maker, 110), _MARGIN, 68, size=11.5, colour=_FAINT)
        width = 270
        corner = (WIDTH - _MARGIN - width) / WIDTH, 1 - 62 / HEIGHT
        self._figure.add_artist(
            Rectangle(corner, width / WIDTH, 40 / HEIGHT, facecolor="#2b220c", edgecolor=_ALARM, linewidth=1.2)
        )
        self._write(RESEARCH_USE, WIDTH - _MARGIN - width / 2, 42, size=12.5, colour=_ALARM, align="center")

    def footline(self, grid: Grid) -> None:
        """What the numbers mean."""
        if grid.spatial_dims == 2:
            words = "Sizes are counts of pixels."
        else:
            side = " × ".join(f"{mm:.3g}" for mm in grid.spacing_mm)
            words = f"Volume: voxels of {side} mm, counted."
        words += "  Expected Dice: estimated without a reference; "
        words += "in brackets about 90 % of it, less if fewer than 19 cases taught it."
        self._write(words, _MARGIN, HEIGHT - 18, size=10, colour=_FAINT)

    def show(self, cut: _Cut, box: _Box, style: _Style) -> None:
        """The image with tinted, outlined labels, letters and a caption."""
        cut = cut.fitted(box)
        at = [
            (start + (np.arange(count) + 0.5) / count * size) / step
            for start, size, count, step in zip(cut.start, cut.size, (box.height, box.width), cut.pixel)
        ]
        known = np.logical_and.outer(*((v >= 0) & (v < n) for v, n in zip(at, cut.labels.shape)))
        ground = np.empty((*known.shape, 3), np.uint8)
        ground[:] = _rgb(_BACKDROP)
        low, high = style.grey
        shade = np.clip((interpolated(cut.image, at) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
        np.copyto(ground, shade[..., None], where=known[..., None])
        shown = cut.labels[np.ix_(*(np.clip(v.astype(int), 0, n - 1) for v, n in zip(at, cut.labels.shape)))]
        values = [value for value in np.unique(shown[known]).tolist() if value in style.colours]
        for value in values:
            where = known & (shown == value)
            ground[where] = ((1 - _TINT) * ground[where] + _TINT * _rgb(style.colours[value])).astype(np.uint8)
        self._ground[box.top : box.top + box.height, box.left : box.left + box.width] = ground
        self._outlines(cut, box, style, values)
        left, right, top, bottom = cut.letters
        size, inside = (13.0, 15) if box.height > 300 else (10.0, 11)
        middle, centre = box.top + box.height / 2, box.left + box.width / 2
        for letter, x, y in (
            (left, box.left + inside, middle),
            (right, box.left + box.width - inside, middle),
            (top, centre, box.top + inside),
            (bottom, centre, box.top + box.height - inside),
        ):
            self._write(letter, x, y, size=size, align="center", cased=True)
        self._write(cut.caption, box.left + 8, box.top + box.height - inside, size=size - 1.5, cased=True)

    def _outlines(self, cut: _Cut, box: _Box, style: _Style, values: Sequence[int]) -> None:
        clip = Rectangle(
            (box.left / WIDTH, 1 - (box.top + box.height) / HEIGHT),
            box.width / WIDTH,
            box.height / HEIGHT,
            transform=self._figure.transFigure,
        )
        scale = box.height / cut.size[0]
        thick = 1.0 if box.height > 300 else 0.7
        lines = {}
        for value in values:
            points = (edges(cut.labels == value) * cut.pixel - np.asarray(cut.start)) * scale
            across, down = (box.left + points[..., 1]) / WIDTH, 1 - (box.top + points[..., 0]) / HEIGHT
            lines[value] = np.stack([across, down], axis=-1)
        # dark rims below all colours: labels that touch keep both
        for width, rim in ((2.8 * thick, True), (1.4 * thick, False)):
            for value, segments in lines.items():
                drawn = LineCollection(
                    list(segments),
                    colors=_CASING if rim else style.colours[value],
                    linewidths=width,
                    capstyle="projecting",
                    transform=self._figure.transFigure,
                )
                self._figure.add_artist(drawn)
                drawn.set_clip_path(clip)

    def table(self, box: _Box, segmentation: Segmentation, quality: Quality, warnings: Sequence[str]) -> None:
        """A line for each label, the largest first, and the warnings below."""
        flat = segmentation.grid.spatial_dims == 2
        sizes = segmentation.voxels if flat else segmentation.volumes_ml
        numbered = list(enumerate(segmentation.segments))
        # in the order of their values where all have room
        if len(numbered) > MOST_LABELS:
            numbered.sort(key=lambda item: -sizes.get(item[1].value, 0))
        shown, more = numbered[:MOST_LABELS], numbered[MOST_LABELS:]
        right = box.left + box.width
        volume_at, dice_at = right - 190, right
        self._write("Label", box.left + 26, box.top + 8, size=10, colour=_FAINT)
        self._write("Pixels" if flat else "Volume", volume_at, box.top + 8, size=10, colour=_FAINT, align="right")
        self._write("Expected Dice", dice_at, box.top + 8, size=10, colour=_FAINT, align="right")
        self._rule(box.left, right, box.top + 22)
        step = 24
        y = box.top + 38
        for number, segment in shown:
            size = sizes.get(segment.value, 0)
            self._swatch(box.left, y, _colour(segment, number))
            self._write(_short(segment.name, 26), box.left + 26, y, size=11.5, colour=_INK if size else _FAINT)
            words = "not found" if not size else f"{size:,}" if flat else f"{_figure(size)} ml"
            self._write(words, volume_at, y, size=11.5, colour=_INK if size else _FAINT, align="right")
            words, low = _dice(quality.get(segment.name, {}))
            self._write(words, dice_at, y, size=11.5, colour=_ALARM if low else _INK, align="right")
            y += step
        if more:
            found = sum(sizes.get(s.value, 0) > 0 for _, s in more)
            words = f"and {len(more)} more labels, {found} of them found"
            self._write(words, box.left + 26, y, size=11, colour=_FAINT)
            y += step
        self._warnings(box, y + 4, warnings)

    def _warnings(self, box: _Box, y: int, warnings: Sequence[str]) -> None:
        room = max(0, (box.top + box.height - y) // 18)
        lines = [line for w in warnings for line in textwrap.wrap(f"! {w}", max(20, box.width // 8))]
        if len(lines) > room:
            lines = [*lines[: max(0, room - 1)], "! more in run.json"][:room]
        for n, line in enumerate(lines):
            self._write(line, box.left, y + 8 + 18 * n, size=10.5, colour=_ALARM)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """The page as RGB."""
        canvas = FigureCanvasAgg(self._figure)
        renderer = canvas.get_renderer()
        buffer = np.asarray(canvas.buffer_rgba())
        buffer[..., :3], buffer[..., 3] = self._ground, 255
        with catch_warnings():
            # letters that the font lacks are boxes
            simplefilter("ignore")
            self._figure.draw(renderer)
        return np.ascontiguousarray(buffer[..., :3])

    def _write(
        self,
        text: str,
        x: float,
        y: float,
        *,
        size: float,
        colour: str = _INK,
        align: str = "left",
        weight: str = "normal",
        cased: bool = False,
    ) -> None:
        self._figure.text(
            x / WIDTH,
            1 - y / HEIGHT,
            text,
            color=colour,
            fontsize=size * 72 / _DPI * 1.3,
            ha=align,
            va="center_baseline",
            fontweight=weight,
            # a name with dollars is no formula
            parse_math=False,
            path_effects=_TEXT_CASING if cased else None,
        )

    def _rule(self, left: float, right: float, y: float) -> None:
        self._figure.add_artist(Line2D([left / WIDTH, right / WIDTH], [1 - y / HEIGHT] * 2, color=_RULE, linewidth=1.0))

    def _swatch(self, x: float, y: float, colour: str) -> None:
        self._figure.add_artist(
            Rectangle((x / WIDTH, 1 - (y + 7) / HEIGHT), 14 / WIDTH, 14 / HEIGHT, facecolor=colour, edgecolor="none")
        )


def _dice(known: Mapping[str, float | None]) -> tuple[str, bool]:
    """Words for an expected Dice and whether it is low."""
    expected, low, high = (known.get(key) for key in ("expected", "low", "high"))
    if expected is None:
        return "–", False
    interval = "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"
    return f"{expected:.2f}{interval}", expected < LOW_DICE


def _figure(number: float) -> str:
    """A number with three digits that count."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _rgb(colour: str) -> npt.NDArray[np.float64]:
    return np.round(255 * np.asarray(to_rgb(colour)))
