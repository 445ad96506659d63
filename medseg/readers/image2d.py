"""Pictures (PNG, TIFF, JPEG, BMP) as (C, rows, columns): a pixel counts as 1 × 1, resolution tags are not used."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from medseg.errors import DataError
from medseg.grid import Grid
from medseg.readers._image import Geometry
from medseg.readers._tiff import Tiff, read_tiff

ENDINGS = (".png", ".tiff", ".tif", ".jpeg", ".jpg", ".bmp")

# the EXIF tag that says how a viewer turns or mirrors the pixels, and its values that are not "as they are"
_ORIENTATION, _TURNED = 274, range(2, 9)
# the colour types of a PNG: colour, grey with transparency, colour with it
_PNG_COLOUR, _PNG_GREY_ALPHA, _PNG_COLOUR_ALPHA = 2, 4, 6

# luma of ITU-R BT.601
_LUMA = np.array([0.299, 0.587, 0.114])


def read(
    path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
) -> tuple[npt.NDArray[Any], Geometry]:
    """Pixels (C, rows, columns) and geometry; transparency is dropped; palettes give their index for `labels`.

    Grey gives 1 channel; colour 3, or 1 if all three are equal or `channels` is 1 (luma of ITU-R BT.601; not for
    labels); a TIFF of as many samples as `channels` all of them. Raises `DataError`, also for a picture that is stored
    turned, and for one whose numbers or channels would not all come out.
    """
    if spatial_dims not in (None, 2):
        raise DataError(f"{path}: a picture has 2 axes, expected {spatial_dims}; use a 2D model")
    pixels = _pixels(path, palette_index=labels, channels=channels)
    if pixels.ndim == 2:
        planes = pixels[None]
    else:
        planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
        if channels != len(planes) and (planes == planes[:1]).all():
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
    tiff = read_tiff(path)
    if tiff is not None:
        _refuse_turned(path, tiff.orientation)
        return Geometry(_grid((tiff.rows, tiff.columns)))
    try:
        with Picture.open(path) as picture:
            _refuse_turned(path, _orientation(picture))
            return Geometry(_grid((picture.height, picture.width)))
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
        # what Pillow does not know is tried in full, with the reason if it fails
        return Geometry(_grid(_pixels(path, palette_index=True, channels=None).shape[:2]))


def is_colour(path: Path) -> bool:
    """Whether it shows colours, and not grey that is stored as colour; not where that cannot be read."""
    try:
        with Picture.open(path) as picture:
            if picture.mode != "P" and len(picture.getbands()) < len(_LUMA):
                return False
        return len(read(path, spatial_dims=2, channels=None, labels=False)[0]) >= len(_LUMA)
    except DataError:
        # refused when it is read, as what its header says
        return True
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
        return False


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


def _pixels(path: Path, *, palette_index: bool, channels: int | None) -> npt.NDArray[Any]:
    """(rows, columns) or (rows, columns, 3), of a TIFF of as many samples as `channels` (rows, columns, samples)."""
    tiff = read_tiff(path)
    if tiff is not None:
        _refuse_turned(path, tiff.orientation)
        if tiff.samples > 1 and (tiff.bits > 8 or not tiff.is_plain or channels == tiff.samples > tiff.colours):
            return _samples(path, tiff, channels)
    try:
        with Picture.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            if pages > 1:
                raise DataError(f"{path}: {pages} pages found, expected one picture; split it, or make it a volume")
            if _is_deep_png(path):
                _refuse_turned(path, _orientation(picture))
                return _by_itk(path)[..., :3]
            if picture.format == "PNG":
                # the tag may lie behind the pixels; of a TIFF loading turns them and forgets it
                picture.load()
            _refuse_turned(path, _orientation(picture))
            if picture.mode == "P" and not palette_index:
                return np.array(picture.convert("RGB"))
            if picture.mode in ("LA", "La", "PA"):
                return np.array(picture)[..., 0]
            if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                return np.array(picture.convert("RGB"))
            pixels = np.array(picture)
            return pixels if pixels.ndim == 2 else pixels[..., :3]
    except UnidentifiedImageError:
        return _by_itk(path) if tiff is None else _samples(path, tiff, channels)
    except Picture.DecompressionBombError as error:
        # "Image size (… pixels) exceeds limit of … pixels, could be …"
        size = str(error).split(",")[0]
        raise DataError(f"{path}: too large to be read ({size}); scale it down, or cut it into tiles") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); copy the file again") from error


def _orientation(picture: Picture.Image) -> int:
    try:
        # of the class of all formats: that of PNG would read all pixels first
        return int(Picture.Image.getexif(picture).get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):
        # damaged notes beside whole pixels: nothing is turned by them
        return 1


def _refuse_turned(path: Path, orientation: int) -> None:
    # one of image and label would be turned and the other not: nobody can tell on which of both the label was drawn
    if orientation in _TURNED:
        raise DataError(
            f"{path}: pixels stored turned or mirrored (EXIF orientation {orientation}), expected as they are shown; "
            "turn the pixels and remove the tag, say with `exiftran -ai` or ImageMagick's `mogrify -auto-orient`"
        )


def _is_deep_png(path: Path) -> bool:
    # Pillow cuts these to 8 bits without a word; bytes 24 and 25 of a PNG: bit depth, colour type
    with path.open("rb") as file:
        start = file.read(26)
    if start[:8] != b"\x89PNG\r\n\x1a\n" or len(start) < 26 or start[24] != 16:
        return False
    if start[25] == _PNG_GREY_ALPHA:
        raise DataError(
            f"{path}: 16 bits of grey with transparency found, expected 16 bits of grey alone; "
            "remove the transparency, say with ImageMagick's `-alpha off`"
        )
    return start[25] in (_PNG_COLOUR, _PNG_COLOUR_ALPHA)


def _samples(path: Path, tiff: Tiff, channels: int | None) -> npt.NDArray[Any]:
    """Pixels of a TIFF that Pillow would cut: all samples if there are as many as `channels`, else grey or colour."""
    whole = channels == tiff.samples
    if not whole and not tiff.is_plain:
        raise DataError(
            f"{path}: {tiff.samples} channels found, expected grey or colour, with or without transparency; "
            f"give one file per channel, or name {tiff.samples} channels in the data set"
        )
    # ITK scrambles all others, or cuts them to 8 bits
    if tiff.samples == 1 or (tiff.rgb and tiff.interleaved):
        pixels = _by_itk(path)
        found = pixels.shape[2] if pixels.ndim == 3 else 1
        if found == tiff.samples and 8 * pixels.dtype.itemsize >= tiff.bits:
            return pixels if whole or pixels.ndim == 2 else pixels[..., : tiff.colours]
    raise DataError(
        f"{path}: {tiff.samples} channels of {tiff.bits} bits found, stored as none of our libraries reads them whole, "
        "expected grey, or RGB with the channels of a pixel side by side; save it so, or give one file per channel"
    )


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
