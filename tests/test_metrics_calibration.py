"""Reliability of probabilities against answers worked by hand; merging is pooling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg.metrics import calibration
from medseg.metrics.calibration import Bins, reliability


def two(foreground):
    """Background and one label that add up to 1."""
    foreground = np.asarray(foreground, np.float64)
    return np.stack([1 - foreground, foreground])


def test_nine_tenths_of_which_half_is_right_is_off_by_four_tenths():
    found = reliability(two([0.9, 0.9, 0.9, 0.9]), np.array([1, 1, 0, 0]), [0, 1])
    assert found.ece == pytest.approx(0.4, abs=1e-12)
    # each channel is off by the same: 0.1 where half is right
    assert found.labels[0].ece == pytest.approx(0.4, abs=1e-12)
    assert found.labels[1].ece == pytest.approx(0.4, abs=1e-12)


def test_shares_that_are_as_probable_as_said_have_no_error():
    # of ten voxels at 0.7 seven are label 1, of five at 0.2 one is
    foreground = [0.7] * 10 + [0.2] * 5
    reference = np.array([1] * 7 + [0] * 3 + [1] + [0] * 4)
    found = reliability(two(foreground), reference, [0, 1], bins=10)
    assert found.ece == pytest.approx(0, abs=1e-12)
    assert found.labels[1].ece == pytest.approx(0, abs=1e-12)


def test_the_curve_tells_each_bin_and_empty_ones():
    found = reliability(two([0.25, 0.75, 1.0]), np.array([0, 1, 0]), [0, 1], bins=2).labels[1].curve
    low, high = found
    assert (low.low, low.high, low.n, low.confidence, low.correct) == (0.0, 0.5, 1, 0.25, 0.0)
    assert (high.low, high.high, high.n, high.confidence, high.correct) == (0.5, 1.0, 2, 0.875, 0.5)
    overall = reliability(two([0.25, 0.75, 1.0]), np.array([0, 1, 0]), [0, 1], bins=2).curve
    assert overall[0].n == 0
    assert math.isnan(overall[0].confidence)
    assert math.isnan(overall[0].correct)


def test_an_edge_belongs_to_the_bin_below_and_nothing_to_the_first():
    found = reliability(np.array([[0.0, 0.5, 0.75]]), np.array([0, 0, 0]), [(1,)], regions=True, bins=4)
    assert found.labels[(1,)].count.tolist() == [1, 1, 1, 0]


def test_merging_cases_is_pooling_their_voxels():
    generator = np.random.default_rng(0)
    foreground, reference = generator.random((6, 7)), generator.integers(0, 2, (6, 7))
    parts = [reliability(two(foreground[n]), reference[n], [0, 1]) for n in range(6)]
    merged = sum(parts[1:], parts[0])
    pooled = reliability(two(foreground), reference, [0, 1])
    assert merged.n_cases == 6
    for one, other in zip([merged.overall, *merged.labels.values()], [pooled.overall, *pooled.labels.values()]):
        assert one.count.tolist() == other.count.tolist()
        assert one.correct.tolist() == other.correct.tolist()
        assert one.confidence == pytest.approx(other.confidence, abs=1e-12)


def test_the_strongest_label_is_the_first_of_equal_ones():
    third = np.full((3, 2), 1 / 3)
    found = reliability(third, np.array([0, 7]), [0, 3, 7], bins=1)
    # background is said of both and right once
    assert found.overall.correct.tolist() == [1]
    assert found.ece == pytest.approx(1 / 2 - 1 / 3, abs=1e-12)


def test_regions_overlap_and_are_pooled():
    # whole = 1 or 2, core = 2
    probabilities = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    found = reliability(probabilities, np.array([1, 2, 0]), [(1, 2), (2,)], regions=True)
    assert found.labels[(1, 2)].ece == 0.0
    # the last voxel is said to be core and is not
    assert found.labels[(2,)].ece == pytest.approx(1 / 3, abs=1e-12)
    assert found.overall.n == 6
    assert found.ece == pytest.approx(1 / 6, abs=1e-12)


def test_ignored_voxels_are_left_out():
    found = reliability(two([0.9, 0.9, 0.5]), np.array([1, 9, 9]), [0, 1], ignore_value=9)
    assert found.overall.n == 1
    assert found.ece == pytest.approx(0.1, abs=1e-12)


def test_nothing_to_look_at_has_no_error_to_tell():
    found = reliability(two([0.9]), np.array([9]), [0, 1], ignore_value=9)
    assert found.overall.n == 0
    assert math.isnan(found.ece)


def test_pieces_make_no_difference(monkeypatch):
    generator = np.random.default_rng(1)
    foreground, reference = generator.random((4, 5, 6)), generator.integers(0, 2, (4, 5, 6))
    whole = reliability(two(foreground), reference, [0, 1])
    monkeypatch.setattr(calibration, "_VOXELS", 7)
    pieces = reliability(two(foreground), reference, [0, 1])
    assert pieces.overall.count.tolist() == whole.overall.count.tolist()
    assert pieces.ece == pytest.approx(whole.ece, abs=1e-12)


def test_channels_may_come_one_by_one():
    probabilities, reference = two([[0.9, 0.2]]), np.array([[1, 1]])
    whole = reliability(probabilities, reference, [0, 1])
    assert reliability((c for c in probabilities), reference, [0, 1]).ece == whole.ece


@pytest.mark.parametrize("wrong", [-0.5, 1.5, math.nan])
def test_numbers_that_are_no_probabilities_are_refused(wrong):
    with pytest.raises(ValueError, match="expected probabilities"):
        reliability(np.array([[wrong], [0.5]]), np.array([0]), [0, 1])


def test_other_shapes_and_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="channel 1 of shape"):
        reliability(np.zeros((2, 3)), np.zeros(4, int), [0, 1])
    with pytest.raises(ValueError, match="1 channels found, expected 2"):
        reliability(np.zeros((1, 3)), np.zeros(3, int), [0, 1])
    with pytest.raises(ValueError, match="expected 2"):
        reliability(np.zeros((3, 3)), np.zeros(3, int), [0, 1])


def test_bins_of_another_number_cannot_be_merged():
    with pytest.raises(ValueError, match="one number of bins"):
        Bins.empty(10) + Bins.empty(15)
