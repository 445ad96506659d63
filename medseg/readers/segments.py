"""The nouns of a segmentation that knows its names: what DICOM objects are read into and written from; no files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.grid import Grid

# in the description of a segment whose number is not its label value
VALUE_NOTE = "Label value {}"


@dataclass(frozen=True)
class SegmentInfo:
    """One label: its value in the label map, its name, and its colour (`#rrggbb`; empty: the writer chooses one)."""

    value: int
    name: str
    colour: str = ""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A label map `array`, integers (*grid.shape), where it lies, and what its values are called (0: background)."""

    array: npt.NDArray[np.integer[Any]]
    grid: Grid
    segments: tuple[SegmentInfo, ...]

    @property
    def names(self) -> dict[int, str]:
        """Name of every value that has one."""
        return {segment.value: segment.name for segment in self.segments}

    @cached_property
    def voxels(self) -> dict[int, int]:
        """How many voxels every value has that is there, background too."""
        return count_voxels(self.array)

    @property
    def volumes_ml(self) -> dict[int, float]:
        """Millilitres of every value that is there: its voxels times their volume. For volumes alone."""
        return volumes_ml(self.voxels, self.grid)


def count_voxels(array: npt.NDArray[np.integer[Any]]) -> dict[int, int]:
    """How many voxels every value has that is there; values from 0."""
    counts: Counter[int] = Counter()
    # plane by plane: counting makes 8 bytes of every voxel
    for plane in array if array.size else ():
        found = np.bincount(np.ravel(plane))
        counts.update({int(value): int(found[value]) for value in np.flatnonzero(found)})
    return dict(counts)


def volumes_ml(voxels: dict[int, int], grid: Grid) -> dict[int, float]:
    """Millilitres by value of so many `voxels` of a grid with three axes."""
    return {value: count * grid.voxel_mm3 / 1000 for value, count in voxels.items()}
