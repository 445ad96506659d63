"""Exports for research: nothing of the patient is left anywhere, and nothing of the image is changed."""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import phantom
import pytest
from dicom_series import classic
from phantom import PLANES, VOXELS, every, only, put, series
from PIL import Image as Picture
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit

import medseg
from medseg import ConfigError, DataError, Deidentified, DeidentifyOptions, deidentify
from medseg.cli import run
from medseg.grid import Grid
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.readers.series import source_images
from medseg.writers.confidentiality import IDENTIFIERS
from medseg.writers.confidentiality_table import ACTIONS
from medseg.writers.dicom_seg import write_dicom_seg
from medseg.writers.dicom_source import labelled_series
from medseg.writers.provenance import Algorithm
from medseg.writers.rtstruct import write_rtstruct

SALT = b"0123456789abcdef"
SURNAME, GIVEN, NUMBER = "Zanzibarius", "Quentin", "ZQ-4711-88"
CANARY = f"{SURNAME}^{GIVEN}"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_all(folder: Path) -> list[Dataset]:
    return [dcmread(path) for path in files(folder)]


def elements(dataset: Dataset) -> Iterator[DataElement]:
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item)


def done(source: Path, output: Path, **options: bool) -> Deidentified:
    return deidentify(source, output, DeidentifyOptions(salt=SALT, **options))


def refused(source: Path, output: Path, **options: bool) -> str:
    """Why the only odd file of a series was refused; the others must be there."""
    result = done(source, output, **options)
    assert result.files == PLANES - 1
    assert len(result.refused) == 1
    assert SURNAME not in result.refused[0].reason
    return result.refused[0].reason


# ---- nothing of the patient


def _canaries(k: int, ds: Dataset) -> None:
    """The name in every kind of place."""
    put(ds, PatientName=CANARY, PatientID=NUMBER, OtherPatientIDs=[NUMBER, CANARY], OtherPatientNames=CANARY)
    put(ds, PatientBirthDate="19620503", PatientBirthName=CANARY, PatientMotherBirthName=CANARY, PatientSex="M")
    put(ds, PatientAddress=CANARY, PatientTelephoneNumbers=CANARY, PatientComments=CANARY, MedicalRecordLocator=CANARY)
    put(ds, MilitaryRank=CANARY, Occupation=CANARY, AdditionalPatientHistory=CANARY, IssuerOfPatientID=CANARY)
    put(ds, AccessionNumber=NUMBER[:16], StudyID=CANARY[:16], StudyDescription=CANARY, SeriesDescription=CANARY)
    put(ds, ReferringPhysicianName=CANARY, OperatorsName=[CANARY, CANARY], NameOfPhysiciansReadingStudy=CANARY)
    put(ds, PerformingPhysicianName=CANARY, InstitutionName=CANARY, InstitutionAddress=CANARY, StationName=GIVEN)
    put(ds, InstitutionalDepartmentName=CANARY, ImageComments=CANARY, DerivationDescription=CANARY)
    put(ds, ProtocolName=CANARY, RequestedProcedureDescription=CANARY, DeviceSerialNumber=NUMBER, FrameComments=CANARY)
    put(ds, ContentCreatorName=CANARY, TextComments=CANARY, TextString=CANARY, ContrastBolusAgent=CANARY)
    put(ds, RetrieveAETitle=GIVEN.upper(), RetrieveURL=f"http://x/{SURNAME}", BodyPartExamined=SURNAME.upper())
    # not in the table: a name in what should be technical
    put(ds, ConvolutionKernel=f"B30f {SURNAME.upper()}", Manufacturer=f"Maker of {GIVEN}", SegmentLabel=CANARY)
    put(ds, PixelSpacingCalibrationDescription=CANARY, ScanOptions=GIVEN.upper())
    put(ds, ICCProfile=CANARY.encode(), EncryptedAttributesSequence=[Dataset()], RequestAttributesSequence=[Dataset()])
    ds.EncryptedAttributesSequence[0].EncryptedContent = CANARY.encode()
    ds.RequestAttributesSequence[0].ScheduledProcedureStepDescription = CANARY
    # deep inside of what stays
    inner = Dataset()
    put(inner, ReferencedSOPClassUID=phantom.CT, ReferencedSOPInstanceUID="1.2.3.5.1", PatientName=CANARY)
    inner.add_new((0x0009, 0x1001), "LO", CANARY)
    inner.DimensionOrganizationUID = CANARY
    inner.PurposeOfReferenceCodeSequence = [Dataset()]
    put(inner.PurposeOfReferenceCodeSequence[0], CodeMeaning=CANARY, CodeValue="121311", CodingSchemeDesignator="DCM")
    ds.SourceImageSequence = Sequence([inner])
    # private ones, a curve, an overlay, a number of the future, the end
    ds.private_block(0x0029, f"{SURNAME} 1.0", create=True).add_new(1, "UT", CANARY)
    ds.add_new((0x0031, 0x1001), "SQ", [inner])
    ds.add_new((0x5000, 0x3000), "OW", CANARY.encode() + b" ")
    ds.add_new((0x5000, 0x0022), "LO", CANARY)
    ds.add_new((0x6000, 0x3000), "OW", CANARY.encode("utf-16-le"))
    ds.add_new((0x6000, 0x0022), "LO", CANARY)
    ds.add_new((0x0018, 0xFFF1), "LO", CANARY)
    ds.add_new((0xFFFC, 0xFFFC), "OB", CANARY.encode() + b" ")
    # types that are not theirs
    ds.add_new((0x0018, 0x0081), "LO", CANARY)
    ds.add_new((0x0018, 0x1250), "UN", CANARY.encode())
    ds.add_new((0x0028, 0x1052), "DS", "0")
    ds.file_meta.SourceApplicationEntityTitle = GIVEN.upper()
    ds.file_meta.PrivateInformationCreatorUID = UID("1.2.3")
    ds.file_meta.PrivateInformation = CANARY.encode() + b" "
    ds.preamble = CANARY.encode().ljust(128, b"\0")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_interval": True, "retain_patient_characteristics": True, "retain_device": True, "allow_burned_in": True},
    ],
)
def test_the_name_is_nowhere(tmp_path: Path, syntax: str, options: dict[str, bool]) -> None:
    def edit(k: int, ds: Dataset) -> None:
        _canaries(k, ds)
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        if "retain_device" in options:
            # what an option keeps is kept as it is, unless it names somebody
            put(ds, DeviceSerialNumber="77", StationName="CT1")

    source = series(tmp_path / CANARY, edit)
    result = done(source, tmp_path / "out", **options)
    assert (result.refused, result.files) == ((), PLANES)
    words = (SURNAME, GIVEN, NUMBER, "19620503")
    for path in files(tmp_path / "out"):
        held = path.read_bytes().lower() + str(path.relative_to(tmp_path)).lower().encode()
        for word in words:
            for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):
                assert word.lower().encode(encoding) not in held, (word, encoding)


