"""Pictures (PNG, TIFF, JPEG, BMP) as (C, rows, columns): a pixel counts as 1 × 1, resolution tags are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from medseg.errors import DataError
from medseg.grid import Grid
from medseg.readers._image import Geometry

ENDINGS = (".png", ".tiff", ".tif", ".jpeg", ".jpg", ".bmp")

# luma of ITU-R BT.601
_LUMA = np.array([0.299, 0.587, 0.114])


def read(
    path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
) -> tuple[npt.NDArray[Any], Geometry]:
    """Pixels (C, rows, columns) and geometry; transparency is dropped; palettes give their index for `labels`.

    Grey gives 1 channel; colour 3, or 1 if all three are equal or `channels` is 1 (luma of ITU-R BT.601; not for
    labels). Raises `DataError`.
    """
    if spatial_dims not in (None, 2):
        raise DataError(f"{path}: a picture has 2 axes, expected {spatial_dims}; use a 2D model")
    pixels = _pixels(path, palette_index=labels)
    if pixels.ndim == 2:
        planes = pixels[None]
    else:
        planes = np.ascontiguousarray(np.moveaxis(pixels[..., :3], -1, 0))
        if (planes == planes[:1]).all() and channels != 3:
            planes = planes[:1]
    if labels and len(planes) > 1:
        colour = planes[:, (planes != planes[:1]).any(axis=0)][:, 0].tolist()
        raise DataError(
            f"{path}: colours such as {colour} found, expected one number per pixel; "
            "save the labels as an index (grey or palette) picture"
        )
    if channels == 1 and len(planes) == 3:
        planes = _grey(planes)
    if channels == 3 and len(planes) == 1:
        planes = np.repeat(planes, 3, axis=0)
    return planes, Geometry(_grid(planes.shape[1:]))


def read_geometry(path: Path, *, spatial_dims: int | None) -> Geometry:
    """Geometry from the header alone. Raises `DataError`."""
    if spatial_dims not in (None, 2):
        raise DataError(f"{path}: a picture has 2 axes, expected {spatial_dims}; use a 2D model")
    try:
        with Picture.open(path) as picture:
            return Geometry(_grid((picture.height, picture.width)))
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
        # what Pillow does not know is tried in full, with the reason if it fails
        return Geometry(_grid(_pixels(path, palette_index=True).shape[:2]))


def label_palette(path: Path) -> dict[int, tuple[int, ...]]:
    """Red, green and blue of each index of a palette picture; empty for others, and for what cannot be read."""
    try:
        with Picture.open(path) as picture:
            colours = (picture.getpalette("RGB") or []) if picture.mode == "P" else []
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
        return {}
    return {n: tuple(colours[3 * n : 3 * n + 3]) for n in range(len(colours) // 3)}


def _grid(shape: tuple[int, ...]) -> Grid:
    return Grid(shape, np.eye(3))


def _grey(planes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    luma = np.tensordot(_LUMA, planes, axes=1)[None]
    return (luma if planes.dtype.kind == "f" else np.rint(luma)).astype(planes.dtype)


def _pixels(path: Path, *, palette_index: bool) -> npt.NDArray[Any]:
    """(rows, columns) or (rows, columns, 2 to 4)."""
    if _is_deep_colour_png(path):
        return _by_itk(path)
    try:
        with Picture.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            if pages > 1:
                raise DataError(f"{path}: {pages} pages found, expected one picture; split it, or make it a volume")
            if picture.mode == "P" and not palette_index:
                return np.array(picture.convert("RGB"))
            if picture.mode in ("LA", "La", "PA"):
                return np.array(picture)[..., 0]
            if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                return np.array(picture.convert("RGB"))
            return np.array(picture)
    except UnidentifiedImageError:
        return _by_itk(path)
    except (OSError, ValueError, SyntaxError, EOFError, Picture.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the file again") from error


def _is_deep_colour_png(path: Path) -> bool:
    # Pillow cuts 16-bit colour to 8 bits without a word; bytes 24 and 25 of a PNG: bit depth, colour type
    with path.open("rb") as file:
        start = file.read(26)
    return start[:8] == b"\x89PNG\r\n\x1a\n" and len(start) == 26 and start[24] == 16 and start[25] in (2, 6)


def _by_itk(path: Path) -> npt.NDArray[Any]:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise DataError(f"{path}: not a picture, or damaged; copy the file again") from error
    if image.GetDimension() != 2:
        raise DataError(
            f"{path}: {image.GetSize()[2]} pages found, expected one picture; split it, or make it a volume"
        )
    return np.asarray(SimpleITK.GetArrayFromImage(image))
