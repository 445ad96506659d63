"""Sets of indices of a tensor as unions of products: one set of indices for each axis, never a grid of all voxels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import product as combinations
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.bool_]
Axis = tuple[Vector, ...]
"""Indices along one axis; several vectors where axes of a reshaped tensor were merged, the slowest first."""
Product = tuple[Axis, ...]
"""One set of indices for each axis of a tensor: all combinations of them."""
Shape = Sequence[int]

MAX_PRODUCTS = 100
MAX_VECTOR = 2**22


class TooComplex(Exception):  # noqa: N818 - says why an analysis ends, and never leaves the networks
    """A set that would need too many products, or too long a vector."""


@lru_cache(maxsize=512)
def ones(size: int) -> Vector:
    """All indices of an axis; do not write into it. Raises `TooComplex` where there are too many."""
    if size > MAX_VECTOR:
        raise TooComplex(f"an axis of {size} elements")
    return np.ones(size, dtype=bool)


def everything(shape: Shape) -> Product:
    """All elements of a tensor."""
    return tuple((ones(n),) for n in shape)


def element(shape: Shape, chosen: Sequence[int | None]) -> Product:
    """The elements at `chosen`, where None takes a whole axis."""
    return tuple((ones(n) if at is None else indices(n, [at]),) for n, at in zip(shape, chosen))


def indices(size: int, found: Any) -> Vector:
    """The vector that is true at `found`."""
    vector = np.zeros(size, dtype=bool)
    vector[found] = True
    return vector


def flat(axis: Axis) -> Vector:
    """An axis as one vector. Raises `TooComplex` where it is too long to write down."""
    if len(axis) == 1:
        return axis[0]
    if prod(len(v) for v in axis) > MAX_VECTOR:
        raise TooComplex("axes merged beyond what can be written down")
    return reduce(lambda a, b: np.outer(a, b).ravel(), axis)


def is_empty(product: Product) -> bool:
    """Whether any axis has no index."""
    return not all(vector.any() for axis in product for vector in axis)


def unite(products: list[Product], new: Product) -> None:
    """Add `new`, which is not empty: nothing contained in another product stays, two that differ on one axis unite."""
    if not products:
        products.append(new)
        return
    changed = True
    while changed:
        changed = False
        for number, old in enumerate(products):
            joined = _join(old, new)
            if joined is old:
                return
            if joined is not None:
                del products[number]
                new, changed = joined, True
                break
    products.append(new)
    if len(products) > MAX_PRODUCTS:
        raise TooComplex(f"more than {MAX_PRODUCTS} grids of taps")


def _join(old: Product, new: Product) -> Product | None:
    """One product for both, or None where there is none."""
    if [len(a) for a in old] != [len(a) for a in new]:
        return None
    in_old = in_new = True
    different: list[tuple[int, int]] = []
    for i, (axis_a, axis_b) in enumerate(zip(old, new)):
        for j, (a, b) in enumerate(zip(axis_a, axis_b)):
            if a is b:
                continue
            if len(a) != len(b):
                return None
            both = a & b
            b_in_a, a_in_b = bool((both == b).all()), bool((both == a).all())
            in_old &= b_in_a
            in_new &= a_in_b
            if not (b_in_a and a_in_b):
                different.append((i, j))
            if not (in_old or in_new) and len(different) > 1:
                return None
    if in_old:
        return old
    if in_new:
        return new
    i, j = different[0]
    axis = list(old[i])
    axis[j] = axis[j] | new[i][j]
    return (*old[:i], tuple(axis), *old[i + 1 :])


def reshape(product: Product, shape: Shape, to: Shape) -> list[Product]:
    """The same elements, in the order of memory, of a tensor of `shape` seen as one of shape `to`."""
    if tuple(shape) == tuple(to):
        return [product]
    groups = [
        _fit([v for axis in axes for v in axis if len(v) > 1], sizes) for axes, sizes in _groups(product, shape, to)
    ]
    return [tuple(axis for part in parts for axis in part) for parts in combinations(*groups)]


def _groups(product: Product, shape: Shape, to: Shape) -> list[tuple[list[Axis], list[int]]]:
    """Runs of axes that hold the same number of elements before and after."""
    groups: list[tuple[list[Axis], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(to):
        axes: list[Axis] = []
        sizes: list[int] = []
        before = after = 1
        if i < len(shape):
            axes.append(product[i])
            before, i = shape[i], i + 1
        if j < len(to):
            sizes.append(to[j])
            after, j = to[j], j + 1
        while before != after:
            if before < after:
                axes.append(product[i])
                before, i = before * shape[i], i + 1
            else:
                sizes.append(to[j])
                after, j = after * to[j], j + 1
        groups.append((axes, sizes))
    return groups


def _fit(vectors: Sequence[Vector], sizes: Sequence[int]) -> list[list[Axis]]:
    """`vectors`, the slowest first, dealt out to axes of `sizes`: every element of the list is one product."""
    if not sizes:
        return [[]]
    taken: list[Vector] = []
    left, waiting = sizes[0], list(vectors)
    while left > 1:
        size = len(waiting[0])
        if left % size == 0:
            taken.append(waiting.pop(0))
            left //= size
        elif size % left == 0:
            rows = waiting.pop(0).reshape(left, size // left)
            found: list[list[Axis]] = []
            patterns, which = np.unique(rows, axis=0, return_inverse=True)
            for number, pattern in enumerate(patterns):
                if pattern.any():
                    axis = (*taken, which.reshape(-1) == number)
                    found += [[axis, *rest] for rest in _fit([pattern, *waiting], sizes[1:])]
            return found
        else:
            waiting[:2] = [flat((waiting[0], waiting[1]))]
    axis = tuple(taken) or (ones(1),)
    return [[axis, *rest] for rest in _fit(waiting, sizes[1:])]


def bounds(products: Sequence[Product], axis: int) -> tuple[int, int] | None:
    """First and last index along `axis`, None for the empty set."""
    found = [np.flatnonzero(flat(p[axis])) for p in products]
    return (min(int(f[0]) for f in found), max(int(f[-1]) for f in found)) if found else None


def volume(products: Sequence[Product], axes: Sequence[int]) -> int:
    """Number of elements in the union, seen along `axes` only.

    Indices that lie in the same products are counted together, so that no grid is written down.
    """
    if not products:
        return 0
    members = np.ones((1, len(products)), dtype=bool)
    counts = np.ones(1, dtype=object)
    for axis in axes:
        table = np.stack([flat(p[axis]) for p in products], axis=1)
        classes, sizes = np.unique(table[table.any(axis=1)], axis=0, return_counts=True)
        both = (members[:, None] & classes[None]).reshape(-1, len(products))
        many = np.outer(counts, sizes.astype(object)).ravel()
        alive = both.any(axis=1)
        members, which = np.unique(both[alive], axis=0, return_inverse=True)
        counts = np.array([0] * len(members), dtype=object)
        np.add.at(counts, which.reshape(-1), many[alive])
    return int(counts.sum())


def dense(products: Sequence[Product], axes: Sequence[int]) -> Vector:
    """The union along `axes` written down as a grid: for pictures and small tests."""
    return reduce(np.logical_or, (reduce(np.multiply.outer, (flat(p[axis]) for axis in axes)) for p in products))
