"""Files become arrays with a grid: one door for all formats, whose details live beside it, DICOM series included."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError, MedsegError
from medseg.grid import ROUNDING_TOLERANCE
from medseg.readers import image2d, itk, nifti
from medseg.readers import series as dicom_series
from medseg.readers._image import Geometry, Image, LabelMap, NiftiHeader
from medseg.readers.archive import is_archive
from medseg.readers.dicom_files import holds_dicom
from medseg.readers.dicom_pixels import Tick, no_tick
from medseg.readers.series import Series, SeriesOptions

__all__ = [
    "ENDINGS",
    "PICTURE_ENDINGS",
    "Geometry",
    "Image",
    "LabelMap",
    "NiftiHeader",
    "Series",
    "SeriesOptions",
    "file_sha256",
    "finite_or_raise",
    "holds_colour",
    "is_image_file",
    "is_picture",
    "is_series",
    "read_geometry",
    "read_image",
    "read_images",
    "read_label",
    "same_kind_or_raise",
    "split_ending",
    "stored_in",
    "why_absent",
]

log = logging.getLogger(__name__)

PICTURE_ENDINGS = image2d.ENDINGS
ENDINGS = nifti.ENDINGS + itk.ENDINGS + PICTURE_ENDINGS

# a rescaled label file holds 0.9999999 or 2.0000002 for 1 and 2
WHOLE_TOLERANCE = 1e-3


class _Format(Protocol):
    """What a module of a format offers; `labels` asks for stored values instead of colours and 1 channel."""

    def read(
        self, path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
    ) -> tuple[npt.NDArray[Any], Geometry]: ...

    def read_geometry(self, path: Path, *, spatial_dims: int | None) -> Geometry: ...


def split_ending(name: str) -> tuple[str, str]:
    """A file name as stem and known ending (`.nii.gz` is one ending); the ending is empty for unknown ones."""
    for ending in ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return name, ""


def is_image_file(path: Path) -> bool:
    """Whether the name is that of an image in a known format; hidden files (`._a.nii`) are none. Opens nothing."""
    return not path.name.startswith(".") and split_ending(path.name)[1] != ""


def is_picture(path: Path) -> bool:
    """Whether the name is that of a picture (PNG, TIFF, JPEG, BMP), which has pixels but no millimetres."""
    return split_ending(path.name)[1].lower() in PICTURE_ENDINGS


def is_series(path: Path) -> bool:
    """Whether `path` is read as a DICOM series: a folder, or a file of no other known ending that holds DICOM.

    Raises `DataError` where it cannot be read.
    """
    return path.is_dir() or (path.is_file() and not split_ending(path.name)[1] and holds_dicom(path))


def same_kind_or_raise(path: Path, like: Path) -> None:
    """Raises `GeometryError` where one of two files that must share a grid is a picture and the other is not.

    A picture is (rows, columns), all else (x, y): where both are square, nothing else tells that one is the transpose.
    """
    if is_picture(path) == is_picture(like):
        return
    picture, other = (path, like) if is_picture(path) else (like, path)
    raise GeometryError(
        f"{path}: {picture.name} is a picture, {other.name} is not: rows and columns against x and y, expected both in "
        "one format; save both as PNG or both as NIfTI"
    )


def why_absent(path: Path) -> str:
    """Why there is nothing to be read at `path`, in words; empty where there is a file or a folder."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        linked = os.path.islink(path)
        return f"a link to {os.readlink(path)}, which is not there" if linked else "no such file or folder"
    except OSError as error:
        # a closed folder above it, a name that is too long, a link to itself
        return f"cannot be reached ({error.strerror})"
    return ""


def holds_colour(path: Path) -> bool:
    """Whether a file is a picture that shows colours; not where that cannot be read."""
    return is_picture(path) and image2d.is_colour(path)


def stored_in(path: Path) -> tuple[Path, ...]:
    """The files that an image is stored in: `path` itself, and those of the voxels that its header names.

    Of a header that cannot be read it is `path` alone: reading it says why.
    """
    if split_ending(path.name)[1].lower() not in itk.ENDINGS:
        return (path,)
    try:
        return (path, *itk.data_files(path))
    except OSError as error:
        log.debug("%s: %s", path, error)
        return (path,)


