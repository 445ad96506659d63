"""DICOM series: the right volume from files of known geometry, or a refusal that says why; never a wrong one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import phantom
import pytest
from phantom import (
    AXES,
    BETWEEN_COLUMNS,
    COLUMNS,
    ORIGIN,
    PLANES,
    ROWS,
    STEP,
    VOXELS,
    every,
    only,
    put,
    put_pixels,
    series,
)
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.encaps import encapsulate, generate_frames
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medseg.errors import DataError, GeometryError
from medseg.readers import Image, SeriesOptions, read_geometry, read_image
from medseg.readers.dicom_files import DicomFile
from medseg.readers.dicom_frames import Frame
from medseg.readers.dicom_pixels import _rescaled
from medseg.readers.series import choose_series, find_series, read_series, source_images

TILT, GAPS = SeriesOptions(resample_tilt=True), SeriesOptions(resample_gaps=True)


def read(source: Path, options: SeriesOptions | None = None) -> Image:
    return read_series(choose_series(source, options))


def refusal(source: Path, options: SeriesOptions | None = None) -> str:
    """What is said of a series that is refused; no patient's data may be in it."""
    with pytest.raises(DataError) as caught:
        read(source, options)
    told = str(caught.value)
    assert not any(word in told for word in ("Canary", "Tweety", "SECRET"))
    return told


# ---- the right volume


