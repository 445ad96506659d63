"""Lesions of one pair against answers worked by hand, and the constants of the BraTS 2023 challenge."""

from __future__ import annotations

import math
import time
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from medseg.metrics.lesions import LESION_RULES, LesionMetrics, LesionRule, measure_lesions

DEFAULT, PANOPTIC, BRATS = (LESION_RULES[name] for name in ("default", "panoptic", "brats2023"))
UNIT = (1.0, 1.0, 1.0)


def lines(prediction, reference):
    """Two maps of one row each: (1, 1, K)."""
    return tuple(np.array([[row]], np.uint8) for row in (prediction, reference))


def measured(prediction, reference, rule=DEFAULT, *, value=1, spacing_mm=UNIT, ignore_value=None) -> LesionMetrics:
    return measure_lesions(prediction, reference, [value], spacing_mm=spacing_mm, rule=rule, ignore_value=ignore_value)[
        value
    ]


def counted(found):
    return found.tp, found.fp, found.fn


def boxes(shape, *corners):
    """1 in each box of (start, stop) by axis."""
    array = np.zeros(shape, np.uint8)
    for start, stop in corners:
        array[tuple(slice(a, b) for a, b in zip(start, stop))] = 1
    return array


def test_found_missed_and_spurious_lesions_by_hand():
    prediction, reference = lines([1, 1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 1])
    found = measured(prediction, reference)
    assert (found.n_reference, found.n_prediction, *counted(found)) == (2, 2, 1, 1, 1)
    assert (found.sensitivity, found.precision, found.f1) == (0.5, 0.5, 0.5)
    # 2 of 4 voxels: IoU 1/2, Dice 4/6
    assert (found.sq, found.rq, found.pq) == (0.5, 0.5, 0.25)
    assert found.lesion_dice == pytest.approx((4 / 6) / 3, abs=1e-15)
    assert [(x.outcome, x.reference_voxels, x.prediction_voxels, x.iou) for x in found.lesions] == [
        ("tp", 4, 2, 0.5),
        ("fn", 1, 0, 0.0),
        ("fp", 0, 1, 0.0),
    ]


def test_an_iou_of_exactly_one_half_is_no_pair_for_panoptic_quality():
    assert counted(measured(*lines([1, 1, 0, 0], [1, 1, 1, 1]), PANOPTIC)) == (0, 1, 1)
    assert counted(measured(*lines([1, 1, 1, 0], [1, 1, 1, 1]), PANOPTIC)) == (1, 0, 0)


def test_one_prediction_over_two_lesions_finds_the_one_it_fits_best():
    found = measured(*lines([1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]))
    assert counted(found) == (1, 0, 1)
    assert found.lesions[0].iou == 3 / 6


def test_two_predictions_on_one_lesion_are_one_that_is_found_and_one_spurious():
    found = measured(*lines([1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]))
    assert counted(found) == (1, 1, 0)
    assert found.lesions[0].iou == 3 / 6


def test_the_largest_total_iou_decides_and_not_the_largest_pair():
    reference = [1, 1, 1, 1, 0, 1, 1, 0]
    prediction = [1, 0, 1, 1, 1, 1, 0, 0]
    found = measured(*lines(prediction, reference))
    # A = 0–3, B = 5–6, Y = 0, X = 2–5: A–X has 2/6, but A–Y with 1/4 and B–X with 1/5 have more together
    assert counted(found) == (2, 0, 0)
    assert found.sq == pytest.approx((1 / 4 + 1 / 5) / 2, abs=1e-15)


def test_a_pair_that_fits_is_not_given_up_for_two_that_hardly_touch():
    # A = 0–8, B = 10, Y = 0, X = 2–10: A–X has 7/11, more than A–Y with 1/9 and B–X with 1/9 together
    reference = np.zeros((3, 12), np.uint8)
    reference[0, 0:9], reference[0, 10] = 1, 1
    prediction = np.zeros((3, 12), np.uint8)
    prediction[0, 0], prediction[0, 2:11] = 1, 1
    found = measured(prediction, reference, spacing_mm=(1.0, 1.0))
    assert counted(found) == (1, 1, 1)
    assert found.sq == 7 / 11


def test_lesions_of_one_voxel_are_lesions():
    found = measured(*lines([1, 0, 1, 0, 0], [1, 0, 0, 0, 1]))
    assert counted(found) == (1, 1, 1)
    assert (found.lesions[0].dice, found.lesions[0].iou, found.lesions[0].hd95_mm) == (1.0, 1.0, 0.0)


