"""Surfaces of two masks, and the distances in mm between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from medseg.metrics.codes import Mask, memory_order
from medseg.metrics.surfels import Floats, contour_lengths, surfel_areas

Surface = Literal["surfel", "voxel"]
Cells = npt.NDArray[np.intp]
Nearest = Callable[[Cells], npt.NDArray[np.integer[Any]]]
SURFACES: tuple[Surface, ...] = ("surfel", "voxel")
# 3 steps of 0.1 mm are 0.30000000000000004 mm: a distance equal to the tolerance must count as within it
TIE_TOLERANCE = 1e-5
_SHARE_TIE = 1e-9
# cells of a slab: what is worked out of a mask at once stays in the processor's cache
_SLAB_CELLS = 1 << 19
# positions looked up at once: bounds the memory
_QUERIES = 1 << 18
# far from a surface many of its elements are nearly the nearest, and large leaves halve the time; near it they do not
# matter
_LEAF_SIZE = 64
# measured on one core over surfaces of 80 to 7.7 million elements, near and 300 mm apart: the tree takes 0.2 µs for an
# element, a query 0.7 µs and 0.02 µs for each element that is at most four steps farther than the nearest (64 queries
# tell how many those are; where none is farther than eight steps they are few), the transform 0.1 µs for a cell
_TREE_US_PER_ELEMENT, _QUERY_US = 0.2, 0.7
_RIVAL_US, _RIVAL_STEPS, _NEAR_STEPS, _SAMPLE = 0.02, 4, 8, 64
_TRANSFORM_US_PER_CELL = 0.1


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
    masd_mm: float
    nsd: float


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
    directed 95th percentiles. ASSD is the mean over both surfaces together, MASD the mean of the two directed means.
    """
    both = surface_distances(prediction, reference, spacing_mm=spacing_mm, surface=surface)
    totals = [float(d.size.sum()) for d in both]
    sums = [float((d.mm * d.size).sum()) for d in both]
    within = nsd_tolerance_mm + TIE_TOLERANCE * min(spacing_mm)
    percentile = _weighted_95th if surface == "surfel" else _linear_95th
    return SurfaceMetrics(
        hd_mm=max(float(d.mm[-1]) for d in both),
        hd95_mm=max(percentile(d) for d in both),
        assd_mm=sum(sums) / sum(totals),
        masd_mm=sum(s / t for s, t in zip(sums, totals)) / 2,
        nsd=sum(float(d.size[: np.searchsorted(d.mm, within, "right")].sum()) for d in both) / sum(totals),
    )


def surface_distances(
    prediction: Mask, reference: Mask, *, spacing_mm: Sequence[float], surface: Surface = "surfel"
) -> tuple[Distances, Distances]:
    """From the prediction's surface to the reference's, and the way back. Both masks must hold something."""
    elements = _surfels if surface == "surfel" else _border_voxels
    # slabs run along the axis that is slowest in memory; neither areas nor distances depend on the order of axes
    order = memory_order(prediction)
    prediction, reference = prediction.transpose(order), reference.transpose(order)
    spacing_mm = [float(spacing_mm[axis]) for axis in order]
    one, other = (elements(mask, spacing_mm) for mask in (prediction, reference))
    return _directed(one, other, spacing_mm), _directed(other, one, spacing_mm)


# Surfaces: the cells that hold an element, as indices into the flattened grid of cells, and the element's size.


@dataclass(frozen=True)
class _Elements:
    at: Cells
    size: Floats
    cells: tuple[int, ...]


