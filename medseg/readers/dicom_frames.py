"""DICOM headers → frames: what every image plane says of its place and its values, classic and enhanced alike.

What headers say of themselves is judged here; whether the frames make up a volume is judged in dicom_stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError
from medseg.readers.dicom_files import DicomFile, header_value, header_word

if TYPE_CHECKING:
    from pydicom import Dataset

Array = npt.NDArray[np.float64]

# elements that this module and the grouping of files look at
TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID"),
    *("Modality", "ImageType", "SeriesNumber", "AcquisitionNumber", "Rows", "Columns", "NumberOfFrames"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "LossyImageCompression"),
    *("ImagesInAcquisition", "NumberOfSlices", "NumberOfSeriesRelatedInstances"),
    *("EchoNumbers", "TemporalPositionIdentifier", "NumberOfTemporalPositions", "DiffusionBValue"),
    *("EchoTime", "InversionTime", "ContrastBolusAgent", "ConvolutionKernel"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
# of values that mean something, the photometric interpretation is how to show them: they are never inverted
QUANTITATIVE = ("CT", "MR", "PT", "NM")
# 8.6 GB of float32: as many voxels as preprocessing takes
MOST_VOXELS = 2**31
# pixel spacings that differ by less make half a pixel on an image of 5000
SPACING_SHARE = 1e-4
# direction cosines are written with six or more digits; three are taken: a tenth of a degree
COSINE_TOLERANCE = 1e-3
# different values that are looked for; each would be compared with all others
MOST_TOLD = 10
_CT_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("2", "2.1", "2.2"))
_RESCALING = ("RescaleSlope", "RescaleIntercept")
# what one scan has one value of, and what images with several are. Not AcquisitionNumber: interleaved packages of one
# volume differ there
_OF_SCANS = (
    *(("EchoTime", "echoes"), ("InversionTime", "inversions"), ("DiffusionBValue", "diffusion weightings")),
    *(("TemporalPositionIdentifier", "time points"), ("ContrastBolusAgent", "contrasts")),
    ("ConvolutionKernel", "reconstructions"),
)
# times are written with three digits or more
_SCAN_SHARE = 1e-3
# images resampled from others keep the count of those
_RESLICED = ("REFORMATTED", "MPR", "RESAMPLED", "CPR", "AVERAGE", "MIN_IP", "MAX_IP", "PROJECTION IMAGE")


@dataclass(frozen=True, eq=False)
class Frame:
    """One image plane: the `index`-th of file number `file`.

    `position` (3,), `orientation` (2, 3): of rows and of columns, LPS mm (as written, until `frames_of` made it that of
    all);  `spacing_mm`: between rows, between columns;
    `stored`: the lowest and the highest value that its bits can hold; `slope`, `intercept`: of the rescaling, 1 and 0
    where there is none; `told`: which of these two the header has.
    """

    file: int
    index: int
    position: Array
    orientation: Array
    spacing_mm: tuple[float, float]
    stored: tuple[int, int]
    slope: float = 1.0
    intercept: float = 0.0
    told: tuple[str, ...] = ()

    @property
    def normal(self) -> Array:
        """Unit vector to the next plane, right-handed with rows and columns."""
        return np.asarray(np.cross(*self.orientation))


@dataclass(frozen=True, eq=False)
class Frames:
    """All planes of a series, and what they have in common: `shape` is (rows, columns)."""

    frames: tuple[Frame, ...]
    shape: tuple[int, int]
    warnings: tuple[str, ...] = ()


def frames_of(files: Sequence[DicomFile], headers: Sequence[Dataset], where: str) -> Frames:
    """The planes of a series. `headers`: one for each of `files`; `where`: what messages call the series.

    All have one orientation, the mean of theirs, made orthonormal.

    Raises `DataError` or `GeometryError` for what cannot be one volume whatever the positions are: several patients,
    colour, a mosaic, a localizer, CT without rescale, another size or spacing, images without a position.
    """
    _refuse_mixtures(headers, where)
    _refuse_contents(files, headers, where)
    frames: list[Frame] = []
    for number, (file, header) in enumerate(zip(files, headers)):
        frames += _frames(file, number, header)
    _refuse_geometries(frames, where)
    _refuse_half_rescaled(frames, where)
    orientation = orthonormal(np.mean([f.orientation for f in frames], axis=0))
    frames = [replace(f, orientation=orientation) for f in frames]
    shape = (int(headers[0].Rows), int(headers[0].Columns))
    if len(frames) * shape[0] * shape[1] > MOST_VOXELS:
        raise DataError(
            f"{where}: {len(frames)} frames of {shape[0]} × {shape[1]} found, expected at most {MOST_VOXELS:,} voxels; "
            "correct the header"
        )
    return Frames(tuple(frames), shape, tuple(_notes(headers, where, len(frames))))


def orthonormal(orientation: Array) -> Array:
    """The nearest pair of perpendicular unit vectors (2, 3), by polar decomposition."""
    left, _, right = np.linalg.svd(orientation, full_matrices=False)
    return np.asarray(left @ right)


def refuse_interleaved(headers: Sequence[Dataset], where: str) -> None:
    """Raises `DataError` where planes are of several scans, though each has a place of its own.

    By the files' own elements, not by functional groups of frames.
    """
    for name, what in _OF_SCANS:
        values: list[float | str] = []
        for value in (_scan_value(header, name) for header in headers):
            if not any(_same_value(value, other) for other in values):
                values.append(value)
            if len(values) == MOST_TOLD:
                break
        if len(values) > 1:
            # words may say anything
            numbers = ", ".join(f"{v:g}" if isinstance(v, float) else "none" for v in values)
            told = f" ({numbers})" if any(isinstance(v, float) for v in values) else ""
            raise DataError(
                f"{where}: planes with {len(values)} values of {name}{told} found, expected one: these are planes of "
                f"several scans ({what}); sort the files by {name}"
            )


def numbers_of(groups: Sequence[Any], sequence: str, name: str, count: int) -> Array | None:
    """The `count` numbers of an element where it is first found; None where it is missing or anything else.

    `groups`: a frame's own, the shared ones, the file itself; each has it in its `sequence`, or directly.
    """
    holder = _holder(groups, sequence, name)
    return None if holder is None else _finite(holder, name, count)


def is_inverted(header: Dataset) -> bool:
    """Whether low values are to be shown bright, and mean nothing else."""
    shown = header_value(header, "PhotometricInterpretation")
    return shown == "MONOCHROME1" and header_value(header, "Modality") not in QUANTITATIVE


def plane_distance(file: DicomFile, header: Dataset) -> tuple[float, str]:
    """What a single plane says of the distance to the next one, in mm, and which element says it.

    Raises `GeometryError` where none does.
    """
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        for groups in (header_value(header, "SharedFunctionalGroupsSequence") or [], [header]):
            for holder in (*groups, *(header_value(header, "PerFrameFunctionalGroupsSequence") or [])[:1]):
                value = numbers_of([holder], "PixelMeasuresSequence", name, 1)
                if value is not None and value[0] > 0:
                    return float(value[0]), name
    raise GeometryError(
        f"{file}: a single plane without SpacingBetweenSlices and SliceThickness found, expected several planes or one "
        "of these; give the whole series"
    )


# ---- what a series may not mix or be


def _refuse_mixtures(headers: Sequence[Dataset], where: str) -> None:
    for name, what, fix in (
        ("PatientID", "patients", "sort the files by patient"),
        ("StudyInstanceUID", "studies", "sort the files by study"),
        ("Modality", "modalities", "sort the files by modality"),
        ("FrameOfReferenceUID", "frames of reference (coordinate systems)", "reconstruct them in one"),
    ):
        count = len({str(header_value(h, name) or "") for h in headers})
        if count > 1:
            # the values themselves are a patient's
            raise DataError(f"{where}: images of {count} {what} found in one series ({name}), expected one; {fix}")
    for name in ("Rows", "Columns", "BitsAllocated", "PixelRepresentation"):
        values = sorted({int(header_value(h, name) or 0) for h in headers})
        if len(values) > 1:
            raise GeometryError(
                f"{where}: {name} {' and '.join(map(str, values))} found, expected one value; choose files of one scan"
            )


def _refuse_contents(files: Sequence[DicomFile], headers: Sequence[Dataset], where: str) -> None:
    for file, header in zip(files, headers):
        kinds = _image_type(header)
        samples, colour = (
            header_value(header, "SamplesPerPixel") or 1,
            header_word(header, "PhotometricInterpretation"),
        )
        if int(samples) != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
            raise DataError(
                f"{file}: {colour or 'no'} pixels with {samples} values each found (a capture? a coloured map?), "
                "expected one grey value a pixel; give the original images"
            )
        if "MOSAIC" in kinds:
            raise DataError(
                f"{file}: a mosaic of {header.Rows} × {header.Columns} found, whose tiles are the slices, expected one "
                "slice an image; export it as enhanced multi-frame, or convert it with a tool that unpacks mosaics"
            )
        bits = int(header_value(header, "BitsAllocated") or 0)
        if bits not in (8, 16, 32):
            raise DataError(f"{file}: {bits} bits a pixel found, expected 8, 16 or 32; give the original images")
        if not 1 <= _bits_stored(header) <= bits:
            raise DataError(f"{file}: BitsStored {_bits_stored(header)} found, expected 1 to {bits}; export it anew")
        if header_value(header, "ModalityLUTSequence") is not None:
            raise DataError(f"{file}: a table of modality values found, expected slope and intercept; export it anew")
    depths = sorted({_bits_stored(header) for header in headers})
    if len(depths) > 1 and any(is_inverted(header) for header in headers):
        raise DataError(
            f"{where}: MONOCHROME1 with BitsStored {' and '.join(map(str, depths))} found, expected one value: each "
            "would be inverted about another middle; choose files of one scan"
        )
    scouts = [file for file, header in zip(files, headers) if "LOCALIZER" in _image_type(header)]
    if scouts:
        raise DataError(
            f"{where}: {len(scouts)} of {len(files)} images are localizers, first {scouts[0]}, expected none; "
            f"{'choose another series' if len(scouts) == len(files) else 'remove them from the folder'}"
        )
    names = Counter(str(header_value(h, "SOPInstanceUID") or "") for h in headers)
    twice = [n for n, count in names.items() if n and count > 1]
    if twice:
        same = [str(f) for f, h in zip(files, headers) if str(h.SOPInstanceUID) == twice[0]]
        raise DataError(
            f"{where}: {len(twice)} images are there twice, such as {same[0]} and {same[1]}, expected each once; "
            "remove the copies"
        )


def _scan_value(header: Dataset, name: str) -> float | str:
    value = header_value(header, name)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "" if value is None else str(value)
    return number if np.isfinite(number) else ""


def _same_value(a: float | str, b: float | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return abs(a - b) <= _SCAN_SHARE * max(abs(a), abs(b))


def _refuse_geometries(frames: Sequence[Frame], where: str) -> None:
    if not frames:
        raise DataError(f"{where}: no frame found, expected at least one")
    first = frames[0]
    orientations = _distinct([f.orientation.ravel() for f in frames], _same_cosines)
    if len(orientations) > 1:
        other = np.cross(*orthonormal(orientations[1].reshape(2, 3)))
        angle = np.degrees(np.arccos(np.clip(abs(other @ first.normal), 0, 1)))
        raise GeometryError(
            f"{where}: {len(orientations)} orientations found (the first two {angle:.1f} degrees apart), expected one; "
            "sort the files by orientation (a localizer?)"
        )
    spacings = _distinct(
        [np.asarray(f.spacing_mm) for f in frames], lambda a, b: np.abs(a / b - 1).max() <= SPACING_SHARE
    )
    if len(spacings) > 1:
        told = " and ".join(f"{s[0]:.6g} × {s[1]:.6g}" for s in spacings[:3])
        raise GeometryError(f"{where}: pixel spacings {told} mm found, expected one; choose files of one scan")


def _refuse_half_rescaled(frames: Sequence[Frame], where: str) -> None:
    for name in _RESCALING:
        count = sum(name in frame.told for frame in frames)
        if 0 < count < len(frames):
            raise DataError(
                f"{where}: {name} found in {count} of {len(frames)} planes, expected it in all or none: their values "
                "are on different scales; export the original images"
            )


def _same_cosines(a: Array, b: Array) -> bool:
    # a hair more is what decimals become in floats
    return bool(np.abs(a - b).max() <= COSINE_TOLERANCE + 1e-9)


def _distinct(values: Sequence[Array], same: Callable[[Array, Array], bool]) -> list[Array]:
    found: list[Array] = []
    for value in values:
        if not any(same(value, other) for other in found):
            found.append(value)
        if len(found) == MOST_TOLD:
            break
    return found


def _notes(headers: Sequence[Dataset], where: str, frames: int) -> list[str]:
    """What is odd but usable. Raises `DataError` where a count says that images are missing."""
    notes = []
    header = headers[0]
    if header_value(header, "PhotometricInterpretation") == "MONOCHROME1":
        modality = header_word(header, "Modality")
        kept = modality in QUANTITATIVE
        notes.append(
            f"MONOCHROME1: values of {modality} are kept as they are, only their display is inverted"
            if kept
            else "MONOCHROME1: inverted, so that bright is high"
        )
    if any(str(header_value(h, "LossyImageCompression") or "") == "01" for h in headers):
        notes.append("the images were compressed with loss")
    return notes + _count_notes(headers, where, frames)


def _count_notes(headers: Sequence[Dataset], where: str, frames: int) -> list[str]:
    """Counts of more images than there are which others may have meant. Raises `DataError` where they mean these."""
    kinds = _image_type(headers[0])
    for name, here in (("NumberOfSeriesRelatedInstances", len(headers)), ("NumberOfSlices", frames)):
        count = _common_count(headers, name)
        if count is None or count <= here:
            continue
        found = f"{here} of {count} images found ({name} says {count})"
        if any(kind in _RESLICED for kind in kinds):
            return [f"{found}; the count may be that of the images these were made of"]
        raise DataError(f"{where}: {found}, expected all; fetch the series again, some of it is missing")
    count = _common_count(headers, "ImagesInAcquisition")
    acquisitions = {str(header_value(h, "AcquisitionNumber") or "") for h in headers}
    # a count of the acquisition says nothing of a series of several
    if count is None or count <= frames or len(acquisitions) > 1:
        return []
    # an acquisition of several volumes, of which this is one: sorted apart, as we advise where they lie together
    if "ORIGINAL" not in kinds or count % frames == 0 or any(_is_one_of_several(header) for header in headers):
        return [f"the header counts {count} images in the acquisition, {frames} are here"]
    raise DataError(
        f"{where}: {frames} of {count} images found (ImagesInAcquisition says {count}), expected all; fetch the series "
        "again, some of it is missing"
    )


def _common_count(headers: Sequence[Dataset], name: str) -> int | None:
    counts = {str(header_value(h, name) or "") for h in headers}
    told = counts.pop()
    return int(told) if not counts and told.isdecimal() else None


def _is_one_of_several(header: Dataset) -> bool:
    """Whether an image is of one of several echoes, time points or diffusion weightings of an acquisition."""
    if header_value(header, "DiffusionBValue") is not None:
        return True
    numbers = ("EchoNumbers", "TemporalPositionIdentifier", "NumberOfTemporalPositions")
    return any(str(header_value(header, name) or "1") != "1" for name in numbers)


# ---- one file


def _frames(file: DicomFile, number: int, header: Dataset) -> list[Frame]:
    count = int(header_value(header, "NumberOfFrames") or 1)
    if count < 1 or count * int(header.Rows) * int(header.Columns) > MOST_VOXELS:
        raise DataError(f"{file}: {count} frames of {header.Rows} × {header.Columns} found; correct the header")
    own = header_value(header, "PerFrameFunctionalGroupsSequence")
    if own is None:
        if count > 1:
            raise GeometryError(
                f"{file}: {count} frames without positions found, expected one for each; a film or a screen capture "
                "is no volume"
            )
        return [_frame(file, number, 0, header, [header])]
    if len(own) != count:
        raise DataError(f"{file}: {len(own)} of {count} frames described, expected all; copy the file again")
    shared = header_value(header, "SharedFunctionalGroupsSequence") or []
    return [_frame(file, number, n, header, [groups, *shared[:1], header]) for n, groups in enumerate(own)]


def _frame(file: DicomFile, number: int, index: int, header: Dataset, groups: list[Any]) -> Frame:
    position = numbers_of(groups, "PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = numbers_of(groups, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = numbers_of(groups, "PixelMeasuresSequence", "PixelSpacing", 2)
    for value, name in (
        (position, "ImagePositionPatient"),
        (orientation, "ImageOrientationPatient"),
        (spacing, "PixelSpacing"),
    ):
        if value is None:
            raise GeometryError(
                f"{file}: no {name} found, expected finite numbers; only images that know their place make a volume "
                "(a projection, a photograph or a capture does not)"
            )
    if position is None or orientation is None or spacing is None:
        raise GeometryError(f"{file}: no place found")
    if spacing.min() <= 0:
        raise GeometryError(f"{file}: PixelSpacing {spacing.tolist()} mm found, expected above 0; correct the header")
    return Frame(
        number,
        index,
        position,
        _perpendicular(file, orientation.reshape(2, 3)),
        (float(spacing[0]), float(spacing[1])),
        _stored_range(header),
        *_rescale(file, header, groups),
    )


def _perpendicular(file: DicomFile, orientation: Array) -> Array:
    lengths = np.linalg.norm(orientation, axis=1)
    # the angle has the rounding of both
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE or abs(orientation[0] @ orientation[1]) > 2 * COSINE_TOLERANCE:
        raise GeometryError(
            f"{file}: ImageOrientationPatient {orientation.ravel().tolist()} found, expected two perpendicular unit "
            "vectors; correct the header"
        )
    return orientation


def _bits_stored(header: Dataset) -> int:
    return int(header_value(header, "BitsStored") or 0)


def _stored_range(header: Dataset) -> tuple[int, int]:
    bits = _bits_stored(header)
    signed = int(header_value(header, "PixelRepresentation") or 0)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _rescale(file: DicomFile, header: Dataset, groups: list[Any]) -> tuple[float, float, tuple[str, ...]]:
    """Slope, intercept, and which of them stand in the header; a blank one does not."""
    found: dict[str, float] = {}
    for name in _RESCALING:
        holder = _holder(groups, "PixelValueTransformationSequence", name)
        if holder is None:
            continue
        numbers = _finite(holder, name, 1)
        if numbers is None:
            raise DataError(f"{file}: {name} that is not one finite number found; export the original images")
        found[name] = float(numbers[0])
    modality = header_value(header, "Modality")
    if (modality == "CT" or header_value(header, "SOPClassUID") in _CT_CLASSES) and len(found) < len(_RESCALING):
        raise DataError(
            f"{file}: CT without RescaleSlope and RescaleIntercept found, expected both: without them values are not "
            "Hounsfield units; export the original images"
        )
    if modality == "PT" and "RescaleSlope" not in found:
        raise DataError(
            f"{file}: PET without RescaleSlope found, expected it: each plane is stored on a scale of its own; "
            "export the original images"
        )
    slope, intercept = found.get("RescaleSlope", 1.0), found.get("RescaleIntercept", 0.0)
    if slope == 0:
        raise DataError(f"{file}: RescaleSlope 0 found, expected another number; export the original images")
    return slope, intercept, tuple(found)


def _holder(groups: Sequence[Any], sequence: str, name: str) -> Dataset | None:
    """The first of `groups` that has an element, blank ones aside: a frame's own, the shared, the file's."""
    for group in groups:
        holders: list[Dataset] = [*(header_value(group, sequence) or [])[:1], group]
        for holder in holders:
            # as it was stored: one that cannot be understood is there too
            stored = holder.get_item(name)
            if stored is not None and not _is_blank(stored.value):
                return holder
    return None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, (bytes, str)) and not value.strip())


def _finite(holder: Dataset, name: str, count: int) -> Array | None:
    try:
        numbers = np.atleast_1d(np.asarray(header_value(holder, name), dtype=np.float64))
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None


def _image_type(header: Dataset) -> list[str]:
    value = header_value(header, "ImageType")
    return [str(v).upper() for v in ([value] if isinstance(value, str) else value or [])]