def file_sha256(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal. Raises `DataError` where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        found = why_absent(path) or f"cannot be read ({error.strerror})"
        raise DataError(f"{path}: {found}; check the path and its permissions") from error
    return digest.hexdigest()


def read_image(
    path: Path, *, spatial_dims: int | None = None, channels: int | None = None, finite: bool = True
) -> Image:
    """The image in `path` with its channels first.

    `spatial_dims`: axes wanted; a file (I, J, 1) is read as (I, J) where 2 is asked. `channels`: the number the file
    has to hold; only then is the fourth axis of a NIfTI taken as channels, and colour is turned into grey (1) or grey
    into colour (3). Raises `DataError` for a file that cannot be read, has other axes or channels, or, with `finite`,
    holds NaN or infinity; `GeometryError` for an impossible grid. Both name the file.
    """
    array, geometry = _read(path, spatial_dims=spatial_dims, channels=channels, labels=False)
    if channels is not None and array.shape[0] != channels:
        raise DataError(
            f"{path}: {_count(array.shape[0], 'channel')} found, expected {channels}; "
            "give one file per channel or correct the channels of the data set"
        )
    for warning in geometry.warnings:
        # whoever reads for somebody tells them: a training reads every file three times
        log.info("%s: %s", path, warning)
    image = Image(array, geometry)
    if finite:
        finite_or_raise(image, path)
    return image


def read_images(
    paths: Sequence[Path],
    *,
    spatial_dims: int | None = None,
    channels: int | None = None,
    finite: bool = True,
    series: Series | None = None,
    tick: Tick = no_tick,
) -> Image:
    """All channels of a case: one file that holds them all, or one file per channel on one grid.

    `series`: the DICOM series that is meant, in place of `paths`; of it `tick` is told files done and in all. Raises as
    `read_image`, and `GeometryError` where the files lie on different grids.
    """
    if series is not None:
        return _read_chosen(series, spatial_dims=spatial_dims, channels=channels, tick=tick)
    if len(paths) == 1:
        return read_image(paths[0], spatial_dims=spatial_dims, channels=channels, finite=finite)
    if not paths or (channels is not None and len(paths) != channels):
        named = ", ".join(str(p) for p in paths) or "no file"
        raise DataError(f"{named}: {_count(len(paths), 'file')} found, expected {channels}, one per channel")
    for path in paths[1:]:
        same_kind_or_raise(path, paths[0])
    images = [read_image(path, spatial_dims=spatial_dims, channels=1, finite=finite) for path in paths]
    for path, image in zip(paths, images):
        if not image.geometry.matches(images[0].geometry, tolerance=ROUNDING_TOLERANCE):
            raise GeometryError(
                f"{path}: {image.grid} differs from {images[0].grid} of {paths[0].name} in shape, spacing, place or "
                "direction; bring all channels of a case to one grid"
            )
    warnings = dict.fromkeys(warning for image in images for warning in image.geometry.warnings)
    geometry = replace(images[0].geometry, warnings=tuple(warnings))
    return Image(np.concatenate([image.array for image in images]), geometry)


def read_label(path: Path, *, spatial_dims: int | None = None) -> LabelMap:
    """The label map in `path`: whole numbers from 0, whatever type the file keeps them in.

    Raises `DataError` for NaN, fractions, negative values, several channels, or a file that cannot be read.
    """
    array, geometry = _read(path, spatial_dims=spatial_dims, channels=1, labels=True)
    if array.shape[0] != 1:
        raise DataError(f"{path}: {array.shape[0]} channels found, expected one label map; store one value per voxel")
    return LabelMap(_whole_numbers(array[0], path), geometry, array.dtype)


def read_geometry(path: Path, *, spatial_dims: int | None = None) -> Geometry:
    """Where the voxels of `path` are, from its header alone. Raises `DataError` or `GeometryError`."""
    with _named(path):
        return _format(path).read_geometry(path, spatial_dims=spatial_dims)


def finite_or_raise(image: Image, path: Path) -> None:
    """Raises `DataError` with their number where `image` holds NaN or infinity."""
    if image.array.dtype.kind != "f":
        return
    # one pass without a mask: a sum is NaN or infinite if any voxel is, or if it overflows; then it is counted
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(image.array.sum(dtype=np.float64)):
            return
    bad = int(image.array.size - np.isfinite(image.array).sum())
    if bad:
        raise DataError(
            f"{path}: {bad} of {image.array.size} voxels are NaN or infinite, expected finite numbers; "
            "find what made them, or replace them by the value of air"
        )


def _read_chosen(chosen: Series, *, spatial_dims: int | None, channels: int | None, tick: Tick) -> Image:
    with _named(chosen.source):
        image = dicom_series.read_series(chosen, spatial_dims=spatial_dims, channels=channels, tick=tick)
    if channels is not None and channels != 1:
        raise DataError(f"{chosen.source}: 1 channel found, expected {channels}; give one file per channel")
    return image


def _read(
    path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
) -> tuple[npt.NDArray[Any], Geometry]:
    with _named(path):
        array, geometry = _format(path).read(path, spatial_dims=spatial_dims, channels=channels, labels=labels)
    if array.dtype.kind not in "uifb":
        raise DataError(f"{path}: voxels of type {array.dtype} found, expected integers or real numbers")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    return array.astype(array.dtype.newbyteorder("="), copy=False), geometry


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever a library raises for a broken file becomes a `DataError` that names the file."""
    try:
        yield
    except MedsegError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {text}); export or copy it again") from error


def _format(path: Path) -> _Format:
    if reason := why_absent(path):
        raise DataError(f"{path}: {reason}; check the path")
    if path.is_dir() or is_archive(path):
        return dicom_series
    if not path.is_file():
        raise DataError(f"{path}: neither a file nor a folder, expected an image; remove it")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes), expected an image; copy it again")
    ending = split_ending(path.name)[1].lower()
    for module in (nifti, itk, image2d):
        if ending in module.ENDINGS:
            return module
    if holds_dicom(path):
        return dicom_series
    raise DataError(f"{path}: ending not known, expected DICOM or one of {', '.join(ENDINGS)}")


def _whole_numbers(array: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    if array.dtype.kind == "f":
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise DataError(f"{path}: {bad} label voxels are NaN or infinite, expected whole numbers; export it again")
        whole = np.rint(array)
        fractions = np.abs(array - whole) > WHOLE_TOLERANCE
        if fractions.any():
            raise DataError(
                f"{path}: label value {float(array[fractions][0]):g} found in {int(fractions.sum())} voxels, "
                "expected whole numbers; resample labels with nearest neighbour, not linearly"
            )
        array = whole
    low, high = (array.min(), array.max()) if array.dtype != np.uint8 else (0, 255)
    if low < 0 or high > np.iinfo(np.int32).max:
        wrong = low if low < 0 else high
        raise DataError(f"{path}: label value {wrong:g} found, expected 0 (background) to 2147483647; renumber it")
    smallest = next(t for t in (np.uint8, np.uint16, np.int32) if high <= np.iinfo(t).max)
    return array.astype(smallest, copy=False)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
