"""Sheets of A4 paper on which text, lines and pictures flow; what is written on them is not known here."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf, PdfPages
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle

Side = Literal["left", "center", "right"]

# all measures are inches from the top left corner, sizes of letters are points
WIDTH, HEIGHT = 8.27, 11.69
LEFT, RIGHT, TOP, BOTTOM = 0.75, 7.52, 0.75, 10.95
INK, QUIET, LINE, DOT, WARNING = "#1b1f24", "#565e69", "#dfe3e8", "#3d6a94", "#7d3300"
# comes with matplotlib, so that a page looks alike everywhere
FONT = "DejaVu Sans"
_POINTS_PER_INCH = 72
_LINE_HEIGHT = 1.4
_MEASURED_AT = 500
_MISSING = "□"
_SETTINGS = {
    # text stays text, to be searched and copied
    "pdf.fonttype": 42,
    "pdf.compression": 6,
    "font.family": [FONT],
    # a dollar in a name is a dollar
    "text.parse_math": False,
    "text.usetex": False,
}


class Paper:
    """A pile of sheets that grows at its end; `y` is where the next thing goes on the last one.

    `lacks_letters`: whether a □ stands anywhere.
    """

    def __init__(self) -> None:
        """No sheet yet: the first `room` or `begin` takes one."""
        self._figures: list[Figure] = []
        self.lacks_letters = False
        self.y = BOTTOM

    @property
    def n_sheets(self) -> int:
        """Sheets taken so far."""
        return len(self._figures)

    def begin(self) -> None:
        """Take a new sheet."""
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(HEIGHT, 0)
        self._figures.append(figure)
        self.y = TOP

    def room(self, height: float) -> bool:
        """Make sure that `height` is left on the sheet; whether a new one had to be taken."""
        if self._figures and self.y + height <= BOTTOM:
            return False
        self.begin()
        return True

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 9,
        colour: str = INK,
        bold: bool = False,
        side: Side = "left",
        width: float | None = None,
    ) -> None:
        """One line with its middle at `y`, cut with … where it is longer than `width`."""
        shown = printable(words)
        self.lacks_letters |= _MISSING in shown
        if width is not None:
            shown = fitted(shown, width, size, bold=bold)
        weight = "bold" if bold else "normal"
        self._axes.text(x, y, shown, size=size, color=colour, weight=weight, ha=side, va="center_baseline")

    def paragraph(self, words: str, *, size: float = 9, colour: str = INK, left: float = LEFT) -> None:
        """Lines from `left` to the right margin, over as many sheets as they take."""
        height = size * _LINE_HEIGHT / _POINTS_PER_INCH
        for line in wrapped(printable(words), RIGHT - left, size):
            self.room(height)
            self.text(left, self.y + height / 2, line, size=size, colour=colour)
            self.y += height

    def rule(self, x: float, y: float, to_x: float, to_y: float, *, colour: str = LINE, weight: float = 0.8) -> None:
        """A straight line."""
        self._axes.add_line(Line2D((x, to_x), (y, to_y), color=colour, linewidth=weight, solid_capstyle="butt"))

    def dashes(self, x: float, y: float, to_x: float, to_y: float, *, colour: str = QUIET) -> None:
        """A broken line."""
        self._axes.add_line(Line2D((x, to_x), (y, to_y), color=colour, linewidth=0.8, linestyle=(0, (4, 3))))

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = "none", edge: str = "none") -> None:
        """A rectangle."""
        self._axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=0.8))

    def card(self, x: float, y: float, width: float, height: float) -> None:
        """A rectangle with round corners and a thin edge."""
        style = "round,pad=0,rounding_size=0.06"
        self._axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="none", edgecolor=LINE, linewidth=0.8)
        )

    def dots(self, points: Sequence[tuple[float, float]], *, across: float = 0.075, colour: str = DOT) -> None:
        """Round dots, seen through a little."""
        if points:
            size = [across] * len(points)
            self._axes.add_collection(
                EllipseCollection(
                    size,
                    size,
                    [0],
                    units="xy",
                    offsets=points,
                    offset_transform=self._axes.transData,
                    facecolor=colour,
                    alpha=0.6,
                    linewidth=0,
                )
            )

    def picture(self, x: float, y: float, side: float, pixels: npt.NDArray[np.uint8]) -> None:
        """A square picture, (rows, columns, 3 or 4)."""
        self._axes.imshow(
            pixels, extent=(x, x + side, y + side, y), aspect="auto", interpolation="none", origin="upper"
        )
        self._axes.set_xlim(0, WIDTH)
        self._axes.set_ylim(HEIGHT, 0)

    def save(self, file: Path | BinaryIO, *, title: str, creator: str, created: datetime) -> None:
        """Write all sheets with their numbers at the foot. The same sheets and `created` give the same bytes."""
        metadata: dict[str, Any] = {"Title": title, "Creator": creator, "CreationDate": created}
        with matplotlib.rc_context(_SETTINGS), PdfPages(file, metadata=metadata) as pages:
            for number, figure in enumerate(self._figures, start=1):
                axes = figure.axes[0]
                foot = HEIGHT - 0.42
                axes.text(LEFT, foot, printable(title), size=7.5, color=QUIET)
                axes.text(RIGHT, foot, f"{number} of {self.n_sheets}", size=7.5, color=QUIET, ha="right")
                FigureCanvasPdf(figure)
                pages.savefig(figure)

    @property
    def _axes(self) -> Axes:
        return self._figures[-1].axes[0]


def plain_text() -> Any:
    """A context in which matplotlib takes names as they are; everything on paper is drawn inside it."""
    return matplotlib.rc_context(_SETTINGS)


def printable(words: str) -> str:
    """`words` on one line, with □ for every character that the font has not and for bytes that are no text."""
    known = _characters()
    kept = []
    for letter in words:
        if letter in "\n\r\t\v\f":
            kept.append(" ")
        elif unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn"):
            # marks without width, such as those that turn the direction of writing, would tear a line apart
            kept.append("" if unicodedata.category(letter) == "Cf" else _MISSING)
        else:
            kept.append(letter if ord(letter) in known else _MISSING)
    return "".join(kept)


def fitted(words: str, width: float, size: float, *, bold: bool = False) -> str:
    """`words`, cut at the end with … so that they are no wider than `width`."""
    limit = width * _POINTS_PER_INCH
    if _width(words, size, bold) <= limit:
        return words
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if _width(words[:middle].rstrip() + "…", size, bold) <= limit:
            low = middle
        else:
            high = middle - 1
    return words[:low].rstrip() + "…"


def wrapped(words: str, width: float, size: float) -> list[str]:
    """Lines no wider than `width`, broken at spaces, and inside a word that is longer than a line."""
    limit = width * _POINTS_PER_INCH
    lines, line = [], ""
    for word in words.split(" "):
        longer = f"{line} {word}" if line else word
        if _width(longer, size, False) <= limit:
            line = longer
            continue
        if line:
            lines.append(line)
        while _width(word, size, False) > limit:
            part = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or _width(word[:n], size, False) <= limit)
            lines.append(word[:part])
            word = word[part:]
        line = word
    return [*lines, line]


@lru_cache(maxsize=100_000)
def _width(words: str, size: float, bold: bool) -> float:
    """Points from the start of the first letter to the end of the last one."""
    font = get_font(_font_file(bold))
    # large, or the widths are rounded to whole pixels as on a screen
    font.set_size(_MEASURED_AT, _POINTS_PER_INCH)
    font.set_text(words, 0.0)
    # the font counts in 64ths of a pixel
    return float(font.get_width_height()[0]) / 64 * size / _MEASURED_AT


@lru_cache(maxsize=2)
def _font_file(bold: bool) -> str:
    return str(findfont(FontProperties(family=FONT, weight="bold" if bold else "normal")))


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """What both weights of the font can show."""
    return frozenset(get_font(_font_file(False)).get_charmap()) & frozenset(get_font(_font_file(True)).get_charmap())