def test_no_lesion_at_all_is_not_defined():
    found = measured(*lines([0, 0], [0, 0]))
    assert (found.n_reference, found.n_prediction, *counted(found)) == (0, 0, 0, 0, 0)
    for name in ("sensitivity", "precision", "f1", "sq", "rq", "pq", "lesion_dice", "lesion_hd95_mm"):
        assert math.isnan(getattr(found, name)), name


def test_lesions_in_the_reference_alone_are_missed():
    found = measured(*lines([0, 0, 0], [1, 0, 1]))
    assert counted(found) == (0, 0, 2)
    assert (found.sensitivity, found.f1, found.pq, found.lesion_dice) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(found.precision)
    assert math.isnan(found.sq)
    assert math.isnan(found.lesion_hd95_mm)


def test_lesions_in_the_prediction_alone_are_spurious():
    found = measured(*lines([1, 0, 1], [0, 0, 0]))
    assert counted(found) == (0, 2, 0)
    assert (found.precision, found.f1, found.pq, found.lesion_dice) == (0.0, 0.0, 0.0, 0.0)
    assert math.isnan(found.sensitivity)


@pytest.mark.parametrize(("connectivity", "lesions"), [(1, 3), (2, 2), (3, 1)])
def test_voxels_hang_together_by_faces_edges_or_corners(connectivity, lesions):
    reference = np.zeros((3, 3, 3), np.uint8)
    # the first two share an edge, the last two a corner
    for voxel in ((0, 0, 0), (0, 1, 1), (1, 2, 2)):
        reference[voxel] = 1
    rule = replace(DEFAULT, connectivity=connectivity)
    assert measured(reference, reference, rule).n_reference == lesions


def test_pixels_hang_together_by_corners():
    reference = np.eye(4, dtype=np.uint8)
    found = measured(reference, reference, spacing_mm=(1.0, 1.0))
    assert (found.n_reference, found.pq, found.lesion_dice, found.lesion_hd95_mm) == (1, 1.0, 1.0, 0.0)


def test_a_region_joins_its_values_and_labels_are_apart():
    prediction, reference = lines([1, 2, 0, 2], [2, 1, 0, 2])
    found = measure_lesions(prediction, reference, [1, 2, (1, 2)], spacing_mm=UNIT)
    assert counted(found[(1, 2)]) == (2, 0, 0)
    assert counted(found[1]) == (0, 1, 1)
    assert counted(found[2]) == (1, 1, 1)


def test_ignored_voxels_belong_to_neither_map():
    prediction, reference = lines([1, 1, 1, 1, 0, 1], [1, 1, 9, 9, 0, 9])
    found = measured(prediction, reference, ignore_value=9)
    assert counted(found) == (1, 0, 0)
    assert found.pq == 1.0


def test_distances_of_found_lesions_are_in_mm_along_each_axis():
    # a bar of four voxels and its copy two steps of 3 mm further
    prediction = boxes((1, 1, 9), ((0, 0, 2), (1, 1, 6)))
    reference = boxes((1, 1, 9), ((0, 0, 4), (1, 1, 8)))
    found = measured(prediction, reference, spacing_mm=(1.0, 1.0, 3.0))
    assert found.lesion_hd95_mm == pytest.approx(6.0, abs=1e-9)


def test_small_lesions_are_judged_by_the_volume_of_the_voxel():
    prediction, reference = lines([1, 1, 0], [1, 1, 0])
    rule = replace(DEFAULT, minimal_mm3=9.5)
    options = {"spacing_mm": (1.0, 1.0, 5.0), "rule": rule}
    # two voxels of 5 mm³, and of 4.7 mm³ between oblique axes
    assert measure_lesions(prediction, reference, [1], **options)[1].n_reference == 1
    assert measure_lesions(prediction, reference, [1], voxel_mm3=4.7, **options)[1].n_reference == 0


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        measured(np.zeros((2, 2)), np.zeros((2, 3)), spacing_mm=(1.0, 1.0))


# ---- BraTS 2023


def test_the_presets_hold_the_constants_of_the_challenge():
    assert asdict(BRATS) == asdict(
        LesionRule("brats2023", "merged", 3, 0.0, 3, 50, unmatched_hd95_mm=374, empty_dice=1, empty_hd95_mm=0)
    )
    met, men = LESION_RULES["brats2023_met"], LESION_RULES["brats2023_men"]
    assert (men.dilation, men.minimal_mm3, met.dilation, met.minimal_mm3) == (1, 50, 1, 2)


