"""Ranks of methods and their stability, by hand and by what must always hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.statistics import rank_all, rank_methods

INF, NAN = math.inf, math.nan


def test_mean_ranks_by_hand():
    # units: a first, then b first, then a and b tied behind c
    found = rank_methods([[0.9, 0.5, 0.4], [0.8, 0.6, 0.4], [0.1, 0.2, 0.9]], higher_is_better=True)
    assert found.mean_rank == pytest.approx([(1 + 2 + 2.5) / 3, (2 + 1 + 2.5) / 3, (3 + 3 + 1) / 3])
    assert found.place.tolist() == [1, 1, 3]
    assert found.n == 3


def test_missing_comes_after_infinite():
    found = rank_methods([[3.0], [INF], [NAN]], higher_is_better=False)
    assert found.mean_rank.tolist() == [1, 2, 3]


def test_missing_comes_after_the_worst_overlap():
    assert rank_methods([[NAN], [0.0]], higher_is_better=True).mean_rank.tolist() == [2, 1]


def test_a_unit_that_nobody_has_is_left_out():
    assert rank_methods([[NAN, 1.0], [NAN, 2.0]], higher_is_better=False).n == 1


def test_of_nothing_there_is_no_order():
    found = rank_methods(np.zeros((2, 0)), higher_is_better=True)
    assert (found.n, found.place_shares, found.place.tolist()) == (0, None, [1, 1])


def test_two_units_have_no_stability():
    found = rank_methods([[1.0, 2.0], [3.0, 4.0]], higher_is_better=True)
    assert (found.place.tolist(), found.first_share, found.kendall_tau) == ([2, 1], None, None)


def test_always_best_is_always_first():
    found = rank_methods([[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]], higher_is_better=False)
    assert found.first_share.tolist() == [1, 0, 0]
    assert found.place_ci95.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert found.kendall_tau == 1


def test_methods_that_are_equal_share_the_first_place():
    found = rank_methods([[1, 2, 3], [1, 2, 3]], higher_is_better=True)
    assert found.place_shares.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert found.kendall_tau is None


def test_a_coin_is_first_in_half_of_the_resamples():
    # 50 wins each: of 100 fair draws as many are above 50 as below; 1 in 2000 is 0.0112, four times that is left
    wins = np.r_[np.ones(50), np.zeros(50)]
    found = rank_methods([wins, 1 - wins], higher_is_better=True)
    assert found.first_share[0] == pytest.approx(0.5, abs=0.045)


def test_the_chance_of_staying_first_is_that_of_the_binomial():
    # a wins 3 of 5 units: a resample of 5 keeps a first where 3 or more draws are wins: 0.68256
    found = rank_methods([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], higher_is_better=True)
    chance = sum(math.comb(5, k) * 0.6**k * 0.4 ** (5 - k) for k in (3, 4, 5))
    assert found.first_share[0] == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 2000))
    assert found.kendall_tau == pytest.approx(2 * found.first_share[0] - 1)


def test_patients_are_resampled_whole():
    wins = np.array([1, 1, 1, 0, 0] * 20)
    copied = rank_methods([wins, 1 - wins], higher_is_better=True, groups=list("abcde") * 20)
    alone = rank_methods([wins[:5], 1 - wins[:5]], higher_is_better=True)
    assert copied.first_share.tolist() == alone.first_share.tolist()


def test_values_without_units_are_refused():
    with pytest.raises(ValueError, match="expected \\(methods, units\\)"):
        rank_methods([1.0, 2.0], higher_is_better=True)


def test_many_rankings_at_once_are_those_of_one_by_one():
    rng = np.random.default_rng(3)
    tables = [rng.uniform(size=(3, n)) for n in (9, 9, 2)]
    for found, values in zip(rank_all([(values, True, None) for values in tables]), tables):
        alone = rank_methods(values, higher_is_better=True)
        assert found.mean_rank.tolist() == alone.mean_rank.tolist()
        assert (found.kendall_tau, found.n) == (alone.kendall_tau, alone.n)


@given(st.integers(1, 4), st.integers(3, 8), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_shares_and_ranks_add_up(n_methods, n_units, seed):
    values = np.random.default_rng(seed).integers(0, 4, (n_methods, n_units)).astype(float)
    found = rank_methods(values, higher_is_better=True)
    assert found.mean_rank.mean() == pytest.approx((n_methods + 1) / 2)
    assert found.place_shares.sum(axis=0) == pytest.approx(np.ones(n_methods))
    assert found.place_shares.sum(axis=1) == pytest.approx(np.ones(n_methods))
    turned = rank_methods(values[::-1], higher_is_better=True)
    assert turned.mean_rank == pytest.approx(found.mean_rank[::-1])
