"""Summaries and their intervals, with infinite, constant, grouped and too few values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg.statistics import summarise


def test_mean_spread_and_quartiles_by_hand():
    found = summarise([1, 2, 3, 4, 5])
    assert (found.mean, found.median, found.q1, found.q3, found.n) == (3, 3, 2, 4, 5)
    assert found.sd == pytest.approx(math.sqrt(2.5))


def test_nan_is_left_out():
    found = summarise([math.nan, 1, 3])
    assert (found.mean, found.n) == (2, 2)


def test_infinite_values_count_in_quartiles_but_not_in_the_mean():
    found = summarise([1, 2, 3, math.inf, math.inf])
    assert (found.median, found.q3, found.mean, found.n, found.n_finite) == (3, math.inf, 2, 5, 3)


def test_a_quartile_beside_an_infinite_value_is_infinite():
    assert summarise([1, math.inf]).median == math.inf


def test_nothing_gives_nothing():
    found = summarise([])
    assert (found.mean, found.sd, found.median, found.ci95, found.n) == (None, None, None, None, 0)


def test_one_value_has_no_spread_and_no_interval():
    found = summarise([0.5])
    assert (found.mean, found.sd, found.median, found.ci95) == (0.5, None, 0.5, None)


def test_two_values_have_no_interval():
    assert summarise([0.5, 0.6]).ci95 is None


def test_constant_values_have_an_interval_without_width():
    assert summarise([0.7] * 6).ci95 == (0.7, 0.7)


def test_the_interval_is_that_of_theory():
    # for many values from one distribution: mean ± 1.96 sd/√n; 15% of the width is left to resampling and skew
    values = np.random.default_rng(0).normal(10, 2, 400)
    half = 1.96 * values.std(ddof=1) / 20
    low, high = summarise(values).ci95
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_same_values_give_the_same_interval():
    values = [0.1, 0.5, 0.7, 0.9]
    assert summarise(values).ci95 == summarise(values).ci95


def test_grouped_values_are_drawn_together():
    # ten copies of the same three patients know no more than the three patients do
    patients = [0.2, 0.5, 0.9, 0.4]
    copied = summarise(patients * 10, groups=["a", "b", "c", "d"] * 10).ci95
    assert copied == pytest.approx(summarise(patients).ci95)
    alone = summarise(patients * 10).ci95
    assert alone[1] - alone[0] < 0.5 * (copied[1] - copied[0])


def test_groups_of_equal_sums_fall_back_to_a_finite_interval():
    # every resample of the patients has the mean 0.5, where BCa is not defined
    assert summarise([0.4, 0.6] * 4, groups=[n // 2 for n in range(8)]).ci95 == pytest.approx((0.5, 0.5))


def test_as_many_groups_as_values():
    with pytest.raises(ValueError, match="3 values with 2 groups"):
        summarise([1, 2, 3], groups=["a", "b"])
