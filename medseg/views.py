"""How volumes are looked at: set upright, their grey range, planes between voxels, outlines; drawing is elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.grid import Grid

Plane = npt.NDArray[Any]

_WINDOW_PERCENTILES = (1, 99)
_WINDOW_ROOM = 4.0
# enough for quantiles to a thousandth, and sorted at once
_WINDOW_VALUES = 200_000


def standing(grid: Grid) -> tuple[list[int], tuple[slice, ...], Grid]:
    """The order of the voxel axes that runs nearest to x, y(, z) in RAS, their flips, and the grid after both."""
    n = grid.spatial_dims
    share = np.abs(grid.affine[:n, :n]) / np.asarray(grid.spacing_mm)
    order: list[int] = []
    for axis in range(n):
        left = [voxel_axis for voxel_axis in range(n) if voxel_axis not in order]
        order.append(max(left, key=lambda voxel_axis: float(share[axis, voxel_axis])))
    flipped = [bool(grid.affine[axis, order[axis]] < 0) for axis in range(n)]
    affine = grid.affine.copy()
    for axis, (source, flip) in enumerate(zip(order, flipped)):
        affine[:, axis] = -grid.affine[:, source] if flip else grid.affine[:, source]
        affine[:, n] += grid.affine[:, source] * (grid.shape[source] - 1 if flip else 0)
    shape = tuple(grid.shape[source] for source in order)
    return order, tuple(slice(None, None, -1 if flip else 1) for flip in flipped), Grid(shape, affine)


def window(image: npt.NDArray[Any], outlined: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Black and white: the shortest range that holds half of what is outlined, and four times as much on both sides.

    That is six standard deviations of one tissue each way. Of many tissues the most frequent ones decide: in a CT of
    all organs soft tissue, within 40 HU of the usual −160 to 240, where a range over all of them (lung to bone) shows
    organs as one grey. The shortest half: Rousseeuw and Leroy 1988. Where it has no width (half of the voxels are
    equal) or nothing is outlined, the 1st to 99th percentile; of the whole image where all are equal. Never beyond the
    range of the image; NaN is passed over.
    """
    known = image[np.isfinite(image)]
    if not known.size:
        return 0.0, 1.0
    inside = np.sort(_some(image[outlined]))
    inside = inside[np.isfinite(inside)]
    low, high = np.percentile(inside if inside.size else _some(known), _WINDOW_PERCENTILES)
    if low == high:
        # a single voxel, saturated ones: they would be white, and all around them black
        low, high = np.percentile(_some(known), _WINDOW_PERCENTILES)
    half = len(inside) // 2
    if half:
        widths = inside[half:] - inside[: len(inside) - half]
        first = int(np.argmin(widths))
        if widths[first] > 0:
            room = _WINDOW_ROOM * widths[first]
            low, high = inside[first] - room, inside[first + half] + room
    low, high = max(float(low), float(known.min())), min(float(high), float(known.max()))
    return low, max(high, low + 1e-6)


def interpolated(image: Plane, at: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
    """`image` at the grid of positions `at` (in voxels from the edge), linear along both axes; edges are continued."""
    plane = image
    for axis in (0, 1):
        last = plane.shape[axis] - 1
        positions = np.clip(at[axis] - 0.5, 0, last)
        low = positions.astype(int)
        share = (positions - low).astype(np.float32)[(slice(None), None) if axis == 0 else (None, slice(None))]
        first, second = (plane.take(n, axis=axis) for n in (low, np.minimum(low + 1, last)))
        plane = np.nan_to_num(first.astype(np.float32)) * (1 - share) + np.nan_to_num(second.astype(np.float32)) * share
    return plane


def edges(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The sides of pixels between inside and outside: (n, 2 ends, 2) as (row, column), corners being whole numbers."""
    padded = np.pad(inside, 1)
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    sides = [np.stack([at, at + np.array(step)], axis=1) for at, step in ((level, (0, 1)), (upright, (1, 0)))]
    return np.concatenate(sides).astype(np.float64)


def _some(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Evenly chosen ones of very many values."""
    return np.asarray(values.ravel()[:: max(1, values.size // _WINDOW_VALUES)], dtype=np.float64)
