"""The pixels of DICOM files: decoded plane by plane, rescaled with each plane's own numbers, laid into one array."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError
from medseg.readers.dicom_files import DicomFile, each_open, header_value, quiet, read_dataset
from medseg.readers.dicom_frames import Frame, is_inverted

if TYPE_CHECKING:
    from pydicom import Dataset

Tick = Callable[[int, int], None]

# what pydicom and gdcm decode; deflated ones are refused before they are opened
SYNTAXES = {
    "1.2.840.10008.1.2": "implicit little endian",
    "1.2.840.10008.1.2.1": "explicit little endian",
    "1.2.840.10008.1.2.2": "explicit big endian",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.4.50": "JPEG baseline",
    "1.2.840.10008.1.2.4.51": "JPEG extended",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless SV1",
    "1.2.840.10008.1.2.4.80": "JPEG-LS lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS near lossless",
    "1.2.840.10008.1.2.4.90": "JPEG 2000 lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
}
# one decoder each: of the others, pyjpegls takes seconds for a few bytes of a stream that is cut off
_DECODERS = {"RLE": "pydicom"}
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
# an empty plane may shrink ten thousand times, but no large one has less than this share left
_SMALL_BYTES, _MOST_EXPANSION = 2**26, 1000


def no_tick(done: int, total: int) -> None:
    """Nobody watches how many files are read."""


def read_planes(
    files: Sequence[DicomFile], frames: Sequence[Frame], shape: tuple[int, int], *, tick: Tick = no_tick
) -> npt.NDArray[Any]:
    """The planes (K, rows, columns) in the order of `frames`, rescaled; `tick` is told after every file.

    Integers where slope and intercept of all planes are whole numbers (the smallest of uint8, int16, uint16, int32 that
    holds them), else float32. MONOCHROME1 is inverted, but for CT, MR, PT and NM, whose values mean something. Raises
    `DataError` naming the file for pixels that are cut off, damaged, or not what the header says.
    """
    by_file: dict[int, list[tuple[int, Frame]]] = {}
    for place, frame in enumerate(frames):
        by_file.setdefault(frame.file, []).append((place, frame))
    used = sorted(by_file)
    planes: npt.NDArray[Any] | None = None
    for count, (number, (file, stream)) in enumerate(zip(used, each_open(files[n] for n in used)), start=1):
        dataset = read_dataset(file, stream, tags=None, stop_before_pixels=False)
        places = {frame.index: (place, frame) for place, frame in by_file[number]}
        for index, stored in _stored(file, dataset, shape):
            if index not in places:
                continue
            place, frame = places.pop(index)
            if planes is None:
                planes = np.empty((len(frames), *shape), _type(frames))
            planes[place] = _rescaled(file, stored, frame, planes.dtype)
        if places:
            raise DataError(f"{file}: {len(places)} frames without pixels found, expected all; copy the file again")
        tick(count, len(used))
    if planes is None:
        raise DataError("no plane found, expected at least one")
    return _small(planes)


def _stored(file: DicomFile, dataset: Dataset, shape: tuple[int, int]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Number and stored values of every frame of a file."""
    _check_before_decoding(file, dataset, shape)
    invert = is_inverted(dataset)
    for index, decoded in enumerate(_decoded(file, dataset)):
        if decoded.shape != shape:
            raise DataError(
                f"{file}: pixels of {decoded.shape} found, expected {shape} as its header says; copy it again"
            )
        values = _within_bits(file, dataset, decoded)
        yield index, _inverted(values, dataset) if invert else values


def _decoded(file: DicomFile, dataset: Dataset) -> Iterator[npt.NDArray[Any]]:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = str(dataset.file_meta.TransferSyntaxUID)
    decoder = get_decoder(syntax)
    plugin = "" if syntax in _PLAIN else _DECODERS.get(SYNTAXES[syntax], "gdcm")
    options: dict[str, Any] = {"raw": True, "decoding_plugin": plugin, "correct_unused_bits": False}
    try:
        with quiet():
            if int(header_value(dataset, "NumberOfFrames") or 1) == 1:
                # alone, it may be changed in place, which pydicom does to a stream whose sign differs from the header
                yield decoder.as_array(dataset, **options)[0]
                return
            for decoded, _ in decoder.iter_array(dataset, **options):
                yield decoded
    except DataError:
        raise
    except Exception as error:
        # whatever a codec says of broken data; its words go along in the cause
        raise DataError(
            f"{file}: its pixels cannot be decoded ({SYNTAXES[syntax]}; damaged, or not what the header says); "
            "copy the file again"
        ) from error


def _check_before_decoding(file: DicomFile, dataset: Dataset, shape: tuple[int, int]) -> None:
    syntax = str(header_value(dataset.file_meta, "TransferSyntaxUID") or "")
    if syntax not in SYNTAXES:
        raise DataError(
            f"{file}: transfer syntax {syntax or 'missing'} found, expected one of {', '.join(SYNTAXES.values())}; "
            "send it uncompressed"
        )
    stored = header_value(dataset, "PixelData")
    if not isinstance(stored, bytes):
        raise DataError(f"{file}: no pixels found, expected PixelData behind the header: cut off; copy the file again")
    frames = int(header_value(dataset, "NumberOfFrames") or 1)
    claimed = frames * math.prod(shape) * int(dataset.BitsAllocated) // 8
    if syntax in _PLAIN and len(stored) < claimed:
        raise DataError(f"{file}: {len(stored)} of {claimed} bytes of pixels found: cut off; copy the file again")
    if syntax not in _PLAIN and claimed > _SMALL_BYTES and claimed > _MOST_EXPANSION * len(stored):
        raise DataError(
            f"{file}: {len(stored)} bytes claim to be {claimed} of pixels, expected at most {_MOST_EXPANSION} times as "
            "many; send it uncompressed if it is right"
        )
    # the planes of RLE have no head: they are decoded by the size in the header
    if syntax not in _PLAIN and SYNTAXES[syntax] != "RLE":
        _check_streams(file, stored, frames, shape)


