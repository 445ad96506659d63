"""Bland–Altman and the number of cases, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg.statistics import bland_altman, cases_needed, cases_to_show, summarise, unit_sd


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


def test_patients_of_as_many_cases_spread_as_their_means_do():
    means, within = [0.8, 0.825, 0.85, 0.875, 0.9], [-0.01, 0.01] * 5
    values = [mean + apart for mean in means for apart in within]
    sd = unit_sd(values, groups=[patient for patient in "abcde" for _ in within])
    # squares of 0.05, 0.025, 0, 0.025, 0.05 over 4
    assert sd == pytest.approx(math.sqrt(0.00625 / 4))
    # (1.959964 · 0.0395285 / 0.02)² = 15.006; of fifty scans taken one by one it would be 14
    assert cases_needed(sd, 0.02) == 16


def test_without_patients_every_value_is_a_unit():
    assert unit_sd([1.0, math.nan, 2.0, 3.0]) == pytest.approx(1.0)


def test_two_units_do_not_tell_their_spread():
    assert unit_sd([1, 2, 3, 4], groups="aabb") is None


def test_patients_of_many_cases_weigh_more():
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 12, 400)
    patients = np.repeat(np.arange(400), sizes)
    values = rng.normal(0, 1, 400)[patients] + rng.normal(0, 0.5, len(patients))
    low, high = summarise(values, groups=list(patients)).ci95
    # the bootstrap of patients gives the same width: of 2000 resamples it is known to a few in 100
    assert 2 * 1.959964 * unit_sd(values, groups=list(patients)) / math.sqrt(400) == pytest.approx(high - low, rel=0.08)


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