def test_a_shuffled_oblique_series_is_its_voxels_in_space(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    (folder / "notes.txt").write_text("no DICOM")
    (folder / ".IM99").write_bytes(b"hidden")
    image = read(folder)
    assert image.array.shape == (1, COLUMNS, ROWS, PLANES)
    assert image.array.dtype == np.int16
    np.testing.assert_array_equal(image.array[0], VOXELS.T)
    np.testing.assert_allclose(image.grid.affine, phantom.ras_affine(), atol=1e-9)
    assert image.geometry.warnings == ()
    found = find_series(folder)
    assert (found.others, found.objects, len(found.series)) == (1, {}, 1)


def test_the_door_for_all_formats_reads_a_folder_and_its_header(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    np.testing.assert_array_equal(read_image(folder).array[0], VOXELS.T)
    np.testing.assert_allclose(read_geometry(folder).grid.affine, phantom.ras_affine(), atol=1e-9)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_transfer_syntaxes_give_the_same_volume(tmp_path: Path, syntax: str) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if syntax == ImplicitVRLittleEndian:
            ds.file_meta.TransferSyntaxUID = syntax
        else:
            ds.compress(syntax, generate_instance_uid=False)

    np.testing.assert_array_equal(read(series(tmp_path / "ct", edit)).array[0], VOXELS.T)


def test_big_endian_gives_the_same_volume(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.set_original_encoding(False, False)
        ds.PixelData = VOXELS[k].astype(">i2").tobytes()
        ds["PixelData"].VR = "OW"

    np.testing.assert_array_equal(read(series(tmp_path / "ct", edit)).array[0], VOXELS.T)


CODERS = {JPEG2000Lossless: phantom.jpeg2000, JPEGLosslessSV1: phantom.jpeg_lossless}


def coded(folder: Path, syntax: str) -> Path:
    """The series, 1000 higher in the files, compressed by one of `CODERS`."""

    def edit(k: int, ds: Dataset) -> None:
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([CODERS[syntax]((VOXELS[k] + 1000).astype(np.uint16))])
        ds.RescaleIntercept = -1000

    return series(folder, edit, voxels=(VOXELS + 1000).astype(np.uint16))


@pytest.mark.parametrize("syntax", CODERS)
def test_jpeg_2000_and_jpeg_lossless_give_the_same_volume(tmp_path: Path, syntax: str) -> None:
    np.testing.assert_array_equal(read(coded(tmp_path / "ct", syntax)).array[0], VOXELS.T)


def test_each_plane_is_rescaled_with_its_own_numbers(tmp_path: Path) -> None:
    slopes = [0.5, 1.0, 2.25, 1.5, 3.0]
    folder = series(tmp_path / "pt", lambda k, ds: put(ds, RescaleSlope=slopes[k], RescaleIntercept=k), modality="PT")
    image = read(folder)
    assert image.array.dtype == np.float32
    wanted = VOXELS * np.array(slopes)[:, None, None] + np.arange(PLANES)[:, None, None]
    np.testing.assert_allclose(image.array[0], wanted.T, rtol=1e-6)


@pytest.mark.parametrize(
    ("voxels", "bits", "intercept", "dtype"),
    [
        (np.array([0, 4095], np.uint16), 12, -1024, np.int16),
        # stored with 16 bits, as most CT: what is there decides
        (np.array([0, 4095], np.uint16), 16, -1024, np.int16),
        (np.array([0, 65535], np.uint16), 16, -1024, np.int32),
        (np.array([0, 65535], np.uint16), 16, 0, np.uint16),
        (np.array([0, 200], np.uint8), 8, 0, np.uint8),
        # the sign is not extended into the bits that are not used
        (np.array([0x0FFF, 0x07FF], np.int16), 12, 0, np.int16),
    ],
)
def test_integers_stay_integers(tmp_path: Path, voxels: np.ndarray, bits: int, intercept: int, dtype: np.dtype) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put_pixels(ds, np.resize(voxels, (2, 3)), bits)
        ds.RescaleIntercept = intercept

    image = read(series(tmp_path / "ct", edit))
    wanted = [-1, 2047] if dtype == np.int16 and voxels.dtype == np.int16 else voxels.astype(int) + intercept
    assert image.array.dtype == dtype
    assert image.array[0, :2, 0, 0].tolist() == list(wanted)


@pytest.mark.parametrize(("modality", "first"), [("MR", 8), ("CT", 12)])
def test_planes_of_more_bits_than_the_first_file_do_not_wrap(tmp_path: Path, modality: str, first: int) -> None:
    # 40000 is more than int16 holds, 300 more than uint8
    voxels = np.array([[[7, 9]], [[300, 40000]]], np.uint16)

    def edit(k: int, ds: Dataset) -> None:
        put_pixels(ds, voxels[k], (first, 16)[k])
        if modality == "CT":
            ds.RescaleIntercept = -1000

    image = read(series(tmp_path / "mixed", edit, voxels=voxels, modality=modality))
    wanted = [[7, 300], [9, 40000]] if modality == "MR" else [[-993, -700], [-991, 39000]]
    assert image.array[0, :, 0].tolist() == wanted


def test_values_beyond_the_type_of_the_array_are_refused() -> None:
    def frame(at: int) -> Frame:
        return Frame(0, at, np.zeros(3), np.eye(3)[:2], (1.0, 1.0), (0, 255))

    with pytest.raises(DataError, match="values of 0 to 256 found"):
        _rescaled(DicomFile(Path("a")), np.array([[0, 256]], np.uint16), frame(0), np.dtype(np.uint8))


def with_text(folder: Path, name: str, text: str) -> Path:
    """The MR series with `text` as the decimal string of an element of plane 3."""

    def edit(k: int, ds: Dataset) -> None:
        put(ds, RescaleSlope=2, RescaleIntercept=0)
        if k == 3:
            ds[name] = RawDataElement(Tag(name), "DS", len(text), text.encode(), 0, False, True)

    return series(folder, edit, modality="MR")


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("text", ["nan ", "inf ", "1\\2 ", "Canary", "1,5 "])
def test_a_rescaling_that_is_no_number_is_refused(tmp_path: Path, name: str, text: str) -> None:
    told = refusal(with_text(tmp_path / "mr", name, text))
    assert f"{name} that is not one finite number found" in told
    assert text.strip() not in told.rpartition("mr/IM")[2]


def test_a_frame_s_own_rescaling_is_not_replaced_by_that_of_all(tmp_path: Path) -> None:
    path = phantom.enhanced(tmp_path / "mr.dcm")
    ds = dcmread(path)
    ds.RescaleSlope = 3
    own = ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence[0]
    own["RescaleSlope"] = RawDataElement(Tag("RescaleSlope"), "DS", 4, b"1\\2 ", 0, False, True)
    ds.save_as(path)
    assert "RescaleSlope that is not one finite number found" in refusal(path)


def test_an_enhanced_file_is_put_in_order_with_the_slope_of_each_frame(tmp_path: Path) -> None:
    image = read(phantom.enhanced(tmp_path / "mr.dcm", slopes=[1, 2, 3, 4, 0.5]))
    np.testing.assert_allclose(image.array[0], (VOXELS * np.array([1, 2, 3, 4, 0.5])[:, None, None]).T)
    np.testing.assert_allclose(image.grid.affine, phantom.ras_affine(), atol=1e-9)


def test_monochrome1_of_ct_is_not_inverted_and_said(tmp_path: Path) -> None:
    image = read(series(tmp_path / "ct", every(PhotometricInterpretation="MONOCHROME1")))
    np.testing.assert_array_equal(image.array[0], VOXELS.T)
    assert "kept as they are" in image.geometry.warnings[0]


def test_monochrome1_of_a_presentation_is_inverted_and_said(tmp_path: Path) -> None:
    voxels = (VOXELS % 1024).astype(np.uint16)

    def edit(k: int, ds: Dataset) -> None:
        put_pixels(ds, voxels[k], 10)
        ds.PhotometricInterpretation = "MONOCHROME1"

    image = read(series(tmp_path / "us", edit, modality="US"))
    np.testing.assert_array_equal(image.array[0], 1023 - voxels.T.astype(int))
    assert "inverted" in image.geometry.warnings[0]


def test_monochrome1_of_several_depths_is_refused(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put_pixels(ds, np.full((ROWS, COLUMNS), k, np.uint16), 12 if k == 3 else 10)
        ds.PhotometricInterpretation = "MONOCHROME1"

    assert "MONOCHROME1 with BitsStored 10 and 12 found" in refusal(series(tmp_path / "us", edit, modality="US"))
    assert read(series(tmp_path / "mr", edit, modality="MR")).array[0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_single_plane_takes_its_thickness_and_says_so(tmp_path: Path) -> None:
    image = read(series(tmp_path / "ct", voxels=VOXELS[:1]))
    assert image.grid.spacing_mm == pytest.approx((0.75, 1.5, 4.0))
    assert "SliceThickness" in image.geometry.warnings[0]
    assert "a single plane" in refusal(series(tmp_path / "bare", every(SliceThickness=None), voxels=VOXELS[:1]))


def test_positions_rounded_to_tenths_are_one_volume(tmp_path: Path) -> None:
    at = [round(0.625 * k, 1) for k in range(PLANES)]
    image = read(series(tmp_path / "ct", at=at))
    # nothing is off by more than half of what rounding took
    assert image.grid.spacing_mm[2] * (PLANES - 1) == pytest.approx(at[-1])


def test_orientations_that_differ_by_rounding_are_their_mean(tmp_path: Path) -> None:
    written = [*AXES[:, 0].tolist(), *AXES[:, 1].tolist()]

    def edit(k: int, ds: Dataset) -> None:
        # 4e-4 to both sides of the first and the last cosine, none on the average
        off = (4e-4, -4e-4, 0, 4e-4, -4e-4)[k]
        ds.ImageOrientationPatient = [written[0] + off, *written[1:5], written[5] - off]

    affine = read(series(tmp_path / "mr", edit, modality="MR")).grid.affine
    np.testing.assert_allclose(affine, phantom.ras_affine(), atol=1e-6)


@pytest.mark.parametrize(("off", "fine"), [(1e-3, True), (2e-3, False)])
def test_cosines_may_differ_by_a_thousandth(tmp_path: Path, off: float, fine: bool) -> None:
    cosines = [[1, 0, 0, 0, 1, 0], [1, off, 0, 0, 1, 0]]

    def edit(k: int, ds: Dataset) -> None:
        put(ds, ImageOrientationPatient=cosines[k == 2], ImagePositionPatient=[0, 0, 2 * k])

    folder = series(tmp_path / "mr", edit, modality="MR")
    if fine:
        directions = read(folder).grid.affine[:3, :3] / (BETWEEN_COLUMNS, phantom.BETWEEN_ROWS, 2)
        np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)
    else:
        assert "2 orientations found" in refusal(folder)


SIXTY = np.zeros((60, ROWS, COLUMNS), np.int16)


def test_cosines_of_three_digits_make_no_tilt(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = np.round(ds.ImageOrientationPatient, 3).tolist()
        put(ds, PixelSpacing=[0.5, 0.5], ImagePositionPatient=(ORIGIN + 3 * k * AXES[:, 2]).tolist())

    affine = read(series(tmp_path / "mr", edit, voxels=SIXTY, modality="MR")).grid.affine
    # the planes are where their positions are, and perpendicular
    last = (ORIGIN + 177 * AXES[:, 2]) * (-1, -1, 1)
    np.testing.assert_allclose(affine[:3] @ [0, 0, 59, 1], last, atol=1e-4)
    np.testing.assert_allclose(affine[:3, 0] @ affine[:3, 2], 0, atol=1e-9)
    np.testing.assert_allclose(affine[:3, :2] / 0.5, AXES[:, :2] * [[-1], [-1], [1]], atol=1e-3)


def test_a_tilt_of_one_degree_is_no_rounding(tmp_path: Path) -> None:
    aslant = np.cos(np.deg2rad(1)) * AXES[:, 2] + np.sin(np.deg2rad(1)) * AXES[:, 1]

    def edit(k: int, ds: Dataset) -> None:
        ds.ImagePositionPatient = (ORIGIN + 3 * k * aslant).tolist()

    told = refusal(series(tmp_path / "ct", edit, voxels=SIXTY))
    assert "a gantry tilt of 1.0 degrees found" in told


# ---- blank UIDs, several series


def blank(k: int, ds: Dataset) -> None:
    put(ds, SeriesInstanceUID="", StudyInstanceUID="", SOPInstanceUID="", SOPClassUID="")


def test_blank_uids_are_one_series(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(series(tmp_path / "ct", blank)).array[0], VOXELS.T)


def test_of_several_series_one_is_chosen(tmp_path: Path) -> None:
    series(tmp_path / "a")
    series(
        tmp_path / "b",
        lambda k, ds: put(ds, SeriesInstanceUID="1.2.9", SOPInstanceUID=f"1.2.9.{k + 1}"),
        voxels=-VOXELS,
    )
    told = refusal(tmp_path)
    assert f"2 series found, expected one: {phantom.SERIES} (CT, 5 files); 1.2.9 (CT, 5 files)" in told
    assert "--series UID" in told
    np.testing.assert_array_equal(read(tmp_path, SeriesOptions("1.2.9")).array[0], -VOXELS.T)
    assert "no series 1.2.8 found" in refusal(tmp_path, SeriesOptions("1.2.8"))


def test_objects_beside_a_series_are_no_series(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    seg = phantom.plane(90, VOXELS[0])
    put(seg, Modality="SEG", SeriesInstanceUID="1.2.77")
    seg.save_as(folder / "seg.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(folder).array[0], VOXELS.T)
    assert find_series(folder).objects == {"SEG": 1}


NO_IMAGE_CLASSES = (
    *("1.3.12.2.1107.5.9.1", "1.3.46.670589.11.0.0.12.4", "1.2.840.10008.5.1.4.34.7"),
    *(f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("68.1", "90.1", "200.1")),
)


def headless(path: Path, name: str, series_uid: str = "1.2.77") -> Path:
    """A DICOM file of a class without any element of an image."""
    ds = phantom.plane(90, VOXELS[0], "MR")
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(name)
    put(ds, SeriesInstanceUID=series_uid, Rows=None, Columns=None, BitsAllocated=None, BitsStored=None, HighBit=None)
    put(ds, ImagePositionPatient=None, PixelData=None, PixelRepresentation=None)
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("name", NO_IMAGE_CLASSES)
def test_objects_of_any_class_block_no_series(tmp_path: Path, name: str) -> None:
    folder = series(tmp_path / "ct")
    headless(folder / "object", name)
    np.testing.assert_array_equal(read(folder).array[0], VOXELS.T)
    assert find_series(folder).objects == {"no image": 1}


@pytest.mark.parametrize("element", [{"BitsAllocated": 16}, {"ImagePositionPatient": [0, 0, 0]}, {"PixelData": b"00"}])
def test_an_unknown_class_with_something_of_an_image_is_a_cut_one(tmp_path: Path, element: dict[str, object]) -> None:
    folder = series(tmp_path / "ct")
    path = headless(folder / "object", NO_IMAGE_CLASSES[0])
    ds = dcmread(path)
    put(ds, **element)
    if "PixelData" in ds:
        ds["PixelData"].VR = "OW"
    ds.save_as(path)
    assert "an image without Rows and Columns found" in refusal(folder)


@pytest.mark.parametrize("name", [phantom.MR, "1.2.840.10008.5.1.4.1", "1.2.840.10008.5.1.4.1.1.12.2"])
def test_an_image_class_without_anything_else_is_a_cut_image(tmp_path: Path, name: str) -> None:
    folder = series(tmp_path / "ct")
    headless(folder / "object", name)
    assert "an image without Rows and Columns found" in refusal(folder)


def test_a_cut_image_of_another_series_does_not_block_the_one_asked_for(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    headless(folder / "object", phantom.MR, "1.2.77")
    np.testing.assert_array_equal(read(folder, SeriesOptions(phantom.SERIES)).array[0], VOXELS.T)
    # cut within the UID, it may be one of ours
    headless(folder / "object", phantom.MR, phantom.SERIES[:5])
    assert "an image without Rows and Columns found" in refusal(folder, SeriesOptions(phantom.SERIES))


# ---- what is no volume


def shifted(k: int, ds: Dataset, sideways_mm: float) -> None:
    ds.ImagePositionPatient = (ORIGIN + STEP * k * AXES[:, 2] + sideways_mm * AXES[:, 1]).tolist()


def rgb(k: int, ds: Dataset) -> None:
    put_pixels(ds, np.zeros((ROWS, 3 * COLUMNS), np.uint8))
    put(ds, Columns=COLUMNS, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)


def turned(k: int, ds: Dataset) -> None:
    if k == 2:
        ds.ImageOrientationPatient = [*AXES[:, 1].tolist(), *AXES[:, 2].tolist()]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (
            lambda k, ds: shifted(k, ds, 0.5 * k),
            "a gantry tilt of 11.3 degrees found (planes shifted by 2.00 mm over 10.00",
        ),
        # highdicom takes up to 2.5 degrees for none
        (lambda k, ds: shifted(k, ds, 0.08 * k), "a gantry tilt of 1.8 degrees"),
        (lambda k, ds: shifted(k, ds, 1.0 * (k == 3)), "planes moved sideways by up to 1.00 mm"),
        (turned, "2 orientations found (the first two 90.0 degrees apart)"),
        (only(2, PixelSpacing=[1.5, 0.76]), "pixel spacings 1.5 × 0.75 and 1.5 × 0.76 mm found, expected one"),
        (only(1, PatientID="SECRET-2"), "images of 2 patients found in one series (PatientID), expected one"),
        (only(1, StudyInstanceUID="1.2.99"), "images of 2 studies"),
        (only(1, FrameOfReferenceUID="1.2.99"), "images of 2 frames of reference"),
        (every(RescaleSlope=None), "CT without RescaleSlope and RescaleIntercept found"),
        (only(3, RescaleIntercept=None), "CT without RescaleSlope and RescaleIntercept found"),
        (every(RescaleSlope=None, Modality="OT"), "CT without RescaleSlope and RescaleIntercept found"),
        (
            every(RescaleSlope=None, Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128"),
            "PET without RescaleSlope",
        ),
        (
            lambda k, ds: put(ds, Modality="MR", SOPClassUID=phantom.MR, RescaleSlope=2 if k else ""),
            "RescaleSlope found in 4 of 5 planes, expected it in all or none",
        ),
        (only(3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "1 of 5 images are localizers"),
        (every(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "choose another series"),
        (every(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "a mosaic of 6 × 8 found"),
        (rgb, "RGB pixels with 3 values each found"),
        (every(ImagesInAcquisition=7), "5 of 7 images found (ImagesInAcquisition says 7), expected all"),
        (every(ImagePositionPatient=None), "no ImagePositionPatient found"),
        (only(0, ImagePositionPatient=["nan", 0, 0]), "no ImagePositionPatient found"),
        (every(PixelSpacing=[0, 1]), "PixelSpacing [0.0, 1.0] mm found, expected above 0"),
        (every(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "expected two perpendicular unit vectors"),
        (only(4, SOPInstanceUID="1.2.3.5.1"), "1 images are there twice"),
        (every(RescaleSlope=0), "RescaleSlope 0 found"),
        (only(2, BitsStored=None), "BitsStored 0 found, expected 1 to 16"),
        (only(2, HighBit=15, BitsStored=12), "bits stored up to bit 15 of 16"),
    ],
)
def test_what_is_no_regular_volume_is_refused(tmp_path: Path, edit: phantom.Edit, told: str) -> None:
    assert told in refusal(series(tmp_path / "ct", edit))


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (
            [0, 2.5, 7.5, 10, 12.5],
            "a gap of 5.00 mm found (2.50 to 7.50 mm from the first plane), expected 2.50 mm: 1 slice",
        ),
        ([0, 2.5, 5, 15, 17.5], "3 slices are missing"),
        (
            [0, 2.5, 5, 7.9, 10.4],
            "distances of 2.50 to 2.90 mm between planes found, expected equal ones (median 2.50 mm)",
        ),
        ([0, 2.5, 2.5, 5, 7.5], "2 images at one position found (2.50 mm from the first), expected one at each of 4"),
        ([0, 0.02, 2.5, 5, 7.5], "2 images at one position found"),
    ],
)
def test_uneven_positions_are_refused_in_mm(tmp_path: Path, at: list[float], told: str) -> None:
    assert told in refusal(series(tmp_path / "ct", at=at))


def test_time_points_are_counted(tmp_path: Path) -> None:
    series(tmp_path / "ct")
    series(tmp_path / "ct/later", lambda k, ds: put(ds, SOPInstanceUID=f"1.2.8.{k + 1}", AcquisitionNumber=2))
    assert "10 images at 5 positions found, 2 each: 2 volumes" in refusal(tmp_path / "ct")
    assert "10 images at 5 positions found" in refusal(phantom.enhanced(tmp_path / "mr.dcm", copies=2))
    # interpolation cannot make one of them
    assert "10 images at 5 positions found" in refusal(tmp_path / "ct", GAPS)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("EchoTime", (10, 80), "2 values of EchoTime (10, 80) found"),
        ("InversionTime", (100, 400), "2 values of InversionTime (100, 400)"),
        ("DiffusionBValue", (0.0, 1000.0), "2 values of DiffusionBValue (0, 1000)"),
        ("DiffusionBValue", ("", 1000.0), "2 values of DiffusionBValue (none, 1000)"),
        ("TemporalPositionIdentifier", (1, 2), "2 values of TemporalPositionIdentifier (1, 2)"),
        ("ContrastBolusAgent", ("", "Canary"), "2 values of ContrastBolusAgent found"),
        ("ConvolutionKernel", ("Canary", "Tweety"), "2 values of ConvolutionKernel found"),
    ],
)
def test_planes_of_interleaved_scans_are_no_volume(
    tmp_path: Path, name: str, values: tuple[object, object], told: str
) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if values[k % 2] != "":
            put(ds, **{name: values[k % 2]})

    folder = series(tmp_path / "mr", edit, modality="MR")
    assert told in refusal(folder)
    assert told in refusal(folder, GAPS)


def test_interleaved_packages_of_one_scan_are_a_volume(tmp_path: Path) -> None:
    # the last digit of the echo time is rounding
    folder = series(
        tmp_path / "mr", lambda k, ds: put(ds, AcquisitionNumber=k % 2, EchoTime=10 + k / 1000), modality="MR"
    )
    np.testing.assert_array_equal(read(folder).array[0], VOXELS.T)


def test_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        if k == 3:
            put_pixels(ds, np.zeros((ROWS, COLUMNS + 1), np.int16))

    assert "Columns 8 and 9 found, expected one value" in refusal(series(tmp_path / "ct", edit))


@pytest.mark.parametrize(
    "elements",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]},
        {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]},
        {"EchoNumbers": 2},
        {"NumberOfTemporalPositions": 3},
        {"TemporalPositionIdentifier": 2},
        {"DiffusionBValue": 1000.0},
    ],
)
def test_a_count_that_others_may_have_meant_is_only_noted(tmp_path: Path, elements: dict[str, object]) -> None:
    folder = series(tmp_path / "ct", every(ImagesInAcquisition=7, **elements))
    assert read(folder).geometry.warnings == ("the header counts 7 images in the acquisition, 5 are here",)


def test_a_count_of_several_acquisitions_says_nothing(tmp_path: Path) -> None:
    several = series(tmp_path / "two", lambda k, ds: put(ds, ImagesInAcquisition=7, AcquisitionNumber=k % 2))
    assert read(several).geometry.warnings == ()


def test_echoes_sorted_apart_as_we_advise_are_read(tmp_path: Path) -> None:
    # two echoes of five planes
    folder = series(tmp_path / "mr", every(ImagesInAcquisition=10), modality="MR")
    assert read(folder).geometry.warnings == ("the header counts 10 images in the acquisition, 5 are here",)


@pytest.mark.parametrize("name", ["ImagesInAcquisition", "NumberOfSeriesRelatedInstances", "NumberOfSlices"])
def test_a_missing_end_slice_is_told_by_the_count(tmp_path: Path, name: str) -> None:
    folder = series(tmp_path / "ct", every(**{name: PLANES + 1}))
    assert f"5 of 6 images found ({name} says 6), expected all" in refusal(folder)


# ---- damage and malice


def test_no_cut_of_a_file_gives_a_volume(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    # at the end of the stack: no gap would give it away
    path = folder / "IM03"
    whole = path.read_bytes()
    for size in range(1, len(whole), 29):
        path.write_bytes(whole[:size])
        if size > 132:
            assert refusal(folder)
            assert refusal(folder, SeriesOptions(phantom.SERIES))
        else:
            # what has no mark is no DICOM by content; by its neighbours or by name it is
            assert "IM03" in refusal(folder)
            path.rename(folder / "IM03.dcm")
            assert "without its mark" in refusal(folder)
            (folder / "IM03.dcm").rename(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "0 bytes"), (bytes(131), "nothing but zeros"), (bytes(5000), "nothing but zeros"), (b"II*\0", "4 bytes")],
)
@pytest.mark.parametrize("name", ["IM31", "1.2.840.31"])
def test_a_dead_file_beside_slices_is_refused(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    folder = series(tmp_path / "ct")
    # of the last plane
    (folder / "IM31").unlink()
    (folder / name).write_bytes(content)
    assert f"{name}: {told}" in refusal(folder)


def test_notes_beside_slices_and_what_is_dead_elsewhere_are_no_slices(tmp_path: Path) -> None:
    folder = series(tmp_path / "study/ct")
    (folder / "README").write_bytes("für später\n".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "LICENSE").write_text("x" * 200)
    (tmp_path / "study/done").touch()
    np.testing.assert_array_equal(read(tmp_path / "study").array[0], VOXELS.T)
    assert find_series(tmp_path / "study").others == 4


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, *CODERS])
def test_cut_codestreams_are_refused(tmp_path: Path, syntax: str) -> None:
    folder = tmp_path / "ct"
    if syntax in CODERS:
        coded(folder, syntax)
    else:
        series(folder, lambda k, ds: ds.compress(syntax, generate_instance_uid=False))
    ds = dcmread(folder / "IM10")
    frame = next(iter(generate_frames(ds.PixelData, number_of_frames=1)))
    for size in (len(frame) // 2, len(frame) * 3 // 4, len(frame) - 6):
        ds.PixelData = encapsulate([frame[:size]])
        ds.save_as(folder / "IM10")
        assert "IM10" in refusal(folder)


@pytest.mark.parametrize("syntax", CODERS)
def test_a_stream_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path, syntax: str) -> None:
    folder = coded(tmp_path / "ct", syntax)
    ds = dcmread(folder / "IM03")
    frame = bytearray(next(iter(generate_frames(ds.PixelData, number_of_frames=1))))
    if syntax == JPEG2000Lossless:
        frame[8:16] = (60000).to_bytes(4, "big") * 2
    else:
        at = frame.index(b"\xff\xc3") + 5
        frame[at : at + 4] = (60000).to_bytes(2, "big") * 2
    ds.PixelData = encapsulate([bytes(frame)])
    ds.save_as(folder / "IM03")
    assert "a compressed image of 60000 × 60000 found, expected 6 × 8" in refusal(folder)


def recoded(folder: Path, syntax: str, change: Callable[[bytes], bytes]) -> Path:
    """The series of `coded`, with the stream of one file changed."""
    coded(folder, syntax)
    ds = dcmread(folder / "IM03")
    ds.PixelData = encapsulate([change(next(iter(generate_frames(ds.PixelData, number_of_frames=1))))])
    ds.save_as(folder / "IM03")
    return folder


@pytest.mark.parametrize("syntax", CODERS)
def test_a_stream_that_does_not_begin_with_its_size_is_refused(tmp_path: Path, syntax: str) -> None:
    # the box of a JP2 file (ISO 15444-1 I.5.1), which hides the size from us but not from the decoder
    box = b"\0\0\0\x0cjP  \r\n\x87\n"
    folder = recoded(tmp_path / "ct", syntax, lambda stream: box + stream)
    assert "compressed pixels that do not begin with their size found" in refusal(folder)


@pytest.mark.parametrize("syntax", CODERS)
def test_a_stream_of_colour_is_refused_before_it_is_decoded(tmp_path: Path, syntax: str) -> None:
    def change(stream: bytes) -> bytes:
        # Csiz is the two bytes from 40, Nf the one behind marker, length, precision, rows and columns
        at = 41 if syntax == JPEG2000Lossless else stream.index(b"\xff\xc3") + 9
        return stream[:at] + b"\3" + stream[at + 1 :]

    assert "a compressed image with 3 values a pixel found" in refusal(recoded(tmp_path / "ct", syntax, change))


def test_a_huge_upright_volume_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    # 1.6e9 mm of 1.5: 1.07e9 rows
    far = series(tmp_path / "ct", lambda k, ds: shifted(k, ds, 4e8 * k))
    assert "5 planes of 1066666673 × 8 would be made by resampling" in refusal(far, TILT)
    farther = series(tmp_path / "more", lambda k, ds: shifted(k, ds, 1e30 * (k == 2)))
    assert refusal(farther, TILT)
    apart = series(tmp_path / "apart", at=[0, 1e-3, 2e-3, 3e-3, 1e7])
    assert refusal(apart, GAPS)


def test_a_huge_claim_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    assert "of 65535 × 65535 found" in refusal(series(tmp_path / "ct", every(Rows=65535, Columns=65535)))
    small = series(tmp_path / "small", every(Rows=8192, Columns=8192))
    assert "96 of 134217728 bytes of pixels found: cut off" in refusal(small)


def test_compressed_bytes_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.Rows = ds.Columns = 8192

    assert "claim to be 134217728" in refusal(series(tmp_path / "ct", edit))


def test_deflated_files_are_refused_unopened(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    ds = dcmread(folder / "IM03")
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    # a megabyte of this would be a gigabyte
    ds.PixelData = bytes(2**20)
    ds.save_as(folder / "IM03")
    assert "deflated as a whole, which is refused" in refusal(folder)


def test_a_transfer_syntax_that_nobody_decodes_is_named(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"
        ds.PixelData = encapsulate([b"\0" * 20])

    assert "transfer syntax 1.2.840.10008.1.2.4.201 found, expected one of" in refusal(series(tmp_path / "ct", edit))


def test_values_in_bits_that_are_not_used_are_refused(tmp_path: Path) -> None:
    def edit(k: int, ds: Dataset) -> None:
        put_pixels(ds, np.full((ROWS, COLUMNS), 0xF005, np.uint16), 12)

    assert "values above the 12 bits" in refusal(series(tmp_path / "ct", edit))


def test_endless_sequences_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    content = (folder / "IM03").read_bytes()
    # an undefined length opens a sequence in a sequence in a sequence …
    deep = b"\x08\x00\x05\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
    at = content.index(b"\x08\x00\x16\x00UI")
    (folder / "IM03").write_bytes(content[:at] + deep)
    assert "its header is damaged or cut off" in refusal(folder)


# ---- resampling, on request alone


def linear(points: np.ndarray) -> np.ndarray:
    """A field that linear interpolation keeps: of LPS mm (..., 3)."""
    return 1000 + points @ np.array([3.0, -2.0, 1.5])


def field_at(positions: list[np.ndarray]) -> np.ndarray:
    """The field on the pixels of planes at these positions (K, rows, columns) float64."""
    r, c = np.meshgrid(np.arange(ROWS), np.arange(COLUMNS), indexing="ij")
    inside = c[..., None] * BETWEEN_COLUMNS * AXES[:, 0] + r[..., None] * phantom.BETWEEN_ROWS * AXES[:, 1]
    return np.stack([linear(p + inside) for p in positions])


def fine(folder: Path, positions: list[np.ndarray]) -> Path:
    """A series of the field, in steps of 0.001."""
    field = np.rint(field_at(positions) * 16).astype(np.int16)

    def edit(k: int, ds: Dataset) -> None:
        put_pixels(ds, field[k])
        put(ds, RescaleSlope=0.0625, ImagePositionPatient=positions[k].tolist())

    return series(folder, edit, voxels=VOXELS[: len(positions)], modality="MR")


def off_the_field(image: Image, positions: list[np.ndarray]) -> float:
    """The largest difference from the field in space, where a plane at one of `positions` covers it."""
    index = np.stack(np.meshgrid(*[np.arange(s) for s in image.grid.shape], indexing="ij"), -1)
    lps = (index @ image.grid.affine[:3, :3].T + image.grid.affine[:3, 3]) * (-1, -1, 1)
    wrong = np.abs(image.array[0] - linear(lps))
    covered = np.zeros(wrong.shape, bool)
    for position in positions:
        column, row, above = np.moveaxis((lps - position) @ AXES, -1, 0) / [[[[BETWEEN_COLUMNS]]], [[[1.5]]], [[[1]]]]
        inside = (column > -1e-6) & (column < COLUMNS - 1 + 1e-6) & (row > -1e-6) & (row < ROWS - 1 + 1e-6)
        covered |= inside & (np.abs(above) < 1e-6)
    assert covered.sum() >= len(positions) * (ROWS - 1) * (COLUMNS - 1)
    return float(wrong[covered].max())


def test_a_tilt_is_shifted_away_in_space(tmp_path: Path) -> None:
    positions = [ORIGIN + STEP * k * AXES[:, 2] + 0.6 * k * AXES[:, 1] - 0.3 * k * AXES[:, 0] for k in range(PLANES)]
    folder = fine(tmp_path / "mr", positions)
    assert "say --resample-tilt" in refusal(folder)
    image = read(folder, TILT)
    # 2.4 mm of 1.5 and 1.2 mm of 0.75: two more rows, two more columns
    assert image.grid.shape == (COLUMNS + 2, ROWS + 2, PLANES)
    directions = image.grid.affine[:3, :3] / image.grid.spacing_mm
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    # the field is in steps of 1/16
    assert off_the_field(image, positions) < 0.04
    assert image.geometry.warnings == ("resampled: planes shifted by up to 2.68 mm, for a tilt of 15.0 degrees",)


@pytest.mark.parametrize("at", [[0, 2.5, 7.5, 10, 12.5], [0, 2.2, 5.3, 7.5, 10.1]])
def test_gaps_are_interpolated_in_space(tmp_path: Path, at: list[float]) -> None:
    folder = fine(tmp_path / "mr", [ORIGIN + a * AXES[:, 2] for a in at])
    assert "say --resample-gaps" in refusal(folder)
    image = read(folder, GAPS)
    between = np.arange(image.grid.shape[2]) * image.grid.spacing_mm[2]
    assert image.grid.spacing_mm[2] * (image.grid.shape[2] - 1) == pytest.approx(at[-1])
    assert off_the_field(image, [ORIGIN + a * AXES[:, 2] for a in between]) < 0.04
    assert "resampled: 5 planes" in image.geometry.warnings[0]


def test_planes_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    image = read(series(tmp_path / "ct", at=[0, 2.5, 7.5, 10, 12.5]), GAPS)
    assert image.array.shape == (1, COLUMNS, ROWS, 6)
    np.testing.assert_array_equal(image.array[0][:, :, [0, 1, 3, 4, 5]], VOXELS.T)
    between = np.rint((VOXELS[1].astype(float) + VOXELS[2]) / 2)
    np.testing.assert_array_equal(image.array[0][:, :, 2], between.T)


def test_a_tilt_with_gaps_needs_both_words(tmp_path: Path) -> None:
    positions = [ORIGIN + a * AXES[:, 2] + 0.2 * a * AXES[:, 1] for a in (0, 2.5, 7.5, 10, 12.5)]
    folder = fine(tmp_path / "mr", positions)
    assert "say --resample-gaps" in refusal(folder, TILT)
    assert "say --resample-tilt" in refusal(folder, GAPS)
    image = read(folder, SeriesOptions(resample_tilt=True, resample_gaps=True))
    assert len(image.geometry.warnings) == 2
    # between two shifted planes is what both cover
    assert off_the_field(image, [positions[n] for n in (0, 1, 2, 3, 4)]) < 0.04


def test_a_regular_series_is_not_touched_by_the_words(tmp_path: Path) -> None:
    image = read(series(tmp_path / "ct"), SeriesOptions(resample_tilt=True, resample_gaps=True))
    np.testing.assert_array_equal(image.array[0], VOXELS.T)
    assert image.geometry.warnings == ()


# ---- what is made from a series


def test_source_images_are_in_the_order_of_the_volume(tmp_path: Path) -> None:
    found = source_images(series(tmp_path / "ct"))
    assert [h.SOPInstanceUID for h in found.headers] == [f"1.2.3.5.{k + 1}" for k in range(PLANES)]
    assert found.frames == tuple((k, 0) for k in range(PLANES))
    assert found.headers[0].PatientName == "Canary^Tweety"
    assert "PixelData" not in found.headers[0]
    np.testing.assert_allclose(found.geometry.grid.affine, phantom.ras_affine(), atol=1e-9)
    many = source_images(phantom.enhanced(tmp_path / "mr.dcm"))
    assert len(many.headers) == 1
    assert many.frames == tuple((0, PLANES - 1 - k) for k in range(PLANES))


def test_source_images_say_whether_planes_are_those_of_the_files(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", at=[0, 2.5, 7.5, 10, 12.5])
    assert source_images(folder, GAPS).resampled
    assert not source_images(series(tmp_path / "whole"), GAPS).resampled


def test_a_digest_is_of_the_bytes_not_of_their_names(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    before = choose_series(folder).sha256()
    other = tmp_path / "other"
    other.mkdir()
    for n, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, other / f"{9 - n}.dcm")
    assert choose_series(other).sha256() == before
    series(tmp_path / "ct", only(0, InstanceNumber=77))
    assert choose_series(folder).sha256() != before


# ---- real ones


VOLUMES = (
    *("mr_sagittal_explicit", "mr_sagittal_implicit", "mr_jpeg2000", "mr_jpeg_lossless", "mr_rle", "ge_sagittal"),
    *("hyperfine_enhanced", "ct_j2k_empty_uids", "mr_two_slices", "mr_hippocrop_study1"),
)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", VOLUMES)
def test_real_series_are_what_dcm2niix_makes_of_them(shared_data: Path, name: str) -> None:
    root = shared_data / "dicom_torture"
    image = read(root / "series" / name)
    ours = nib.as_closest_canonical(nib.Nifti1Image(image.array[0].astype(np.float32), image.grid.affine))
    theirs = nib.as_closest_canonical(nib.load(root / "ref_dcm2niix" / f"{name}.nii.gz"))
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    np.testing.assert_array_equal(ours.get_fdata(), theirs.get_fdata())


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ct_gantry_tilt_14deg", "a gantry tilt of 14.0 degrees"),
        ("ct_missing_slice", "a gap of 10.00 mm found"),
        ("ct_small_and_multiframe_mixed", "2 series found"),
        ("ge_single_slice", "a single plane"),
        ("mr_mixed_orientations", "2 orientations found"),
        ("philips_enhanced_4d_dti", "32 images at 8 positions"),
        ("rgb_secondary_capture", "RGB"),
        ("siemens_mosaic_fmri", "a mosaic of 640 × 640"),
        ("siemens_xa10_enhanced_4d", "24 images at 6 positions"),
    ],
)
def test_real_series_that_are_no_volume_are_refused(shared_data: Path, name: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(shared_data / "dicom_torture" / "series" / name)


@pytest.mark.shared_data
def test_every_real_series_is_judged(shared_data: Path) -> None:
    names = {path.name for path in (shared_data / "dicom_torture" / "series").iterdir()}
    assert len(names) == len(VOLUMES) + 9


@pytest.mark.shared_data
def test_a_real_tilt_has_the_place_that_dcm2niix_gives_its_first_plane(shared_data: Path) -> None:
    image = read(shared_data / "dicom_torture/series/ct_gantry_tilt_14deg", TILT)
    assert image.grid.shape == (512, 521, 4)
    assert image.grid.spacing_mm == pytest.approx((0.41797, 0.41797, 4.85148), abs=1e-4)
    with pytest.raises(GeometryError):
        read(shared_data / "dicom_torture/series/ct_gantry_tilt_14deg")
