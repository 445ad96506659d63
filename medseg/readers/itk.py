"""NRRD and MetaImage files by SimpleITK; NIfTI and DICOM series have modules of their own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError
from medseg.readers._axes import LPS_TO_RAS, channels_first, place, plane, spatial_shape
from medseg.readers._image import Geometry

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")

# of MetaImage and NRRD: the field that names the files of the voxels
_DATA_FIELD = re.compile(rb"(?:elementdatafile\s*=\s*|data ?file:\s+)(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"%[-+ #0]*\d*[diu]")
# of a header, bytes in a line and lines; what is longer is no text
_LINE, _LINES = 2**16, 2**16


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


def data_files(path: Path) -> tuple[Path, ...]:
    """The files that the header in `path` names for its voxels, as far as they are there; none where it holds them.

    Of numbered ones (`slice%03d.raw 1 90 1`) all that the pattern fits. Raises `OSError`.
    """
    with path.open("rb") as file:
        named = list(_named_files(file))
    found: list[Path] = []
    for name in named:
        pattern = name.split(" ")[0]
        if _NUMBER.search(pattern):
            folder, fits = path.parent / os.path.dirname(pattern), _numbered(os.path.basename(pattern))
            there = sorted(folder.iterdir()) if folder.is_dir() else []
            found += [file for file in there if fits.fullmatch(file.name)]
        else:
            found.append(path.parent / name)
    # what is not there reading tells of
    return tuple(file for file in dict.fromkeys(found) if file.is_file())


def _named_files(header: BinaryIO) -> Iterator[str]:
    """What the data field of a header says, or the lines behind it where that is LIST."""
    lines, is_nrrd = islice(iter(partial(header.readline, _LINE), b""), _LINES), False
    for line in lines:
        found = _DATA_FIELD.fullmatch(line.strip())
        if found is None:
            is_nrrd = is_nrrd or line.startswith(b"NRRD")
            # there the header ends, that of a MetaImage with the field
            if not line.strip() and is_nrrd:
                return
            continue
        word = os.fsdecode(found[1])
        if word.upper() == "LOCAL":
            return
        if word.upper().split(" ")[0] != "LIST":
            yield word
            return
        yield from (os.fsdecode(name.strip()) for name in lines if name.strip())
        return


def _numbered(pattern: str) -> re.Pattern[str]:
    """What a name with a number in it, as C's printf writes it, may be."""
    before, after = _NUMBER.split(pattern, maxsplit=1)
    return re.compile(rf"{re.escape(before)}[-+ ]*\d+ *{re.escape(after)}")


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