# cubes of 4 × 4 × 4 = 64 voxels, above the 50 mm³ of the challenge
CUBE_SHAPE = (12, 12, 40)


def cubes(*starts):
    return boxes(CUBE_SHAPE, *(((4, 4, k), (8, 8, k + 4)) for k in starts))


def test_brats_nothing_in_both_is_perfect():
    found = measured(cubes(), cubes(), BRATS)
    assert (found.lesion_dice, found.lesion_hd95_mm, *counted(found)) == (1.0, 0.0, 0, 0, 0)


def test_brats_missed_and_spurious_lesions_count_with_0_and_374_mm():
    found = measured(cubes(4, 34), cubes(4, 20), BRATS)
    assert counted(found) == (1, 1, 1)
    assert found.lesion_dice == pytest.approx(1 / 3, abs=1e-15)
    assert found.lesion_hd95_mm == pytest.approx(2 * 374 / 3, abs=1e-9)
    assert math.isnan(found.pq)


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_brats_lesions_whose_growth_meets_are_one(gap, lesions):
    # each grows by 3: seven voxels between them leave one free
    both = cubes(2, 2 + 4 + gap)
    assert measured(both, both, BRATS).n_reference == lesions


def test_brats_growth_by_three_goes_along_edges_but_not_across_a_corner_in_one_step():
    # from the corner voxel of a cube three steps of two axes each cover (2, 2, 2) and not (3, 3, 3) beyond it
    reference = boxes((14, 14, 14), ((0, 0, 0), (4, 4, 4)))
    for beyond, spurious in ((2, 0), (3, 1)):
        prediction = np.zeros_like(reference)
        prediction[3 + beyond, 3 + beyond, 3 + beyond] = 1
        assert measured(prediction, reference, BRATS).fp == spurious, beyond


def test_brats_all_predictions_that_touch_a_grown_lesion_are_its_prediction():
    # 64 voxels of the lesion itself and 64 beside it, two voxels away
    found = measured(cubes(10, 16), cubes(10), BRATS)
    assert counted(found) == (1, 0, 0)
    assert found.lesion_dice == pytest.approx(2 * 64 / (64 + 128), abs=1e-15)


def test_brats_a_prediction_that_touches_without_overlap_is_no_false_positive():
    found = measured(cubes(16), cubes(10), BRATS)
    assert (found.lesion_dice, *counted(found)) == (0.0, 1, 0, 0)
    # the farthest faces are six voxels apart, both ways
    assert found.lesion_hd95_mm == pytest.approx(6.0, abs=1e-9)


def test_brats_one_prediction_may_be_that_of_two_lesions():
    prediction = boxes(CUBE_SHAPE, ((4, 4, 4), (8, 8, 24)))
    found = measured(prediction, cubes(4, 20), BRATS)
    assert counted(found) == (2, 0, 0)
    assert found.lesion_dice == pytest.approx(2 * 64 / (64 + 320), abs=1e-15)


@pytest.mark.parametrize(("voxels", "judged"), [(50, 0), (51, 1)])
def test_brats_lesions_up_to_the_threshold_are_not_judged_nor_what_finds_them(voxels, judged):
    reference = np.zeros((4, 4, 20), np.uint8)
    reference.reshape(-1)[np.flatnonzero(boxes(reference.shape, ((0, 0, 0), (4, 4, 4))).ravel())[:voxels]] = 1
    assert int(reference.sum()) == voxels
    found = measured(reference, reference, BRATS)
    assert counted(found) == (judged, 0, 0)
    assert measured(np.zeros_like(reference), reference, BRATS).fn == judged


def test_brats_the_threshold_is_a_volume():
    # 32 voxels of 2 mm³
    reference = boxes((8, 8, 8), ((0, 0, 0), (4, 4, 2)))
    assert measured(reference, reference, BRATS).n_reference == 0
    assert measured(reference, reference, BRATS, spacing_mm=(1.0, 1.0, 2.0)).n_reference == 1


def test_brats_a_lesion_of_exactly_the_threshold_is_left_out_at_spacings_of_single_precision():
    # 50 voxels of 1 mm³; a spacing of 1.0000001 mm is 1 mm as a file tells it
    reference = boxes((5, 10, 3), ((0, 0, 0), (5, 10, 1)))
    spacing = tuple(map(float, np.nextafter(np.ones(3, np.float32), np.float32(2))))
    assert 50 * math.prod(spacing) > 50
    assert measured(reference, reference, BRATS, spacing_mm=spacing).n_reference == 0


