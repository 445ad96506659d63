"""DICOM Segmentations as label maps: made by highdicom or by hand here, and real ones with their NRRD twins."""

from __future__ import annotations

import shutil
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_series import LPS_TO_RAS, OBLIQUE, SHAPE, classic, images_of, ras
from geometry import orientations, reorient
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import JPEG2000Lossless, RLELossless, generate_uid

from medseg.errors import DataError, GeometryError
from medseg.grid import Grid
from medseg.readers.segmentation import is_dicom_segmentation, read_segmentation
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.readers.series import source_images
from medseg.writers.dicom_seg import write_dicom_seg
from medseg.writers.dicom_source import labelled_series
from medseg.writers.provenance import Algorithm

GRID = Grid(SHAPE, ras(OBLIQUE))


def stacked(masks: np.ndarray) -> hd.Volume:
    """`masks`: (segment, column, row, plane)."""
    affine = OBLIQUE[:, [2, 1, 0, 3]]
    channels = {"SegmentNumber": list(range(1, len(masks) + 1))}
    return hd.Volume(masks.T, affine, "PATIENT", frame_of_reference_uid="1.2.3", channels=channels)


def by_highdicom(path: Path, masks: np.ndarray, kind: str = "BINARY", **options: object) -> Path:
    """A SEG that our writer has no hand in; `masks` (segment, column, row, plane) on the grid of the series."""
    source = classic()
    for header in source:
        header.FrameOfReferenceUID = "1.2.3"
        for keyword in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(header, keyword, "")
    described = [
        hd.seg.SegmentDescription(n, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
        for n, name in zip(range(1, len(masks) + 1), ("one", "two", "three"))
    ]
    made = hd.seg.Segmentation(
        source, stacked(masks), kind, described, generate_uid(), 1, generate_uid(), 1, "m", "n", "1", "2", **options
    )
    made.save_as(path)
    return path


def two_masks() -> np.ndarray:
    masks = np.zeros((2, *SHAPE), np.uint8)
    masks[0, 2:6, 3:5, 1:3] = 1
    masks[1, 6:8, 3:8, 2:5] = 1
    return masks


def as_map(masks: np.ndarray) -> np.ndarray:
    return sum(n * mask for n, mask in enumerate(masks.astype(int), 1))


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_label_map_of_another_program(tmp_path: Path, kind: str) -> None:
    path = by_highdicom(tmp_path / "seg.dcm", two_masks(), kind, omit_empty_frames=False)
    found = read_segmentation(path)
    np.testing.assert_array_equal(found.array, as_map(two_masks()))
    np.testing.assert_allclose(found.grid.affine, GRID.affine, atol=1e-6)
    assert found.names == {1: "one", 2: "two"}
    assert found.array.dtype == np.uint8


def test_compressed_label_map(tmp_path: Path) -> None:
    seg = pydicom.dcmread(by_highdicom(tmp_path / "plain.dcm", two_masks(), "LABELMAP"))
    # pydicom's own encoder: that of GDCM aborts the process where SimpleITK, which has a GDCM in it, is loaded too
    seg.compress(pydicom.uid.RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    seg.save_as(path := tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_segmentation(path).array, as_map(two_masks())[..., 1:5])


def test_deflated_files_are_refused_unread(tmp_path: Path) -> None:
    path = written(tmp_path / "seg.dcm")
    seg = pydicom.dcmread(path)
    seg.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    seg.save_as(path)
    assert is_dicom_segmentation(path)
    with pytest.raises(DataError, match=r"seg\.dcm: a deflated file"):
        read_segmentation(path)


def test_planes_that_are_not_stored_are_background(tmp_path: Path) -> None:
    masks = two_masks()
    masks[..., 2:4] = 0
    path = by_highdicom(tmp_path / "seg.dcm", masks)
    assert pydicom.dcmread(path).NumberOfFrames == 2
    # from the first to the last plane stored: 1 and 4
    np.testing.assert_array_equal(read_segmentation(path).array, as_map(masks)[..., 1:5])


def test_missing_planes_come_back_on_the_grid_of_the_series(tmp_path: Path) -> None:
    path = by_highdicom(tmp_path / "seg.dcm", two_masks())
    for order, flipped in orientations():
        want, affine = reorient(as_map(two_masks()), GRID.affine, order, flipped)
        like = Grid(want.shape, affine)
        found = read_segmentation(path, like=like)
        np.testing.assert_array_equal(found.array, want)
        assert found.grid is like


def test_a_grid_that_cuts_labels_or_voxels_is_refused(tmp_path: Path) -> None:
    path = by_highdicom(tmp_path / "seg.dcm", two_masks())
    with pytest.raises(GeometryError, match="outside"):
        read_segmentation(path, like=Grid((11, 9, 4), GRID.affine))
    half = GRID.affine.copy()
    half[:, 3] = GRID.affine @ [0.5, 0, 0, 1]
    with pytest.raises(GeometryError, match="whole voxels"):
        read_segmentation(path, like=Grid(SHAPE, half))


def test_overlap_is_refused_by_name_or_decided(tmp_path: Path) -> None:
    masks = two_masks()
    masks[1] |= masks[0]
    path = by_highdicom(tmp_path / "seg.dcm", masks, omit_empty_frames=False)
    with pytest.raises(DataError, match="`one` and `two`"):
        read_segmentation(path)
    np.testing.assert_array_equal(read_segmentation(path, overlap="last").array, masks[1] * 2)
    first = np.where(masks[0], 1, masks[1] * 2)
    np.testing.assert_array_equal(read_segmentation(path, overlap="first").array, first)


def test_fractions_need_a_threshold(tmp_path: Path) -> None:
    fractions = two_masks()[:1] * 0.6
    fractions[0, 0, 0, 0] = 0.4
    path = by_highdicom(tmp_path / "seg.dcm", fractions, "FRACTIONAL", omit_empty_frames=False)
    with pytest.raises(DataError, match="FRACTIONAL"):
        read_segmentation(path)
    np.testing.assert_array_equal(read_segmentation(path, threshold=0.5).array, two_masks()[0])
    assert read_segmentation(path, threshold=0.3).array[0, 0, 0] == 1


def written(path: Path) -> Path:
    array = np.zeros(SHAPE, np.uint16)
    array[2:5, 3:6, 2], array[7, 7, 4] = 7, 300
    segments = (SegmentInfo(7, "Tumör", "#CC79A7"), SegmentInfo(300, "肝", "#0072B2"))
    return write_dicom_seg(
        path, labelled_series(images_of(classic()), Segmentation(array, GRID, segments), algorithm=Algorithm())
    )


def test_what_we_write_comes_back_with_values_names_and_colours(tmp_path: Path) -> None:
    found = read_segmentation(written(tmp_path / "seg.dcm"))
    assert found.segments == (SegmentInfo(7, "Tumör", "#CC79A7"), SegmentInfo(300, "肝", "#0072B2"))
    assert (found.array[3, 4, 2], found.array[7, 7, 4], np.count_nonzero(found.array)) == (7, 300, 10)
    np.testing.assert_allclose(found.grid.affine, GRID.affine, atol=1e-6)
    assert found.grid.shape == SHAPE


def test_only_segmentations_are_segmentations(tmp_path: Path) -> None:
    seg, slice_, text = written(tmp_path / "seg.dcm"), tmp_path / "slice.dcm", tmp_path / "notes.txt"
    header = classic()[0]
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.save_as(slice_, enforce_file_format=True)
    text.write_text("no DICOM")
    assert [is_dicom_segmentation(path) for path in (seg, slice_, text, tmp_path / "none")] == [True] + 3 * [False]
    with pytest.raises(DataError, match=r"slice\.dcm.*expected a DICOM Segmentation"):
        read_segmentation(slice_)
    with pytest.raises(DataError, match=r"notes\.txt.*InvalidDicom"):
        read_segmentation(text)


def broken(path: Path, change: object) -> Path:
    seg = pydicom.dcmread(written(path))
    change(seg)
    seg.save_as(path)
    return path


def truncate(seg: Dataset) -> None:
    seg.PixelData = seg.PixelData[:10]


def move_a_frame(seg: Dataset) -> None:
    seg.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient = [1, 2, 3]


def spread_frames(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = "1e-9"
    for n, group in enumerate(seg.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, n * 1e-3 if n < 2 else 1e8]
    seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]


def name_no_segment(seg: Dataset) -> None:
    seg.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9


def leave_frames_out(seg: Dataset) -> None:
    seg.NumberOfFrames = 2


def claim_compression(seg: Dataset) -> None:
    seg.BitsAllocated = seg.BitsStored = 8
    seg.HighBit = 7
    empty = np.zeros((int(seg.NumberOfFrames), seg.Rows, seg.Columns), np.uint8)
    seg.compress(RLELossless, empty, encoding_plugin="pydicom", generate_instance_uid=False)
    # a stream that tells its own size, which a decoder would believe
    seg.file_meta.TransferSyntaxUID = JPEG2000Lossless


def say_a_name_for_a_number(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (leave_frames_out, "2 frames with . places found, expected as many of both"),
        (claim_compression, "JPEG 2000 .* found, expected uncompressed or RLE"),
        (say_a_name_for_a_number, "no ImageOrientationPatient of 6 numbers"),
        (truncate, "10 bytes of pixels"),
        (move_a_frame, "off planes"),
        (spread_frames, "at most"),
        (name_no_segment, "segment 9"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, change: object, message: str) -> None:
    path = broken(tmp_path / "seg.dcm", change)
    with pytest.raises(DataError, match=rf"seg\.dcm: .*{message}"):
        read_segmentation(path)


# ---- real ones


def twin(path: Path) -> tuple[np.ndarray, Grid]:
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, Grid(image.GetSize(), LPS_TO_RAS @ affine)


@pytest.mark.shared_data
@pytest.mark.parametrize("kind", ["noppv", "ppv5"])
def test_real_label_maps_agree_with_their_twins(shared_data: Path, kind: str) -> None:
    folder = shared_data / "dicom_torture/dicom_seg"
    want, grid = twin(folder / f"dcmqi_sparse_labelmap_{kind}_seg.nrrd")
    found = read_segmentation(folder / f"dcmqi_sparse-labelmap-{kind}.dcm", like=grid)
    # 5 is the padding value: no segment
    np.testing.assert_array_equal(found.array, np.where(want == 5, 0, want))
    assert found.names == {1: "Liver"}


@pytest.mark.shared_data
def test_real_overlapping_segments_agree_with_their_twins(shared_data: Path) -> None:
    folder = shared_data / "dicom_torture/dicom_seg"
    path = folder / "dcmqi_partial_overlaps.dcm"
    with pytest.raises(DataError, match="`GREEN` and `ORANGE`"):
        read_segmentation(path)
    maps = [twin(folder / f"dcmqi_partial_overlaps-{n}.nrrd") for n in (1, 2, 3)]
    masks = {value: array == value for array, _ in maps for value in np.unique(array) if value}
    first, last = (read_segmentation(path, like=maps[0][1], overlap=o).array for o in ("first", "last"))
    want = np.zeros(first.shape, int)
    for value in sorted(masks):
        want[masks[value]] = value
    np.testing.assert_array_equal(last, want)
    for value in sorted(masks, reverse=True):
        want[masks[value]] = value
    np.testing.assert_array_equal(first, want)


@pytest.mark.shared_data
def test_real_series_round_trip(tmp_path: Path, shared_data: Path) -> None:
    torture = shared_data / "dicom_torture"
    # by another program: dcm2niix
    image, grid = twin(torture / "ref_dcm2niix/mr_hippocrop_study1.nii.gz")
    labels = (image > np.percentile(image, 70)).astype(np.uint8) + (image > np.percentile(image, 95))
    segments = (SegmentInfo(1, "Anterior"), SegmentInfo(2, "Posterior"))
    images, path = source_images(torture / "series/mr_hippocrop_study1"), tmp_path / "seg.dcm"
    write_dicom_seg(path, labelled_series(images, Segmentation(labels, grid, segments), algorithm=Algorithm()))
    alone, on_it = read_segmentation(path), read_segmentation(path, like=grid)
    assert sorted(alone.grid.shape) == sorted(grid.shape)
    np.testing.assert_array_equal(on_it.array, labels)


@pytest.mark.shared_data
def test_real_files_of_highdicom(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "seg.dcm"
    shutil.copy(shared_data / "dicom_torture/dicom_seg/highdicom_seg_image_ct_binary.dcm", path)
    volume = hd.seg.segread(path).get_volume(combine_segments=True)
    found = read_segmentation(path)
    affine = LPS_TO_RAS @ volume.affine[:, [2, 1, 0, 3]]
    like = Grid(volume.spatial_shape[::-1], affine)
    np.testing.assert_array_equal(read_segmentation(path, like=like).array, volume.array.T)
    assert found.segments == (SegmentInfo(1, "first segment", ""),)
