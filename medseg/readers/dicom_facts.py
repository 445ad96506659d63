"""What one received DICOM file says of itself, for whoever decides whether to keep it; hostile files are expected."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import tag_for_keyword

from medseg.errors import DataError
from medseg.readers.dicom_files import DicomFile, each_open, quiet
from medseg.readers.dicom_frames import MOST_VOXELS
from medseg.readers.dicom_walk import META_CLASS, META_INSTANCE, TRANSFER_SYNTAX, Header, walk
from medseg.readers.series import IMAGES, NO_IMAGES, OBJECTS

# characters of a value: of a long string, of a person's name (three groups of 64, and what parts them)
LONGEST, LONGEST_NAME = 64, 324
MOST_IMAGE_TYPES = 16
# PS3.5 chapter 9: numbers without leading zeros between dots
VALID_UID = re.compile(r"(?=[0-9.]{1,64}\Z)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")
_INTEGER = re.compile(r"[+-]?[0-9]{1,12}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_UIDS = {
    "SOPClassUID": "SOP class",
    "SOPInstanceUID": "SOP instance",
    "StudyInstanceUID": "study",
    "SeriesInstanceUID": "series",
}
_KEYWORDS = (
    *_UIDS,
    *("SpecificCharacterSet", "Modality", "BodyPartExamined", "SeriesDescription", "StudyDescription", "ProtocolName"),
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "StudyTime"),
    *("SeriesNumber", "InstanceNumber", "Rows", "Columns", "NumberOfFrames", "SliceThickness", "Manufacturer"),
    *("ImageType", "ImagesInAcquisition"),
)


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise LookupError(keyword)
    return int(tag)


_TAGS = {keyword: _tag(keyword) for keyword in _KEYWORDS}
_WANTED = frozenset((*_TAGS.values(), TRANSFER_SYNTAX, META_CLASS, META_INSTANCE))


@dataclass(frozen=True)
class DicomFacts:
    """What a file says of itself. Texts are decoded, without control characters, cut at 64 characters (names at 324).

    Empty or None: missing, blank, or not to be understood. The UIDs are there and valid; none of the rest is checked.
    `is_image`: it has pixels of an image of a patient, and is no segmentation, report, plan or the like. `frames`: 1
    where an image does not say.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str
    modality: str
    body_part: str
    series_description: str
    study_description: str
    protocol_name: str
    patient_name: str
    patient_id: str
    patient_birth_date: str
    patient_sex: str
    accession_number: str
    study_date: str
    study_time: str
    series_number: int | None
    instance_number: int | None
    rows: int | None
    columns: int | None
    frames: int | None
    slice_thickness_mm: float | None
    manufacturer: str
    image_type: tuple[str, ...]
    images_in_acquisition: int | None
    is_image: bool


def dicom_facts(path: str | Path) -> DicomFacts:
    """The facts of the DICOM file at `path`, read up to its pixels, which are never decoded.

    Time and memory are bounded whatever the file is. Raises `DataError` that names the file and shows nothing of a
    patient: no DICOM file (PS3.10) or a cut-off one; deflated; a UID missing or invalid; a header that contradicts that
    of the file, has more than 64 MiB, or nests more than 64 sequences; more than `MOST_VOXELS` pixels.
    """
    path = Path(path)
    if not path.is_file():
        # a pipe would be waited for
        raise DataError(f"{path}: no file found, expected one of DICOM; check the path")
    for file, stream in each_open([DicomFile(path)]):
        return read_facts(file, stream)
    raise DataError(f"{path}: no file found, expected one of DICOM; check the path")


