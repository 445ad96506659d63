"""The nouns of a segmentation that knows its names: what DICOM objects are read into and written from; no files."""

from __future__ import annotations

from dataclasses import dataclass
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