def test_private_elements_curves_and_overlays_are_gone(tmp_path: Path) -> None:
    done(series(tmp_path / "in", _canaries), tmp_path / "out")
    for dataset in read_all(tmp_path / "out"):
        groups = {element.tag.group for element in elements(dataset)}
        assert not any(group % 2 or 0x5000 <= group < 0x7000 or group > 0x7FE0 for group in groups)


def test_a_name_for_a_number(tmp_path: Path) -> None:
    source = series(tmp_path / "in", every(KVP="120.00000000", WindowCenter="40.000000000"))
    for path in files(source):
        data = path.read_bytes()
        assert b"DS\x0c\x00120.00000000" in data
        path.write_bytes(data.replace(b"120.00000000", b"Zanzibarius "))
    assert done(source, tmp_path / "out").files == PLANES
    assert all(b"Zanzibarius" not in path.read_bytes() for path in files(tmp_path / "out"))
    assert all("KVP" not in ds and ds.WindowCenter == 40 for ds in read_all(tmp_path / "out"))


def test_text_in_other_alphabets(tmp_path: Path) -> None:
    name = "Yamada^Tarou=山田^太郎"

    def edit(_: int, ds: Dataset) -> None:
        put(ds, SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name, Manufacturer="山田電機")

    done(series(tmp_path / "in", edit), tmp_path / "out")
    for path in files(tmp_path / "out"):
        data = path.read_bytes()
        assert all("山田".encode(e) not in data for e in ("utf-8", "iso2022_jp", "euc_jp", "shift_jis", "utf-16-le"))
        # short names are looked for as words of their own
        assert b"yamada" not in data.lower()


