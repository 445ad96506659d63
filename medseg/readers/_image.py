"""What reading gives: images, label maps and where their voxels are; the formats themselves live beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.grid import Array, Grid


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """The fields of a NIfTI header that place its voxels, as they stand in the file; `shape` is that of the file.

    `version`: 1, or 2 whose numbers are of 64 bits.
    """

    shape: tuple[int, ...]
    fields: dict[str, Any]
    version: int = 1


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a file are. `header` only for NIfTI; `warnings`: what is odd about the file, but usable.

    `plane`: where in space a plane lies, which its grid does not tell: (i, j, 1) → RAS mm, (3, 3), or (2, 3) of a file
    that knows x and y alone; None for volumes, and where the file does not say, as of pictures.
    """

    grid: Grid
    header: NiftiHeader | None = None
    warnings: tuple[str, ...] = ()
    plane: Array | None = None

    @property
    def affine_4x4(self) -> Array:
        """Voxel → RAS mm as files want it, of a plane with the place that is known of it."""
        affine = self.grid.affine_4x4
        if self.plane is not None:
            known = len(self.plane)
            affine[:known, :2], affine[:known, 3] = self.plane[:, :2], self.plane[:, 2]
            # one millimetre thick, at a right angle
            across = np.cross(affine[:3, 0], affine[:3, 1])
            affine[:3, 2] = across / np.linalg.norm(across)
        return affine

    def matches(self, other: Geometry, *, tolerance: float) -> bool:
        """Whether both are the same voxels, as `Grid.matches`, and planes at the same place as far as both say it."""
        if not self.grid.matches(other.grid, tolerance=tolerance):
            return False
        if self.plane is None or other.plane is None:
            return True
        known = min(len(self.plane), len(other.plane))
        last_i, last_j = (size - 1 for size in self.grid.shape)
        corners = np.array([[i, j, 1] for i in (0, last_i) for j in (0, last_j)])
        apart = np.abs(corners @ (self.plane[:known] - other.plane[:known]).T).max()
        return bool(apart <= tolerance * min(self.grid.spacing_mm))


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
