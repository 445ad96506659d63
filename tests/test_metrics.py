"""Counts, overlaps and surface distances of one pair against answers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg.metrics import (
    Counts,
    counts,
    dice,
    iou,
    judged,
    measure,
    missing_prediction,
    precision,
    present_values,
    recall,
    status,
    surface_distances,
    surface_metrics,
)


def cube(start, stop, shape=(40, 40, 40)):
    array = np.zeros(shape, np.uint8)
    array[tuple(slice(a, b) for a, b in zip(start, stop))] = 1
    return array


CUBE = cube((10, 10, 10), (20, 20, 20))


def test_counts_by_hand():
    prediction = np.array([[1, 1, 2], [0, 2, 0]])
    reference = np.array([[1, 2, 2], [1, 0, 0]])
    assert counts(prediction, reference, [1, 2]) == {1: Counts(1, 1, 1), 2: Counts(1, 1, 1)}


@pytest.mark.parametrize("big", [7, 300, 40_000, 2_000_000])
def test_counts_with_gaps_and_big_values(big):
    prediction = np.array([0, 3, big, big, 5], np.int32)
    reference = np.array([3, 3, big, 0, 5], np.int32)
    assert counts(prediction, reference, [3, big]) == {3: Counts(1, 0, 1), big: Counts(1, 1, 0)}


def test_values_beyond_the_largest_label_are_background():
    prediction = np.array([1, 200, 255], np.uint8)
    reference = np.array([1, 1, 255], np.uint8)
    assert counts(prediction, reference, [1]) == {1: Counts(1, 0, 1)}


def test_negative_values_are_background():
    assert counts(np.array([-1, 1]), np.array([-1, -1]), [1]) == {1: Counts(0, 1, 0)}


def test_a_region_counts_its_values_as_one():
    prediction = np.array([1, 2, 0, 3])
    reference = np.array([2, 1, 1, 0])
    found = counts(prediction, reference, [(1, 2), 3])
    assert found == {(1, 2): Counts(2, 0, 1), 3: Counts(0, 1, 0)}


def test_ignored_voxels_are_in_neither_map():
    prediction = np.array([1, 1, 1, 0])
    reference = np.array([1, 9, 0, 1])
    assert counts(prediction, reference, [1], ignore_value=9) == {1: Counts(1, 1, 1)}


def test_counts_do_not_depend_on_memory_order():
    generator = np.random.default_rng(0)
    prediction, reference = generator.integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    mixed = counts(np.asfortranarray(prediction), reference, [1, 2, 3])
    assert mixed == counts(prediction, reference, [1, 2, 3])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 3), (3, 3, 0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_maps_without_voxels_are_empty(shape, dtype):
    nothing = np.zeros(shape, dtype)
    assert measure(nothing, nothing, [1], spacing_mm=(1.0,) * len(shape))[1].status == "both_empty"


def test_a_value_that_is_named_twice_counts_once():
    prediction, reference = np.array([[1, 1, 0, 2]]), np.array([[1, 0, 1, 2]])
    assert counts(prediction, reference, [(1, 1, 2)]) == {(1, 1, 2): Counts(2, 1, 1)}


@pytest.mark.parametrize("dtype", ["i1", "u2", ">u2", ">i4", "i8", "u8", ">u8"])
def test_counts_do_not_depend_on_the_type_of_numbers(dtype):
    generator = np.random.default_rng(0)
    prediction, reference = generator.integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    expected = counts(prediction, reference, [1, 3])
    assert counts(prediction.astype(dtype), reference, [1, 3]) == expected
    assert counts(prediction, np.asfortranarray(reference.astype(dtype)), [1, 3]) == expected


def test_values_beyond_64_signed_bits_are_not_mistaken_for_others():
    prediction = np.array([2**64 - 1, 1, 2**63], np.uint64)
    assert counts(prediction, np.array([1, 1, 1]), [1]) == {1: Counts(1, 0, 2)}


def test_maps_of_mirrored_memory_have_the_counts_of_their_copies():
    generator = np.random.default_rng(0)
    prediction, reference = generator.integers(0, 4, (2, 5, 6, 7)).astype(np.int16)
    mirrored = prediction[::-1, :, ::-1].copy()[::-1, :, ::-1]
    assert mirrored.strides[0] < 0
    assert counts(mirrored, reference, [1, 3]) == counts(prediction, reference, [1, 3])


def test_maps_that_are_not_integer_are_refused():
    with pytest.raises(ValueError, match="float64 found, expected whole numbers"):
        counts(np.zeros(2), np.zeros(2, int), [1])


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, -1), (1, 1, math.nan), (1, 1, math.inf)])
def test_a_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(ValueError, match="expected 3 numbers above 0"):
        measure(CUBE, CUBE, [1], spacing_mm=spacing)


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match=r"NSD tolerance of .* expected 0 or more"):
        measure(CUBE, CUBE, [1], spacing_mm=(1, 1, 1), nsd_tolerance_mm=tolerance)


def test_differing_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        counts(np.zeros(2, int), np.zeros(3, int), [1])


def test_overlaps_by_hand():
    c = Counts(tp=6, fp=2, fn=4)
    assert (dice(c), iou(c), precision(c), recall(c)) == (12 / 18, 0.5, 0.75, 0.6)


@pytest.mark.parametrize(
    ("c", "name", "overlaps"),
    [
        (Counts(0, 0, 0), "both_empty", (None, None, None, None)),
        (Counts(0, 0, 5), "missed", (0, 0, None, 0)),
        (Counts(0, 5, 0), "spurious", (0, 0, 0, None)),
        (Counts(0, 5, 5), "ok", (0, 0, 0, 0)),
    ],
)
def test_edge_cases_of_overlap(c, name, overlaps):
    found = (dice(c), iou(c), precision(c), recall(c))
    assert status(c) == name
    assert tuple(None if math.isnan(v) else v for v in found) == overlaps


@pytest.mark.parametrize("surface", ["surfel", "voxel"])
def test_edge_cases_of_distance(surface):
    nothing = np.zeros_like(CUBE)

    def row(prediction, reference):
        return measure(prediction, reference, [1], spacing_mm=(1, 1, 1), surface=surface)[1]

    for missing_one in (row(nothing, CUBE), row(CUBE, nothing)):
        assert (missing_one.hd_mm, missing_one.hd95_mm, missing_one.assd_mm) == (math.inf,) * 3
        assert missing_one.nsd == 0
    neither = row(nothing, nothing)
    assert all(math.isnan(v) for v in (neither.hd_mm, neither.hd95_mm, neither.assd_mm, neither.nsd))


# a 10-cube has 6·9² + 6√2·9 + √3 of surfel area, and 10³ − 8³ = 488 border voxels
@pytest.mark.parametrize(
    ("start", "spacing", "hd95", "nsd", "assd"),
    [
        ((10, 10, 10), (1, 1, 1), 0, (1, 1), (0, 0)),
        ((11, 10, 10), (1, 1, 1), 1, (1, 1), (0.3338450783, 0.3360655738)),
        ((12, 10, 10), (1, 1, 1), 2, (0.7228824942, 352 / 488), (0.6797951596, 0.6885245902)),
        ((10, 10, 12), (1, 1, 3), 6, (0.7699887168, 316 / 488), (1.0199388309, 1.6967213115)),
    ],
)
def test_shifted_cubes(start, spacing, hd95, nsd, assd):
    moved = cube(start, [s + 10 for s in start])
    for n, surface in enumerate(("surfel", "voxel")):
        row = measure(moved, CUBE, [1], spacing_mm=spacing, surface=surface)[1]
        assert row.hd95_mm == pytest.approx(hd95, abs=1e-9)
        assert row.nsd == pytest.approx(nsd[n], abs=1e-9)
        assert row.assd_mm == pytest.approx(assd[n], abs=1e-9)


@pytest.mark.parametrize("side", [1, 2, 7])
def test_surfel_area_of_a_cube(side):
    solid = np.ones((side,) * 3, bool)
    there, _ = surface_distances(solid, solid, spacing_mm=(1, 1, 1))
    assert there.size.sum() == pytest.approx(6 * (side - 1) ** 2 + 6 * math.sqrt(2) * (side - 1) + math.sqrt(3))


def test_surfel_area_follows_the_spacing():
    # a box of 3³ voxels: faces of 2 × 2 cells, bevels along 12 edges of 2 cells each, and 8 corners
    solid = np.ones((3, 3, 3), bool)
    x, y, z = 2.0, 3.0, 6.0
    there, _ = surface_distances(solid, solid, spacing_mm=(x, y, z))
    faces = 2 * 4 * (x * y + y * z + x * z)
    edges = 4 * 2 * (x * math.hypot(y, z) + y * math.hypot(x, z) + z * math.hypot(x, y)) / 2
    corners = 8 * 0.125 * math.sqrt((x * y) ** 2 + (y * z) ** 2 + (x * z) ** 2)
    assert there.size.sum() == pytest.approx(faces + edges + corners)


def test_surfel_area_of_corners_that_touch_by_a_diagonal():
    # two single voxels: each has the surface of a 1-cube, √3
    diagonal = np.eye(2, dtype=bool)[:, :, None] & np.array([True])
    there, _ = surface_distances(diagonal, diagonal, spacing_mm=(1, 1, 1))
    assert there.size.sum() == pytest.approx(2 * math.sqrt(3))


def test_contour_length_in_two_dimensions():
    # a 3 × 3 square of pixels 1 × 2 mm: sides 2·(2·1 + 2·2), four corners of half a diagonal
    square = np.ones((3, 3), bool)
    there, _ = surface_distances(square, square, spacing_mm=(1, 2))
    assert there.size.sum() == pytest.approx(12 + 4 * math.sqrt(5) / 2)


def test_a_distance_equal_to_the_tolerance_is_within_it():
    reference = cube((5, 5, 5), (10, 10, 10), (20, 20, 20))
    moved = np.roll(reference, 3, axis=0)
    row = measure(moved, reference, [1], spacing_mm=(0.1, 0.1, 0.1), nsd_tolerance_mm=0.3)[1]
    assert row.nsd == 1


def test_hd95_is_the_larger_of_both_directions():
    # every voxel of the short bar is on the long one; the far end of the long bar is 10 mm from the short one
    short, long = np.zeros((1, 1, 21), bool), np.zeros((1, 1, 21), bool)
    short[..., :11], long[...] = True, True
    for surface in ("surfel", "voxel"):
        found = surface_metrics(short, long, spacing_mm=(1, 1, 1), surface=surface)
        assert found.hd_mm == 10
        assert found.hd95_mm == 9


def test_a_hole_has_a_surface():
    solid = np.ones((7, 7, 7), np.uint8)
    hollow = solid.copy()
    hollow[3, 3, 3] = 0
    assert measure(hollow, solid, [1], spacing_mm=(1, 1, 1))[1].hd_mm == pytest.approx(3)


def test_distances_of_a_region_use_all_its_values():
    reference = cube((2, 2, 2), (8, 8, 8), (10, 10, 10))
    halves = reference.copy()
    halves[5:] *= 4
    row = measure(halves, reference, [(1, 4)], spacing_mm=(1, 1, 1))[1, 4]
    assert (row.dice, row.hd_mm, row.nsd) == (1, 0, 1)


def test_volumes_in_millilitres():
    row = measure(cube((0, 0, 0), (10, 10, 5)), CUBE, [1], spacing_mm=(1, 1, 2))[1]
    assert (row.reference_ml, row.prediction_ml, row.volume_difference_ml) == pytest.approx((2.0, 1.0, -1.0))


def test_volumes_follow_the_voxel_where_axes_are_not_at_right_angles():
    row = measure(cube((0, 0, 0), (10, 10, 5)), CUBE, [1], spacing_mm=(1, 1, 2), voxel_mm3=1.5)[1]
    assert (row.reference_ml, row.prediction_ml, row.volume_difference_ml) == pytest.approx((1.5, 0.75, -0.75))
    assert missing_prediction(500, spacing_mm=(1, 1, 2), voxel_mm3=1.5).reference_ml == 0.75


def test_two_dimensional_maps_have_no_volume():
    square = np.ones((4, 4), np.uint8)
    row = measure(square, square, [1], spacing_mm=(1, 1))[1]
    assert row.dice == 1
    assert math.isnan(row.reference_ml)


def test_missing_prediction_keeps_the_reference_volume():
    row = missing_prediction(500, spacing_mm=(1, 1, 2))
    assert (row.status, row.tp, row.reference_ml) == ("missing_prediction", None, 1.0)
    assert math.isnan(row.dice)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_present_values(dtype):
    assert present_values(np.array([[0, 3], [250, 3]], dtype)) == {3, 250}


def test_a_label_beyond_what_the_maps_can_hold_is_in_neither():
    small = np.array([0, 1, 3], np.uint8)
    # 259 is 3 in eight bits
    prediction, reference = judged(small, small, [1, 259])
    assert (prediction.tolist(), reference.tolist()) == ([0, 1, 0], [0, 1, 0])


def test_judged_maps_hold_the_labels_and_nothing_else():
    prediction, reference = judged(np.array([1, 4, 7, 7]), np.array([4, 2, 9, 7]), [4, (7,)], ignore_value=9)
    assert (prediction.tolist(), reference.tolist()) == ([0, 4, 0, 7], [4, 0, 0, 7])
