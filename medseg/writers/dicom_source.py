"""The image series that DICOM objects refer to: checked, made complete, and the label map laid on its planes, once.

Imports pydicom: this module is imported where DICOM is written, never by the package.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import DataElement, Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.coding import Code
from pydicom.uid import UID

from medseg.errors import DataError, GeometryError, MedsegError
from medseg.grid import ROUNDING_TOLERANCE, Grid, turned
from medseg.readers._axes import LPS_TO_RAS
from medseg.readers.dicom_files import UNREADABLE, quiet
from medseg.readers.segments import Segmentation, SegmentInfo, count_voxels, volumes_ml
from medseg.readers.series import SourceImages
from medseg.writers.anatomy import CODES
from medseg.writers.provenance import Algorithm, Origin, complete_segments, labels_sha256

log = logging.getLogger(__name__)

_UIDS = {
    "SOPInstanceUID": "SOP Instance UID",
    "SOPClassUID": "SOP Class UID",
    "StudyInstanceUID": "Study Instance UID",
    "SeriesInstanceUID": "Series Instance UID",
    "FrameOfReferenceUID": "Frame of Reference UID",
}
# every object of a study has these, empty where unknown (type 2)
_TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
_PATTERNS = {
    "PatientBirthDate": r"\d{8}",
    "PatientSex": r"[MFO]",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?",
}
PIXELS = 0x7FE0
LONG_STRING = 64
_DATES = ("Series", "Acquisition", "Content", "Study")


@dataclass(frozen=True, eq=False)
class Plane:
    """One frame of `header`, counted from 1; `position`: LPS mm of the centre of its first pixel."""

    header: Dataset
    frame: int
    position: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Source:
    """A series that can be referred to: complete headers, and its planes in the order of the volume.

    `grid`: the volume of columns, rows, planes in RAS mm.
    """

    planes: tuple[Plane, ...]
    grid: Grid
    origin: Origin

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """(column, row, plane) → LPS mm, 4×4."""
        return np.asarray(LPS_TO_RAS @ self.grid.affine)

    @property
    def first(self) -> Dataset:
        """A header for what all have in common."""
        return self.planes[0].header

    @property
    def headers(self) -> list[Dataset]:
        """Every object once, in the order of the planes."""
        return list({id(plane.header): plane.header for plane in self.planes}.values())

    @property
    def series_number(self) -> int:
        """That of the series, or 0."""
        text = str(self.first.get("SeriesNumber") or "0")
        return int(text) if re.fullmatch(r"\d{1,6}", text) else 0

    @property
    def date_and_time(self) -> tuple[str, str]:
        """When the series was made, as DA and TM.

        What is derived from it carries this date and not that of its computation, so that it has the same bytes
        whenever it is made.
        """
        for kind in _DATES:
            date, time = str(self.first.get(f"{kind}Date") or ""), str(self.first.get(f"{kind}Time") or "")
            if re.fullmatch(r"\d{8}", date):
                return date, time if re.fullmatch(_PATTERNS["StudyTime"], time) else "000000"
        return "19700101", "000000"


@dataclass(frozen=True, eq=False)
class LabelledSeries:
    """What every object is made from: a series, and a label map on its planes.

    `voxels` (plane, row, column) uint8 or uint16; `segments`: all that are named or there, by their values, coloured.
    """

    source: Source
    voxels: npt.NDArray[np.integer[Any]]
    segments: tuple[SegmentInfo, ...]

    @property
    def volumes_ml(self) -> dict[int, float]:
        """Millilitres of every value that is there."""
        return volumes_ml(count_voxels(self.voxels), self.source.grid)


def labelled_series(
    images: SourceImages, segmentation: Segmentation, *, algorithm: Algorithm, revision: int = 1
) -> LabelledSeries:
    """The series of `images` with `segmentation` on its planes, turned and flipped as needed, never resampled.

    The label map may have its axes in another order or direction. Raises `DataError` for values that make no segments
    and for images that cannot be referred to (see `check_references`), `GeometryError` where the label map does not
    have exactly their voxels, up to `ROUNDING_TOLERANCE` of one.
    """
    with quiet():
        try:
            segments = complete_segments(segmentation)
            source = _source(images, segmentation, algorithm, revision)
            return LabelledSeries(source, _voxels_on(source, segmentation), segments)
        except MedsegError:
            raise
        except Exception as error:
            raise DataError(
                f"headers that cannot be understood found ({type(error).__name__}), expected those of an image series; "
                "write NIfTI instead, or get the series from the archive again"
            ) from error


def check_references(images: SourceImages) -> None:
    """Raises `DataError` where objects cannot refer to `images`: planes were resampled, or UIDs are blank or broken."""
    if images.resampled:
        raise DataError(
            "planes that were resampled found, expected those of the files: what is in no file cannot be referred to; "
            "leave out --resample-tilt and --resample-gaps, or write NIfTI"
        )
    for header in images.headers:
        for keyword, words in _UIDS.items():
            _check_uid(header, keyword, words)


def _source(images: SourceImages, segmentation: Segmentation, algorithm: Algorithm, revision: int) -> Source:
    check_references(images)
    # without a model the labels tell objects apart
    labels = "" if algorithm.model_sha256 else labels_sha256(segmentation)
    instances = tuple(str(header.SOPInstanceUID) for header in images.headers)
    origin = Origin(str(images.headers[0].SeriesInstanceUID), instances, revision, algorithm, labels)
    complete = [_complete(header) for header in images.headers]
    planes = tuple(
        Plane(complete[place], frame + 1, position)
        for (place, frame), position in zip(images.frames, images.positions, strict=True)
    )
    return Source(planes, images.geometry.grid, origin)


def _voxels_on(source: Source, segmentation: Segmentation) -> npt.NDArray[np.integer[Any]]:
    want = source.grid
    hint = "give the series the labels were made on, or resample them to it"
    if segmentation.grid.spatial_dims != 3:
        raise GeometryError(f"label map of {segmentation.grid.spatial_dims} axes found, expected 3; {hint}")
    try:
        array, grid = turned(segmentation.array, segmentation.grid, want)
    except GeometryError as error:
        raise GeometryError(f"label map {segmentation.grid} is turned against the series {want}; {hint}") from error
    if not grid.matches(want, tolerance=ROUNDING_TOLERANCE):
        raise GeometryError(f"label map {segmentation.grid} found, expected the grid {want} of the series; {hint}")
    return np.ascontiguousarray(array.T, dtype=np.uint8 if array.dtype == np.uint8 else np.uint16)


@contextmanager
def written_as(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises over a strange header becomes a `DataError` that names the file and no value.

    pydicom warns of values that are not to the letter, and quotes them: it is kept quiet.
    """
    with quiet():
        try:
            yield
        except MedsegError:
            raise
        except Exception as error:
            raise DataError(
                f"{path}: cannot be written as {what} ({type(error).__name__}): something in the headers of the source "
                "series is not as it should be; write NIfTI instead, or get the series from the archive again"
            ) from error


