"""What reading gives: images, label maps and where their voxels are; the formats themselves live beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.grid import Grid


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """The fields of a NIfTI header that place its voxels, as they stand in the file; `shape` is that of the file."""

    shape: tuple[int, ...]
    fields: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a file are. `header` only for NIfTI; `warnings`: what is odd about the file, but usable."""

    grid: Grid
    header: NiftiHeader | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Image:
    """`array` (C, *grid.shape) in the type of the file (float32 where the file rescales)."""

    array: npt.NDArray[Any]
    geometry: Geometry

    @property
    def grid(self) -> Grid:
        """Shape and affine, voxel → RAS mm."""
        return self.geometry.grid

    @property
    def header(self) -> NiftiHeader | None:
        """What a mask needs to lie on the same NIfTI grid."""
        return self.geometry.header


@dataclass(frozen=True, eq=False)
class LabelMap:
    """`array` (*grid.shape) in the smallest of uint8, uint16, int32; `file_dtype` is the type found in the file."""

    array: npt.NDArray[Any]
    geometry: Geometry
    file_dtype: np.dtype[Any]

    @property
    def grid(self) -> Grid:
        """Shape and affine, voxel → RAS mm."""
        return self.geometry.grid
