"""A DICOM Segmentation becomes a label map with names, on the grid that its frames lie on or a given one.

Imports pydicom: this module is imported where DICOM is at hand, never by the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from medseg.errors import DataError, GeometryError, MedsegError
from medseg.grid import ROUNDING_TOLERANCE, Grid, turned
from medseg.readers._axes import LPS_TO_RAS
from medseg.readers.dicom_files import quiet
from medseg.readers.dicom_frames import COSINE_TOLERANCE, MOST_VOXELS, numbers_of
from medseg.readers.segments import VALUE_NOTE, Segmentation, SegmentInfo

SEGMENTATION_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_VALUE_NOTE = re.compile(VALUE_NOTE.format(r"(\d{1,5})"))

Overlap = Literal["refuse", "first", "last"]


def is_dicom_segmentation(path: Path) -> bool:
    """Whether `path` is a DICOM Segmentation, from its first bytes."""
    try:
        meta = read_file_meta_info(path)
    except (InvalidDicomError, OSError):
        return False
    return str(meta.get("MediaStorageSOPClassUID", "")) in SEGMENTATION_CLASSES


def read_segmentation(
    path: Path, *, like: Grid | None = None, threshold: float | None = None, overlap: Overlap = "refuse"
) -> Segmentation:
    """The label map in a DICOM SEG (BINARY, LABELMAP or, with a `threshold`, FRACTIONAL) and the names in it.

    A value is the number of its segment, or what its description says (`Label value 7`). The array is (column, row,
    plane) from the first to the last plane stored, planes between them that are not stored being background; with
    `like` (say, the grid of the image series) it lies on that grid instead, turned and padded, never resampled.
    `threshold`: fraction (0 to 1) from which a voxel belongs to a fractional segment. `overlap`: where segments share
    voxels, the segment that comes `first` or `last` in the file has them.

    Raises `DataError` for what cannot be read, fractions without a threshold, or segments that overlap, by name;
    `GeometryError` where the frames make no regular grid.
    """
    try:
        with quiet():
            _refuse_deflated(path)
            return _read(pydicom.dcmread(path), like, threshold, overlap)
    except MedsegError as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:
        # pydicom has no exception of its own for a broken file, and quotes what it finds: it may be a patient's
        raise DataError(f"{path}: cannot be read ({type(error).__name__}); export or copy it again") from error


def _refuse_deflated(path: Path) -> None:
    """Raises `DataError` before a small file becomes a large one in memory."""
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise DataError("a deflated file found, expected another transfer syntax; convert it, say with `dcmconv +te`")


def _read(header: Dataset, like: Grid | None, threshold: float | None, overlap: Overlap) -> Segmentation:
    if str(header.get("SOPClassUID", "")) not in SEGMENTATION_CLASSES:
        raise DataError(f"SOP class {header.get('SOPClassUID')} found, expected a DICOM Segmentation")
    kind = str(header.SegmentationType)
    if kind == "FRACTIONAL" and threshold is None:
        raise DataError(
            "a FRACTIONAL segmentation found, expected BINARY or LABELMAP; say from which fraction a voxel counts"
        )
    segments = {int(item.SegmentNumber): _segment(item) for item in header.SegmentSequence}
    frames = _frames(header)
    if int(header.NumberOfFrames) != len(frames):
        raise DataError(f"{header.NumberOfFrames} frames with {len(frames)} places found, expected as many of both")
    stack = _stack(frames, int(header.Rows), int(header.Columns))
    values = [segment.value for segment in segments.values()]
    if len(set(values)) < len(values):
        raise DataError(f"label values {sorted(values)} found, expected each once")
    array = np.zeros(stack.grid.shape[::-1], np.uint8 if max(values, default=0) < 256 else np.uint16)
    if kind == "LABELMAP":
        _fill_maps(array, header, stack, segments)
    else:
        _fill_masks(array, header, stack, segments, threshold=threshold, overlap=overlap)
    named = tuple(segment for _, segment in sorted(segments.items()) if segment.value)
    made = Segmentation(array.T, stack.grid, named)
    return made if like is None else _set_into(made, like)


# ---- where frames lie


@dataclass(frozen=True, eq=False)
class _Frame:
    """What the header says of one frame.

    `position`: LPS mm of the centre of its first pixel; `directions`: along a row, along a column; `spacing_mm`:
    between rows, between columns; `step_mm`: to the next plane, 0 where unknown.
    """

    position: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    spacing_mm: tuple[float, float]
    step_mm: float


@dataclass(frozen=True, eq=False)
class _Stack:
    """The grid (column, row, plane) in RAS mm, and which of its planes each frame is."""

    grid: Grid
    plane_of: npt.NDArray[np.intp]


def _frames(header: Dataset) -> list[_Frame]:
    """Raises `GeometryError` where the header does not say where a frame lies."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [
        _frame(number, [groups, *shared])
        for number, groups in enumerate(header.get("PerFrameFunctionalGroupsSequence") or [], 1)
    ]


