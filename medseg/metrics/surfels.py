"""Size of the surface within each cell of 2 × 2 pixels or 2 × 2 × 2 voxels, for every way to fill the cell."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def contour_lengths(height_mm: float, width_mm: float) -> Floats:
    """Length of the marching-squares contour for the 16 ways to fill 2 × 2 pixels (bit n: corner n in C order)."""
    corner = 0.5 * float(np.hypot(height_mm, width_mm))
    lengths = np.full(16, corner)
    lengths[[0b0000, 0b1111]] = 0
    lengths[[0b0011, 0b1100]] = width_mm
    lengths[[0b0101, 0b1010]] = height_mm
    lengths[[0b0110, 0b1001]] = 2 * corner
    return lengths


@lru_cache(maxsize=64)
def surfel_areas(spacing_mm: tuple[float, ...]) -> Floats:
    """Area of the marching-cubes surface for the 256 ways to fill 2 × 2 × 2 voxels (bit n: corner n in C order)."""
    x, y, z = spacing_mm
    scale = np.array([y * z, x * z, x * y])
    return np.array([np.linalg.norm(t * scale, axis=1).sum() if len(t) else 0.0 for t in _surfel_normals()])


@lru_cache(maxsize=1)
def _surfel_normals() -> tuple[Floats, ...]:
    """For each code, the triangles' normals (T, 3) at spacing 1, as long as the triangle's area.

    The surface cuts edges at their middle. Corners of the rarer kind that touch only by a diagonal stay apart, and a
    code and its complement have one surface; a polygon becomes the fan of triangles with the largest area. These
    three choices reproduce the areas of DeepMind's table.
    """
    table = []
    for code in range(256):
        rarer = code if code.bit_count() <= 4 else 255 - code
        fans = [_largest_fan(polygon) for polygon in _polygons(rarer)]
        table.append(np.concatenate(fans) if fans else np.zeros((0, 3)))
    return tuple(table)


def _polygons(code: int) -> list[Floats]:
    """Closed polygons (P, 3) that part the corners set in `code` from the others."""
    next_to: dict[frozenset[int], list[frozenset[int]]] = {}
    for a, b in _face_segments(code):
        next_to.setdefault(a, []).append(b)
        next_to.setdefault(b, []).append(a)
    polygons = []
    while next_to:
        edge = next(iter(next_to))
        path = []
        while edge in next_to:
            path.append(edge)
            edge = next((e for e in next_to.pop(edge) if e in next_to), edge)
        polygons.append(np.array([np.mean([_CORNERS[c] for c in e], axis=0) for e in path]))
    return polygons


def _face_segments(code: int) -> Iterable[tuple[frozenset[int], frozenset[int]]]:
    """Where the surface crosses the cube's faces: pairs of cut edges; an edge is the set of its two corners."""
    for axis, side in itertools.product(range(3), (0, 1)):
        u, v = (a for a in range(3) if a != axis)
        face = []
        for pu, pv in ((0, 0), (1, 0), (1, 1), (0, 1)):
            corner = {axis: side, u: pu, v: pv}
            face.append(_CORNERS.index((corner[0], corner[1], corner[2])))
        inside = [bool(code >> c & 1) for c in face]
        edges = [frozenset((face[n], face[(n + 1) % 4])) for n in range(4)]
        cut = [edges[n] for n in range(4) if inside[n] != inside[(n + 1) % 4]]
        if len(cut) == 2:
            yield cut[0], cut[1]
        elif len(cut) == 4:
            yield from ((edges[n - 1], edges[n]) for n in range(4) if inside[n])


def _largest_fan(polygon: Floats) -> Floats:
    n = len(polygon)
    # corner 0, 1 and 2 of each triangle of the fan around each corner of the polygon
    first, step = np.arange(n)[:, None], np.arange(1, n - 1)
    a, b, c = polygon[first], polygon[(first + step) % n], polygon[(first + step + 1) % n]
    normals = np.cross(b - a, c - a) / 2
    areas = np.linalg.norm(normals, axis=-1).sum(axis=-1)
    return np.asarray(normals[int(np.argmax(areas.round(9)))])


_CORNERS: list[tuple[int, int, int]] = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
