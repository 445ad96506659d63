"""NRRD and MetaImage files by SimpleITK; NIfTI and DICOM series have modules of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError
from medseg.readers._axes import LPS_TO_RAS, channels_first, place, plane, spatial_shape
from medseg.readers._image import Geometry

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")


def read(
    path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
) -> tuple[npt.NDArray[Any], Geometry]:
    """Voxels (C, …) and geometry. Raises `DataError`, `GeometryError`. Of `labels` only the advice differs."""
    import SimpleITK

    reader = _reader(path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _refusal(path, error) from error
    geometry = _geometry(path, reader, spatial_dims)
    stored = SimpleITK.GetArrayFromImage(image)
    vector = image.GetNumberOfComponentsPerPixel() > 1
    if vector:
        stored = np.moveaxis(stored, -1, 0)
        space = geometry.grid.shape
        if stored[0].size != int(np.prod(space)):
            raise DataError(f"{path}: several volumes of vectors found, expected one volume")
        return np.stack([plane.T.reshape(space, order="F") for plane in stored]), geometry
    return channels_first(path, _three_axes(stored.T), geometry.grid.shape, channels, labels=labels), geometry


def read_geometry(path: Path, *, spatial_dims: int | None) -> Geometry:
    """Geometry from the header alone. Raises `DataError`, `GeometryError`."""
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _refusal(path, error) from error
    return _geometry(path, reader, spatial_dims)


def _reader(path: Path) -> Any:
    import SimpleITK

    # what ITK would print on the terminal is in the exception too
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    return reader


def _geometry(path: Path, reader: Any, spatial_dims: int | None) -> Geometry:
    shape = tuple(int(s) for s in reader.GetSize())
    n, used = len(shape), min(3, len(shape))
    directions = np.asarray(reader.GetDirection()).reshape(n, n)[:used, :used]
    affine = np.eye(4)
    affine[:used, :used] = directions * np.asarray(reader.GetSpacing())[:used]
    affine[:used, 3] = np.asarray(reader.GetOrigin())[:used]
    affine, space = LPS_TO_RAS @ affine, spatial_shape(path, shape, spatial_dims)
    return Geometry(place(path, space, affine), plane=plane(space, affine, known=used))


def _three_axes(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.reshape(array.shape + (1,) * (3 - array.ndim), order="A")


def _refusal(path: Path, error: RuntimeError) -> DataError:
    reason = str(error).strip().splitlines()[-1].strip()
    if "spacing" in reason.lower() or "determinant" in reason.lower():
        return GeometryError(f"{path}: impossible geometry ({reason}); correct the header")
    return DataError(f"{path}: cannot be read ({reason}); copy the file again, or check where it comes from")
