"""Counts, overlap, surface distances and volumes of one prediction against its reference; no files, no statistics."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

Value = int | tuple[int, ...]
"""One label, or all values that together make a region."""
Labels = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Surface = Literal["surfel", "voxel"]
Status = Literal["ok", "both_empty", "missed", "spurious", "missing_prediction"]

SURFACES: tuple[Surface, ...] = ("surfel", "voxel")
# 3 steps of 0.1 mm are 0.30000000000000004 mm: a distance equal to the tolerance must count as within it
TIE_TOLERANCE = 1e-5
_LOOKUP_LIMIT = 65535


@dataclass(frozen=True)
class Counts:
    """Voxels that both have (`tp`), only the prediction has (`fp`), only the reference has (`fn`)."""

    tp: int
    fp: int
    fn: int

    @property
    def reference(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def prediction(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp


@dataclass(frozen=True)
class PairMetrics:
    """All measures of one label in one case, in the columns of the report; NaN: not defined."""

    status: Status
    tp: int | None
    fp: int | None
    fn: int | None
    dice: float
    iou: float
    precision: float
    recall: float
    hd_mm: float
    hd95_mm: float
    assd_mm: float
    nsd: float
    reference_ml: float
    prediction_ml: float
    volume_difference_ml: float


@dataclass(frozen=True)
class Distances:
    """From each element of one surface to the nearest of the other, in mm, ascending, with the size of each element."""

    mm: Floats
    size: Floats


@dataclass(frozen=True)
class SurfaceMetrics:
    """Distances between two surfaces in mm, and the share of both within the tolerance."""

    hd_mm: float
    hd95_mm: float
    assd_mm: float
    nsd: float


def measure(
    prediction: Labels,
    reference: Labels,
    values: Collection[Value],
    *,
    spacing_mm: Sequence[float],
    ignore_value: int | None = None,
    surface: Surface = "surfel",
    nsd_tolerance_mm: float = 1.0,
) -> dict[Value, PairMetrics]:
    """Every measure for each of `values`. Both maps: (I, J) or (I, J, K) integer, of one shape.

    Voxels where the reference is `ignore_value` belong to neither map. Volumes of 2D maps are NaN.
    Raises `ValueError` if the shapes differ.
    """
    parts = _parts(values)
    prediction_codes, reference_codes = _encode(prediction, reference, parts, ignore_value)
    found = _count(prediction_codes, reference_codes, parts, values)
    boxes = _boxes(prediction_codes, reference_codes, len(parts))
    codes = {part: code for code, part in enumerate(parts, start=1)}
    result = {}
    for value, c in found.items():
        distances = _WITHOUT_SURFACE.get(status(c))
        if distances is None:
            wanted = [codes[part] for part in _members(value)]
            box = _union([boxes[code] for code in wanted if code in boxes])
            masks = [_any_of(m[box], wanted, len(parts)) for m in (prediction_codes, reference_codes)]
            distances = surface_metrics(
                *masks, spacing_mm=spacing_mm, surface=surface, nsd_tolerance_mm=nsd_tolerance_mm
            )
        result[value] = _row(c, distances, spacing_mm)
    return result


def counts(
    prediction: Labels, reference: Labels, values: Collection[Value], *, ignore_value: int | None = None
) -> dict[Value, Counts]:
    """Counts for each of `values` in one pass. Both maps: integer, of one shape; a tuple of values is a region.

    Voxels where the reference is `ignore_value` are left out. Raises `ValueError` if the shapes differ.
    """
    parts = _parts(values)
    return _count(*_encode(prediction, reference, parts, ignore_value), parts, values)


def judged(
    prediction: Labels, reference: Labels, values: Collection[Value], *, ignore_value: int | None = None
) -> tuple[Labels, Labels]:
    """Both maps with 0 wherever a voxel belongs to none of `values` or is ignored."""
    parts = _parts(values)
    codes = _encode(prediction, reference, parts, ignore_value)
    if parts == tuple(range(1, len(parts) + 1)):
        return codes
    back = np.array([0, *parts], np.result_type(prediction, reference))
    return back[codes[0]], back[codes[1]]


def present_values(labels: Labels) -> frozenset[int]:
    """The values other than 0 that occur."""
    return frozenset(int(v) for start in range(labels.shape[-1]) for v in _distinct(labels[..., start]) if v)


def status(c: Counts) -> Status:
    """Which row of the table of edge cases applies."""
    if not c.reference:
        return "spurious" if c.prediction else "both_empty"
    return "ok" if c.prediction else "missed"


def dice(c: Counts) -> float:
    """2TP / (2TP + FP + FN); NaN where both are empty, 0 where one is."""
    return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def iou(c: Counts) -> float:
    """TP / (TP + FP + FN); NaN where both are empty, 0 where one is."""
    return _ratio(c.tp, c.tp + c.fp + c.fn)


def precision(c: Counts) -> float:
    """TP / (TP + FP); NaN where nothing was predicted."""
    return _ratio(c.tp, c.prediction)


def recall(c: Counts) -> float:
    """TP / (TP + FN); NaN where the reference is empty."""
    return _ratio(c.tp, c.reference)


def missing_prediction(reference_voxels: int, *, spacing_mm: Sequence[float]) -> PairMetrics:
    """The row of a case nobody predicted: only the volume of the reference is known."""
    volume = reference_voxels * _voxel_ml(spacing_mm)
    unknown = _NAN, _NAN, _NAN, _NAN
    return PairMetrics("missing_prediction", None, None, None, *unknown, *unknown, volume, _NAN, _NAN)


def both_empty(*, spacing_mm: Sequence[float]) -> PairMetrics:
    """The row of a label that neither map holds."""
    return _row(Counts(0, 0, 0), _WITHOUT_SURFACE["both_empty"], spacing_mm)


def surface_metrics(
    prediction: Mask,
    reference: Mask,
    *,
    spacing_mm: Sequence[float],
    surface: Surface = "surfel",
    nsd_tolerance_mm: float = 1.0,
) -> SurfaceMetrics:
    """Distances between the surfaces of two masks that both hold something; (I, J) or (I, J, K).

    `surfel`: marching-cubes elements weighted by their area (Nikolov et al. 2021, as DeepMind's surface-distance).
    `voxel`: voxels with a 6-neighbour (2D: 4-neighbour) outside, all of one weight. HD95 is the larger of the two
    directed 95th percentiles.
    """
    there, back = surface_distances(prediction, reference, spacing_mm=spacing_mm, surface=surface)
    both = (there, back)
    total = sum(float(d.size.sum()) for d in both)
    within = nsd_tolerance_mm + TIE_TOLERANCE * min(spacing_mm)
    percentile = _weighted_95th if surface == "surfel" else _linear_95th
    return SurfaceMetrics(
        hd_mm=max(float(d.mm[-1]) for d in both),
        hd95_mm=max(percentile(d) for d in both),
        assd_mm=sum(float(d.mm @ d.size) for d in both) / total,
        nsd=sum(float(d.size[d.mm <= within].sum()) for d in both) / total,
    )


def surface_distances(
    prediction: Mask, reference: Mask, *, spacing_mm: Sequence[float], surface: Surface = "surfel"
) -> tuple[Distances, Distances]:
    """From the prediction's surface to the reference's, and the way back. Both masks must hold something."""
    elements = _surfels if surface == "surfel" else _border_voxels
    sizes = [elements(mask, spacing_mm) for mask in (prediction, reference)]
    return _directed(sizes[0], sizes[1], spacing_mm), _directed(sizes[1], sizes[0], spacing_mm)


def _row(c: Counts, distances: SurfaceMetrics, spacing_mm: Sequence[float]) -> PairMetrics:
    voxel = _voxel_ml(spacing_mm)
    return PairMetrics(
        status=status(c),
        tp=c.tp,
        fp=c.fp,
        fn=c.fn,
        dice=dice(c),
        iou=iou(c),
        precision=precision(c),
        recall=recall(c),
        hd_mm=distances.hd_mm,
        hd95_mm=distances.hd95_mm,
        assd_mm=distances.assd_mm,
        nsd=distances.nsd,
        reference_ml=c.reference * voxel,
        prediction_ml=c.prediction * voxel,
        volume_difference_ml=(c.prediction - c.reference) * voxel,
    )


_NAN, _INF = float("nan"), float("inf")
# what stands for distances where at least one of the two has no surface
_WITHOUT_SURFACE = {
    "both_empty": SurfaceMetrics(_NAN, _NAN, _NAN, _NAN),
    "missed": SurfaceMetrics(_INF, _INF, _INF, 0.0),
    "spurious": SurfaceMetrics(_INF, _INF, _INF, 0.0),
}


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else _NAN


def _voxel_ml(spacing_mm: Sequence[float]) -> float:
    return float(np.prod(spacing_mm)) / 1000 if len(spacing_mm) == 3 else _NAN


# Label values become the codes 1..n (0: any other value), so that counting and boxes work on small numbers.


def _members(value: Value) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _parts(values: Iterable[Value]) -> tuple[int, ...]:
    return tuple(sorted({part for value in values for part in _members(value)}))


def _encode(
    prediction: Labels, reference: Labels, parts: tuple[int, ...], ignore_value: int | None
) -> tuple[Labels, Labels]:
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, reference of shape {reference.shape}")
    codes = _codes(prediction, parts), _codes(reference, parts)
    if ignore_value is None:
        return codes
    kept = reference != ignore_value
    zero = codes[0].dtype.type(0)
    return np.where(kept, codes[0], zero), np.where(kept, codes[1], zero)


def _codes(labels: Labels, parts: tuple[int, ...]) -> Labels:
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    dtype = np.uint8 if len(parts) < 256 else np.uint16
    if not parts:
        return np.zeros(labels.shape, dtype)
    if labels.dtype == dtype and parts == tuple(range(1, len(parts) + 1)) and labels.max() <= len(parts):
        return labels
    codes = cast(Labels, np.empty_like(labels, dtype=dtype))
    axis = _slowest_axis(labels)
    for n in range(labels.shape[axis]):
        slab = (*[slice(None)] * axis, slice(n, n + 1))
        codes[slab] = _slab_codes(labels[slab], np.asarray(parts))
    return codes


def _slab_codes(slab: Labels, parts: npt.NDArray[np.intp]) -> Labels:
    if parts[0] >= 0 and parts[-1] <= _LOOKUP_LIMIT:
        # the last entry stands for everything that is out of reach
        table = np.zeros(int(parts[-1]) + 2, np.uint16)
        table[parts] = np.arange(1, len(parts) + 1)
        reach = slab if slab.dtype.kind == "u" else np.where(slab < 0, parts[-1] + 1, slab)
        return np.asarray(np.take(table, reach, mode="clip"))
    at = np.minimum(np.searchsorted(parts, slab), len(parts) - 1)
    return np.where(parts[at] == slab, at + 1, 0)


def _slowest_axis(labels: Labels) -> int:
    # slab by slab along it: look-ups and bincount need eight bytes a voxel, and a slab stays in the cache
    return int(np.argmax(np.abs(labels.strides)))


def _any_of(codes: Labels, wanted: Sequence[int], size: int) -> Mask:
    chosen = np.zeros(size + 1, bool)
    chosen[list(wanted)] = True
    return np.asarray(chosen[codes])


def _count(
    prediction: Labels, reference: Labels, parts: tuple[int, ...], values: Iterable[Value]
) -> dict[Value, Counts]:
    table = _confusion(prediction, reference, len(parts) + 1)
    code = {part: n for n, part in enumerate(parts, start=1)}
    result = {}
    for value in values:
        chosen = [code[part] for part in _members(value)]
        tp = int(table[np.ix_(chosen, chosen)].sum())
        result[value] = Counts(tp, int(table[chosen].sum()) - tp, int(table[:, chosen].sum()) - tp)
    return result


def _confusion(prediction: Labels, reference: Labels, size: int) -> npt.NDArray[np.intp]:
    axis = _slowest_axis(reference)
    total = np.zeros(size * size, np.intp)
    for p, r in zip(np.moveaxis(prediction, axis, 0), np.moveaxis(reference, axis, 0)):
        total += np.bincount((p.astype(np.intp) * size + r).ravel(order="K"), minlength=size * size)
    return total.reshape(size, size)


def _distinct(slab: Labels) -> npt.NDArray[Any]:
    if slab.dtype == np.uint8 or slab.dtype == bool:
        return np.flatnonzero(np.bincount(slab.ravel(order="K")))
    return np.unique(slab)


Box = tuple[slice, ...]


def _boxes(prediction: Labels, reference: Labels, size: int) -> dict[int, Box]:
    if not size:
        return {}
    found: dict[int, list[Box]] = {}
    for codes in (prediction, reference):
        for code, box in enumerate(ndimage.find_objects(codes, max_label=size), start=1):
            if box is not None:
                found.setdefault(code, []).append(box)
    return {code: _union(boxes) for code, boxes in found.items()}


def _union(boxes: Sequence[Box]) -> Box:
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes))


# Surfaces: an array of element sizes, 0 where there is no surface.


def _border_voxels(mask: Mask, spacing_mm: Sequence[float]) -> Floats:
    cross = ndimage.generate_binary_structure(mask.ndim, 1)
    return np.asarray(mask & ~ndimage.binary_erosion(mask, cross), dtype=np.float64)


def _surfels(mask: Mask, spacing_mm: Sequence[float]) -> Floats:
    padded = np.pad(mask, 1).astype(np.uint8)
    corners = list(itertools.product((0, 1), repeat=mask.ndim))
    code = np.zeros([s - 1 for s in padded.shape], np.uint8)
    for bit, corner in enumerate(corners):
        code |= padded[tuple(slice(c, c + s) for c, s in zip(corner, code.shape))] << bit
    sizes = _contour_lengths(*spacing_mm) if mask.ndim == 2 else _surfel_areas(tuple(float(s) for s in spacing_mm))
    return np.asarray(sizes[code])


def _directed(start: Floats, goal: Floats, spacing_mm: Sequence[float]) -> Distances:
    elements = start > 0
    size = start[elements]
    mm = np.zeros(len(size))
    apart = (goal == 0)[elements]  # where the surfaces coincide the distance is 0
    if apart.any():
        tree = cKDTree(np.argwhere(goal > 0) * np.asarray(spacing_mm), balanced_tree=False, compact_nodes=False)
        mm[apart] = tree.query(np.argwhere(elements & (goal == 0)) * np.asarray(spacing_mm))[0]
    order = np.argsort(mm)
    return Distances(mm[order], size[order])


def _weighted_95th(d: Distances) -> float:
    share = np.cumsum(d.size) / d.size.sum()
    return float(d.mm[min(int(np.searchsorted(share, 0.95)), len(d.mm) - 1)])


def _linear_95th(d: Distances) -> float:
    return float(np.percentile(d.mm, 95))


def _contour_lengths(height_mm: float, width_mm: float) -> Floats:
    """Length of the marching-squares contour for the 16 ways to fill 2 × 2 pixels (bit n: corner n in C order)."""
    corner = 0.5 * float(np.hypot(height_mm, width_mm))
    lengths = np.full(16, corner)
    lengths[[0b0000, 0b1111]] = 0
    lengths[[0b0011, 0b1100]] = width_mm
    lengths[[0b0101, 0b1010]] = height_mm
    lengths[[0b0110, 0b1001]] = 2 * corner
    return lengths


@lru_cache(maxsize=64)
def _surfel_areas(spacing_mm: tuple[float, ...]) -> Floats:
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
    def fan(first: int) -> Floats:
        p = np.roll(polygon, -first, axis=0)
        return np.asarray(np.cross(p[1:-1] - p[0], p[2:] - p[0]) / 2)

    return max((fan(n) for n in range(len(polygon))), key=lambda t: round(float(np.linalg.norm(t, axis=1).sum()), 9))


_CORNERS: list[tuple[int, int, int]] = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
