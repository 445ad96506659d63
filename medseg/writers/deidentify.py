"""DICOM files for research: whose they are is removed, their pixels stay as they are; file by file, none is changed."""

from __future__ import annotations

import hashlib
import io
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from medseg.errors import ConfigError, DataError, MedsegError
from medseg.progress import Progress, silent
from medseg.readers.dicom_facts import DicomFacts, read_facts
from medseg.readers.dicom_files import (
    DicomFile,
    each_open,
    header_value,
    header_word,
    list_dicom,
    quiet,
    read_dataset,
)
from medseg.versions import versions
from medseg.writers import atomic_path, is_disk_full
from medseg.writers.compressed import beside_image
from medseg.writers.confidentiality import (
    Rules,
    Secret,
    cleaned,
    holds_identifier,
    identifiers_of,
    patient_of,
    traits_of,
)
from medseg.writers.provenance import IMPLEMENTATION_UID

__all__ = ["Deidentified", "DeidentifyOptions", "Refused", "deidentify"]

LEAST_SALT_BYTES = 16
# beside images: segmentations (also as label maps), contours, doses; all others hold text that nobody can clean
_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_OTHERS = (*_SEGMENTATIONS, "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.481.2")
# screens and films that were photographed; ultrasound and visible light, whose machines write names into pixels
_CAPTURES = "1.2.840.10008.5.1.4.1.1.7"
_WRITTEN_ON = tuple(f"1.2.840.10008.5.1.4.1.1.{n}." for n in ("3", "6", "77"))
_WRITTEN_ON_MODALITIES = ("US", "IVUS", "ES", "GM", "XC", "OT", "SM", "OP")
_SCREENS = ("SCREEN", "CAPTURE", "DOSE_INFO")
# CID 7050
_METHODS = {
    "keep_interval": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "retain_patient_characteristics": ("113108", "Retain Patient Characteristics Option"),
    "retain_device": ("113109", "Retain Device Identity Option"),
    "retain_uids": ("113110", "Retain UIDs Option"),
}
_FLOATS = ("FloatPixelData", "DoubleFloatPixelData")
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


@dataclass(frozen=True)
class DeidentifyOptions:
    """What an export keeps. `salt`: a secret of 16 bytes or more; exports with the same one fit together, None: a new
    one that nobody knows. `keep_interval`: all dates of a patient move by the same number of days; else they go.

    `retain_uids`, `retain_patient_characteristics` (sex, age up to 90, size, weight), `retain_device` keep what they
    name. `allow_burned_in`: take images that may have names in their pixels.
    """

    salt: bytes | None = field(default=None, repr=False)
    keep_interval: bool = False
    retain_uids: bool = False
    retain_patient_characteristics: bool = False
    retain_device: bool = False
    allow_burned_in: bool = False


@dataclass(frozen=True)
class Refused:
    """A file of the source of which nothing was written, and why; the reason shows nothing of the patient."""

    file: str
    reason: str


@dataclass(frozen=True)
class Deidentified:
    """What is in the folder `path` now: how many `files` of how many `series` and `patients`.

    `others`: files of the source that are no DICOM, and are left out. `copies`: files that were there twice.
    """

    path: Path
    files: int
    series: int
    patients: int
    others: int
    copies: int
    refused: tuple[Refused, ...]


def deidentify(
    source: str | Path, output: str | Path, options: DeidentifyOptions | None = None, *, progress: Progress = silent
) -> Deidentified:
    """Copies the DICOM files of a folder, zip archive or file into the new `output`, without what tells whose they are.

    PS3.15 annex E, Basic Application Level Confidentiality Profile, at all depths; private elements, curves and
    overlays go. Pixels and geometry stay bit for bit. Files are `SERIES/INSTANCE.dcm`, by their new UIDs. A file that
    is odd, or of a kind that cannot be cleaned (reports, documents, presentation states, captured screens), is refused
    with the reason, and the others are done. Raises `ConfigError` for wrong paths or options, `DataError` where the
    source cannot be read, holds no DICOM, or the disk is full.
    """
    source, output, options = Path(source), Path(output), options or DeidentifyOptions()
    _check_paths(source, output)
    secret = _secret(options)
    listed = list_dicom(source)
    refused = [Refused(str(u.file), u.reason) for u in listed.unreadable]
    if not listed.files and not refused:
        raise DataError(f"{source}: no DICOM file found, expected some; check the path")
    export = _Export(output, secret, options)
    for number, (file, stream) in enumerate(_each(listed.files), start=1):
        try:
            if isinstance(stream, DataError):
                raise stream
            with quiet():
                export.add(file, stream)
        except DataError as error:
            if is_disk_full(error):
                raise
            refused.append(Refused(str(file), str(error).removeprefix(f"{file}: ")))
        progress("deidentify", number, len(listed.files), "")
    return Deidentified(
        path=output,
        files=len(export.written),
        series=len({path.parent for path in export.written}),
        patients=len(export.patients),
        others=listed.others,
        copies=export.copies,
        refused=tuple(refused),
    )


