"""Label maps become files that are whole or not there; DICOM objects have writers of their own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError
from medseg.readers import Geometry, Image, is_picture, read_geometry, split_ending
from medseg.writers import image2d, nifti

__all__ = ["atomic_path", "label_ending", "write_label", "write_text"]


def label_ending(source: Path) -> str:
    """The ending of the mask of `source`: `.png` for pictures, `.nii.gz` for all else."""
    return ".png" if is_picture(source) else ".nii.gz"


def write_label(
    path: Path, array: npt.NDArray[Any], like: Image | Geometry | Path, *, names: Mapping[int, str]
) -> Path:
    """Writes `array`, integers (*grid.shape) of 0 to 65535, on the grid of `like`; gives back `path`.

    `path` ends in `.nii.gz`, `.nii` or `.png`. uint8, or uint16 where a value above 255 is named or there. `names` goes
    into the header as JSON: a NIfTI extension of code 6 (comment), a PNG text `labels`. The same input gives the same
    bytes. Raises `DataError` for a folder that cannot be written or values that do not fit, `GeometryError` for another
    shape.
    """
    # the axes of the array say whether a file (I, J, 1) is meant as a plane
    geometry = read_geometry(like, spatial_dims=array.ndim) if isinstance(like, Path) else like
    geometry = geometry.geometry if isinstance(geometry, Image) else geometry
    if array.shape != geometry.grid.shape:
        raise GeometryError(f"{path}: mask of shape {array.shape} found, expected {geometry.grid.shape} as its image")
    stored = _stored(path, array, names)
    ending = split_ending(path.name)[1]
    if ending not in (".nii.gz", ".nii", ".png"):
        raise DataError(f"{path}: masks are written as .nii.gz, .nii or .png; choose one of these")
    with atomic_path(path) as temporary:
        if ending == ".png":
            image2d.write(temporary, stored, names)
        else:
            nifti.write(temporary, stored, geometry, names)
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same ending, hidden) that becomes `path` when the block ends without an error.

    Makes the folder. Raises `DataError` where it cannot be written or is full; then nothing is left behind.
    """
    stem, ending = split_ending(path.name)
    temporary = path.with_name(f".{stem}.{uuid.uuid4().hex[:12]}{ending or path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot write {path.name} ({error.strerror or error}); "
            "free space, change the permissions, or choose another folder"
        ) from error
    finally:
        # a name is left over only if something went wrong above
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes `text` as UTF-8, whole or not at all. Raises `DataError` where the folder cannot be written."""
    with atomic_path(path) as temporary:
        # a file name may hold bytes that are no text; they are shown as their codes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


def _stored(path: Path, array: npt.NDArray[Any], names: Mapping[int, str]) -> npt.NDArray[Any]:
    if array.dtype.kind not in "uib":
        raise DataError(f"{path}: mask of type {array.dtype} found, expected integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: mask values {low} to {high} found, expected 0 to 65535")
    return array.astype(np.uint16 if max([high, *names]) > 255 else np.uint8, copy=False)
