"""Bland–Altman and the number of cases, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg.statistics import bland_altman, cases_needed, cases_to_show


def test_bias_and_limits_by_hand():
    # differences 1, 2, 3, 4, 5: mean 3, variance 2.5
    found = bland_altman([11, 12, 13, 14, 15], [10, 10, 10, 10, 10])
    sd = math.sqrt(2.5)
    assert (found.bias_ml, found.n) == (3, 5)
    assert found.sd_ml == pytest.approx(sd)
    assert (found.low_ml, found.high_ml) == pytest.approx((3 - 1.959964 * sd, 3 + 1.959964 * sd))


def test_intervals_of_bias_and_limits_by_hand():
    # t of 4 degrees of freedom is 2.776; SD/√5 of the bias, SD·√(3/5) of a limit
    found = bland_altman([11, 12, 13, 14, 15], [10, 10, 10, 10, 10])
    sd = math.sqrt(2.5)
    half = 2.776445 * sd / math.sqrt(5)
    assert found.bias_ci95_ml == pytest.approx((3 - half, 3 + half), rel=1e-6)
    wide = 2.776445 * sd * math.sqrt(3 / 5)
    assert found.low_ci95_ml == pytest.approx((found.low_ml - wide, found.low_ml + wide), rel=1e-6)
    assert found.high_ci95_ml == pytest.approx((found.high_ml - wide, found.high_ml + wide), rel=1e-6)


def test_a_pair_without_a_volume_is_left_out():
    assert bland_altman([1, 2, 3, math.nan], [1, 2, 3, 4]).n == 3


def test_constant_differences_have_limits_without_width():
    found = bland_altman([2, 3, 4], [1, 2, 3])
    assert (found.sd_ml, found.low_ml, found.high_ml, found.bias_ci95_ml) == (0, 1, 1, (1, 1))


def test_two_pairs_have_no_limits():
    assert bland_altman([1, 2], [1, 3]) is None


def test_as_many_volumes_on_both_sides():
    with pytest.raises(ValueError, match="2 predicted volumes with 3"):
        bland_altman([1, 2], [1, 2, 3])


def test_cases_needed_by_hand():
    # (1.959964 · 0.1 / 0.02)² = 96.04
    assert cases_needed(0.1, 0.02) == 97


def test_that_many_cases_give_an_interval_of_that_width():
    n = cases_needed(2.0, 0.1)
    means = np.random.default_rng(0).normal(0, 2, (2000, n)).mean(axis=1)
    # 95 of 100 means lie within 0.1; three standard errors of a share of 2000 are 1.5 of 100
    assert (np.abs(means) <= 0.1).mean() == pytest.approx(0.95, abs=0.015)


def test_an_interval_takes_three_cases_at_least():
    assert cases_needed(0.0, 0.01) == 3


@pytest.mark.parametrize(("sd", "half_width"), [(math.nan, 0.1), (-1, 0.1), (math.inf, 0.1), (1, 0), (1, math.nan)])
def test_what_is_no_spread_or_width_is_refused(sd, half_width):
    with pytest.raises(ValueError, match="found, expected"):
        cases_needed(sd, half_width)


def test_cases_to_show_by_hand():
    # ((1.959964 + 0.841621) · 0.1 / 0.02)² = 196.2
    assert cases_to_show(0.1, 0.02) == 197


def test_that_many_cases_find_the_difference_in_four_of_five_trials():
    n = cases_to_show(2.0, 0.5)
    means = np.random.default_rng(1).normal(0.5, 2, (4000, n)).mean(axis=1)
    # four standard errors of a share of 4000 are 2.5 of 100
    assert (means > 1.959964 * 2 / math.sqrt(n)).mean() == pytest.approx(0.8, abs=0.025)