def test_a_name_in_a_compressed_stream_is_refused(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        _compressed(k, ds)
        ds.PatientName = CANARY
        if k == 1:
            stream = phantom.jpeg2000(VOXELS[k].astype(np.uint16))
            comment = SURNAME.encode()
            # ISO 15444-1 A.9.2, in front of the first tile
            at = stream.index(b"\xff\x90")
            held = b"\xff\x64" + (len(comment) + 4).to_bytes(2, "big") + b"\0\1" + comment
            ds.PixelData = encapsulate([stream[:at] + held + stream[at:]])

    assert "a comment" in refused(series(tmp_path / "in", edit), tmp_path / "out")


def _jpeg(note: bytes = b"", behind: bytes = b"", block: bytes = b"") -> bytes:
    held = io.BytesIO()
    Picture.fromarray((VOXELS[1] % 256).astype(np.uint8)).save(held, "JPEG", comment=note)
    stream = held.getvalue()
    return stream[:2] + block + stream[2:] + behind


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        # too short to be looked for by its letters
        (_jpeg(note=b"LI BO 1962"), "a comment"),
        (_jpeg(note=b"1962-05-03"), "a comment"),
        (_jpeg(behind=b"LI BO "), "bytes behind the end"),
        (_jpeg(block=b"\xff\xe1\x00\x0cExif\0\0LIBO"), "a block of another program"),
        (b"LI BO ", "cut off"),
        (_jpeg()[:-2], "cut off"),
    ],
)
def test_what_stands_beside_the_image_in_a_compressed_stream(tmp_path: Path, stream: bytes, words: str) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.PatientName = "Li^Bo"
        phantom.put_pixels(ds, (VOXELS[k] % 256).astype(np.uint8))
        ds.PixelData = encapsulate(
            [stream if k == 1 else _jpeg(note=b"LEAD Technologies Inc. V1.01", behind=b"\0\xff")]
        )
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit

    assert words in refused(series(tmp_path / "in", edit), tmp_path / "out")


def test_a_compression_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if k == 1:
            _compressed(k, ds)
            ds.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.100")

    assert "nobody can look into" in refused(series(tmp_path / "in", edit), tmp_path / "out")


@pytest.mark.parametrize("keep_interval", [False, True])
def test_texts_that_the_table_forgets(tmp_path: Path, keep_interval: bool) -> None:
    def edit(_: int, ds: Dataset) -> None:
        put(ds, PatientID="12345678", PatientBirthDate="19620503", InstitutionName="Sankt Marien Klinik")
        put(ds, PatientBirthDateInAlternativeCalendar="S37.05.03", PatientBodyMassIndex="31.2")
        put(ds, PlacerOrderNumberProcedure="ORD-9981", FillerOrderNumberProcedure="ORD-9981", ImageID="IMG-77")
        put(ds, DoseComment="plan of Dr Who", AcquisitionProtocolName="knee", NTPSourceAddress="10.3.4.5")
        put(ds, ContentDescription="of March", AcquisitionNumber="12345678", RadiationMachineName="LINAC 3")
        put(ds, Manufacturer="For Sankt Marien Klinik", SoftwareVersions="1 (03.05.1962)", SequenceName="s1962-05-03")
        put(ds, ManufacturerModelName=f"of {phantom.STUDY}", ConvolutionKernel="B30f")

    done(series(tmp_path / "in", edit), tmp_path / "out", keep_interval=keep_interval)
    for made in read_all(tmp_path / "out"):
        assert {element.keyword for element in made} & _TEXTS == {"ConvolutionKernel"}


_TEXTS = {
    *("PatientBirthDateInAlternativeCalendar", "PatientBodyMassIndex", "PlacerOrderNumberProcedure", "DoseComment"),
    *("FillerOrderNumberProcedure", "ImageID", "AcquisitionProtocolName", "NTPSourceAddress", "ContentDescription"),
    *("AcquisitionNumber", "RadiationMachineName", "Manufacturer", "SoftwareVersions", "SequenceName"),
    *("ManufacturerModelName", "ConvolutionKernel"),
}


# ---- the table


def test_the_table_names_what_pydicom_knows() -> None:
    assert [keyword for keyword in ACTIONS if tag_for_keyword(keyword) is None] == []
    assert len(ACTIONS) > 600
    assert set(ACTIONS.values()) == {"X", "Z", "D", "U", "X/Z", "X/D", "Z/D", "X/Z/D", "X/Z/U*"}