def _slabs(mask: Mask, rows: int, *, planes: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """In turn: number of the first of some of the `rows` of cells, and the voxels they need, 0 outside the mask.

    Row n needs `planes` planes of voxels from n − 1 on; along the other axes there is one more voxel on each side.
    """
    at_once = max(1, _SLAB_CELLS // mask[0].size)
    for first in range(0, rows, at_once):
        last = min(first + at_once, rows)
        slab = np.zeros((last - first + planes - 1, *(s + 2 for s in mask.shape[1:])), np.uint8)
        start, stop = max(first - 1, 0), min(last + planes - 2, mask.shape[0])
        slab[(slice(start - first + 1, stop - first + 1), *[slice(1, -1)] * (mask.ndim - 1))] = mask[start:stop]
        yield first, slab


def _surfels(mask: Mask, spacing_mm: Sequence[float]) -> _Elements:
    """A cell lies between 2 × 2 (× 2) voxels; there is one more of them along each axis than voxels."""
    cells = tuple(s + 1 for s in mask.shape)
    row = int(np.prod(cells[1:]))
    sizes = contour_lengths(*spacing_mm) if mask.ndim == 2 else surfel_areas(tuple(float(s) for s in spacing_mm))
    one, full = np.uint8(1), np.uint8(len(sizes) - 1)
    at, size = [], []
    for first, code in _slabs(mask, cells[0], planes=2):
        for axis in reversed(range(mask.ndim)):
            bits = np.uint8(1 << (mask.ndim - 1 - axis))
            code = code[_part(axis, None, -1)] | (code[_part(axis, 1, None)] << bits)
        # in unsigned numbers 0 − 1 is the largest: neither empty nor full
        found = np.flatnonzero((code - one) < (full - one))
        at.append(found + first * row)
        size.append(sizes[code.ravel()[found]])
    return _Elements(np.concatenate(at), np.concatenate(size), cells)


def _border_voxels(mask: Mask, spacing_mm: Sequence[float]) -> _Elements:
    row = mask[0].size
    inside = (slice(1, -1),) * mask.ndim
    at = []
    for first, voxels in _slabs(mask, mask.shape[0], planes=3):
        border = np.zeros_like(voxels[inside])
        for axis, shift in itertools.product(range(mask.ndim), (0, 2)):
            beside = (*inside[:axis], slice(shift, voxels.shape[axis] - 2 + shift), *inside[axis + 1 :])
            border |= ~voxels[beside]
        at.append(np.flatnonzero(border & voxels[inside]) + first * row)
    found = np.concatenate(at)
    return _Elements(found, np.ones(len(found)), mask.shape)


def _part(axis: int, start: int | None, stop: int | None) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(start, stop))


# Distances: a tree of the goal's elements, or a distance transform of the whole box where that costs less.


def _directed(start: _Elements, goal: _Elements, spacing_mm: Sequence[float]) -> Distances:
    mm = np.zeros(len(start.at))
    there = np.zeros(int(np.prod(goal.cells)), bool)
    there[goal.at] = True
    apart = np.flatnonzero(~there[start.at])  # where the surfaces coincide the distance is 0
    if len(apart):
        nearest = _by_tree(start.at[apart], goal, spacing_mm) or _by_transform(there.reshape(goal.cells), spacing_mm)
        del there
        for some in np.split(apart, range(_QUERIES, len(apart), _QUERIES)):
            here = np.stack(np.unravel_index(start.at[some], start.cells), axis=-1)
            # from whole steps, so that both ways give one number and 3 steps are 3 steps anywhere
            mm[some] = np.sqrt((((nearest(here) - here) * spacing_mm) ** 2).sum(axis=-1))
    order = np.argsort(mm)
    return Distances(mm[order], start.size[order])


def _by_tree(at: Cells, goal: _Elements, spacing_mm: Sequence[float]) -> Nearest | None:
    """Finds the nearest element of `goal` for positions (N, dimensions); None where the transform is cheaper."""
    transform_us = int(np.prod(goal.cells)) * _TRANSFORM_US_PER_CELL
    least_us = len(goal.at) * _TREE_US_PER_ELEMENT + len(at) * _QUERY_US
    if least_us > transform_us:
        return None
    places = np.stack(np.unravel_index(goal.at, goal.cells), axis=-1).astype(np.int32)
    tree = cKDTree(places * np.asarray(spacing_mm), leafsize=_LEAF_SIZE, balanced_tree=False, compact_nodes=False)

    few = at[:: -(-len(at) // _SAMPLE)]
    points = np.stack(np.unravel_index(few, goal.cells), axis=-1) * np.asarray(spacing_mm)
    mm, step_mm = tree.query(points)[0], min(spacing_mm)
    if mm.max() > _NEAR_STEPS * step_mm:
        # a query looks at all that is hardly farther than the nearest; far away that can be the whole surface
        rivals = np.mean(tree.query_ball_point(points, mm + _RIVAL_STEPS * step_mm, return_length=True))
        if least_us + len(at) * float(rivals) * _RIVAL_US > transform_us:
            return None
    return lambda here: places[tree.query(here * np.asarray(spacing_mm))[1]]


def _by_transform(there: Mask, spacing_mm: Sequence[float]) -> Nearest:
    """Finds the nearest element for positions (N, dimensions); takes 13 bytes a cell."""
    nearest = ndimage.distance_transform_edt(~there, sampling=spacing_mm, return_distances=False, return_indices=True)
    return lambda here: np.stack([axis[tuple(here.T)] for axis in nearest], axis=-1)


def _weighted_95th(d: Distances) -> float:
    # 19 of 20 equal elements are a share of 0.95 however their sizes add up
    return float(d.mm[np.searchsorted(np.cumsum(d.size), (0.95 - _SHARE_TIE) * d.size.sum())])


def _linear_95th(d: Distances) -> float:
    return float(np.percentile(d.mm, 95))
