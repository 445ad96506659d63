"""Label maps as small numbers: what is asked for by its code, all else 0; boxes and masks of what was found."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Value = int | tuple[int, ...]
"""One label, or all values that together make a region."""
Labels = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, ...]
_LOOKUP_LIMIT = 65535
_SLAB_VOXELS = 1 << 18


@dataclass(frozen=True)
class Pair:
    """Both maps with the code n + 1 for `parts[n]` and 0 for any other value and for ignored voxels."""

    prediction: Labels
    reference: Labels
    parts: tuple[int, ...]
    n_judged: int
    """Voxels that are not ignored."""

    def codes(self, value: Value) -> list[int]:
        """The codes that make up `value`."""
        return [self.parts.index(part) + 1 for part in members(value)]

    def boxes(self) -> dict[int, Box]:
        """The smallest box that holds a code in both maps, for each code that occurs."""
        around = self._foreground()
        found: dict[int, list[Box]] = {}
        for codes in (self.prediction, self.reference) if around else ():
            # read in the order of memory: three times as fast
            boxes = ndimage.find_objects(codes[around].transpose(self._order), max_label=len(self.parts))
            for code, box in enumerate(boxes, start=1):
                if box is not None:
                    inner = (box[self._order.index(axis)] for axis in range(len(box)))
                    shifted = tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(around, inner))
                    found.setdefault(code, []).append(shifted)
        return {code: union(boxes) for code, boxes in found.items()}

    def confusion(self, box: Box) -> npt.NDArray[np.intp]:
        """Voxels of `box` with code p in the prediction and r in the reference, (parts + 1, parts + 1); 0 at [0, 0]."""
        size = len(self.parts) + 1
        total = np.zeros(size * size, np.intp)
        for p, r in self._slabs(box):
            held = (p | r) != 0
            total += np.bincount(p[held].astype(np.intp) * size + r[held], minlength=size * size)
        return total.reshape(size, size)

    @property
    def _order(self) -> list[int]:
        return memory_order(self.reference)

    def _slabs(self, box: Box | EllipsisType = ...) -> Iterator[tuple[Labels, Labels]]:
        # along the slowest axis: what is worked out of a slab stays in the processor's cache
        laid = [codes[box].transpose(self._order) for codes in (self.prediction, self.reference)]
        rows = max(1, _SLAB_VOXELS // max(1, laid[0][:1].size))
        for first in range(0, len(laid[0]), rows):
            yield laid[0][first : first + rows], laid[1][first : first + rows]

    def _foreground(self) -> Box:
        """The smallest box around all codes; () where there is none."""
        if not self.reference.size:
            return ()
        held: list[list[Mask]] = [[] for _ in self._order]
        for p, r in self._slabs():
            either = p | r
            for axis, planes in enumerate(held):
                planes.append(np.asarray(either.any(axis=tuple(a for a in range(either.ndim) if a != axis))))
        along = [np.concatenate(held[0]), *(np.any(planes, axis=0) for planes in held[1:])]
        if not along[0].any():
            return ()
        box = [slice(int(np.argmax(h)), len(h) - int(np.argmax(h[::-1]))) for h in along]
        return tuple(box[self._order.index(axis)] for axis in range(len(box)))

    def masks(self, value: Value, box: Box) -> tuple[Mask, Mask]:
        """Where the prediction and the reference hold `value`, within `box`."""
        codes = self.codes(value)
        if len(codes) == 1:
            return self.prediction[box] == codes[0], self.reference[box] == codes[0]
        chosen = np.zeros(len(self.parts) + 1, bool)
        chosen[codes] = True
        return chosen[self.prediction[box]], chosen[self.reference[box]]


def encode(prediction: Labels, reference: Labels, values: Collection[Value], ignore_value: int | None = None) -> Pair:
    """Both maps as codes of the parts of `values`. Raises `ValueError` if the shapes differ or a map is not integer."""
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, reference of shape {reference.shape}")
    for labels in (prediction, reference):
        if labels.dtype.kind not in "biu":
            raise ValueError(f"label map of {labels.dtype} found, expected whole numbers of an integer type")
    parts = tuple(sorted({part for value in values for part in members(value)}))
    codes = _codes(prediction, parts), _codes(reference, parts)
    if ignore_value is None:
        return Pair(*codes, parts, reference.size)
    kept = reference != ignore_value
    zero = codes[0].dtype.type(0)
    return Pair(np.where(kept, codes[0], zero), np.where(kept, codes[1], zero), parts, int(np.count_nonzero(kept)))


def judged(
    prediction: Labels, reference: Labels, values: Collection[Value], *, ignore_value: int | None = None
) -> tuple[Labels, Labels]:
    """Both maps with 0 wherever a voxel belongs to none of `values` or is ignored."""
    pair = encode(prediction, reference, values, ignore_value)
    if pair.parts == tuple(range(1, len(pair.parts) + 1)):
        return pair.prediction, pair.reference
    # a value beyond what the maps can hold is in neither: no voxel looks it up
    back = np.array([0, *pair.parts]).astype(np.result_type(prediction, reference))
    return back[pair.prediction], back[pair.reference]


def present_values(labels: Labels) -> frozenset[int]:
    """The values other than 0 that occur."""
    return frozenset(int(v) for slab in labels.transpose(memory_order(labels)) for v in _distinct(slab) if v)


def members(value: Value) -> tuple[int, ...]:
    """The values that make up a label or a region, each once."""
    return tuple(dict.fromkeys(value)) if isinstance(value, tuple) else (value,)


def memory_order(labels: npt.NDArray[Any]) -> list[int]:
    """The axes from the slowest to the fastest in memory."""
    return sorted(range(labels.ndim), key=lambda axis: -abs(labels.strides[axis]))


def check_spacing(spacing_mm: Sequence[float], dims: int) -> None:
    """Raises `ValueError` unless there is a finite size above 0 for each of `dims` axes."""
    if len(spacing_mm) != dims or not all(0 < size < math.inf for size in spacing_mm):
        raise ValueError(f"spacing of {tuple(map(float, spacing_mm))} mm found, expected {dims} numbers above 0")


def union(boxes: Iterable[Box]) -> Box:
    """The smallest box that holds all of `boxes`."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes))


def _codes(labels: Labels, parts: tuple[int, ...]) -> Labels:
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    dtype = np.uint8 if len(parts) < 256 else np.uint16
    if not parts:
        return np.zeros(labels.shape, dtype)
    if labels.dtype == dtype and parts == tuple(range(1, len(parts) + 1)) and labels.max(initial=0) <= len(parts):
        return labels
    codes = cast(Labels, np.empty_like(labels, dtype=dtype))
    # slab by slab, each read and written as it lies: look-ups need eight bytes a voxel, and a slab stays in the cache
    order = memory_order(labels)
    read, written = labels.transpose(order), codes.transpose(order)
    for n in range(len(read)):
        written[n : n + 1] = _slab_codes(read[n : n + 1], np.asarray(parts))
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


def _distinct(slab: Labels) -> npt.NDArray[Any]:
    if slab.dtype == np.uint8 or slab.dtype == bool:
        return np.flatnonzero(np.bincount(slab.ravel(order="K")))
    return np.unique(slab)