@pytest.mark.parametrize("options", [{}, {"keep_interval": True, "retain_patient_characteristics": True}])
def test_every_text_of_the_table_goes(tmp_path: Path, options: dict[str, bool]) -> None:
    """By the table alone: the word is in no name or number, so that nobody looks for it."""
    texts = [k for k in ACTIONS if dictionary_VR(k) in ("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT", "OB")]
    texts = [k for k in texts if tag_for_keyword(k) >> 16 > 8 and k not in IDENTIFIERS]

    def fill(ds: Dataset) -> None:
        for keyword in texts:
            tag = Tag(tag_for_keyword(keyword))
            word = b"CANARY" if dictionary_VR(tag) == "OB" else "CANARY"
            if keyword not in ds:
                ds.add_new(tag, dictionary_VR(tag), word)

    def edit(_: int, ds: Dataset) -> None:
        ds.PatientName = "Other^Name"
        ds.SourceImageSequence = [Dataset()]
        fill(ds.SourceImageSequence[0])
        fill(ds)

    result = done(series(tmp_path / "in", edit), tmp_path / "out", **options)
    assert (result.files, result.refused, len(texts) > 250) == (PLANES, (), True)
    assert all(b"CANARY" not in path.read_bytes() for path in files(tmp_path / "out"))


def test_each_action(tmp_path: Path) -> None:
    def edit(_: int, ds: Dataset) -> None:
        put(ds, PatientComments="a", StudyDate="20240101", ContentDate="20240101", AccessionNumber="b")
        put(ds, ContrastBolusAgent="c", AcquisitionDate="20240101", SeriesDate="20240101", KVP="120", PatientAge="064Y")
        put(ds, AcquisitionDateTime="20240101101010", DeviceSerialNumber="9", StationName="CT1", PatientWeight="70")

    done(series(tmp_path / "in", edit), tmp_path / "out")
    made = read_all(tmp_path / "out")[0]
    # X and X/D of dates
    for keyword in ("PatientComments", "SeriesDate", "PatientAge", "PatientWeight"):
        assert keyword not in made
    # Z and X/Z
    assert (made.StudyDate, made.AccessionNumber, made.AcquisitionDate) == ("", "", "")
    # D where some object must have a value
    assert (made.ContrastBolusAgent, made.ContentDate, made.StationName) == ("REMOVED", "19000101", "REMOVED")
    assert made.AcquisitionDateTime == "19000101000000"
    # not in the table
    assert made.KVP == 120


def test_what_was_done_stands_in_the_file(tmp_path: Path) -> None:
    done(series(tmp_path / "in"), tmp_path / "out", keep_interval=True, retain_device=True)
    made = read_all(tmp_path / "out")[0]
    assert (made.PatientIdentityRemoved, made.LongitudinalTemporalInformationModified) == ("YES", "MODIFIED")
    codes = [(c.CodeValue, c.CodingSchemeDesignator) for c in made.DeidentificationMethodCodeSequence]
    assert codes == [("113100", "DCM"), ("113107", "DCM"), ("113109", "DCM")]
    assert made.DeidentificationMethod.startswith("medseg")
    assert made.file_meta.ImplementationVersionName == "MEDSEG"


# ---- references, pseudonyms, dates


