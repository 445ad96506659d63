"""Charts as inline SVG in the colours of the page's theme: axes, strips, scatters, reliability; no measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

Floats = npt.NDArray[np.float64]

# a label's chart with more dots than this is a blot, and costs time to open
MAX_DOTS = 300
# over all labels of one kind of chart: about 0.2 MB
MAX_DOTS_OF_ALL = 8_000
_FEWEST_DOTS = 40
_DECADES_FOR_LOG = 1.5
_LANE = 0.09
_GOLDEN = 0.6180339887
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_WIDTH, _HEIGHT = 300, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 12, 40
_STRIP_HEIGHT = 44


@dataclass(frozen=True)
class Axis:
    """A scale from values to 0–1, linear or logarithmic.

    `zero` keeps a lane at the start for 0 on a logarithmic axis, `infinite` one at the end for ∞.
    """

    low: float
    high: float
    log: bool = False
    zero: bool = False
    infinite: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies, as 0–1; values off the axis lie at its ends. NaN stays NaN."""
        if math.isnan(value):
            return math.nan
        start, end = _LANE if self.zero else 0.0, 1 - _LANE if self.infinite else 1.0
        if value == math.inf:
            return 1 - _LANE / 4 if self.infinite else 1.0
        if self.log and value <= 0:
            return _LANE / 4 if self.zero else 0.0
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return start + (end - start) * min(max((value - low) / (high - low), 0.0), 1.0)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where marks stand (0–1) and what is written there, rising."""
        values = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        marks = [(self.place(v), number(v)) for v in values]
        zero = [(self.place(0.0), "0")] if self.zero else []
        return [*zero, *marks, *([(self.place(math.inf), "∞")] if self.infinite else [])]


def axis(values: Sequence[float] | Floats, *, low: float | None = None, high: float | None = None) -> Axis:
    """The axis that shows all of `values` (NaN is left out): logarithmic where positive ones span decades.

    `low` and `high` fix an end, and with it a linear scale. Without a number at all: 0 to 1.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    infinite = bool(np.isposinf(array).any())
    positive = finite[finite > 0]
    fixed_ends = low is not None or high is not None
    if not fixed_ends and len(positive) and len(positive) + int((finite == 0).sum()) == len(finite):
        first, last = float(positive.min()), float(positive.max())
        if math.log10(last / first) >= _DECADES_FOR_LOG:
            # half a tenth of a decade of air, so that no dot stands on the edge
            return Axis(first / 1.12, last * 1.12, True, bool((finite == 0).any()), infinite)
    start = float(finite.min()) if len(finite) else 0.0
    end = float(finite.max()) if len(finite) else 1.0
    if low is None:
        # volumes and distances begin at zero; only differences reach below
        low = 0.0 if start >= 0 else start - 0.05 * (end - start)
    if high is None:
        high = end + 0.05 * (end - low)
    return Axis(low, high if high > low else low + 1.0, infinite=infinite)


def share_axis(values: Sequence[float] | Floats) -> Axis:
    """The axis of Dice and its like: up to 1, from the fifth below the lowest value, but no later than 0.8."""
    array = np.asarray(values, dtype=np.float64)
    lowest = float(np.nanmin(array)) if np.isfinite(array).any() else 0.0
    # 0.6 × 5 is not quite 3
    return Axis(max(0.0, min(0.8, math.floor(lowest * 5 + 1e-9) / 5)), 1.0)


def spread(values: Floats, limit: int) -> npt.NDArray[np.intp]:
    """Indices of `values` by rank, NaN left out; of more than `limit`, evenly many with both ends."""
    order = np.argsort(values, kind="stable")
    order = order[~np.isnan(values[order])]
    if len(order) > limit:
        order = order[np.linspace(0, len(order) - 1, limit).round().astype(int)]
    return order


def scattered(rank: int) -> float:
    """How high the dot of this rank stands in its strip, as 0–1."""
    # multiples of the golden ratio spread neighbours apart, the same way every time
    return (rank * _GOLDEN) % 1


