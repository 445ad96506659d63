"""Planes that are no regular volume brought onto one, on explicit request: a tilt shifted away, gaps interpolated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError
from medseg.readers.dicom_frames import MOST_VOXELS
from medseg.readers.dicom_stack import Stack, base_step_mm

Planes = npt.NDArray[Any]

# of the way to the next plane: so near to one, it is that one
SAME_SHARE = 1e-3


def upright_shape(made: Stack, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that hold every plane once `set_upright` has shifted them."""
    low, high = _range(made)
    # of any size: positions may be far apart
    return shape[0] + int(high[1] - low[1]), shape[1] + int(high[0] - low[0])


def set_upright(made: Stack, planes: Planes | None) -> tuple[Stack, Planes | None]:
    """Planes shifted within themselves (linear interpolation) until each is above the first.

    `planes` (K, rows, columns), or None for the geometry alone. The rows and columns grow to hold all; what no plane
    covers has the lowest value. Gives the stack that the result has.
    """
    low, _ = _range(made)
    first = made.first
    moved = low[0] * first.spacing_mm[1] * first.orientation[0] + low[1] * first.spacing_mm[0] * first.orientation[1]
    frames = tuple(
        replace(f, position=first.position + moved + along * first.normal)
        for f, along in zip(made.frames, made.along_mm)
    )
    upright = Stack(frames, made.along_mm, np.zeros_like(made.sideways_mm))
    if planes is None:
        return upright, None
    rows, columns = upright_shape(made, (planes.shape[1], planes.shape[2]))
    result = np.empty((len(planes), rows, columns), planes.dtype)
    empty = planes.min()
    for plane, target, (x, y) in zip(planes, result, _pixels(made) - low):
        room = np.full((rows, columns), empty, np.float64)
        room[: plane.shape[0], : plane.shape[1]] = plane
        for axis, shift in ((0, y), (1, x)):
            room = _shifted(room, float(shift), axis, float(empty))
        target[:] = _as(room, planes.dtype)
    return upright, result


def even_steps(made: Stack) -> tuple[int, float]:
    """Number of planes and their distance in mm that keep both ends and come nearest to the usual distance."""
    length = float(made.along_mm[-1])
    count = round(length / base_step_mm(made)) + 1
    return count, length / (count - 1)


def fill_gaps(made: Stack, planes: Planes) -> Planes:
    """Planes at equal distances, interpolated linearly between neighbours; one that is there already stays as it is.

    Raises `DataError` before memory is taken where that would be too many.
    """
    count, step = even_steps(made)
    if count * math.prod(planes.shape[1:]) > MOST_VOXELS:
        raise DataError(
            f"{count} planes would be made, expected at most {MOST_VOXELS:,} voxels; choose files of one scan"
        )
    result = np.empty((count, *planes.shape[1:]), planes.dtype)
    for number, target in enumerate(result):
        at = number * step
        above = int(np.clip(np.searchsorted(made.along_mm, at), 1, len(planes) - 1))
        low, high = made.along_mm[above - 1], made.along_mm[above]
        # processors differ in the last bits of a position: half way between whole numbers they would round apart
        share = round(float(np.clip((at - low) / (high - low), 0, 1)), 9)
        if min(share, 1 - share) < SAME_SHARE:
            target[:] = planes[above - 1 if share < 0.5 else above]
        else:
            target[:] = _as(planes[above - 1] * (1 - share) + planes[above] * share, planes.dtype)
    return result


def _pixels(made: Stack) -> npt.NDArray[np.float64]:
    """How far each plane is moved, (K, 2) in pixels: along its rows, along its columns."""
    between_rows, between_columns = made.first.spacing_mm
    return np.asarray(made.sideways_mm / (between_columns, between_rows))


def _range(made: Stack) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The whole pixels, along rows and along columns, between which all planes are moved."""
    pixels = _pixels(made)
    # a hair beyond a whole pixel is rounding
    return np.floor(pixels.min(axis=0) + 1e-6), np.ceil(pixels.max(axis=0) - 1e-6)


def _shifted(plane: npt.NDArray[np.float64], shift: float, axis: int, empty: float) -> npt.NDArray[np.float64]:
    """`plane` moved by `shift` ≥ 0 pixels towards higher indices of `axis`."""
    whole = math.floor(shift + 1e-6)
    share = max(0.0, shift - whole)

    def moved(by: int) -> npt.NDArray[np.float64]:
        target = np.full_like(plane, empty)
        size = plane.shape[axis]
        to, source = [slice(None)] * 2, [slice(None)] * 2
        to[axis], source[axis] = slice(by, size), slice(0, max(0, size - by))
        target[tuple(to)] = plane[tuple(source)]
        return target

    near = moved(whole)
    return near if share < 1e-6 else near * (1 - share) + moved(whole + 1) * share


def _as(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.rint(values).astype(dtype) if dtype.kind in "ui" else values.astype(dtype)