def test_references_hold_within_an_export_and_lead_nowhere_outside(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        item = Dataset()
        put(item, ReferencedSOPClassUID=phantom.CT, ReferencedSOPInstanceUID=f"1.2.3.5.{(k + 1) % PLANES + 1}")
        ds.ReferencedImageSequence = Sequence([item])

    done(series(tmp_path / "in", edit), tmp_path / "out")
    made = read_all(tmp_path / "out")
    instances = {ds.SOPInstanceUID for ds in made}
    assert len(instances) == PLANES
    assert {ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID for ds in made} == instances
    assert {ds.ReferencedImageSequence[0].ReferencedSOPClassUID for ds in made} == {phantom.CT}
    assert all(ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID for ds in made)
    assert len({(ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID) for ds in made}) == 1
    for path, ds in zip(files(tmp_path / "out"), made):
        assert path.relative_to(tmp_path / "out") == Path(ds.SeriesInstanceUID, f"{ds.SOPInstanceUID}.dcm")
        olds = ("1.2.3.5.", phantom.SERIES, phantom.STUDY, phantom.FRAME)
        assert not any(e.VR == "UI" and str(e.value).startswith(olds) for e in elements(ds))


def test_the_salt_decides(tmp_path: Path) -> None:
    source = series(tmp_path / "in")
    for name, salt in (("a", SALT), ("b", SALT), ("c", SALT[::-1]), ("d", None), ("e", None)):
        deidentify(source, tmp_path / name, DeidentifyOptions(salt=salt))
    a, b, c, d, e = ([p.read_bytes() for p in files(tmp_path / name)] for name in "abcde")
    assert a == b
    uids = [{ds.SOPInstanceUID for ds in read_all(tmp_path / name)} for name in "acde"]
    people = [{ds.PatientID for ds in read_all(tmp_path / name)} for name in "acde"]
    assert not any(x & y for found in (uids, people) for n, x in enumerate(found) for y in found[:n])
    assert len(c) == len(d) == len(e) == PLANES


def test_patients_keep_apart(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put(ds, PatientID=f"number {k % 2}", PatientName="Same^Name")

    result = done(series(tmp_path / "in", edit), tmp_path / "out")
    made = read_all(tmp_path / "out")
    assert result.patients == len({ds.PatientID for ds in made}) == 2
    assert all(str(ds.PatientName) == ds.PatientID for ds in made)


@pytest.mark.parametrize("trait", [{"IssuerOfPatientID": "HOSP B"}, {"PatientBirthDate": "20010101"}])
def test_two_patients_of_one_number_do_not_become_one(tmp_path: Path, trait: dict[str, str]) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put(ds, PatientID="1001", IssuerOfPatientID="HOSP A", PatientBirthDate="19620503")
        # a derived object may tell less
        put(ds, **trait) if k == 4 else put(ds, IssuerOfPatientID="") if k == 2 else None

    reason = refused(series(tmp_path / "in", edit), tmp_path / "out")
    assert f"another {next(iter(trait))}" in reason
    assert "HOSP" not in reason


def test_namesakes_without_numbers_keep_apart(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put(ds, PatientID="", PatientName="Same^Name", PatientBirthDate=f"196205{k % 2 + 10}")

    assert done(series(tmp_path / "in", edit), tmp_path / "out").patients == 2


def test_dates_move_together(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put(ds, PatientID=f"number {k % 2}", StudyDate="20240229", SeriesDate="20240310", StudyTime="081500.25")
        put(ds, AcquisitionDateTime="20240229235959.5+0100", PatientBirthDate="19620503", ContentDate="2024.02")

    done(series(tmp_path / "in", edit), tmp_path / "out", keep_interval=True)
    days = {}
    for ds in read_all(tmp_path / "out"):
        study, later = (np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:]}") for d in (ds.StudyDate, ds.SeriesDate))
        assert later - study == np.timedelta64(10, "D")
        assert (ds.StudyTime, ds.AcquisitionDateTime) == ("081500.25", f"{ds.StudyDate}235959.5+0100")
        assert (ds.PatientBirthDate, ds.ContentDate) == ("", "")
        days.setdefault(ds.PatientID, set()).add(np.datetime64("2024-02-29") - study)
    assert all(len(found) == 1 and 1 <= min(found).astype(int) <= 3650 for found in days.values())
    assert len({min(found) for found in days.values()}) == 2


def test_what_options_keep(tmp_path: Path) -> None:
    def edit(_: int, ds: Dataset) -> None:
        put(ds, PatientSex="F", PatientAge="093Y", PatientSize="1.7", PatientWeight="70", DeviceSerialNumber="9")
        put(ds, StationName="CT1", EthnicGroup="x")

    source = series(tmp_path / "in", edit)
    done(source, tmp_path / "out", retain_patient_characteristics=True, retain_device=True, retain_uids=True)
    made = read_all(tmp_path / "out")
    first = made[0]
    assert (first.PatientSex, first.PatientAge, first.PatientSize, first.PatientWeight) == ("F", "090Y", 1.7, 70)
    assert (first.DeviceSerialNumber, first.StationName) == ("9", "CT1")
    assert "EthnicGroup" not in first
    assert {ds.SOPInstanceUID for ds in made} == {f"1.2.3.5.{k + 1}" for k in range(PLANES)}
    assert first.SeriesInstanceUID == phantom.SERIES


# ---- nothing of the image is changed


def _compressed(k: int, ds: Dataset) -> None:
    phantom.put_pixels(ds, VOXELS[k].astype(np.uint16))
    ds.PixelData = encapsulate([phantom.jpeg2000(VOXELS[k].astype(np.uint16))])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless


def _implicit(_: int, ds: Dataset) -> None:
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    ds.SmallestImagePixelValue = -900


def _nothing(_: int, ds: Dataset) -> None:
    ds.ImagePositionPatient = [f"{float(v):.8f}" for v in ds.ImagePositionPatient]


@pytest.mark.parametrize("edit", [_nothing, _implicit, _compressed])
def test_the_volume_is_the_same(tmp_path: Path, edit: Callable[[int, Dataset], None]) -> None:
    source = series(tmp_path / "in", edit)
    done(source, tmp_path / "out")
    for folder in ("in", "out"):
        medseg.convert(tmp_path / folder, tmp_path / f"{folder}.nii.gz")
    before, after = nib.load(tmp_path / "in.nii.gz"), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(before.affine, after.affine)
    np.testing.assert_array_equal(np.asanyarray(before.dataobj), np.asanyarray(after.dataobj))
    pixels = [{bytes(ds.PixelData) for ds in read_all(tmp_path / folder)} for folder in ("in", "out")]
    assert pixels[0] == pixels[1]
    syntaxes = [{ds.file_meta.TransferSyntaxUID for ds in read_all(tmp_path / folder)} for folder in ("in", "out")]
    assert syntaxes[0] == syntaxes[1]


def test_a_multi_frame_file(tmp_path: Path) -> None:
    source = phantom.enhanced(tmp_path / "in.dcm", slopes=[1, 2, 3, 4, 5])
    done(source, tmp_path / "out")
    medseg.convert(source, tmp_path / "a.nii.gz")
    medseg.convert(tmp_path / "out", tmp_path / "b.nii.gz")
    before, after = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(before.affine, after.affine)
    np.testing.assert_array_equal(np.asanyarray(before.dataobj), np.asanyarray(after.dataobj))


def _objects(folder: Path) -> Path:
    """A series with a SEG and an RTSTRUCT that refer to it."""
    headers = classic()
    for k, header in enumerate(headers):
        header.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
        header.file_meta.MediaStorageSOPClassUID, header.file_meta.MediaStorageSOPInstanceUID = (
            header.SOPClassUID,
            header.SOPInstanceUID,
        )
        header.PatientName = CANARY
        full = Dataset()
        full.update(header)
        full.file_meta = header.file_meta
        phantom.put_pixels(full, np.full((header.Rows, header.Columns), k, np.uint16))
        folder.mkdir(exist_ok=True)
        full.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    images = source_images(folder)
    array = np.zeros(images.geometry.grid.shape, np.uint8)
    array[3:8, 2:6, 1:4] = 1
    labels = Segmentation(array, Grid(array.shape, images.geometry.grid.affine), (SegmentInfo(1, "liver"),))
    labelled = labelled_series(images, labels, algorithm=Algorithm())
    write_dicom_seg(folder / "seg.dcm", labelled)
    write_rtstruct(folder / "rt.dcm", labelled)
    return folder


def test_segmentations_and_contours_still_fit_their_images(tmp_path: Path) -> None:
    source = _objects(tmp_path / "in")
    result = done(source, tmp_path / "out")
    assert (result.refused, result.files, result.series, result.patients) == ((), 8, 3, 1)
    made = {ds.Modality: ds for ds in read_all(tmp_path / "out")}
    images = {ds.SOPInstanceUID for ds in read_all(tmp_path / "out") if ds.Modality == "MR"}
    listed = made["SEG"].ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in listed} == images
    assert made["SEG"].SegmentSequence[0].SegmentLabel == "liver"
    contours = made["RTSTRUCT"].ROIContourSequence[0].ContourSequence
    assert {c.ContourImageSequence[0].ReferencedSOPInstanceUID for c in contours} <= images
    # the profile empties the names of regions
    assert made["RTSTRUCT"].StructureSetROISequence[0].ROIName == ""
    masks = []
    for folder in ("in", "out"):
        seg = next(path for path in files(tmp_path / folder) if dcmread(path).Modality == "SEG")
        medseg.convert(seg, tmp_path / f"{folder}.nii.gz")
        masks.append(np.asanyarray(nib.load(tmp_path / f"{folder}.nii.gz").dataobj))
    np.testing.assert_array_equal(*masks)


# ---- what is refused, and what it costs


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"BurnedInAnnotation": "YES"}, "BurnedInAnnotation YES"),
        ({"ConversionType": "WSD"}, "a film or a screen"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "picture of a screen"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"}, "often shows names"),
    ],
)
def test_names_in_pixels(tmp_path: Path, elements: dict[str, object], words: str) -> None:
    source = series(tmp_path / "in", only(2, **elements))
    assert words in refused(source, tmp_path / "out")
    assert done(source, tmp_path / "all", allow_burned_in=True).files == PLANES


