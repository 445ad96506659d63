"""Label maps as RT Structure Sets: rasterised back in the plane by matplotlib and by crossing counts of our own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_series import CORONAL, LPS_TO_RAS, OBLIQUE, SHAPE, classic, enhanced, images_of, ras
from geometry import oblique, orientations, reorient
from matplotlib.path import Path as Polygon
from pydicom import Dataset

from medseg.errors import DataError, GeometryError
from medseg.grid import Grid
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.writers.dicom_source import labelled_series
from medseg.writers.outlines import outlines
from medseg.writers.provenance import Algorithm
from medseg.writers.rtstruct import write_rtstruct

ALGORITHM = Algorithm("net", "1.2", "a" * 64, "b" * 64)
SEGMENTS = (SegmentInfo(1, "shell", "#CC79A7"), SegmentInfo(2, "two parts"), SegmentInfo(5, "Tumör 肝"))

# ---- outlines in pixels

RING = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]], bool)


def area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2)


def filled(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """How many polygons each pixel centre lies in, by matplotlib."""
    columns, rows = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]))
    points = np.stack([columns.ravel(), rows.ravel()], axis=1)
    inside = [Polygon(np.vstack([p, p[:1]]), closed=True).contains_points(points) for p in polygons]
    return np.sum(inside, axis=0, dtype=int).reshape(shape) if inside else np.zeros(shape, int)


def wound(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Winding number of each pixel centre: vertical edges to its left, upward ones against downward ones."""
    number = np.zeros(shape, int)
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0)):
            rows = slice(int(min(y0, y1) + 0.5), int(max(y0, y1) + 0.5))
            number[rows, int(x0 + 0.5) :] += int(np.sign(y0 - y1)) if x0 == x1 else 0
    return number


def test_one_pixel_is_a_square_around_its_centre() -> None:
    mask = np.zeros((4, 5), bool)
    mask[2, 3] = True
    (polygon,) = outlines(mask)
    assert {tuple(p) for p in polygon} == {(2.5, 1.5), (3.5, 1.5), (3.5, 2.5), (2.5, 2.5)}
    assert len(polygon) == 4


def test_straight_edges_have_corners_alone() -> None:
    assert [len(p) for p in outlines(np.ones((7, 9), bool))] == [4]


def test_no_pixels_no_polygon() -> None:
    assert outlines(np.zeros((3, 3), bool)) == []


def test_a_hole_is_reached_by_a_keyhole() -> None:
    (polygon,) = outlines(RING)
    # outer corners, inner corners, the way in and out; the hole's upper left corner is passed twice
    assert len(polygon) == 4 + 4 + 1 + 2
    points = [tuple(p) for p in polygon]
    assert points.count((0.5, 0.5)) == points.count((-0.5, 0.5)) == 2
    assert area(polygon) == 10
    np.testing.assert_array_equal(filled([polygon], RING.shape), RING)


def test_an_island_in_a_hole_is_a_polygon_of_its_own() -> None:
    mask = np.ones((7, 7), bool)
    mask[1:6, 1:6] = False
    mask[3, 3] = True
    assert sorted(area(p) for p in outlines(mask)) == [1, 24]


@pytest.mark.parametrize("mask", [np.eye(3, dtype=bool), ~np.eye(4, dtype=bool)])
def test_pixels_that_share_a_corner_alone_are_apart(mask: np.ndarray) -> None:
    # three squares; the background of the second runs through from corner to corner, so it is two triangles
    assert len(outlines(mask)) == {3: 3, 4: 2}[len(mask)]
    np.testing.assert_array_equal(filled(outlines(mask), mask.shape), mask)


def test_any_mask_comes_back_by_both_rules_of_filling() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = tuple(rng.integers(1, 14, 2))
        mask = rng.random(shape) < rng.random()
        polygons = outlines(mask)
        assert sum(map(area, polygons)) == mask.sum()
        np.testing.assert_array_equal(filled(polygons, shape), mask)
        np.testing.assert_array_equal(np.abs(wound(polygons, shape)), mask)


def test_no_step_of_a_polygon_is_oblique_or_empty() -> None:
    mask = np.random.default_rng(1).random((40, 40)) < 0.6
    for polygon in outlines(mask):
        steps = np.abs(np.roll(polygon, -1, axis=0) - polygon)
        assert (steps.min(axis=1) == 0).all()
        assert (steps.max(axis=1) > 0).all()


# ---- structure sets


