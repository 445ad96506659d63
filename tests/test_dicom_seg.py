"""Label maps as DICOM Segmentations: judged by plain pydicom arithmetic and by highdicom, never by our own reader."""

from __future__ import annotations

import datetime
import itertools
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from dicom_series import CORONAL, LPS_TO_RAS, OBLIQUE, SHAPE, classic, enhanced, images_of, ras
from geometry import orientations, reorient
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.sr._concepts_dict import concepts
from pydicom.tag import Tag
from skimage.color import rgb2lab

from medseg.errors import DataError, GeometryError
from medseg.grid import Grid
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.readers.series import source_images
from medseg.writers.anatomy import CODES, anatomy_of
from medseg.writers.dicom_seg import write_dicom_seg
from medseg.writers.dicom_source import labelled_series
from medseg.writers.provenance import Algorithm

ALGORITHM = Algorithm("net", "1.2", "a" * 64, "b" * 64)
SEGMENTS = (SegmentInfo(1, "liver", "#CC79A7"), SegmentInfo(2, "kidney_left"), SegmentInfo(3, "Tumör 肝"))


def labelled(affine: np.ndarray = OBLIQUE) -> Segmentation:
    """A box, a part of two voxels that touches it, and a voxel in a corner; the last two planes are empty."""
    array = np.zeros(SHAPE, np.uint8)
    array[3:7, 2:7, 1:4] = 1
    array[7, 2:4, 2] = 2
    array[0, 8, 3] = 3
    return Segmentation(array, Grid(SHAPE, ras(affine)), SEGMENTS)


def write(path: Path, segmentation: Segmentation, source: list[Dataset], **options: object) -> Dataset:
    write_dicom_seg(path, labelled_series(images_of(source), segmentation, **{"algorithm": ALGORITHM, **options}))
    return pydicom.dcmread(path)


def centres(seg: Dataset) -> dict[int, np.ndarray]:
    """LPS mm of the centre of every segment, voxel by voxel from the functional groups (PS3.3 C.7.6.2.1.1)."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    along_row, along_column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(
        float
    )
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    points: dict[int, list[np.ndarray]] = {}
    for frame, group in zip(np.atleast_3d(seg.pixel_array), seg.PerFrameFunctionalGroupsSequence):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(frame):
            at = position + along_row * between_columns * column + along_column * between_rows * row
            points.setdefault(number, []).append(at)
    return {number: np.mean(found, axis=0) for number, found in points.items()}


def expected_centres(segmentation: Segmentation) -> dict[int, np.ndarray]:
    affine = LPS_TO_RAS @ segmentation.grid.affine
    return {
        s.value: affine[:3, :3] @ np.argwhere(segmentation.array == s.value).mean(axis=0) + affine[:3, 3]
        for s in segmentation.segments
    }


SOURCES = {
    "oblique": (OBLIQUE, classic(OBLIQUE)[::-1]),
    "coronal": (CORONAL, classic(CORONAL)),
    "enhanced": (OBLIQUE, [enhanced(OBLIQUE)]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_voxel_is_where_it_was(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    labels = labelled(affine)
    found = centres(write(tmp_path / "seg.dcm", labels, source))
    # decimal strings have 16 digits: far less than the half voxel that is asked for
    for number, centre in expected_centres(labels).items():
        np.testing.assert_allclose(found[number], centre, atol=1e-6)


@pytest.mark.parametrize("name", SOURCES)
def test_highdicom_reads_the_same_label_map_on_the_whole_grid(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    labels = labelled(affine)
    write(tmp_path / "seg.dcm", labels, source)
    volume = hd.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    assert volume.spatial_shape == SHAPE[::-1]
    back, grid = turned_like(volume, labels)
    np.testing.assert_array_equal(back, labels.array)
    np.testing.assert_allclose(grid, labels.grid.affine, atol=1e-6)


def turned_like(volume: hd.Volume, labels: Segmentation) -> tuple[np.ndarray, np.ndarray]:
    """The volume as (column, row, plane) along the label map's planes, and its affine to RAS mm."""
    affine = LPS_TO_RAS @ volume.affine
    array, affine = volume.array.T, affine[:, [2, 1, 0, 3]]
    if affine[:3, 2] @ labels.grid.affine[:3, 2] < 0:
        array, affine = reorient(array, affine, (0, 1, 2), (False, False, True))
    return array, affine


def test_labels_may_come_in_any_orientation(tmp_path: Path) -> None:
    labels = labelled()
    want = write(tmp_path / "seg.dcm", labels, classic())
    # all 48 are turned in test_grid.py; these have every order of axes and every flip among them
    for order, flipped in itertools.islice(orientations(), 3, None, 5):
        array, affine = reorient(labels.array, labels.grid.affine, order, flipped)
        other = write(tmp_path / "other.dcm", Segmentation(array, Grid(array.shape, affine), SEGMENTS), classic())
        assert other.PixelData == want.PixelData
        assert other.SOPInstanceUID == want.SOPInstanceUID


