"""Summaries and their intervals, with infinite, constant, grouped and too few values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from medseg.statistics import summarise, summarise_all


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


def test_the_mean_of_equal_values_is_that_value():
    # six times 0.7 sum up to 4.2 and a little
    found = summarise([0.7] * 6)
    assert (found.mean, found.sd) == (0.7, 0)


def test_infinite_values_alone_have_no_mean_and_no_interval():
    found = summarise([math.inf] * 5)
    assert (found.mean, found.ci95, found.median, found.n, found.n_finite) == (None, None, math.inf, 5, 0)


def test_nan_alone_is_nothing():
    assert summarise([math.nan] * 4) == summarise([])


def test_an_interval_is_of_the_finite_values():
    assert summarise([1, 2, 4, 8, math.inf]).ci95 == summarise([1, 2, 4, 8]).ci95


def test_two_patients_have_no_interval_however_many_scans():
    assert summarise([0.5, 0.6, 0.7, 0.8], groups=["a", "a", "b", "b"]).ci95 is None


def widened(n):
    """The confidence at which a bootstrap of `n` normal values is as wide as Student's interval at 95%."""
    half = stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))
    return 1 - 2 * stats.norm.cdf(-half)


def test_95_percent_intervals_of_eight_values_cover_the_mean_in_more_than_92_percent():
    # 94% of 3000 ± 0.4%; without widening it is 88%
    lists = np.random.default_rng(1).normal(size=(3000, 8))
    assert np.mean([found.ci95[0] <= 0 <= found.ci95[1] for found in summarise_all(lists)]) > 0.92


def test_an_interval_of_three_values_is_their_range():
    assert summarise([1, 2, 4]).ci95 == pytest.approx((1, 4))


def test_the_interval_holds_the_mean_where_one_patient_has_nearly_all_scans():
    found = summarise(np.arange(1000.0), groups=["a"] * 998 + ["b", "c"])
    # resamples of one patient alone: that of the first has the mean of 0 to 997
    assert found.ci95 == pytest.approx((498.5, 999))
    assert found.ci95[0] <= found.mean <= found.ci95[1]


@pytest.mark.parametrize("n", [12, 40, 1500])
def test_the_interval_is_that_of_scipy(n):
    # 1500 are drawn in blocks; with fewer than 12, draws of every unit once are frequent: scipy rounds these apart
    values = np.random.default_rng(n).gamma(2, 1, n)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=2000,
        method="BCa",
        batch=100,
        confidence_level=widened(n),
        random_state=np.random.default_rng(11),
    ).confidence_interval
    assert summarise(values, seed=11).ci95 == pytest.approx((expected.low, expected.high))


def test_many_lists_at_once_are_summarised_as_one_by_one():
    rng = np.random.default_rng(2)
    lists = [rng.uniform(size=12) for _ in range(3)] + [
        np.full(12, 0.5),
        np.r_[rng.uniform(size=10), math.nan, math.inf],
    ]
    groups = list("aabbccddeeff")
    # sums over several columns at a time are rounded otherwise
    for found, values in zip(summarise_all(lists, groups=groups), lists):
        alone = summarise(values, groups=groups)
        assert found.ci95 == pytest.approx(alone.ci95)
        assert (found.mean, found.sd, found.n, found.n_finite) == (alone.mean, alone.sd, alone.n, alone.n_finite)