def _frame(number: int, groups: list[Dataset]) -> _Frame:
    position = _told(groups, "PlanePositionSequence", "ImagePositionPatient", 3)
    directions = _told(groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
    spacing = _told(groups, "PixelMeasuresSequence", "PixelSpacing", 2)
    lengths = np.linalg.norm(directions, axis=1)
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE or abs(directions[0] @ directions[1]) > COSINE_TOLERANCE:
        raise GeometryError(f"frame {number}: Image Orientation {directions.ravel()} is no pair of unit vectors")
    if (spacing <= 0).any():
        raise GeometryError(f"frame {number}: Pixel Spacing {spacing} found, expected numbers above 0")
    steps = [numbers_of(groups, "PixelMeasuresSequence", n, 1) for n in ("SpacingBetweenSlices", "SliceThickness")]
    step_mm = next((abs(float(step[0])) for step in steps if step is not None and step[0]), 0.0)
    return _Frame(position, directions / lengths[:, None], (float(spacing[0]), float(spacing[1])), step_mm)


def _told(groups: list[Dataset], sequence: str, name: str, count: int) -> npt.NDArray[np.float64]:
    numbers = numbers_of(groups, sequence, name, count)
    if numbers is None:
        # what stands there may be anything, a name too
        raise GeometryError(f"no {name} of {count} numbers found, expected one; the image has no place in space")
    return numbers


def _refuse_turned(frames: list[_Frame]) -> None:
    """Raises `GeometryError` where frames are turned against each other or their pixels differ in size."""
    first = frames[0]
    for frame in frames:
        if np.abs(frame.directions - first.directions).max() > COSINE_TOLERANCE:
            raise GeometryError("planes of several orientations found, expected parallel ones; give one series")
        if not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=COSINE_TOLERANCE):
            raise GeometryError(f"pixels of {first.spacing_mm} and {frame.spacing_mm} mm found, expected one size")


def _stack(frames: list[_Frame], rows: int, columns: int) -> _Stack:
    _refuse_turned(frames)
    first = frames[0]
    normal = np.cross(*first.directions)
    positions = np.stack([frame.position for frame in frames])
    heights = positions @ normal
    lowest = positions[int(heights.argmin())]
    apart = np.diff(np.unique(np.round(heights, 6)))
    # two planes one rounding apart are one
    apart = apart[apart > ROUNDING_TOLERANCE * (first.step_mm or float(apart.max(initial=0)))]
    step_mm = _step_mm(apart, first.step_mm)
    numbers = (heights - heights.min()) / step_mm
    count = int(np.rint(numbers.max())) + 1
    if count * rows * columns > MOST_VOXELS:
        raise GeometryError(f"a grid of {columns} × {rows} × {count} voxels found, expected at most {MOST_VOXELS}")
    off = np.abs(positions - (lowest + np.rint(numbers)[:, None] * step_mm * normal)).max()
    if off > ROUNDING_TOLERANCE * step_mm:
        raise GeometryError(f"frames {off:.3g} mm off planes every {step_mm:.4g} mm found, expected a regular stack")
    if count > 1:
        # to the last plane, not by the rounded spacing
        step_mm = float(heights.max() - heights.min()) / (count - 1)
    affine = np.eye(4)
    # along a row the column counts: the first direction goes with the second spacing
    affine[:3, :2] = first.directions.T * first.spacing_mm[::-1]
    affine[:3, 2], affine[:3, 3] = normal * step_mm, lowest
    return _Stack(Grid((columns, rows, count), LPS_TO_RAS @ affine), np.rint(numbers).astype(np.intp))


def _step_mm(apart: npt.NDArray[np.float64], told_mm: float) -> float:
    """The distance between planes: what the file says where all gaps are multiples of it, else the smallest gap."""
    if not len(apart):
        return told_mm or 1.0
    if told_mm > 0:
        steps = apart / told_mm
        if np.abs(steps - np.rint(steps)).max() <= ROUNDING_TOLERANCE and steps.min() > 0.5:
            return told_mm
    return float(apart.min())


def _set_into(made: Segmentation, like: Grid) -> Segmentation:
    """On `like`, of which it has whole voxels. Raises `GeometryError` where it has not, or labels lie outside."""
    array, grid = turned(made.array, made.grid, like)
    offset = np.linalg.solve(like.affine, grid.affine[:, 3])[:3]
    start = np.rint(offset).astype(int)
    moved = like.affine.copy()
    moved[:, 3] = like.affine @ [*start, 1]
    if not Grid(grid.shape, moved).matches(grid, tolerance=ROUNDING_TOLERANCE):
        raise GeometryError(f"segmentation on {grid} found, expected whole voxels of {like}; give its own series")
    low = np.maximum(-start, 0)
    high = np.minimum(np.asarray(like.shape) - start, grid.shape)
    inside = tuple(slice(int(a), int(max(a, b))) for a, b in zip(low, high))
    if np.count_nonzero(array[inside]) < np.count_nonzero(array):
        raise GeometryError(f"labels outside {like} found, expected all inside; give the series they were made on")
    whole = np.zeros(like.shape, array.dtype)
    whole[tuple(slice(s.start + o, s.stop + o) for s, o in zip(inside, start))] = array[inside]
    return Segmentation(whole, like, made.segments)


