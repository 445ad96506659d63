"""What is told of one received DICOM file, and that hostile ones end in an error that shows nothing of a patient."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import phantom
import pytest
from phantom import COLUMNS, CT, ROWS, SERIES, STUDY, VOXELS, put
from pydicom import Dataset
from pydicom.dataelem import DataElement
from pydicom.dataset import FileDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian

from medseg import DataError, DicomFacts, dicom_facts
from medseg.readers import dicom_walk

EXPLICIT = "1.2.840.10008.1.2.1"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


def saved(path: Path, ds: Dataset) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def whole() -> FileDataset:
    ds = phantom.plane(0, VOXELS[0])
    put(ds, SeriesDescription="Thorax", StudyDescription="Staging", ProtocolName="p", BodyPartExamined="CHEST")
    put(ds, PatientBirthDate="19700101", PatientSex="F", AccessionNumber="A1", StudyDate="20240229", StudyTime="081500")
    put(ds, SeriesNumber=3, Manufacturer="Maker", ImagesInAcquisition=5)
    return ds


@pytest.fixture
def facts_of(tmp_path: Path) -> Callable[..., DicomFacts]:
    """The facts of a file with elements changed."""

    def call(**elements: object) -> DicomFacts:
        ds = whole()
        put(ds, **elements)
        return dicom_facts(saved(tmp_path / "f", ds))

    return call


# ---- what is told


def test_all_of_an_image(facts_of: Callable[..., DicomFacts]) -> None:
    assert facts_of() == DicomFacts(
        sop_class_uid=CT,
        sop_instance_uid="1.2.3.5.1",
        study_uid=STUDY,
        series_uid=SERIES,
        transfer_syntax_uid=EXPLICIT,
        modality="CT",
        body_part="CHEST",
        series_description="Thorax",
        study_description="Staging",
        protocol_name="p",
        patient_name="Canary^Tweety",
        patient_id="SECRET-4711",
        patient_birth_date="19700101",
        patient_sex="F",
        accession_number="A1",
        study_date="20240229",
        study_time="081500",
        series_number=3,
        instance_number=5,
        rows=ROWS,
        columns=COLUMNS,
        frames=1,
        slice_thickness_mm=4.0,
        manufacturer="Maker",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        images_in_acquisition=5,
        is_image=True,
    )


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_ways_to_write_it(tmp_path: Path, syntax: UID) -> None:
    ds = whole()
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = VOXELS[0].astype(">i2").tobytes()
        ds.set_original_encoding(False, False)
    facts = dicom_facts(saved(tmp_path / "f", ds))
    assert (facts.rows, facts.columns, facts.is_image) == (ROWS, COLUMNS, True)
    assert (facts.series_description, facts.slice_thickness_mm) == ("Thorax", 4.0)


def test_compressed_and_multi_frame(tmp_path: Path) -> None:
    facts = dicom_facts(phantom.enhanced(tmp_path / "f"))
    assert (facts.frames, facts.is_image, facts.instance_number) == (5, True, 5)


def test_what_is_missing_is_empty(facts_of: Callable[..., DicomFacts]) -> None:
    gone = dict.fromkeys(("PatientName", "SliceThickness", "InstanceNumber", "ImageType", "Modality"))
    facts = facts_of(**gone, SeriesDescription="  ")
    assert (facts.patient_name, facts.modality, facts.series_description, facts.image_type) == ("", "", "", ())
    assert (facts.slice_thickness_mm, facts.instance_number) == (None, None)


@pytest.mark.parametrize(
    ("keyword", "raw"), [("SliceThickness", b"nan "), ("SliceThickness", b"1,5 "), ("InstanceNumber", b"1_0 ")]
)
def test_numbers_that_are_none_are_none(tmp_path: Path, keyword: str, raw: bytes) -> None:
    ds = whole()
    delattr(ds, keyword)
    # as an LO, which pydicom does not look at
    ds.add_new((0x0008, 0x103E), "LO", "Thorax")
    path = saved(tmp_path / "f", ds)
    tag = {"SliceThickness": b"\x18\0\x50\0DS", "InstanceNumber": b"\x20\0\x13\0IS"}[keyword]
    data = path.read_bytes()
    at = data.index(b"\x20\0\x0d\0UI") if keyword == "SliceThickness" else data.index(b"\x20\0\x32\0DS")
    path.write_bytes(data[:at] + tag + struct.pack("<H", len(raw)) + raw + data[at:])
    facts = dicom_facts(path)
    assert (facts.slice_thickness_mm if keyword == "SliceThickness" else facts.instance_number) is None


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
    ],
)
def test_names_are_decoded_by_the_character_set(
    facts_of: Callable[..., DicomFacts], charset: str | list[str], name: str
) -> None:
    assert facts_of(SpecificCharacterSet=charset, PatientName=name).patient_name == name


def test_texts_are_one_short_line(facts_of: Callable[..., DicomFacts]) -> None:
    words = "a\tb\r\nc\x1b[31m\u202e\u200bd" + "x" * 100
    facts = facts_of(SpecificCharacterSet="ISO_IR 192", StudyDescription=words, PatientName="N" * 500)
    # an escape sequence is cut where the next alphabet would begin: what is left is printable
    assert facts.study_description.isprintable()
    assert len(facts.study_description) <= 64
    assert len(facts.patient_name) == 324


@pytest.mark.parametrize(
    "elements",
    [
        {"SOPClassUID": SEG, "Modality": "SEG"},
        {"SOPClassUID": SEG},
        {"Modality": "RTDOSE"},
        {"Rows": 0},
    ],
)
def test_what_is_no_image(tmp_path: Path, elements: dict[str, object]) -> None:
    ds = whole()
    put(ds, **elements)
    ds.file_meta.MediaStorageSOPClassUID = UID(str(ds.SOPClassUID))
    assert not dicom_facts(saved(tmp_path / "f", ds)).is_image


# ---- what is refused


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"SOPInstanceUID": "../../x"}, "no SOP instance UID"),
        ({"SOPInstanceUID": "1.02.3"}, "no SOP instance UID"),
        ({"SeriesInstanceUID": "Canary"}, "no series UID"),
        ({"SeriesInstanceUID": "1." * 40 + "1"}, "no series UID"),
        ({"SeriesInstanceUID": "1.2 3"}, "no series UID"),
        ({"StudyInstanceUID": None}, "no study UID"),
        ({"SOPClassUID": ""}, "no SOP class UID"),
        ({"NumberOfFrames": 2**31}, "voxels"),
        ({"PixelData": None}, "without pixels"),
    ],
)
def test_what_is_refused(facts_of: Callable[..., DicomFacts], elements: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words) as told:
        facts_of(**elements)
    assert "Canary" not in str(told.value)
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [(b"1.2.3.5.1", b"1.2.3.5.9", "SOP instance"), (CT.encode(), phantom.MR.encode(), "SOP class")],
)
def test_two_headers_that_disagree(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    path = saved(tmp_path / "f", whole())
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(DataError, match=f"two different {words}"):
        dicom_facts(path)


def test_deflated_and_no_transfer_syntax(tmp_path: Path) -> None:
    data = saved(tmp_path / "f", whole()).read_bytes()
    syntax = EXPLICIT.encode() + b"\0"
    for other, words in ((b"1.2.840.10008.1.2.1.99", "deflated"), (b"", "no transfer syntax"), (b"x", "no transfer")):
        raw = other + b"\0" * (len(other) % 2)
        old, new = struct.pack("<H", len(syntax)) + syntax, struct.pack("<H", len(raw)) + raw
        (tmp_path / "f").write_bytes(data.replace(old, new))
        with pytest.raises(DataError, match=words if other != b"x" else "no transfer syntax UID"):
            dicom_facts(tmp_path / "f")


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 200, b"\0" * 128 + b"DICM"])
def test_no_dicom_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(DataError, match="f: "):
        dicom_facts(tmp_path / "f")


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no file found"):
            dicom_facts(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # other readers would take these numbers for one, and see another object
        (b"\x08\0\x18\0UI", b"\x08\0\x18\0US", "no SOP instance UID"),
        # and this for a header that is written in another way, which hides all the rest
        (b"DICM\2\0\0\0UL", b"DICM\2\0\0\0U\0", "header of the file itself"),
    ],
)
def test_types_that_others_read_otherwise(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    path = saved(tmp_path / "f", whole())
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DataError, match=words):
        dicom_facts(path)


def test_an_element_twice(tmp_path: Path) -> None:
    path = saved(tmp_path / "f", whole())
    data = path.read_bytes()
    at = data.index(b"\x08\0\x20\0DA")
    path.write_bytes(data[:at] + b"\x08\0\x18\0UI\x08\0../../x\0" + data[at:])
    with pytest.raises(DataError, match=r"\(0008,0018\) found twice"):
        dicom_facts(path)


# ---- bombs


def meta(syntax: str = EXPLICIT) -> bytes:
    raw = syntax.encode() + b"\0" * (len(syntax) % 2)
    return b"\0" * 128 + b"DICM" + b"\2\0\x10\0UI" + struct.pack("<H", len(raw)) + raw


def undefined(vr: bytes) -> bytes:
    return b"\x08\0\x40\x11" + vr + b"\0\0" + b"\xff" * 4 + b"\xfe\xff\0\xe0" + b"\xff" * 4


def with_lengths(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        item = b"\xfe\xff\0\xe0" + struct.pack("<I", len(data)) + data
        data = b"\x08\0\x40\x11SQ\0\0" + struct.pack("<I", len(item)) + item
    return data


@pytest.mark.parametrize(
    "data",
    [
        meta() + 10_000 * undefined(b"SQ"),
        meta() + 10_000 * undefined(b"UN"),
        meta() + with_lengths(10_000),
        # implicit, by a tag of the dictionary, and by one that nobody knows
        meta("1.2.840.10008.1.2") + 10_000 * (b"\x08\0\x40\x11" + b"\xff" * 4 + b"\xfe\xff\0\xe0" + b"\xff" * 4),
        meta("1.2.840.10008.1.2") + 10_000 * (b"\x09\0\x40\x11" + b"\xff" * 4 + b"\xfe\xff\0\xe0" + b"\xff" * 4),
    ],
)
def test_sequences_without_end(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(DataError, match="more than 64 sequences"):
        dicom_facts(tmp_path / "f")


def test_sequences_as_deep_as_allowed(tmp_path: Path) -> None:
    ds = whole()
    inner = Dataset()
    for _ in range(63):
        outer = Dataset()
        outer.ReferencedImageSequence = Sequence([inner])
        inner = outer
    ds.ReferencedImageSequence = Sequence([inner])
    assert dicom_facts(saved(tmp_path / "f", ds)).is_image
    deeper = Dataset()
    deeper.ReferencedImageSequence = Sequence([inner])
    ds.ReferencedImageSequence = Sequence([deeper])
    with pytest.raises(DataError, match="more than 64 sequences"):
        dicom_facts(saved(tmp_path / "f", ds))


def test_a_header_without_end(tmp_path: Path) -> None:
    size = 65 * 2**20
    with (tmp_path / "f").open("wb") as file:
        file.write(meta() + b"\x09\0\x10\x10OB\0\0" + struct.pack("<I", size))
        # a hole: no disk is filled
        file.truncate(file.tell() + size)
    with pytest.raises(DataError, match="more than 64 MiB"):
        dicom_facts(tmp_path / "f")


def test_elements_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_walk, "MOST_ELEMENTS", 1000)
    (tmp_path / "f").write_bytes(meta() + 2000 * b"\x09\0\x10\x10LO\0\0")
    with pytest.raises(DataError, match="more than 1,000 elements"):
        dicom_facts(tmp_path / "f")


# ---- damage


def test_every_cut_is_refused(tmp_path: Path) -> None:
    data = saved(tmp_path / "f", whole()).read_bytes()
    for length in (*range(0, len(data), 3), len(data) - 1):
        (tmp_path / "f").write_bytes(data[:length])
        with pytest.raises(DataError, match="f: "):
            dicom_facts(tmp_path / "f")


def test_a_cut_in_compressed_pixels_is_refused(tmp_path: Path) -> None:
    ds = whole()
    ds.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.5")
    ds["PixelData"] = DataElement(0x7FE00010, "OB", b"\xfe\xff\0\xe0\0\0\0\0\xfe\xff\0\xe0\x08\0\0\0" + b"x" * 8)
    ds["PixelData"].is_undefined_length = True
    data = saved(tmp_path / "f", ds).read_bytes()
    assert dicom_facts(tmp_path / "f").is_image
    (tmp_path / "f").write_bytes(data[:-10])
    with pytest.raises(DataError, match="cut off"):
        dicom_facts(tmp_path / "f")


@pytest.mark.parametrize("syntax", [EXPLICIT, ImplicitVRLittleEndian])
def test_damaged_files_raise_nothing_else(tmp_path: Path, syntax: str) -> None:
    ds = whole()
    ds.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    ds.PatientName = "Yamada^Tarou=山田^太郎"
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.ReferencedImageSequence = Sequence([Dataset()])
    ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID = "1.2.3"
    data = saved(tmp_path / "f", ds).read_bytes()
    dice = random.Random(7)
    refused = 0
    for _ in range(600):
        broken = bytearray(data)
        for _ in range(dice.randint(1, 6)):
            broken[dice.randrange(128, len(broken))] = dice.choice((0, 255, 0xFE, 0x20, dice.randrange(256)))
        if dice.random() < 0.3:
            at = dice.randrange(132, len(broken))
            del broken[at : at + dice.randint(1, 40)]
        (tmp_path / "f").write_bytes(broken)
        try:
            dicom_facts(tmp_path / "f")
        except DataError:
            refused += 1
    # so that the test has not only looked at harmless flips
    assert refused > 100


def test_noise_raises_nothing_else(tmp_path: Path) -> None:
    dice = random.Random(8)
    for _ in range(300):
        head = meta(dice.choice((EXPLICIT, "1.2.840.10008.1.2", "1.2.840.10008.1.2.2")))
        (tmp_path / "f").write_bytes(head + dice.randbytes(dice.randint(0, 300)))
        with pytest.raises(DataError):
            dicom_facts(tmp_path / "f")
