"""Measures of one pair against answers worked by hand: single voxels, outliers, balls, ties, 2D, regions, extras."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from medseg.metrics import (
    EXTRA,
    both_empty,
    boundary_iou,
    centreline_dice,
    measure,
    missing_prediction,
    surface_distances,
    surface_metrics,
)

SURFACES = ("surfel", "voxel")
# 6 faces of 9² cells, 12 edges of 9 cells with half a face diagonal each, 8 corners of √3/8
CUBE_AREA = 6 * 81 + 6 * math.sqrt(2) * 9 + math.sqrt(3)


def box(shape, *slices):
    array = np.zeros(shape, np.uint8)
    array[tuple(slice(*s) for s in slices)] = 1
    return array


CUBE = box((40, 30, 30), (10, 20), (10, 20), (10, 20))


def ball(radius, shape=(60, 60, 60), at=(30, 30, 30)):
    ijk = np.ogrid[tuple(slice(n) for n in shape)]
    return (sum((x - c) ** 2 for x, c in zip(ijk, at)) <= radius**2).astype(np.uint8)


# ---- surfaces


@pytest.mark.parametrize(("steps", "assd"), [(1, (1, 2)), (2, (3, 4)), (3, (5, 6))])
def test_a_single_voxel_moved(steps, assd):
    # its 8 equal surfels lie in two planes: from the near one it is `steps` − 1 of 2 mm to the other voxel's surfels
    # (0 where they coincide), from the far one `steps`
    one = box((9, 3, 3), (2, 3), (1, 2), (1, 2))
    moved = np.roll(one, steps, axis=0)
    for surface, mean in zip(SURFACES, assd):
        row = measure(moved, one, [1], spacing_mm=(2, 3, 6), surface=surface)[1]
        assert (row.hd_mm, row.hd95_mm) == (2 * steps, 2 * steps)
        assert (row.assd_mm, row.masd_mm) == pytest.approx((mean, mean), abs=1e-12)


def test_one_voxel_against_itself():
    one = box((1, 1, 1), (0, 1), (0, 1), (0, 1))
    for surface in SURFACES:
        row = measure(one, one, [1], spacing_mm=(1, 1, 1), surface=surface)[1]
        assert (row.dice, row.hd_mm, row.hd95_mm, row.assd_mm, row.masd_mm, row.nsd) == (1, 0, 0, 0, 0, 1)


def test_a_far_voxel_counts_in_hd_and_hardly_in_the_rest():
    # its surfels lie in the planes 30 and 31, the cube's last in plane 20
    with_outlier = CUBE.copy()
    with_outlier[30, 15, 15] = 1
    outlier = math.sqrt(3) / 2 * (10 + 11)
    row = measure(with_outlier, CUBE, [1], spacing_mm=(1, 1, 1))[1]
    assert (row.hd_mm, row.hd95_mm) == (11, 0)
    assert row.assd_mm == pytest.approx(outlier / (2 * CUBE_AREA + math.sqrt(3)))
    assert row.masd_mm == pytest.approx(outlier / (CUBE_AREA + math.sqrt(3)) / 2)
    assert row.nsd == pytest.approx(2 * CUBE_AREA / (2 * CUBE_AREA + math.sqrt(3)))
    row = measure(with_outlier, CUBE, [1], spacing_mm=(1, 1, 1), surface="voxel")[1]
    assert (row.hd_mm, row.hd95_mm) == (11, 0)
    assert (row.assd_mm, row.masd_mm, row.nsd) == pytest.approx((11 / 977, 11 / 489 / 2, 976 / 977))


def test_masd_gives_both_directions_one_weight():
    # every voxel of the short bar is on the long one; from the other half of the long one it is 1 to 10 mm
    short, long = np.zeros((21, 1), bool), np.ones((21, 1), bool)
    short[:11] = True
    found = surface_metrics(short, long, spacing_mm=(1, 1), surface="voxel")
    assert found.assd_mm == pytest.approx(55 / (11 + 21))
    assert found.masd_mm == pytest.approx((0 / 11 + 55 / 21) / 2)


def test_a_square_of_oblong_pixels_moved():
    # contour: 2·9 cells of 2 mm, 2·9 of 1 mm, 4 corners of √5/2. Moved by one pixel of 2 mm, each way alike: 2 corners
    # and the 9 cells of the side left behind are 2 mm away; of the 9 on the other side those next to a corner 1 mm
    square = box((30, 30), (10, 20), (10, 20))
    moved = np.roll(square, 1, axis=1)
    length = 54 + 2 * math.sqrt(5)
    row = measure(moved, square, [1], spacing_mm=(1, 2))[1]
    assert (row.hd_mm, row.hd95_mm) == (2, 2)
    assert row.assd_mm == pytest.approx((2 * math.sqrt(5) + 18 + 2 * 1 + 7 * 2) / length)
    assert row.nsd == pytest.approx((length - math.sqrt(5) - 9 - 7) / length)
    # 36 border pixels: 2 corners, 8 of one side, 6 of the other 2 mm away, 2 of it 1 mm
    row = measure(moved, square, [1], spacing_mm=(1, 2), surface="voxel")[1]
    assert (row.hd_mm, row.assd_mm, row.nsd) == pytest.approx((2, 34 / 36, 20 / 36))


@pytest.mark.parametrize("surface", SURFACES)
def test_balls_within_each_other(surface):
    # an element is at most half a cell's diagonal, √3/2, from its sphere: two of them √3 from their gap
    there, back = surface_distances(ball(20) > 0, ball(25) > 0, spacing_mm=(1, 1, 1), surface=surface)
    for d in (there, back):
        assert d.mm.min() >= 5 - math.sqrt(3)
        assert d.mm.max() <= 5 + math.sqrt(3)


def test_area_of_a_ball():
    # a closed surface that cuts the corners of voxels: no less than the ball's, less than 6πr² of the voxels' faces
    there, _ = surface_distances(ball(20) > 0, ball(20) > 0, spacing_mm=(1, 1, 1))
    assert 4 * math.pi * 20**2 < there.size.sum() < 6 * math.pi * 20**2


@pytest.mark.parametrize("surface", SURFACES)
def test_hd_of_a_moved_ball_is_the_way_it_moved(surface):
    # no element is farther than its own image, and those in front have nothing nearer
    one = ball(10, (40, 30, 30), (15, 15, 15))
    assert measure(np.roll(one, 5, axis=0), one, [1], spacing_mm=(0.8, 1, 1.5), surface=surface)[1].hd_mm == 4


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("step", "steps", "tolerance"), [(0.1, 3, 0.3), (0.7, 3, 2.1), (0.1, 6, 0.6), (1.1, 3, 3.3)])
def test_whole_steps_that_make_the_tolerance_are_within_it(surface, step, steps, tolerance):
    one = box((20, 6, 6), (5, 8), (2, 4), (2, 4))
    moved = np.roll(one, steps, axis=0)
    found = measure(moved, one, [1], spacing_mm=(step, step, step), surface=surface, nsd_tolerance_mm=tolerance)[1]
    assert found.nsd == 1
    less = measure(moved, one, [1], spacing_mm=(step,) * 3, surface=surface, nsd_tolerance_mm=tolerance - 0.01)[1]
    assert less.nsd < 1


@pytest.mark.parametrize("spacing", [(0.3, 0.1), (0.9, 0.1), (1.0, 0.1)])
def test_hd95_where_the_share_is_exactly_95_of_100(spacing):
    # 10 single pixels, one of them moved by a step of 0.1 mm: 38 of 40 equal pieces of contour coincide
    reference = np.zeros((3, 40), bool)
    reference[1, ::4] = True
    prediction = np.roll(reference, 1, axis=1)
    prediction[:, :36] = reference[:, :36]
    found = surface_metrics(prediction, reference, spacing_mm=spacing)
    assert (found.hd_mm, found.hd95_mm) == (0.1, 0)
    # as pixels 9 of 10: linear between the 9th and the 10th of 10 at 0.95 · 9 = 8.55
    found = surface_metrics(prediction, reference, spacing_mm=spacing, surface="voxel")
    assert found.hd95_mm == pytest.approx(0.1 * 0.55)


# ---- labels


def test_labels_with_gaps_are_measured_each_for_itself():
    reference = np.zeros((20, 6, 6), np.int32)
    reference[2:5, 2:4, 2:4], reference[10:13, 2:4, 2:4] = 7, 70_000
    prediction = reference.copy()
    prediction[reference == 70_000] = 0
    prediction[11:14, 2:4, 2:4] = 70_000
    rows = measure(prediction, reference, [7, 70_000, 5], spacing_mm=(2, 1, 1), surface="voxel")
    assert (rows[7].dice, rows[7].hd_mm) == (1, 0)
    assert (rows[70_000].dice, rows[70_000].hd_mm) == (2 / 3, 2)
    assert rows[5].status == "both_empty"


def test_what_is_ignored_has_no_surface():
    reference, prediction = CUBE.copy(), CUBE.copy()
    reference[30:], prediction[35, 15, 15] = 9, 1
    row = measure(prediction, reference, [1], spacing_mm=(1, 1, 1), ignore_value=9)[1]
    assert (row.dice, row.hd_mm, row.nsd, row.specificity, row.fp) == (1, 0, 1, 1, 0)


def test_a_tolerance_for_each_value():
    reference = np.zeros((30, 6, 6), np.uint8)
    reference[2:5, 2:4, 2:4], reference[12:15, 2:4, 2:4] = 1, 2
    rows = measure(
        np.roll(reference, 2, axis=0), reference, [1, 2, (1, 2)], spacing_mm=(1, 1, 1),
        nsd_tolerance_mm={1: 2.0, 2: 1.0, (1, 2): 2.0},
    )  # fmt: skip
    assert (rows[1].nsd, rows[1, 2].nsd) == (1, 1)
    assert rows[2].nsd < 1


def test_a_value_without_a_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"no NSD tolerance for \[2\]"):
        measure(CUBE, CUBE, [1, 2], spacing_mm=(1, 1, 1), nsd_tolerance_mm={1: 1.0})


def test_specificity_by_hand():
    # 7 voxels are judged: 1 tp, 1 fn, 1 fp, 4 tn
    prediction = np.array([[1, 0, 1, 0], [0, 0, 1, 0]])
    reference = np.array([[1, 1, 0, 0], [0, 0, 9, 0]])
    assert measure(prediction, reference, [1], spacing_mm=(1, 1), ignore_value=9)[1].specificity == 4 / 5


def test_specificity_of_a_reference_that_fills_the_map_is_not_defined():
    full = np.ones((3, 3), np.uint8)
    assert math.isnan(measure(full, full, [1], spacing_mm=(1, 1))[1].specificity)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [((0, 6), (0, 4), 0.5), ((0, 1), (0, 4), -0.75), ((0, 0), (0, 4), -1.0), ((0, 4), (0, 0), None)],
)
def test_relative_volume_difference(prediction, reference, expected):
    maps = [box((8, 2), rows, (0, 2)) for rows in (prediction, reference)]
    found = measure(*maps, [1], spacing_mm=(1, 1))[1].relative_volume_difference
    assert (None if math.isnan(found) else found) == expected


def test_rows_of_labels_that_neither_map_holds_agree():
    nothing = np.zeros((3, 3, 3), np.uint8)
    assert repr(measure(nothing, nothing, [1], spacing_mm=(1, 1, 2))[1]) == repr(both_empty(spacing_mm=(1, 1, 2)))


def test_a_missing_prediction_has_no_measure():
    row = missing_prediction(5, spacing_mm=(1, 1, 1))
    values = (row.specificity, row.masd_mm, row.relative_volume_difference, row.boundary_iou, row.cldice, row.nsd)
    assert all(math.isnan(v) for v in values)


# ---- boundary IoU and clDice


def test_boundary_iou_of_a_moved_square():
    # rings of 6² − 4² = 20 pixels; of the two in common: 5 pixels in each of the rows along which it moved
    square = box((12, 12), (3, 9), (3, 9)) > 0
    moved = np.roll(square, 1, axis=1)
    assert boundary_iou(moved, square, spacing_mm=(1, 1), within_mm=1) == 10 / 30


def test_boundary_iou_far_from_the_contour_is_iou():
    square = box((12, 12), (3, 9), (3, 9)) > 0
    moved = np.roll(square, 1, axis=1)
    assert boundary_iou(moved, square, spacing_mm=(1, 1), within_mm=3) == 30 / 42


@pytest.mark.parametrize(("within_mm", "transforms"), [(2.9, 2), (3.0, 0)])
def test_boundary_iou_measures_no_depth_where_none_can_be_too_deep(within_mm, transforms, monkeypatch):
    # five voxels across: the middle one is three steps from outside
    done = []
    measure_depth = ndimage.distance_transform_edt
    monkeypatch.setattr(ndimage, "distance_transform_edt", lambda *a, **k: done.append(1) or measure_depth(*a, **k))
    full = np.ones((9, 5), bool)
    full_iou = boundary_iou(full, full, spacing_mm=(1, 1), within_mm=within_mm)
    assert (full_iou, len(done)) == (1, transforms)


def test_boundary_iou_always_sees_the_outermost_voxels():
    square = box((12, 12), (3, 9), (3, 9)) > 0
    moved = np.roll(square, 1, axis=1)
    assert boundary_iou(moved, square, spacing_mm=(3, 5), within_mm=0.1) == 10 / 30


def test_boundary_iou_follows_the_spacing():
    # 9 × 5 × 5 voxels that fill the map, beyond which is outside: within 0.3 mm (3 steps included) 3 planes at each
    # end, and the 16 outermost voxels of the 3 planes between. A hole adds 2 voxels along and 4 beside it
    full = np.ones((9, 5, 5), bool)
    holed = full.copy()
    holed[4, 2, 2] = False
    rim = 6 * 25 + 3 * 16
    assert boundary_iou(holed, full, spacing_mm=(0.1, 9, 9), within_mm=0.3) == rim / (rim + 6)


@pytest.mark.parametrize(
    "measure_of", [lambda a, b: boundary_iou(a, b, spacing_mm=(1, 1), within_mm=1), centreline_dice]
)
def test_extras_of_empty_masks(measure_of):
    nothing, something = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert math.isnan(measure_of(nothing, nothing))
    assert (measure_of(something, nothing), measure_of(nothing, something)) == (0, 0)


def test_centreline_dice_of_half_a_line():
    # a line is its own centre line: all of the half lies in the whole, half of the whole in the half
    whole, half = box((3, 3, 24), (1, 2), (1, 2), (2, 22)) > 0, box((3, 3, 24), (1, 2), (1, 2), (2, 12)) > 0
    assert centreline_dice(half, whole) == pytest.approx(2 * 0.5 / 1.5)


def test_centreline_dice_forgives_the_width():
    thin, thick = box((7, 7, 24), (3, 4), (3, 4), (2, 22)) > 0, box((7, 7, 24), (2, 5), (2, 5), (2, 22)) > 0
    assert centreline_dice(thin, thick) == 1


def test_centreline_dice_of_lines_apart_is_0():
    one = box((9, 24), (1, 2), (2, 22)) > 0
    assert centreline_dice(one, np.roll(one, 4, axis=0)) == 0


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 2, 2), (4, 4, 4), (1, 2, 2)])
def test_every_mask_has_a_centre_line(shape):
    full = np.pad(np.ones(shape, bool), 1)
    assert centreline_dice(full, full) == 1


def test_extras_are_not_defined_unless_asked_for():
    row = measure(CUBE, CUBE, [1], spacing_mm=(1, 1, 1))[1]
    assert math.isnan(row.boundary_iou)
    assert math.isnan(row.cldice)


def test_boundary_iou_looks_as_far_as_the_tolerance():
    moved, how = np.roll(CUBE, 2, axis=0), {"spacing_mm": (1, 1, 1)}
    found = [
        measure(moved, CUBE, [1], **how, nsd_tolerance_mm=t, extra=["boundary_iou"])[1].boundary_iou for t in (1.0, 2.0)
    ]
    assert found == [boundary_iou(moved > 0, CUBE > 0, **how, within_mm=t) for t in (1, 2)]
    assert found[0] < found[1]


def test_extras_that_are_asked_for():
    rows = measure(CUBE, CUBE * 2, [1, (1, 2), 3], spacing_mm=(1, 1, 1), extra=EXTRA)
    assert (rows[1, 2].boundary_iou, rows[1, 2].cldice) == (1, 1)
    assert (rows[1].boundary_iou, rows[1].cldice) == (0, 0)
    assert math.isnan(rows[3].boundary_iou)


def test_an_unknown_extra_is_refused():
    with pytest.raises(ValueError, match=r"'boundary'.*boundary_iou"):
        measure(CUBE, CUBE, [1], spacing_mm=(1, 1, 1), extra=["boundary"])


# ---- alone


def test_metrics_need_numpy_and_scipy_only():
    code = """
import sys
for name in ("torch", "monai", "pandas", "skimage", "nibabel", "SimpleITK", "pydantic", "matplotlib"):
    sys.modules[name] = None  # an import of it fails
import numpy as np
from medseg.metrics import measure
square = np.ones((2, 2), np.uint8)
assert measure(square, square, [1], spacing_mm=(1, 1), extra=["boundary_iou"])[1].dice == 1
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
print(*sorted({f.replace("\\\\", "/").split("site-packages/")[1].split("/")[0] for f in files if "site-packages" in f}))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # an editable installation has a hook of its own
    assert {name for name in found.stdout.split() if not name.startswith("_")} <= {"numpy", "scipy", "medseg"}
