"""The two charts of a comparison, as inline SVG in the colours of the theme: differences on a line, one against one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from medseg.compare.alignment import Floats
from medseg.report.charts import Axis, share_axis, spread, strip

# of very few cases that lie far off the scale says so: the others would be a blot
_SHARE_ON_SCALE = 0.95
_ROOM = 1.3
_SIDE, _LEFT, _TOP, _BOTTOM = 300, 46, 8, 40


def difference_axis(differences: Floats, ends: Sequence[float]) -> tuple[Axis, bool]:
    """A scale around 0 that shows most `differences` and all `ends` of intervals; and whether some lie beyond it."""
    sizes = np.abs(differences[np.isfinite(differences)])
    wide = np.abs([end for end in ends if not math.isnan(end)]).max(initial=0.0)
    if not len(sizes) or max(sizes.max(), wide) == 0:
        return Axis(-1.0, 1.0), bool(np.isinf(differences).any())
    usual = _ROOM * max(float(np.quantile(sizes, _SHARE_ON_SCALE)), wide)
    limit = float(sizes.max()) * 1.05 if sizes.max() <= _ROOM * usual or not usual else usual
    limit = max(limit, wide * 1.05)
    return Axis(-limit, limit), bool(np.isinf(differences).any() or sizes.max() > limit)


def differences_strip(
    differences: Floats, scale: Axis, text: str, *, interval: tuple[float, float, float] | None, limit: int
) -> Markup:
    """A dot per case on `scale` and a box of the mean with its `interval` (low, mean, high)."""
    # what is infinite stands at the end of the scale
    shown = np.where(np.isposinf(differences), scale.high, differences)
    shown = np.where(np.isneginf(shown), scale.low, shown)
    return strip(shown, scale, text, rows=range(len(differences)), limit=limit, box=interval)


def against(x: Floats, y: Floats, titles: tuple[str, str], text: str, *, limit: int) -> Markup:
    """A dot per case and label at (`x`, `y`), both shares, and the line on which both methods are equal."""
    # where one has no value there is no dot
    scale = share_axis(np.concatenate([x, y]))
    chosen = spread(np.where(np.isnan(x), np.nan, y), limit)
    parts = []
    for at, written in scale.ticks:
        across, down = _across(at), _down(at)
        parts.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{_TOP}" y2="{_down(0):.1f}"/>')
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_across(1):.1f}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{across:.1f}" y="{_down(0) + 15:.1f}" text-anchor="middle">{written}</text>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{written}</text>')
    parts.append(f'<path class="even" d="M{_across(0):.1f} {_down(0):.1f}L{_across(1):.1f} {_down(1):.1f}"/>')
    points = "".join(f"M{_across(scale.place(x[n])):.4g} {_down(scale.place(y[n])):.4g}h.1" for n in chosen)
    parts.append(f'<path class="dots" d="{points}"/>' if points else "")
    middle = _across(0.5)
    parts.append(
        f'<text class="title" x="{middle:.1f}" y="{_SIDE - 6}" text-anchor="middle">{escape(titles[0])}</text>'
        f'<text class="title" transform="translate(12 {_down(0.5):.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(titles[1])}</text>"
    )
    return Markup(
        f'<svg class="chart plane square" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{escape(text)}">'
        f"{''.join(parts)}</svg>"
    )


def _across(share: float) -> float:
    return _LEFT + share * (_SIDE - _LEFT - 10)


def _down(share: float) -> float:
    return _SIDE - _BOTTOM - share * (_SIDE - _TOP - _BOTTOM)