def test_bytes_behind_pixels_that_are_floats(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if k == 2:
            del ds.PixelData, ds.BitsStored, ds.HighBit
            put(ds, BitsAllocated=32, FloatPixelData=VOXELS[k].astype("<f4").tobytes() + b"\0Li Bo 1962-05-0")

    assert "bytes behind its pixels" in refused(series(tmp_path / "in", edit), tmp_path / "out")


def test_a_table_of_frames_that_are_not_there(tmp_path: Path) -> None:
    source = series(tmp_path / "in", lambda k, ds: ds.add_new(0x7FE00001, "OV", b"Li Bo 62") if k == 2 else None)
    assert "table of compressed frames" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("empty", [False, True])
def test_an_overlay_inside_of_the_pixels(tmp_path: Path, empty: bool) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if k == 2:
            ds.add_new((0x6000, 0x0102), "US", 12)
        if k == 2 and empty:
            ds.add_new((0x6000, 0x3000), "OW", b"")

    assert "overlay" in refused(series(tmp_path / "in", edit), tmp_path / "out")


@pytest.mark.parametrize(
    ("patient", "text"),
    [
        ({"PatientName": "Müller^Jürgen"}, "for MUELLER"),
        ({"PatientName": "Müller^Jürgen"}, "for Muller"),
        ({"PatientName": "Mueller^X"}, "for Müller"),
        ({"PatientName": "Müller^Jürgen"}, "for Mu\u0308ller"),
        ({"PatientName": "Núñez^Zoé"}, "of ZOE"),
        ({"PatientName": "Li^Bo"}, "for LI BO"),
        ({"PatientName": "Li^Bo"}, "for Bo, Li"),
        ({"PatientID": "47-11/88"}, "no 471188"),
        ({"PatientID": "471188"}, "no 47.11.88"),
        ({"DeviceSerialNumber": "SN778899"}, "X SN778899"),
        ({"StationName": "CTROOM5"}, "in CTROOM5"),
    ],
)
def test_names_and_numbers_in_other_spellings(tmp_path: Path, patient: dict[str, str], text: str) -> None:
    source = series(tmp_path / "in", every(SpecificCharacterSet="ISO_IR 192", Manufacturer=text, **patient))
    assert done(source, tmp_path / "out").files == PLANES
    assert not any("Manufacturer" in made for made in read_all(tmp_path / "out"))


def test_a_class_that_nobody_has_registered_is_no_class(tmp_path: Path) -> None:
    def edit(_: int, ds: Dataset) -> None:
        item = Dataset()
        put(item, ReferencedSOPClassUID=phantom.STUDY, ReferencedSOPInstanceUID="1.2.3.5.1")
        ds.SourceImageSequence = Sequence([item])

    done(series(tmp_path / "in", edit), tmp_path / "out")
    for made in read_all(tmp_path / "out"):
        assert made.SourceImageSequence[0].ReferencedSOPClassUID == made.StudyInstanceUID


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Modality": "SR"}, "a report"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1", "Modality": "DOC"}, "a document"),
        ({"ContentSequence": [Dataset()]}, "a report inside"),
        ({"SOPInstanceUID": "Zanzibarius"}, "SOP instance UID"),
        ({"PixelData": VOXELS[2].tobytes() + b"\0Quentin"}, "bytes behind its pixels"),
    ],
)
def test_files_that_cannot_be_cleaned(tmp_path: Path, elements: dict[str, object], words: str) -> None:
    source = series(tmp_path / "in", only(2, **elements))
    assert words in refused(source, tmp_path / "out")


