"""Which axes of a file are space and which are channels; the same answer for all formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError
from medseg.grid import Grid

# x and y of DICOM and ITK run to the left and to the back, ours to the right and to the front
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def spatial_shape(path: Path, shape: tuple[int, ...], spatial_dims: int | None) -> tuple[int, ...]:
    """The first `spatial_dims` sizes (not given: as many as the file has, up to 3) of a file of `shape`.

    Axes of length 1 are dropped or added at the end. Raises `DataError` if a dropped axis is longer.
    """
    space = shape[:3]
    wanted = len(space) if spatial_dims is None else spatial_dims
    if any(size != 1 for size in space[wanted:]):
        raise DataError(f"{path}: a volume of shape {space} found, expected {wanted} axes; use a {len(space)}D model")
    return (space + (1,) * wanted)[:wanted]


def channels_first(
    path: Path, array: npt.NDArray[Any], space: tuple[int, ...], channels: int | None, *, labels: bool = False
) -> npt.NDArray[Any]:
    """`array` (I, J, K, …) as (C, *space): whatever follows the third axis are channels where `channels` says so.

    Raises `DataError` for a time series or several volumes in one file, and for `labels` of one volume each.
    """
    extra = array.shape[3:]
    long = [axis for axis, size in enumerate(extra) if size > 1]
    if not long:
        return array.reshape((1, *space), order="A")
    count = extra[long[0]]
    if len(long) > 1 or channels != count:
        advice = "" if channels is None else "or name the channels: in the data set, or by --set data.channels=[…]"
        if labels:
            advice = "of one volume for each label make one with the label's number in every voxel"
        raise DataError(
            f"{path}: axis {long[0] + 4} has {count} points (shape {array.shape}), expected one volume"
            + (f" or {channels} channels" if channels and channels > 1 else "")
            + "; split a time series into one file per time point"
            + (f"; {advice}" if advice else "")
        )
    return np.moveaxis(array.reshape((*space, count), order="F"), -1, 0)


def place(path: Path, space: tuple[int, ...], affine: npt.NDArray[np.float64]) -> Grid:
    """The grid of `space` under a 4×4 `affine`; in 2D only the spacing is kept: what a network sees has no place.

    Raises `GeometryError` naming the file.
    """
    n = len(space)
    try:
        if n == 3:
            return Grid(space, affine)
        spacing = np.sqrt((affine[:3, :n] ** 2).sum(axis=0))
        return Grid(space, np.diag([*spacing, 1.0]))
    except GeometryError as error:
        raise GeometryError(f"{path}: {error}") from error


def plane(space: tuple[int, ...], affine: npt.NDArray[np.float64], *, known: int = 3) -> npt.NDArray[np.float64] | None:
    """Where a plane lies, (i, j, 1) → RAS mm in the first `known` of x, y and z; None for all that is no plane."""
    return affine[:known, [0, 1, 3]] if len(space) == 2 else None