def labelled(affine: np.ndarray = OBLIQUE, shape: tuple[int, int, int] = SHAPE) -> Segmentation:
    """A shell with a hole and an island in it, two parts, and a voxel in the last corner."""
    array = np.zeros(shape, np.uint8)
    array[1:8, 1:8, 1:4] = 1
    array[3:6, 3:6, 2] = 0
    array[4, 4, 2] = 1
    array[8:10, 0:3, 2:5] = 2
    array[8:10, 5, 1] = 2
    array[-1, -1, -1] = 5
    return Segmentation(array, Grid(shape, ras(affine)), SEGMENTS)


SOURCES = {
    "oblique": (OBLIQUE, classic(OBLIQUE)[::-1]),
    "coronal": (CORONAL, classic(CORONAL)),
    "enhanced": (OBLIQUE, [enhanced(OBLIQUE)]),
}


def write(path: Path, segmentation: Segmentation, source: list[Dataset], **options: object) -> Dataset:
    write_rtstruct(path, labelled_series(images_of(source), segmentation, **{"algorithm": ALGORITHM, **options}))
    return pydicom.dcmread(path)


def points_of(contour: Dataset) -> np.ndarray:
    return np.reshape([float(v) for v in contour.ContourData], (-1, 3))


def rasterised(made: Dataset, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The label map that the contours say, in the coordinates (column, row, plane) of `affine` to LPS mm."""
    array = np.zeros(shape, int)
    for roi in made.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            points = points_of(contour)
            assert contour.NumberOfContourPoints == len(points)
            voxels = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
            plane = round(float(voxels[0, 2]))
            # in the plane to 0.1 µm, as written
            assert np.abs(voxels[:, 2] - plane).max() < 1e-3
            inside = filled([voxels[:, :2]], (shape[1], shape[0])).T > 0
            assert not array[inside, plane].any()
            array[inside, plane] = roi.ReferencedROINumber
    return array


@pytest.mark.parametrize("name", SOURCES)
def test_contours_rasterise_back_to_the_label_map(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    made = write(tmp_path / "rt.dcm", labelled(affine), source)
    np.testing.assert_array_equal(rasterised(made, affine, SHAPE), labelled(affine).array)


@pytest.mark.parametrize("name", SOURCES)
def test_volume_and_centre_follow_from_the_points_alone(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    labels = labelled(affine)
    made = write(tmp_path / "rt.dcm", labels, source)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    step = abs(affine[:3, 2] @ normal / np.linalg.norm(normal))
    for roi in made.ROIContourSequence:
        volume, moment = 0.0, np.zeros(3)
        for contour in roi.ContourSequence:
            points = points_of(contour)
            # triangles from the first point, signed by the normal
            edges = points - points[0]
            triangles = np.cross(edges, np.roll(edges, -1, axis=0)) @ normal / np.linalg.norm(normal) / 2
            centres = (points[0] + points + np.roll(points, -1, axis=0)) / 3
            volume += abs(triangles.sum()) * step
            moment += abs(triangles.sum()) * step * (triangles @ centres) / triangles.sum()
        voxels = np.argwhere(labels.array == roi.ReferencedROINumber)
        centre = (LPS_TO_RAS @ labels.grid.affine) @ [*voxels.mean(axis=0), 1]
        # exact but for decimals: asked for are half a voxel and a few per cent
        assert volume == pytest.approx(len(voxels) * abs(np.linalg.det(affine[:3, :3])), rel=1e-3)
        np.testing.assert_allclose(moment / volume, centre[:3], atol=1e-3)


def test_a_round_body_has_its_volume_and_place(tmp_path: Path) -> None:
    affine, shape = oblique((0.7, 0.9, 1.6), degrees=35), (40, 34, 20)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    centre, radius_mm = affine @ [20.3, 16.1, 9.4, 1], 10.0
    distance = np.linalg.norm(index @ affine[:3, :3].T + affine[:3, 3] - centre[:3], axis=-1)
    labels = Segmentation((distance < radius_mm).astype(np.uint8), Grid(shape, ras(affine)), (SegmentInfo(1, "ball"),))
    made = write(tmp_path / "rt.dcm", labels, classic(affine, shape))
    found = np.argwhere(rasterised(made, affine, shape))
    volume = len(found) * np.prod([0.7, 0.9, 1.6])
    # a ball of 4200 voxels: its surface of a thousand voxels is right to a small part of one each
    assert volume == pytest.approx(4 / 3 * np.pi * radius_mm**3, rel=0.02)
    np.testing.assert_allclose(found.mean(axis=0), [20.3, 16.1, 9.4], atol=0.1)


@pytest.mark.parametrize("name", SOURCES)
def test_every_contour_names_the_image_it_lies_on(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    made = write(tmp_path / "rt.dcm", labelled(affine), source)
    (frame,) = made.ReferencedFrameOfReferenceSequence
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    listed = {image.ReferencedSOPInstanceUID for image in series.ContourImageSequence}
    assert (frame.FrameOfReferenceUID, series.SeriesInstanceUID) == (
        source[0].FrameOfReferenceUID,
        source[0].SeriesInstanceUID,
    )
    assert listed == {header.SOPInstanceUID for header in source}
    numbers = {header.SOPInstanceUID: int(header.InstanceNumber) for header in source}
    for roi in made.ROIContourSequence:
        for contour in roi.ContourSequence:
            (image,) = contour.ContourImageSequence
            number = image.get("ReferencedFrameNumber", numbers[image.ReferencedSOPInstanceUID])
            voxel = np.linalg.inv(affine) @ [*points_of(contour)[0], 1]
            assert round(float(voxel[2])) == number - 1


def test_regions_have_names_colours_and_one_observation_each(tmp_path: Path) -> None:
    empty = Segmentation(labelled().array, labelled().grid, (*SEGMENTS, SegmentInfo(9, "nowhere")))
    made = write(tmp_path / "rt.dcm", empty, classic())
    assert [(r.ROINumber, r.ROIName) for r in made.StructureSetROISequence] == [
        (1, "shell"),
        (2, "two parts"),
        (5, "Tumör 肝"),
        (9, "nowhere"),
    ]
    assert [r.ReferencedROINumber for r in made.RTROIObservationsSequence] == [1, 2, 5, 9]
    assert list(made.ROIContourSequence[0].ROIDisplayColor) == [0xCC, 0x79, 0xA7]
    assert "ContourSequence" not in made.ROIContourSequence[3]
    kinds = {c.ContourGeometricType for r in made.ROIContourSequence[:3] for c in r.ContourSequence}
    assert kinds == {"CLOSED_PLANAR"}


def test_labels_may_come_in_any_orientation(tmp_path: Path) -> None:
    labels = labelled()
    write(tmp_path / "rt.dcm", labels, classic())
    order, flipped = list(orientations())[29]
    array, affine = reorient(labels.array, labels.grid.affine, order, flipped)
    other = Segmentation(array, Grid(array.shape, affine), SEGMENTS)
    write(tmp_path / "other.dcm", other, classic())
    assert (tmp_path / "rt.dcm").read_bytes() == (tmp_path / "other.dcm").read_bytes()


def test_identifiers_differ_from_those_of_another_model_and_revision(tmp_path: Path) -> None:
    options: list[dict[str, object]] = [{}, {"revision": 2}, {"algorithm": Algorithm("net", "1.2", "c" * 64)}]
    made = [write(tmp_path / "rt.dcm", labelled(), classic(), **o) for o in options]
    uids = [str(uid) for m in made for uid in (m.SOPInstanceUID, m.SeriesInstanceUID)]
    assert len(set(uids)) == 6
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)


def test_patient_and_study_are_those_of_the_series(tmp_path: Path) -> None:
    made = write(tmp_path / "rt.dcm", labelled(), classic())
    assert (made.PatientID, str(made.PatientName), made.StudyDate) == ("P1", "Doe^Jane", "")
    assert (made.StructureSetDate, made.StructureSetTime) == ("20240229", "081500")


def test_blank_uids_and_other_grids_are_refused(tmp_path: Path) -> None:
    source = classic()
    source[3].SOPInstanceUID = ""
    with pytest.raises(DataError, match="UID"):
        write(tmp_path / "rt.dcm", labelled(), source)
    other = Segmentation(labelled().array, Grid(SHAPE, ras(CORONAL)), SEGMENTS)
    with pytest.raises(GeometryError, match="series"):
        write(tmp_path / "rt.dcm", other, classic())
    assert not any(tmp_path.iterdir())


def test_a_contour_longer_than_a_16_bit_length_is_whole(tmp_path: Path) -> None:
    affine, shape = OBLIQUE, (80, 80, 1)
    array = (np.random.default_rng(0).random(shape) < 0.8).astype(np.uint8)
    labels = Segmentation(array, Grid(shape, ras(affine)), (SegmentInfo(1, "sponge"),))
    made = write(tmp_path / "rt.dcm", labels, classic(affine, shape))
    longest = max(len("\\".join(map(str, c.ContourData))) for c in made.ROIContourSequence[0].ContourSequence)
    assert longest > 65535
    np.testing.assert_array_equal(rasterised(made, affine, shape), array)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy on the path; install dicom3tools")
@pytest.mark.parametrize("name", SOURCES)
def test_the_validator_finds_no_error(tmp_path: Path, name: str) -> None:
    affine, source = SOURCES[name]
    write(tmp_path / "rt.dcm", labelled(affine), source)
    done = subprocess.run(["dciodvfy", tmp_path / "rt.dcm"], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []
    assert "RTStructureSet" in done.stderr