def test_small_sins_are_mended(tmp_path: Path) -> None:
    source = series(tmp_path / "in", only(1, PixelData=VOXELS[1].tobytes() + b"\0" * 64))
    for path in files(source):
        # the header of the file itself names another object, as after other tools
        path.write_bytes(path.read_bytes().replace(b"1.2.3.5.", b"1.2.3.6.", 1))
    result = done(source, tmp_path / "out")
    assert (result.files, result.refused) == (PLANES, ())
    assert all(ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID for ds in read_all(tmp_path / "out"))


def test_a_number_that_pixels_need_must_be_one(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if k == 2:
            del ds.PixelSpacing
            ds.add_new((0x0028, 0x0030), "LO", CANARY)

    assert "PixelSpacing" in refused(series(tmp_path / "in", edit), tmp_path / "out")


def test_broken_files_and_others_cost_nothing(tmp_path: Path) -> None:
    source = series(tmp_path / "in")
    whole = files(source)[1].read_bytes()
    (source / "cut").write_bytes(whole[:700])
    (source / "bomb").write_bytes(
        whole[: whole.index(b"\x08\0\x08\0CS")]
        + 5000 * (b"\x08\0\x40\x11SQ\0\0" + b"\xff" * 4 + b"\xfe\xff\0\xe0" + b"\xff" * 4)
    )
    (source / "copy").write_bytes(whole)
    (source / "notes.txt").write_text("hello")
    result = done(source, tmp_path / "out")
    assert (result.files, result.others, result.copies) == (PLANES, 1, 1)
    assert sorted(Path(r.file).name for r in result.refused) == ["bomb", "cut"]
    assert len(files(tmp_path / "out")) == PLANES


def test_damaged_files_raise_nothing_and_leave_no_name(tmp_path: Path) -> None:
    source = series(tmp_path / "in", _canaries)
    whole = next(data for data in (path.read_bytes() for path in files(source)) if b"1.2.3.5.1\0" in data[:600])
    pixels = len(VOXELS[0].tobytes())
    dice = random.Random(9)
    (tmp_path / "broken").mkdir()
    for n in range(250):
        broken = bytearray(whole.replace(b"1.2.3.5.1", f"1.2.3.{100 + n}".encode()))
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(132, len(broken) - pixels)] = dice.choice((0, 255, 0x20, dice.randrange(256)))
        (tmp_path / "broken" / f"{n}.dcm").write_bytes(broken)
    result = done(tmp_path / "broken", tmp_path / "out")
    assert result.files + result.copies + len(result.refused) == 250
    assert result.files > 10
    assert len(result.refused) > 50
    assert not any(SURNAME in each.reason or GIVEN in each.reason for each in result.refused)
    # a flipped byte may change the name where the others are looked for: the table must do
    assert all(CANARY.encode() not in path.read_bytes() for path in files(tmp_path / "out"))