def test_empty_planes_are_left_out_but_for_the_ends(tmp_path: Path) -> None:
    seg = write(tmp_path / "seg.dcm", labelled(), classic())
    frames = np.asarray(seg.pixel_array)
    # three planes of the box, one each of the others, and the first and the last plane, both empty
    assert len(frames) == 7
    assert int((frames.sum(axis=(1, 2)) == 0).sum()) == 2
    assert frames.sum() == np.count_nonzero(labelled().array)


def test_a_case_without_any_label_keeps_its_segments_and_its_grid(tmp_path: Path) -> None:
    empty = Segmentation(np.zeros(SHAPE, np.uint8), labelled().grid, SEGMENTS)
    seg = write(tmp_path / "seg.dcm", empty, classic())
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "kidney_left", "Tumör 肝"]
    assert np.asarray(seg.pixel_array).shape == (2, 9, 11)
    assert not np.asarray(seg.pixel_array).any()


@pytest.mark.parametrize("source", [classic(), [enhanced()]])
def test_frames_refer_to_the_images_they_lie_on(tmp_path: Path, source: list[Dataset]) -> None:
    seg = write(tmp_path / "seg.dcm", labelled(), source)
    listed = {i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert listed == {str(header.SOPInstanceUID) for header in source}
    positions = {
        (str(header.SOPInstanceUID), n): frame_position(header, n)
        for header in source
        for n in range(1, int(header.get("NumberOfFrames", 1)) + 1)
    }
    for group in seg.PerFrameFunctionalGroupsSequence:
        image = group.DerivationImageSequence[0].SourceImageSequence[0]
        at = positions[image.ReferencedSOPInstanceUID, int(image.get("ReferencedFrameNumber", 1))]
        np.testing.assert_allclose(group.PlanePositionSequence[0].ImagePositionPatient, at, atol=1e-6)


def frame_position(header: Dataset, number: int) -> np.ndarray:
    if "PerFrameFunctionalGroupsSequence" in header:
        header = header.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0]
    return np.array(header.ImagePositionPatient, float)


def test_same_input_same_bytes_whatever_the_moment(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", labelled(), classic())
    write(tmp_path / "b.dcm", labelled(), classic()[::-1])
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    assert datetime.date.today().strftime("%Y%m%d").encode() not in (tmp_path / "a.dcm").read_bytes()


def test_identifiers_follow_from_source_revision_model_and_configuration(tmp_path: Path) -> None:
    other = labelled()
    other.array[5, 5, 5] = 1
    path = tmp_path / "seg.dcm"
    first = write(path, labelled(), classic())
    # a second computation on another machine may differ in a voxel, and is the same result all the same
    assert write(path, other, classic()).SOPInstanceUID == first.SOPInstanceUID
    changed = [
        write(path, labelled(), classic(series=2)),
        write(path, labelled(), classic(), revision=2),
        write(path, labelled(), classic(), algorithm=Algorithm("net", "1.2", "c" * 64, "b" * 64)),
        write(path, labelled(), classic(), algorithm=Algorithm("net", "1.2", "a" * 64, "c" * 64)),
    ]
    uids = [str(uid) for seg in [first, *changed] for uid in (seg.SOPInstanceUID, seg.SeriesInstanceUID)]
    assert len(set(uids)) == 10
    assert all(uid.startswith("2.25.") and pydicom.uid.UID(uid).is_valid for uid in uids)


def test_without_a_model_the_labels_tell_objects_apart(tmp_path: Path) -> None:
    other = labelled()
    other.array[5, 5, 5] = 1
    by_hand = Algorithm("hand", "1", kind="MANUAL")
    uids = [write(tmp_path / "a.dcm", s, classic(), algorithm=by_hand).SOPInstanceUID for s in (labelled(), other)]
    assert uids[0] != uids[1]


def test_segments_say_what_they_are_and_who_made_them(tmp_path: Path) -> None:
    liver, kidney, tumour = write(tmp_path / "seg.dcm", labelled(), classic()).SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue) == ("64033007", "7771000")
    assert tumour.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    made = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert (made.AlgorithmName, made.AlgorithmVersion) == ("net", "1.2")
    assert "a" * 64 in "".join(made.AlgorithmParameters)
    assert liver.SegmentAlgorithmType == "AUTOMATIC"