def long_string(text: str) -> str:
    """What the value of an LO may be: one line, no backslash (it parts values), 64 characters."""
    words = "".join(c if c.isprintable() else " " for c in text.replace("\\", "/")).split()
    return " ".join(words)[:LONG_STRING].strip()


def coded(meaning: str) -> Code:
    """The SNOMED CT code of a `meaning` in `CODES`."""
    return Code(CODES[meaning], "SCT", meaning[0].upper() + meaning[1:])


def reference_to(header: Dataset) -> Dataset:
    """An item that refers to the object with this `header`."""
    made = Dataset()
    made.ReferencedSOPClassUID, made.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return made


def repeatable(made: Dataset) -> Dataset:
    """`made` without what highdicom takes from the clock."""
    del made.InstanceCreationDate, made.InstanceCreationTime
    for item in made.get("ContributingEquipmentSequence", []):
        item.pop("ContributionDateTime", None)
    return made


def _check_uid(header: Dataset, keyword: str, words: str) -> None:
    value = str(header.get(keyword) or "")
    if not UID(value).is_valid or not value:
        # what stands in its place may be anything, a name too
        what = f"{words} that is none" if value else f"blank {words}"
        raise DataError(
            f"{what} found in the source series, expected a valid UID: an object without one cannot be referred to; "
            "write NIfTI instead, or get the series from the archive again"
        )


def _complete(header: Dataset) -> Dataset:
    """A copy in UTF-8 with all that an object of its study must have, and nothing there that no one could read."""
    made = _legible(header)
    # the text is decoded by now: from here on it is Unicode, whatever the scanner wrote
    made.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _TYPE_2:
        value: Any = made.get(keyword)
        pattern = _PATTERNS.get(keyword)
        if value is None or (pattern and not re.fullmatch(pattern, str(value))):
            setattr(made, keyword, "")
    made.PatientName = str(made.PatientName)
    made.ReferringPhysicianName = str(made.ReferringPhysicianName)
    return made


def _legible(header: Dataset) -> Dataset:
    """What can be read of a header and of the sequences in it, without pixels and private elements.

    A weight of "70,5" must not cost the object.
    """
    made = Dataset()
    for tag in sorted(header.keys()):
        if tag.group == PIXELS or tag.group % 2:
            continue
        try:
            element = header[tag]
            if element.VR == "SQ":
                value: Any = Items([_legible(item) for item in element.value])
            else:
                value = element.value
            made.add(DataElement(tag, element.VR, value))
        except UNREADABLE as error:
            # neither the value nor what pydicom says of it, which quotes it: it may be a patient's
            log.info("%s cannot be read (%s) and is left out", tag, type(error).__name__)
    return made