# ---- what frames hold


def _fill_masks(
    array: npt.NDArray[Any],
    header: Dataset,
    stack: _Stack,
    segments: dict[int, SegmentInfo],
    *,
    threshold: float | None,
    overlap: Overlap,
) -> None:
    numbers = [_segment_number(header, n) for n in range(len(stack.plane_of))]
    unknown = sorted(set(numbers) - set(segments))
    if unknown:
        raise DataError(f"frames of segment {unknown[0]} found, expected one of {sorted(segments)}")
    least = 1.0
    if str(header.SegmentationType) == "FRACTIONAL":
        least = max(float(threshold or 0) * float(header.get("MaximumFractionalValue", 255)), 1e-9)
    shared: set[tuple[str, str]] = set()
    rank = {number: n for n, number in enumerate(segments)}
    order = {segment.value: rank[number] for number, segment in segments.items()}
    for frame, plane, number in zip(_pixels(header), stack.plane_of, numbers, strict=True):
        segment, there = segments[number], array[plane]
        mask = frame >= least
        taken = mask & (there != 0) & (there != segment.value)
        if taken.any():
            others = list(np.unique(there[taken]))
            shared |= {(_name_of(segments, int(value)), segment.name) for value in others}
            for value in others:
                wins = (order[segment.value] < order[int(value)]) == (overlap == "first")
                mask = mask if wins else mask & (there != value)
        there[mask] = segment.value
    if shared and overlap == "refuse":
        pairs = ", ".join(f"`{a}` and `{b}`" for a, b in sorted(shared)[:5])
        raise DataError(
            f"segments that overlap found ({pairs}), expected at most one at each voxel, as a label map holds; "
            "say which comes first"
        )


def _fill_maps(array: npt.NDArray[Any], header: Dataset, stack: _Stack, segments: dict[int, SegmentInfo]) -> None:
    table = np.zeros(2 ** int(header.BitsAllocated), array.dtype)
    for number, segment in segments.items():
        table[number] = segment.value
    known = np.zeros(len(table), bool)
    known[[0, *segments]] = True
    padding = header.get("PixelPaddingValue")
    if padding is not None and int(padding) not in segments:
        known[int(padding)] = True
    for frame, plane in zip(_pixels(header), stack.plane_of, strict=True):
        if not known[frame].all():
            raise DataError(f"voxels of segment {int(frame[~known[frame]][0])} found, expected one that is described")
        array[plane] = table[frame]


def _pixels(header: Dataset) -> Iterator[npt.NDArray[Any]]:
    """Frame after frame; bits are unpacked here, since frames of BINARY ones need not begin at a byte."""
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:
        # a decoder takes memory by what a stream says of itself
        raise DataError(f"{syntax.name} found, expected uncompressed or RLE; convert it, say with `dcmdjpeg`")
    if int(header.BitsAllocated) != 1 or syntax.is_encapsulated:
        yield from iter_pixels(header, raw=True)
        return
    shape = (int(header.Rows), int(header.Columns))
    size, count = shape[0] * shape[1], int(header.NumberOfFrames)
    data = np.frombuffer(header.PixelData, np.uint8)
    if len(data) < -(-size * count // 8):
        raise DataError(f"{len(data)} bytes of pixels found, expected {-(-size * count // 8)}; copy the file again")
    for n in range(count):
        first, last = n * size, (n + 1) * size
        bits = np.unpackbits(data[first // 8 : -(-last // 8)], bitorder="little")
        yield bits[first % 8 : first % 8 + size].reshape(shape)


def _segment_number(header: Dataset, frame: int) -> int:
    for group in (header.PerFrameFunctionalGroupsSequence[frame], header.SharedFunctionalGroupsSequence[0]):
        if "SegmentIdentificationSequence" in group:
            return int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
    raise DataError(f"frame {frame + 1} belongs to no segment, expected the number of one")


def _segment(item: Dataset) -> SegmentInfo:
    number = int(item.SegmentNumber)
    note = _VALUE_NOTE.fullmatch(str(item.get("SegmentDescription") or ""))
    name = str(item.get("SegmentLabel") or "") or f"label {number}"
    return SegmentInfo(int(note[1]) if note else number, name, _colour(item))


def _colour(item: Dataset) -> str:
    """`#rrggbb` of the CIELab colour, by highdicom's inverse of what it writes; empty where there is none."""
    from highdicom.color import CIELabColor

    found = item.get("RecommendedDisplayCIELabValue")
    if found is None or len(found) != 3:
        return ""
    colour = CIELabColor.from_dicom_value([int(v) for v in found])
    return "#{:02X}{:02X}{:02X}".format(*(round(v) for v in colour.to_rgb(clip=True)))


def _name_of(segments: dict[int, SegmentInfo], value: int) -> str:
    return next(segment.name for segment in segments.values() if segment.value == value)