@dataclass
class _Export:
    """A folder that grows file by file, and what is in it: digests by path, what is known of patients by pseudonym."""

    output: Path
    secret: Secret
    options: DeidentifyOptions
    written: dict[Path, str] = field(default_factory=dict)
    patients: dict[str, dict[str, str]] = field(default_factory=dict)
    copies: int = 0

    def add(self, file: DicomFile, stream: BinaryIO) -> None:
        """Writes one file, or raises `DataError`."""
        # the copy gets a header of its own
        facts = read_facts(file, stream, own_header=False)
        _refuse_kind(file, facts)
        stream.seek(0)
        dataset = read_dataset(file, stream, tags=None, stop_before_pixels=False)
        try:
            _refuse_contradictions(file, dataset, facts)
            if not self.options.allow_burned_in:
                _refuse_written_on(file, dataset, facts)
            identifiers = identifiers_of(dataset, devices=not self.options.retain_device)
            rules = self._rules(dataset)
            made = cleaned(dataset, rules, identifiers)
            self._describe(made, rules, facts)
            buffer = io.BytesIO()
            dcmwrite(buffer, made, enforce_file_format=True)
        except MedsegError:
            raise
        except Exception as error:
            # whatever pydicom stumbles over; it may quote a value
            raise DataError(
                f"{file}: cannot be copied ({type(error).__name__}): something in its header is not as it should be; "
                "export it again"
            ) from error
        data = buffer.getvalue()
        if holds_identifier(data, made.get("PixelData") or b"", identifiers):
            raise DataError(
                f"{file}: a part of a name or number of the patient found after all was cleaned, expected none; "
                "look at it with a DICOM viewer, and leave it out"
            )
        known = self._refuse_another_patient(file, dataset, str(made.PatientID))
        self._write(file, made, data)
        self.patients[str(made.PatientID)] = known

    def _refuse_another_patient(self, file: DicomFile, dataset: Dataset, pseudonym: str) -> dict[str, str]:
        """Gives what is known of the patient now. Hospitals give the same numbers: two people must not become one."""
        known, found = self.patients.get(pseudonym, {}), traits_of(dataset)
        for keyword, value in found.items():
            if known.get(keyword, value) != value:
                raise DataError(
                    f"{file}: another {keyword} found than before for the same patient number, expected one: two "
                    "patients would become one; export it apart with another salt, or give it another number"
                )
        return known | found

    def _rules(self, dataset: Dataset) -> Rules:
        options = self.options
        return Rules(
            self.secret,
            patient_of(dataset),
            keep_interval=options.keep_interval,
            retain_uids=options.retain_uids,
            retain_patient_characteristics=options.retain_patient_characteristics,
            retain_device=options.retain_device,
        )

    def _describe(self, made: Dataset, rules: Rules, facts: DicomFacts) -> None:
        """What was done stands in the file; and its own header is new."""
        made.SpecificCharacterSet = "ISO_IR 192"
        # an object without them would be taken for one that was forgotten
        made.PatientID = made.PatientName = self.secret.pseudonym(rules.patient)
        made.PatientIdentityRemoved = "YES"
        made.LongitudinalTemporalInformationModified = "MODIFIED" if self.options.keep_interval else "REMOVED"
        made.DeidentificationMethod = f"medseg {versions('medseg')['medseg']} PS3.15 E.1-1 2026c"
        codes = [("113100", "Basic Application Confidentiality Profile")]
        codes += [code for name, code in _METHODS.items() if getattr(self.options, name)]
        items = []
        for value, meaning in codes:
            item = Dataset()
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
            items.append(item)
        made.DeidentificationMethodCodeSequence = Sequence(items)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
        meta.TransferSyntaxUID = UID(facts.transfer_syntax_uid)
        meta.ImplementationClassUID, meta.ImplementationVersionName = UID(IMPLEMENTATION_UID), "MEDSEG"
        made.file_meta = meta

    def _write(self, file: DicomFile, made: Dataset, data: bytes) -> None:
        path = self.output / str(made.SeriesInstanceUID) / f"{made.SOPInstanceUID}.dcm"
        digest = hashlib.sha256(data).hexdigest()
        if path in self.written:
            if self.written[path] != digest:
                raise DataError(
                    f"{file}: another file has the same SOP instance UID, expected one for each; remove one of them"
                )
            self.copies += 1
            return
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
        self.written[path] = digest


def _each(files: tuple[DicomFile, ...]) -> Iterator[tuple[DicomFile, BinaryIO | DataError]]:
    """The files open for reading, or why one cannot be opened."""
    at = 0
    while at < len(files):
        try:
            for file, stream in each_open(files[at:]):
                at += 1
                yield file, stream
        except DataError as error:
            at += 1
            yield files[at - 1], error