def dots_per_label(n_labels: int) -> int:
    """How many dots a label's chart may have on a page with `n_labels` of them."""
    return max(_FEWEST_DOTS, min(MAX_DOTS, MAX_DOTS_OF_ALL // max(n_labels, 1)))


def number(value: float) -> str:
    """A tick's number: as short as it can be said, with a minus sign that is one."""
    text = f"{value:.3g}"
    if "e" in text:
        text = f"{value:.0f}" if abs(value) >= 1 else f"{value:.6f}".rstrip("0")
    return text.replace("-", "−")


def strip(
    values: Floats, scale: Axis, text: str, *, rows: Sequence[int], limit: int, box: Sequence[float] | None
) -> Markup:
    """A dot per case along `scale`, scattered in height, and a box of (first quartile, median, third quartile).

    `values` and `rows` belong together; `rows` are what a script shows for a dot. `text` is what is read aloud.
    """
    chosen = spread(values, limit)
    points = [(1000 * scale.place(values[n]), 8 + 28 * scattered(rank)) for rank, n in enumerate(chosen)]
    parts = [_grid_line(x) for x, _ in scale.ticks]
    parts.append(
        f'<svg viewBox="0 0 1000 {_STRIP_HEIGHT}" preserveAspectRatio="none" overflow="visible">'
        f"{_dots(points, [rows[n] for n in chosen])}</svg>"
    )
    if box is not None:
        q1, median, q3 = (100 * scale.place(value) for value in box)
        parts.append(
            f'<rect class="box" x="{q1:.2f}%" width="{max(q3 - q1, 0.01):.2f}%" y="5" height="34" rx="2"/>'
            f'<line class="median" x1="{median:.2f}%" x2="{median:.2f}%" y1="5" y2="39"/>'
        )
    return Markup(f'<svg class="chart strip" role="img" aria-label="{escape(text)}">{"".join(parts)}</svg>')


def scatter(
    x: Floats,
    y: Floats,
    x_axis: Axis,
    y_axis: Axis,
    text: str,
    *,
    titles: tuple[str, str],
    rows: Sequence[int],
    limit: int,
    lines: Sequence[tuple[float, str]] = (),
) -> Markup:
    """A dot per case at (`x`, `y`); `titles` of the two axes; `lines` across are (height, class)."""
    defined = np.where(np.isnan(x), np.nan, y)
    chosen = spread(defined, limit)
    points = [(_across(x_axis.place(x[n])), _down(y_axis.place(y[n]))) for n in chosen]
    across = [_level(kind, _down(y_axis.place(value))) for value, kind in lines]
    return _figure([_frame(x_axis, y_axis, titles), *across, _dots(points, [rows[n] for n in chosen])], text)


def reliability(bins: Sequence[Mapping[str, Any]], text: str) -> Markup:
    """Share correct against confidence, a dot per bin that holds voxels; bars below tell where the voxels are."""
    unit = Axis(0.0, 1.0)
    held = [b for b in bins if b["n"]]
    most = max((b["n"] for b in held), default=1)
    # the square root shows the rare bins too
    bars = [_bar(_across(b["low"]), _across(b["high"]), 0.25 * math.sqrt(b["n"] / most)) for b in held]
    points = [(_across(b["confidence"]), _down(b["correct"])) for b in held]
    even = _path("even", [(_across(0), _down(0)), (_across(1), _down(1))])
    return _figure(
        [_frame(unit, unit, ("Confidence", "Share correct")), *bars, even, _path("curve", points), _dots(points, ())],
        text,
    )


def _figure(parts: Sequence[str], text: str) -> Markup:
    head = f'<svg class="chart plane" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(text)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")


def _level(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _upright(x: float) -> str:
    return f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'


def _bar(left: float, right: float, share: float) -> str:
    width, height = right - left - 1, _down(0) - _down(share)
    return f'<rect class="bar" x="{left + 0.5:.1f}" y="{_down(share):.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{corners}"/>' if len(points) > 1 else ""


def _dots(points: Sequence[tuple[float, float]], rows: Sequence[int]) -> str:
    """All dots as one path of round-capped points: a tenth of the size of circles, and as quick to draw."""
    if not points:
        return ""
    path = "".join(f"M{x:.5g} {y:.4g}h.1" for x, y in points)
    known = f' data-rows="{" ".join(map(str, rows))}"' if len(rows) else ""
    return f'<path class="dots" d="{path}"{known}/>'


def _grid_line(x: float) -> str:
    return f'<line class="grid" x1="{100 * x:.2f}%" x2="{100 * x:.2f}%" y1="0" y2="{_STRIP_HEIGHT}"/>'


def _frame(x_axis: Axis, y_axis: Axis, titles: tuple[str, str]) -> str:
    parts = []
    for x, text in ((_across(at), text) for at, text in x_axis.ticks):
        parts.append(_upright(x) + f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{text}</text>')
    for y, text in ((_down(at), text) for at, text in y_axis.ticks):
        parts.append(_level("grid", y) + f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{middle[0]}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(titles[0])}</text>')
    turned = f"translate(11 {middle[1]}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(titles[1])}</text>')
    return "".join(parts)


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _down(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in _STEPS if power * s >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    # a sum of steps drifts, a multiple does not; adding 0 makes −0 a 0
    return [round(n * step, 12) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**n for n in range(first, last + 1) for f in factors if low <= f * 10.0**n <= high]
        if len(ticks) >= 3:
            every = math.ceil(len(ticks) / 6)
            return ticks[::every]
    return ticks