def read_facts(file: DicomFile, stream: BinaryIO, *, own_header: bool = True) -> DicomFacts:
    """The facts of an open file. Raises `DataError` as `dicom_facts`, without `own_header` not for what the header of
    the file itself says of the object in it."""
    header = walk(file, stream, _WANTED)
    read = _Values(header)
    uids = {keyword: _uid(file, read.identifier(keyword), words) for keyword, words in _UIDS.items()}
    syntax = _uid(file, header.syntax, "transfer syntax")
    for tag, keyword in ((META_CLASS, "SOPClassUID"), (META_INSTANCE, "SOPInstanceUID")):
        if own_header and read.word(tag) not in ("", uids[keyword]):
            raise DataError(
                f"{file}: two different {_UIDS[keyword]} UIDs found, expected that of the file's own header in its "
                "data set too; send it again"
            )
    rows, columns = read.short("Rows"), read.short("Columns")
    frames = read.integer("NumberOfFrames") if _TAGS["NumberOfFrames"] in header.values else 1 if rows else None
    if (rows or 1) * (columns or 1) * (frames or 1) > MOST_VOXELS:
        raise DataError(
            f"{file}: {frames} frames of {rows} × {columns} found, expected at most {MOST_VOXELS:,} voxels; it is not "
            "taken"
        )
    if not header.pixels and f"{uids['SOPClassUID']}.".startswith(IMAGES):
        raise DataError(f"{file}: an image without pixels found, expected some: cut off; send it again")
    modality = read.text("Modality")
    return DicomFacts(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_uid=uids["StudyInstanceUID"],
        series_uid=uids["SeriesInstanceUID"],
        transfer_syntax_uid=syntax,
        modality=modality,
        body_part=read.text("BodyPartExamined"),
        series_description=read.text("SeriesDescription"),
        study_description=read.text("StudyDescription"),
        protocol_name=read.text("ProtocolName"),
        patient_name=read.text("PatientName", LONGEST_NAME),
        patient_id=read.text("PatientID"),
        patient_birth_date=read.text("PatientBirthDate"),
        patient_sex=read.text("PatientSex"),
        accession_number=read.text("AccessionNumber"),
        study_date=read.text("StudyDate"),
        study_time=read.text("StudyTime"),
        series_number=read.integer("SeriesNumber"),
        instance_number=read.integer("InstanceNumber"),
        rows=rows,
        columns=columns,
        frames=frames,
        slice_thickness_mm=read.decimal("SliceThickness"),
        manufacturer=read.text("Manufacturer"),
        image_type=read.texts("ImageType"),
        images_in_acquisition=read.integer("ImagesInAcquisition"),
        is_image=_is_image(header, uids["SOPClassUID"], modality, (rows, columns, frames)),
    )


def _is_image(header: Header, sop_class: str, modality: str, sizes: Iterable[int | None]) -> bool:
    return (
        header.pixels
        and modality not in OBJECTS
        and not sop_class.startswith(NO_IMAGES)
        and all(size is not None and size > 0 for size in sizes)
    )


def _uid(file: DicomFile, found: str, words: str) -> str:
    if not VALID_UID.fullmatch(found):
        # what stands in its place may be anything, a name too
        raise DataError(
            f"{file}: {'something that is no' if found else 'no'} {words} UID found, expected a valid one; it is not "
            "taken"
        )
    return found


class _Values:
    """The values of a header as text and numbers."""

    def __init__(self, header: Header) -> None:
        self._header = header
        named = self.word(_TAGS["SpecificCharacterSet"])
        try:
            with quiet():
                self._encodings = convert_encodings([name.strip() for name in named.split("\\")])
        except (LookupError, ValueError, TypeError, AttributeError):
            self._encodings = ["iso8859"]

    def word(self, tag: int) -> str:
        """A value of plain ASCII, without its padding."""
        return self._header.values.get(tag, b"").decode("ascii", "replace").strip(" \0")

    def identifier(self, keyword: str) -> str:
        """A UI; empty where the file says that it is of another type."""
        return self.word(_TAGS[keyword]) if self._header.vrs.get(_TAGS[keyword]) in ("UI", "UN", "") else ""

    def text(self, keyword: str, longest: int = LONGEST) -> str:
        """Decoded, on one line, cut."""
        raw = self._header.values.get(_TAGS[keyword], b"").strip(b" \0")
        try:
            with quiet():
                text = decode_bytes(raw, self._encodings, {ord(c) for c in "\\^=\r\n\t\f"})
        except (LookupError, ValueError, TypeError):
            return ""
        # also what hides or turns the text around it
        shown = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
        return shown.strip()[:longest].strip()

    def texts(self, keyword: str) -> tuple[str, ...]:
        """The values of a code with several."""
        whole = self.text(keyword, (LONGEST + 1) * MOST_IMAGE_TYPES)
        return tuple(part.strip()[:LONGEST] for part in whole.split("\\")[:MOST_IMAGE_TYPES]) if whole else ()

    def integer(self, keyword: str) -> int | None:
        """An IS."""
        text = self.word(_TAGS[keyword])
        return int(text) if _INTEGER.fullmatch(text) else None

    def decimal(self, keyword: str) -> float | None:
        """A DS that is finite."""
        text = self.word(_TAGS[keyword])
        number = float(text) if _DECIMAL.fullmatch(text) else math.nan
        return number if math.isfinite(number) else None

    def short(self, keyword: str) -> int | None:
        """A US."""
        raw, vr = self._header.values.get(_TAGS[keyword], b""), self._header.vrs.get(_TAGS[keyword], "")
        if len(raw) != 2 or vr not in ("US", "UN", ""):
            return None
        return int.from_bytes(raw, "big" if self._header.big_endian else "little")
