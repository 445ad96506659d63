"""Where the planes of DICOM headers lie: classic slices and multi-frame objects, by position and orientation alone.

Pixels are read elsewhere. Imports pydicom: this module is imported where DICOM is at hand, never by the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from medseg.errors import GeometryError
from medseg.grid import ROUNDING_TOLERANCE, Grid
from medseg.readers._axes import LPS_TO_RAS

Array = npt.NDArray[np.float64]

# orientations of planes of one stack, and the lengths of their directions, differ by rounding in decimal strings only
DIRECTION_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Plane:
    """One frame of `header`, counted from 1; `position`: LPS mm of the centre of its first pixel."""

    header: Dataset
    frame: int
    position: Array


@dataclass(frozen=True, eq=False)
class Planes:
    """Parallel planes of `rows` × `columns` at equal steps, in order along their normal.

    `affine`: (column, row, plane) → LPS mm.
    """

    planes: tuple[Plane, ...]
    rows: int
    columns: int
    affine: Array

    @property
    def grid(self) -> Grid:
        """The same voxels as (column, row, plane) in RAS mm."""
        return Grid((self.columns, self.rows, len(self.planes)), LPS_TO_RAS @ self.affine)


@dataclass(frozen=True, eq=False)
class Frame:
    """What the header says of one frame.

    `directions`: along a row, along a column; `spacing_mm`: between rows, between columns; `step_mm`: to the next
    plane, 0 where unknown.
    """

    plane: Plane
    directions: Array
    spacing_mm: tuple[float, float]
    step_mm: float


def planes_of(headers: Sequence[Dataset]) -> Planes:
    """The stack that the frames of `headers` make, sorted along the normal, whatever the order they come in.

    Raises `GeometryError` where they make no single regular stack.
    """
    found = [frame for header in headers for frame in frames_of(header)]
    if not found:
        raise GeometryError("no frames found, expected the headers of an image series")
    first = found[0]
    sizes = {(int(header.Rows), int(header.Columns)) for header in headers}
    if len(sizes) > 1:
        raise GeometryError(f"planes of {sorted(sizes)} rows and columns found, expected one size; give one series")
    same_orientation(found)
    normal = np.cross(*first.directions)
    found.sort(key=lambda frame: float(frame.plane.position @ normal))
    positions = np.stack([frame.plane.position for frame in found])
    rows, columns = sizes.pop()
    affine = stack_affine(first, positions[0], _step(positions, normal, first.step_mm))
    return Planes(tuple(frame.plane for frame in found), rows, columns, affine)


def frames_of(header: Dataset) -> Iterator[Frame]:
    """Every frame of a single- or multi-frame header. Raises `GeometryError` where it does not say where it lies."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for number, item in enumerate(per_frame or [None], 1):
        groups = [header] if item is None else [item, shared]
        position = _numbers(groups, "PlanePositionSequence", "ImagePositionPatient", 3)
        directions = _numbers(groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
        spacing = _numbers(groups, "PixelMeasuresSequence", "PixelSpacing", 2)
        lengths = np.linalg.norm(directions, axis=1)
        if np.abs(lengths - 1).max() > DIRECTION_TOLERANCE or abs(directions[0] @ directions[1]) > DIRECTION_TOLERANCE:
            raise GeometryError(f"frame {number}: Image Orientation {directions.ravel()} is no pair of unit vectors")
        if (spacing <= 0).any():
            raise GeometryError(f"frame {number}: Pixel Spacing {spacing} found, expected numbers above 0")
        step = _value(groups, "PixelMeasuresSequence", "SpacingBetweenSlices")
        step = step or _value(groups, "PixelMeasuresSequence", "SliceThickness")
        yield Frame(
            Plane(header, number, position),
            directions / lengths[:, None],
            (float(spacing[0]), float(spacing[1])),
            abs(float(step)) if step else 0.0,
        )


def same_orientation(frames: Sequence[Frame]) -> None:
    """Raises `GeometryError` where frames are turned against each other or their pixels differ in size."""
    first = frames[0]
    for frame in frames:
        if np.abs(frame.directions - first.directions).max() > DIRECTION_TOLERANCE:
            raise GeometryError("planes of several orientations found, expected parallel ones; give one series")
        if not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=DIRECTION_TOLERANCE):
            raise GeometryError(f"pixels of {first.spacing_mm} and {frame.spacing_mm} mm found, expected one size")


def stack_affine(frame: Frame, origin: Array, step: Array) -> Array:
    """(column, row, plane) → LPS mm of planes like `frame`, the first at `origin`, the next one `step` mm away."""
    affine = np.eye(4)
    # along a row the column counts: the first direction goes with the second spacing
    affine[:3, 0] = frame.directions[0] * frame.spacing_mm[1]
    affine[:3, 1] = frame.directions[1] * frame.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = step, origin
    return affine


def _step(positions: Array, normal: Array, step_mm: float) -> Array:
    count = len(positions)
    if count == 1:
        return np.asarray(normal * (step_mm or 1.0))
    step = (positions[-1] - positions[0]) / (count - 1)
    apart = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    length = float(np.linalg.norm(step))
    if apart.min() <= ROUNDING_TOLERANCE * length:
        raise GeometryError("two planes at one position found, expected one volume; give one time point or one series")
    off = np.abs(positions - (positions[0] + np.arange(count)[:, None] * step)).max()
    if off > ROUNDING_TOLERANCE * length:
        raise GeometryError(
            f"planes {apart.min():.3g} to {apart.max():.3g} mm apart found, expected equal steps; "
            "a slice is missing, or the series is no single volume"
        )
    return np.asarray(step)


def _numbers(groups: Sequence[Dataset], sequence: str, keyword: str, count: int) -> Array:
    value = _value(groups, sequence, keyword)
    try:
        numbers = np.asarray([] if value is None else value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.size != count or not np.isfinite(numbers).all():
        # what stands there may be anything, a name too
        raise GeometryError(f"no {keyword} of {count} numbers found, expected one; the image has no place in space")
    return numbers


def _value(groups: Sequence[Dataset], sequence: str, keyword: str) -> Any:
    for group in groups:
        # a classic header holds the attribute itself, functional groups hold it in a sequence of one item
        held = group.get(sequence) or [group]
        if held[0].get(keyword) is not None:
            return held[0].get(keyword)
    return None