def test_colours_are_cielab_of_the_label_colours(tmp_path: Path) -> None:
    seg = write(tmp_path / "seg.dcm", labelled(), classic())
    lightness, a, b = rgb2lab(np.array([[[0xCC, 0x79, 0xA7]]]) / 255)[0, 0]
    # the scale of PS3.3 C.10.7.1.1
    want = [lightness / 100 * 65535, (a + 128) * 257, (b + 128) * 257]
    # a tenth of a unit of L*, a*, b*, of which an eye sees one: the white point of D65 has several roundings
    np.testing.assert_allclose(seg.SegmentSequence[0].RecommendedDisplayCIELabValue, want, atol=26)


def test_values_with_gaps_are_told_in_the_description(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, np.uint16)
    array[1, 2, 3], array[2, 2, 3] = 300, 7
    labels = Segmentation(array, labelled().grid, (SegmentInfo(300, "spleen"),))
    seg = write(tmp_path / "seg.dcm", labels, classic())
    assert [(s.SegmentNumber, s.SegmentLabel, s.SegmentDescription) for s in seg.SegmentSequence] == [
        (1, "label 7", "Label value 7"),
        (2, "spleen", "Label value 300"),
    ]


def test_117_labels(tmp_path: Path) -> None:
    array = (np.arange(np.prod(SHAPE)) % 118).reshape(SHAPE).astype(np.uint8)
    segments = tuple(SegmentInfo(n, f"label {n}") for n in range(1, 118))
    write(tmp_path / "seg.dcm", Segmentation(array, labelled().grid, segments), classic())
    volume = hd.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    np.testing.assert_array_equal(turned_like(volume, labelled())[0], array)


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_text_of_the_scanner_survives_in_another_alphabet(tmp_path: Path) -> None:
    source = classic()
    for header in source:
        header.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        header.PatientName = "Yamada^Tarou=山田^太郎"
        header.StudyDescription = "腹部"
        header.PatientSex, header.PatientBirthDate = "unknown", "1.1.1970"
        header.save_as(tmp_path / f"{header.InstanceNumber}", implicit_vr=False, little_endian=True)
    read = [pydicom.dcmread(tmp_path / f"{n}", force=True) for n in range(1, 7)]
    seg = write(tmp_path / "seg.dcm", labelled(), read)
    assert (str(seg.PatientName), seg.StudyDescription) == ("Yamada^Tarou=山田^太郎", "腹部")
    # what is no sex and no date is left empty
    assert (seg.PatientSex, seg.PatientBirthDate) == ("", "")


def test_headers_of_the_caller_stay_as_they_are(tmp_path: Path) -> None:
    images = images_of(classic())
    before = deepcopy(images.headers)
    write_dicom_seg(tmp_path / "seg.dcm", labelled_series(images, labelled(), algorithm=ALGORITHM))
    assert images.headers == before


def test_a_sequence_that_is_cut_off_costs_nothing_but_itself(tmp_path: Path) -> None:
    images = images_of(classic())
    for header in images.headers:
        # as a file gives it, understood when it is asked for: an item's tag without its length
        for keyword in ("ReferencedStudySequence", "ReferencedPatientSequence"):
            tag = Tag(keyword)
            header[tag] = RawDataElement(tag, "SQ", 4, b"\xfe\xff\x00\xe0", 0, False, True)
    with pytest.raises(OSError, match="No tag to read"):
        deepcopy(images.headers[0])[Tag("ReferencedStudySequence")]
    path = tmp_path / "seg.dcm"
    write_dicom_seg(path, labelled_series(images, labelled(), algorithm=ALGORITHM))
    seg = pydicom.dcmread(path)
    assert "ReferencedStudySequence" not in seg
    assert seg.PatientID == images.headers[0].PatientID
    assert centres(seg).keys() == {1, 2, 3}


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("value", ["", "1.2.x", None])
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_blank_and_broken_uids_are_refused(tmp_path: Path, keyword: str, value: str | None) -> None:
    source = classic()
    # one with several would be another series
    for header in source[:1] if keyword.startswith("SOP") else source:
        if value is None:
            delattr(header, keyword)
        else:
            header[keyword]._value = value
    with pytest.raises(DataError, match="UID"):
        write(tmp_path / "seg.dcm", labelled(), source)
    assert not any(tmp_path.iterdir())


def test_a_patient_s_number_is_in_no_message(tmp_path: Path) -> None:
    source = classic()
    source[2].PatientID = "CANARY"
    with pytest.raises(DataError, match="images of 2 patients") as raised:
        write(tmp_path / "seg.dcm", labelled(), source)
    assert "CANARY" not in str(raised.value)


def moved(change: np.ndarray) -> Grid:
    return Grid(SHAPE, ras(OBLIQUE) @ change)