def test_brats_a_spurious_lesion_counts_whatever_its_size():
    prediction = cubes(4)
    prediction[0, 0, 39] = 1
    found = measured(prediction, cubes(4), BRATS)
    assert (found.lesion_dice, found.fp) == (0.5, 1)


def brute_brats(prediction, reference):
    """Dice and counts as the challenge words them: each lesion grown by itself, one after the other."""
    from scipy import ndimage

    corner, edge = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)
    p, n_p = ndimage.label(prediction, corner)
    grown, n_r = ndimage.label(ndimage.binary_dilation(reference, edge, iterations=1), corner)
    dices, touched, missed = [], set(), 0
    for number in range(1, n_r + 1):
        lesion = (grown == number) & (reference > 0)
        near = set(np.unique(p[ndimage.binary_dilation(lesion, edge, iterations=1)])) - {0}
        touched |= near
        if lesion.sum() <= 2:
            continue
        mine = np.isin(p, list(near))
        dices.append(2 * (mine & lesion).sum() / (mine.sum() + lesion.sum()))
        missed += not near
    spurious = n_p - len(touched)
    total = len(dices) + spurious
    return (sum(dices) / total if total else 1.0), len(dices) - missed, spurious, missed


# ---- properties

MAPS = arrays(np.uint8, (6, 7, 8), elements=st.sampled_from([0, 0, 0, 1]))


@settings(max_examples=60, deadline=None)
@given(MAPS, MAPS)
def test_brats_agrees_with_lesions_taken_one_by_one(prediction, reference):
    found = measured(prediction, reference, LESION_RULES["brats2023_met"])
    dice, *numbers = brute_brats(prediction, reference)
    assert list(counted(found)) == numbers
    assert found.lesion_dice == pytest.approx(dice, abs=1e-12)


SPARSE = arrays(np.uint8, (5, 6, 7), elements=st.sampled_from([0, 0, 1]))


@settings(max_examples=60, deadline=None)
@given(SPARSE, SPARSE, st.sampled_from([DEFAULT, PANOPTIC, replace(DEFAULT, connectivity=1)]))
def test_swapping_the_maps_swaps_errors_and_keeps_f1_and_panoptic_quality(one, other, rule):
    there, back = measured(one, other, rule), measured(other, one, rule)
    assert counted(there) == (back.tp, back.fn, back.fp)
    assert there.f1 == pytest.approx(back.f1, abs=1e-12, nan_ok=True)
    assert there.pq == pytest.approx(back.pq, abs=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(SPARSE, SPARSE)
def test_the_pairs_are_those_of_a_full_assignment(prediction, reference):
    from scipy import ndimage

    rule = replace(DEFAULT, connectivity=1)
    (p, n_p), (r, n_r) = (ndimage.label(m) for m in (prediction, reference))
    table = np.zeros((n_r, n_p))
    for i in range(n_r):
        for j in range(n_p):
            a, b = r == i + 1, p == j + 1
            table[i, j] = (a & b).sum() / (a | b).sum()
    best = table[linear_sum_assignment(-table)].sum()
    found = measured(prediction, reference, rule)
    assert sum(x.iou for x in found.lesions) == pytest.approx(best, abs=1e-8)


def test_a_thousand_lesions_take_no_pass_over_the_volume_each():
    # a pass over 256³ voxels takes 5 ms at the very least: a thousand for each of two maps are 10 s
    generator = np.random.default_rng(1)
    reference, prediction = np.zeros((2, 256, 256, 256), np.uint8)
    for at in np.ndindex(10, 10, 10):
        start = 25 * np.array(at) + generator.integers(0, 8, 3)
        reference[tuple(slice(a, a + 8) for a in start)] = 1
        prediction[tuple(slice(a + 1, a + 9) for a in start)] = 1
    begun = time.process_time()
    found = measured(prediction, reference)
    spent = time.process_time() - begun
    assert counted(found) == (1000, 0, 0)
    assert found.sq == pytest.approx(7**3 / (2 * 8**3 - 7**3), abs=1e-12)
    assert spent < 10


def test_memory_does_not_grow_with_the_number_of_lesions():
    reference = np.zeros((64, 64, 64), np.uint8)
    reference[::5, ::5, ::5] = 1
    tracemalloc.start()
    assert measured(reference, reference).tp == 2197
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # two label maps of four bytes, masks, and what a lesion is told with: a table of 2197 × 2197 pairs would be 38 MB
    assert peak < 19e6