def _check_streams(file: DicomFile, stored: bytes, frames: int, shape: tuple[int, int]) -> None:
    """A compressed image tells its own size, and a decoder takes memory by it, not by that of the header."""
    from pydicom.encaps import generate_frames

    try:
        for stream in generate_frames(stored, number_of_frames=frames):
            told = _told_size(stream)
            if told is None:
                raise DataError(
                    f"{file}: compressed pixels that do not begin with their size found (in a box? cut off?), expected "
                    "a bare stream of JPEG, JPEG-LS or JPEG 2000; send it uncompressed"
                )
            rows, columns, values = told
            if (rows, columns) != shape:
                raise DataError(
                    f"{file}: a compressed image of {rows} × {columns} found, expected {shape[0]} × {shape[1]} as "
                    "its header says; copy the file again"
                )
            if values != 1:
                raise DataError(
                    f"{file}: a compressed image with {values} values a pixel found, expected 1 as its header says; "
                    "give the original images"
                )
    except (ValueError, EOFError, IndexError, struct.error) as error:
        raise DataError(f"{file}: its compressed pixels are cut off or damaged; copy the file again") from error


def _told_size(stream: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and values a pixel in the head of a JPEG 2000, JPEG or JPEG-LS stream; None for other ones."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(stream[at : at + size], "big")

    if stream[:4] == b"\xff\x4f\xff\x51":
        # ISO 15444-1 A.5.1: Xsiz, Ysiz, XOsiz, YOsiz; behind the tiles Csiz
        return number(12, 4) - number(20, 4), number(8, 4) - number(16, 4), number(40, 2)
    if stream[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        # ISO 10918-1 B.2.2 and ISO 14495-1: start of frame, but not the tables of Huffman and arithmetic codes
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return number(at + 5, 2), number(at + 7, 2), stream[at + 9]
        at += 1 if marker == 0xFF else 2 + number(at + 2, 2)
    return None


def _within_bits(file: DicomFile, dataset: Dataset, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`values` without what lies above BitsStored: a sign that was not extended, or an overlay of before 2004."""
    allocated, used = 8 * values.dtype.itemsize, int(dataset.BitsStored)
    if used == allocated:
        return values
    if not 1 <= used < allocated or int(header_value(dataset, "HighBit") or used - 1) != used - 1:
        raise DataError(
            f"{file}: {used} bits stored up to bit {header_value(dataset, 'HighBit')} of {allocated} found, expected "
            "them at the low end; export it anew"
        )
    signed = values.dtype.kind == "i"
    kept = (values << (allocated - used)) >> (allocated - used)
    if (kept == values).all():
        return values
    raw = values.view(np.dtype(f"u{values.dtype.itemsize}"))
    above = raw >> used
    overlays = any(
        element.tag.group & 0xFF00 == 0x6000 and element.tag.element == 0x0102 and int(element.value or 0) >= used
        for element in dataset
    )
    # zeros above a negative number are allowed too
    if not overlays and not (signed and not above.any()):
        raise DataError(
            f"{file}: values above the {used} bits that the header tells of found, expected none; export it anew"
        )
    return kept


def _inverted(values: npt.NDArray[Any], dataset: Dataset) -> npt.NDArray[Any]:
    # the bitwise complement within BitsStored: largest becomes smallest
    if values.dtype.kind == "i":
        return np.asarray(np.invert(values))
    top = values.dtype.type(2 ** int(dataset.BitsStored) - 1)
    return np.asarray(top - values)


def _type(frames: Sequence[Frame]) -> np.dtype[Any]:
    """A type that holds whatever could be stored in any plane; which it takes in the end is seen when all is read."""
    if not all(f.slope.is_integer() and f.intercept.is_integer() for f in frames):
        return np.dtype(np.float32)
    values = [f.slope * end + f.intercept for f in frames for end in f.stored]
    for kind in (np.uint8, np.int16, np.uint16, np.int32, np.int64):
        if min(values) >= np.iinfo(kind).min and max(values) <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype(np.float32)


def _rescaled(file: DicomFile, stored: npt.NDArray[Any], frame: Frame, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values of a plane in `dtype`. Raises `DataError` for what an integer type would wrap around."""
    if dtype.kind == "f":
        return np.asarray(stored * np.float64(frame.slope) + np.float64(frame.intercept), dtype)
    unscaled = (frame.slope, frame.intercept) == (1, 0)
    values = stored if unscaled else stored.astype(np.int64) * int(frame.slope) + int(frame.intercept)
    low, high = int(values.min()), int(values.max())
    if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        raise DataError(
            f"{file}: values of {low} to {high} found, expected what its BitsStored and rescaling allow; export it anew"
        )
    return np.asarray(values.astype(dtype, copy=False))


def _small(planes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Wide integers as int16 or int32 where they fit, as most CT does that is stored with 16 bits."""
    if planes.dtype not in (np.int32, np.int64):
        return planes
    low, high = int(planes.min()), int(planes.max())
    for kind in (np.int16, np.int32):
        if low >= np.iinfo(kind).min and high <= np.iinfo(kind).max:
            return planes.astype(kind, copy=False)
    return planes.astype(np.float32)