def _check_paths(source: Path, output: Path) -> None:
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder; check the path")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: a file found, expected a new folder; choose another -o")
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"{output}: inside of the source, or around it; choose a folder elsewhere with -o")
    if output.is_dir() and any(output.iterdir()):
        # what is in it may be the files of somebody
        raise ConfigError(f"{output}: files found, expected a new or empty folder; choose another -o")


def _secret(options: DeidentifyOptions) -> Secret:

    if options.salt is None:
        return Secret(secrets.token_bytes(32))
    if len(options.salt) < LEAST_SALT_BYTES:
        raise ConfigError(
            f"a salt of {len(options.salt)} bytes found, expected {LEAST_SALT_BYTES} or more that nobody can guess; "
            "make one with `openssl rand -hex 32`"
        )
    return Secret(options.salt)


# ---- what is not taken


def _refuse_kind(file: DicomFile, facts: DicomFacts) -> None:
    if not facts.is_image and facts.sop_class_uid not in _OTHERS:
        raise DataError(
            f"{file}: no image, segmentation, contours or dose found (a report, a document, a presentation state, a "
            "plan?): its text may name somebody, and is not cleaned; leave it out"
        )


def _refuse_contradictions(file: DicomFile, dataset: Dataset, facts: DicomFacts) -> None:
    """What another reader would see in a file must be what was checked."""

    seen = {
        "SOPClassUID": facts.sop_class_uid,
        "SOPInstanceUID": facts.sop_instance_uid,
        "StudyInstanceUID": facts.study_uid,
        "SeriesInstanceUID": facts.series_uid,
        "Rows": facts.rows,
        "Columns": facts.columns,
    }
    for keyword, value in seen.items():
        found = header_value(dataset, keyword)
        if (str(found).strip(" \0") if isinstance(value, str) else found) != value:
            raise DataError(f"{file}: two values of {keyword} found, expected one; export it again")
    if "ContentSequence" in dataset:
        raise DataError(f"{file}: a report inside of an image found: its text is not cleaned; leave it out")
    pixels = header_value(dataset, "PixelData")
    if facts.transfer_syntax_uid in _PLAIN:
        if "ExtendedOffsetTable" in dataset or "ExtendedOffsetTableLengths" in dataset:
            raise DataError(f"{file}: a table of compressed frames found, where none is compressed; export it again")
        for plain in (pixels, *(header_value(dataset, keyword) for keyword in _FLOATS)):
            if isinstance(plain, bytes):
                _refuse_tail(file, dataset, plain)
    elif isinstance(pixels, bytes) and (found := beside_image(pixels, facts.transfer_syntax_uid)):
        raise DataError(
            f"{file}: {found} found in its compressed pixels, expected an image alone: it may name somebody; export it "
            "again uncompressed"
        )


def _refuse_tail(file: DicomFile, dataset: Dataset, pixels: bytes) -> None:
    """Nobody sees what stands behind the last pixel, and no viewer shows it; zeros are padding."""
    counts = [header_value(dataset, n) or 1 for n in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")]
    bits = header_value(dataset, "BitsAllocated")
    if not isinstance(bits, int) or not all(isinstance(n, int) for n in counts):
        raise DataError(f"{file}: no numbers for the size of its pixels found, expected some; export it again")
    if pixels[(bits * math.prod(int(n) for n in counts) + 7) // 8 :].strip(b"\0"):
        raise DataError(f"{file}: bytes behind its pixels found, expected none; export it again")


def _refuse_written_on(file: DicomFile, dataset: Dataset, facts: DicomFacts) -> None:
    """Images whose pixels may show a name, by all that a header can say of it."""
    told = header_word(dataset, "BurnedInAnnotation")
    why = ""
    if f"{facts.sop_class_uid}.".startswith(f"{_CAPTURES}."):
        why = "a secondary capture"
    elif header_word(dataset, "ConversionType"):
        why = "an image that was made from a film or a screen"
    elif any(word in kind.upper() for kind in facts.image_type for word in _SCREENS):
        why = "a picture of a screen"
    elif told not in ("", "NO"):
        why = f"BurnedInAnnotation {told}"
    elif told == "" and (f"{facts.sop_class_uid}.".startswith(_WRITTEN_ON) or facts.modality in _WRITTEN_ON_MODALITIES):
        why = "an image of a kind that often shows names, and does not say that it shows none,"
    elif any(_is_inside(dataset, group) for group in range(0x6000, 0x6100, 2)):
        why = "an overlay inside of the pixels"
    if why:
        raise DataError(
            f"{file}: {why} found: its pixels may name somebody; look at it, and export it with --allow-burned-in if "
            "they do not"
        )


def _is_inside(dataset: Dataset, group: int) -> bool:
    # with data of its own, an overlay goes; without, it is in bits of the pixels that are not used
    return (group, 0x0102) in dataset and not ((group, 0x3000) in dataset and dataset[group, 0x3000].value)