TURNED = np.array([[0.999, -0.045, 0, 0], [0.045, 0.999, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
SHIFTED, STRETCHED = np.eye(4), np.diag([1.0, 1.02, 1, 1])
SHIFTED[0, 3] = 0.3


@pytest.mark.parametrize("change", [TURNED, SHIFTED, STRETCHED])
def test_labels_on_another_grid_are_refused(tmp_path: Path, change: np.ndarray) -> None:
    with pytest.raises(GeometryError, match="series"):
        write(tmp_path / "seg.dcm", Segmentation(labelled().array, moved(change), SEGMENTS), classic())


def test_labels_of_a_part_of_the_series_are_refused(tmp_path: Path) -> None:
    part = Segmentation(labelled().array[..., :5], Grid((11, 9, 5), ras(OBLIQUE)), SEGMENTS)
    with pytest.raises(GeometryError, match=r"\(11, 9, 6\)"):
        write(tmp_path / "seg.dcm", part, classic())


def test_a_header_rounded_to_float32_is_the_same_grid(tmp_path: Path) -> None:
    rounded = Grid(SHAPE, ras(OBLIQUE).astype(np.float32).astype(np.float64))
    seg = write(tmp_path / "seg.dcm", Segmentation(labelled().array, rounded, SEGMENTS), classic())
    assert seg.PixelData == write(tmp_path / "b.dcm", labelled(), classic()).PixelData


@pytest.mark.parametrize(
    ("value", "segments", "message"),
    [(70000, (), "65535"), (-1, SEGMENTS, "-1"), (1, (SegmentInfo(0, "x"),), "0"), (0, (), "no labels")],
)
def test_values_that_make_no_segments_are_refused(
    tmp_path: Path, value: int, segments: tuple[SegmentInfo, ...], message: str
) -> None:
    array = np.zeros(SHAPE, np.int32)
    array[1, 1, 1] = value
    with pytest.raises(DataError, match=message):
        write(tmp_path / "seg.dcm", Segmentation(array, labelled().grid, segments), classic())


def test_codes_are_those_of_the_standard() -> None:
    known = {(code, meaning.lower()) for terms in concepts["SCT"].values() for code, (meaning, _) in terms.items()}
    assert [meaning for meaning, code in CODES.items() if (code, meaning) not in known] == []


@pytest.mark.parametrize(
    ("name", "meaning", "side"),
    [
        ("kidney_left", "kidney", "left"),
        ("Right Kidney", "kidney", "right"),
        ("hippocampus L", "hippocampus", "left"),
        ("vertebrae_L1", "l1 vertebra", ""),
        ("lung_upper_lobe_left", "upper lobe of lung", "left"),
        ("lung_middle_lobe_right", "middle lobe of right lung", ""),
        ("heart_atrium_left", "left atrium", ""),
        ("kidneys", "kidney", ""),
        ("rib_left_11", "rib", "left"),
        ("liver_tumor", "neoplasm", ""),
        ("Anterior", "anatomical structure", ""),
        ("left and right lung", "anatomical structure", ""),
    ],
)
def test_names_tell_meaning_and_side(name: str, meaning: str, side: str) -> None:
    found = anatomy_of(name)
    assert (found.meaning, found.side) == (meaning, side)
    assert found.category in CODES


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy on the path; install dicom3tools")
@pytest.mark.parametrize("name", SOURCES)
def test_the_validator_finds_no_error(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    write(tmp_path / "seg.dcm", labelled(affine), source)
    done = subprocess.run(["dciodvfy", tmp_path / "seg.dcm"], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
    assert "Segmentation" in done.stderr


@pytest.mark.shared_data
def test_a_real_series_without_identifiers_is_refused(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "dicom_torture/series/ct_j2k_empty_uids"
    images = source_images(folder)
    labels = Segmentation(np.ones((512, 512, 20), np.uint8), Grid((512, 512, 20), np.eye(4)), ())
    with pytest.raises(DataError, match="blank SOP Instance UID"):
        labelled_series(images, labels, algorithm=ALGORITHM)


def test_corners_of_the_grid_are_marked_in_no_frame(tmp_path: Path) -> None:
    # the first voxel of every plane, in all combinations of labelled and empty planes
    for planes in itertools.product((0, 1), repeat=4):
        array = np.zeros((3, 3, 4), np.uint8)
        array[0, 0] = planes
        affine = OBLIQUE
        labels = Segmentation(array, Grid((3, 3, 4), ras(affine)), (SegmentInfo(1, "a"), SegmentInfo(2, "b")))
        seg = write(tmp_path / "seg.dcm", labels, classic(affine, (3, 3, 4)))
        assert np.asarray(seg.pixel_array).sum() == sum(planes)