def test_a_second_object_of_one_uid_is_refused(tmp_path: Path) -> None:
    source = series(tmp_path / "in", lambda k, ds: put(ds, SOPInstanceUID="1.2.3.5.1") if k < 2 else None)
    assert "the same SOP instance UID" in refused(source, tmp_path / "out")


def test_an_archive(tmp_path: Path) -> None:
    source = series(tmp_path / "in", every(PatientName=CANARY))
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in files(source):
            archive.write(path, f"{CANARY}/{path.name}")
        archive.writestr(f"{CANARY}/broken.dcm", b"\0" * 200)
    result = done(tmp_path / "in.zip", tmp_path / "out")
    assert result.files == PLANES
    assert [r.file for r in result.refused] == [f"{tmp_path / 'in.zip'} (member {PLANES + 1})"]


def test_paths_and_salts_are_checked_first(tmp_path: Path) -> None:
    source = series(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for output in (source, source / "out", tmp_path, tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(ConfigError):
            done(source, output)
    with pytest.raises(ConfigError, match="no such file"):
        done(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="salt of 3 bytes"):
        deidentify(source, tmp_path / "out", DeidentifyOptions(salt=b"abc"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM file"):
        done(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "0123" not in repr(DeidentifyOptions(salt=SALT))


def test_the_source_is_not_changed_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    source = series(tmp_path / "in", _canaries)
    before = shutil.copytree(source, tmp_path / "before")
    # pydicom quotes what it finds odd: here only that which the test wrote
    assert SURNAME in caplog.text
    caplog.clear()
    recwarn.clear()
    with caplog.at_level("DEBUG"):
        done(source, tmp_path / "out")
    assert SURNAME not in caplog.text
    assert not any(SURNAME in str(warning.message) for warning in recwarn)
    assert [p.read_bytes() for p in files(source)] == [p.read_bytes() for p in files(before)]


# ---- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = series(tmp_path / "in", only(0, BurnedInAnnotation="YES"))
    (tmp_path / "salt").write_bytes(SALT + b"\n")
    code = run(["deidentify", str(source), "-o", str(tmp_path / "out"), "--salt-file", str(tmp_path / "salt")])
    shown = capsys.readouterr()
    assert code == 1
    assert "4 files of 1 series and 1 patients" in " ".join(shown.out.split())
    assert "BurnedInAnnotation YES" in " ".join(shown.err.split())
    done(source, tmp_path / "same")
    assert [p.name for p in files(tmp_path / "out")] == [p.name for p in files(tmp_path / "same")]
    assert run(["deidentify", str(source), "-o", str(tmp_path / "x"), "--salt-file", str(tmp_path / "none")]) == 2
