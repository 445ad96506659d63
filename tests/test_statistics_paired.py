"""Paired tests of two methods: by hand, against scipy, with infinite values and patients, and what must always hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medseg.statistics import compare_pair, compare_pairs, holm

INF, NAN = math.inf, math.nan


def compare(differences, **options):
    """Method a is as far above 0, which method b always has, as `differences` say."""
    return compare_pair(differences, [0.0] * len(differences), **{"higher_is_better": True, **options})


# ---- by hand


def test_means_counts_and_the_sign_of_the_difference():
    found = compare_pair([0.9, 0.5, 0.7, 0.7], [0.8, 0.6, 0.7, 0.3], higher_is_better=True)
    assert (found.n, found.better, found.worse, found.equal) == (4, 2, 1, 1)
    assert found.mean_difference == pytest.approx((0.1 - 0.1 + 0 + 0.4) / 4)
    assert found.median_difference == pytest.approx(0.05)


def test_five_gains_are_as_likely_as_two_of_32_signs():
    found = compare([1, 2, 3, 4, 5])
    assert found.p_wilcoxon == found.p_permutation == 2 / 32


def test_gains_that_cancel_are_no_evidence():
    # sums of ±1 ±2 ±3 are all as far from 0 as 0 is; rank sums of at most 3 have chance 5/8
    found = compare([1, 2, -3])
    assert found.p_wilcoxon == found.p_permutation == 1
    assert found.rank_biserial == 0


def test_tied_differences_by_hand():
    # ranks 1.5, 1.5, 3: rank sums 0, 1.5, 1.5, 3, 3, 4.5, 4.5, 6; that of a is 4.5: 2 · 3/8
    found = compare([1, -1, 2])
    assert found.p_wilcoxon == 0.75
    # of the sums ±1 ±1 ±2, six of eight are 2 or further from 0
    assert found.p_permutation == 0.75


def test_the_effect_is_the_surplus_of_the_rank_sum():
    # ranks 1 + 2 + 3 for a, 4 for b
    assert compare([1, 2, 3, -4]).rank_biserial == pytest.approx((6 - 4) / 10)


def test_effects_are_positive_where_the_first_method_is_better():
    found = compare([-1, -2, -3, -5], higher_is_better=False)
    assert found.rank_biserial == 1
    assert found.better == 4
    assert found.cohens_dz == pytest.approx(2.75 / np.std([1, 2, 3, 5], ddof=1))
    assert found.mean_difference == -2.75


def test_no_difference_anywhere_gives_p_of_1():
    found = compare([0, 0, 0, 0])
    assert (found.p_wilcoxon, found.p_permutation, found.rank_biserial, found.cohens_dz) == (1, 1, 0, None)
    assert (found.equal, found.mean_difference, found.ci95) == (4, 0, (0, 0))


def test_units_without_a_difference_say_nothing_to_the_tests():
    few, many = compare([1, 2, 3, 4, 5]), compare([1, 2, 3, 4, 5, 0, 0, 0])
    assert many.p_wilcoxon == few.p_wilcoxon
    assert many.p_permutation == few.p_permutation
    assert many.equal == 3


def test_differences_of_rounding_are_none():
    found = compare_pair([0.1 + 0.2, 0.5], [0.3, 0.5], higher_is_better=True)
    assert (found.equal, found.p_wilcoxon) == (2, 1)


def test_differences_that_are_equal_but_for_rounding_are_tied():
    assert 0.4 - 0.3 != 0.9 - 0.8
    found = compare_pair([0.4, 0.8, 0.5], [0.3, 0.9, 0.3], higher_is_better=True)
    assert found.p_wilcoxon == 0.75


def test_differences_that_cancel_but_for_rounding_have_no_mean():
    # 0.1 + 0.05 − 0.15 in doubles is 2.8e-17
    found = compare_pair([0.9, 0.7, 0.65], [0.8, 0.65, 0.8], higher_is_better=True)
    assert (found.mean_difference, found.cohens_dz) == (0, 0)


def test_of_nothing_no_p():
    found = compare([])
    assert (found.n, found.p_wilcoxon, found.p_permutation, found.mean_difference) == (0, None, None, None)


def test_one_case_shows_nothing():
    found = compare([0.3])
    assert (found.p_wilcoxon, found.p_permutation, found.ci95, found.cohens_dz) == (1, 1, None, None)


def test_pairs_without_a_value_are_left_out_and_counted():
    found = compare_pair([NAN, 0.5, NAN, 0.9], [NAN, 0.4, 0.3, NAN], higher_is_better=True)
    assert (found.n_cases, found.n_undefined, found.n_one_undefined) == (1, 1, 2)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 values of one method with 1"):
        compare_pair([1, 2], [1], higher_is_better=True)


# ---- infinite values


def test_a_missed_organ_has_the_largest_rank_and_no_place_in_the_mean():
    # a is better by 1 and 2 mm, but missed once: ranks 1 and 2 for a, 3 for b
    found = compare_pair([4, 3, INF], [5, 5, 9], higher_is_better=False)
    assert (found.better, found.worse, found.n_finite, found.mean_difference) == (2, 1, 2, -1.5)
    assert found.rank_biserial == 0
    assert found.cohens_dz is None


def test_missed_by_both_is_no_difference():
    found = compare_pair([INF, 1], [INF, 2], higher_is_better=False)
    assert (found.equal, found.better, found.mean_difference) == (1, 1, -0.5)


def test_several_missed_organs_share_the_largest_rank():
    # of a: 1, of b: (2.5 + 2.5)
    found = compare_pair([4, INF, INF], [5, 1, 2], higher_is_better=False)
    assert found.rank_biserial == pytest.approx((1 - 5) / 6)


def test_with_infinite_differences_the_permutation_test_works_on_ranks():
    # signed ranks −1, −2, −3, −4, −5: two of 32 sums are as far from 0
    found = compare_pair([2, 3, 4, 5, INF], [1, 1, 1, 1, 1], higher_is_better=False)
    assert found.p_permutation == 2 / 32


def test_the_median_difference_includes_infinite_ones():
    assert compare_pair([INF, INF, 1], [1, 1, 1], higher_is_better=False).median_difference == INF
    assert compare_pair([INF, 1], [1, INF], higher_is_better=False).median_difference is None


# ---- patients


def test_the_patient_is_the_unit_of_the_tests():
    # ten scans of each of five patients know no more than the five patients do
    few = compare([1, 2, 3, 4, 5])
    many = compare([1, 2, 3, 4, 5] * 10, groups=list("abcde") * 10)
    assert (many.n, many.n_cases) == (5, 50)
    assert (many.p_wilcoxon, many.p_permutation) == (few.p_wilcoxon, few.p_permutation)
    assert many.ci95 == pytest.approx(few.ci95)
    assert many.cohens_dz == pytest.approx(few.cohens_dz)


def test_a_patient_is_judged_by_the_mean_of_its_scans():
    # a: 0.3 − 0.1, b: −0.2, c: 0.1 + 0.2 − 0.3
    found = compare([0.3, -0.1, -0.2, 0.1, 0.2, -0.3], groups=list("aabccc"))
    assert (found.better, found.worse, found.equal) == (1, 1, 1)


def test_an_infinite_scan_decides_over_its_patient():
    values = [INF, 1, INF, 2, 5, INF], [1, 9, 1, INF, 4, INF]
    # a: +∞ and a finite one; b: +∞ and −∞ cancel; c: 1 and ∞ − ∞ = 0
    found = compare_pair(*values, groups=list("aabbcc"), higher_is_better=False)
    assert (found.worse, found.equal, found.better) == (2, 1, 0)
    assert found.rank_biserial == -1


# ---- against scipy


@pytest.mark.parametrize("n", [4, 9, 12, 40])
def test_wilcoxon_is_that_of_scipy_where_no_ranks_are_tied(n):
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    assert compare(differences).p_wilcoxon == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_wilcoxon_of_many_with_ties_is_that_of_scipy():
    differences = np.random.default_rng(0).integers(-8, 11, 150).astype(float)
    expected = stats.wilcoxon(differences, method="approx", zero_method="wilcox", correction=False).pvalue
    assert compare(differences).p_wilcoxon == pytest.approx(expected)


def test_exact_and_normal_wilcoxon_meet():
    # at 100 units the normal approximation is off by less than a hundredth of p
    differences = np.random.default_rng(5).normal(0.2, 1, 100)
    normal = stats.wilcoxon(differences, method="approx").pvalue
    assert compare(differences).p_wilcoxon == pytest.approx(normal, rel=0.01)


def test_the_exact_permutation_test_is_that_of_scipy():
    differences = np.random.default_rng(3).normal(0.4, 1, 10)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert compare(differences).p_permutation == pytest.approx(expected)


def test_random_flips_agree_with_all_flips():
    differences = np.random.default_rng(4).normal(0.35, 1, 17)
    flips = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = (np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9).mean()
    # four standard errors of 9,999 random flips
    room = 4 * math.sqrt(exact * (1 - exact) / 9999)
    assert 0.02 < exact < 0.5
    assert compare(differences).p_permutation == pytest.approx(exact, abs=room)


def test_random_flips_give_the_same_p_again_and_another_for_another_seed():
    differences = np.random.default_rng(4).normal(0.35, 1, 30)
    assert compare(differences).p_permutation == compare(differences).p_permutation
    assert compare(differences).p_permutation != compare(differences, seed=1).p_permutation


def test_the_smallest_p_of_random_flips_is_one_in_their_number_plus_one():
    assert compare([1.0] * 60, permutations=999).p_permutation == 1 / 1000


def many_tests(n_tests, n_units=40):
    """Pairs of methods of which the first differs by 1 everywhere and the others by noise."""
    noise = np.random.default_rng(2).normal(size=(n_tests - 1, n_units))
    return [(row, np.zeros(n_units), True) for row in (np.ones(n_units), *noise)]


def test_a_clear_difference_can_be_shown_among_a_thousand_tests():
    # 9,999 flips alone leave 1/10,000 · 1000
    p = holm([test.p_permutation for test in compare_pairs(many_tests(1000))])
    assert p[0] == pytest.approx(1000 / 100_001)


def test_the_family_may_be_part_of_the_tests():
    found = compare_pairs(many_tests(1000), family=200)
    assert found[0].p_permutation == pytest.approx(1 / 20_001)


def test_a_p_that_is_not_rare_takes_no_more_flips():
    alone = [compare_pair(*pair[:2], higher_is_better=True).p_permutation for pair in many_tests(30)[1:]]
    of_many = [test.p_permutation for test in compare_pairs(many_tests(30), family=1000)[1:]]
    assert all(p == q for p, q in zip(alone, of_many) if p > 0.0101)
    assert sum(p > 0.0101 for p in alone) > 20


def test_a_rare_p_is_known_to_more_digits_with_more_flips():
    differences = np.random.default_rng(4).normal(1.5, 1, 17)
    flips = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = (np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert 5e-5 < exact < 5e-4
    found = compare_pairs([(differences, np.zeros(17), True)], family=5000)[0].p_permutation
    # four standard errors of 500,000 random flips
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / 500_000))


def test_p_of_a_great_many_gains_is_above_0():
    assert 0 < compare(np.arange(1.0, 3001)).p_wilcoxon < 1e-300


def test_the_interval_of_the_difference_is_that_of_scipy():
    differences = np.random.default_rng(8).gamma(2, 1, 25) - 1
    # widened as Student's t is: at 24 degrees of freedom and a variance of 24/25
    half = stats.t.ppf(0.975, 24) * math.sqrt(25 / 24)
    expected = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=2000,
        method="BCa",
        confidence_level=1 - 2 * stats.norm.cdf(-half),
        random_state=np.random.default_rng(7),
    ).confidence_interval
    assert compare(differences, seed=7).ci95 == pytest.approx((expected.low, expected.high))


# ---- what must always hold

# multiples of 1/64 below 8 are added and subtracted without rounding
exact_numbers = st.integers(-512, 512).map(lambda n: n / 64)
distances = st.one_of(st.integers(0, 512).map(lambda n: n / 64), st.just(INF), st.just(NAN))


@given(st.lists(st.tuples(distances, distances), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_swapping_the_methods_swaps_the_answer(pairs, higher_is_better):
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    one = compare_pair(a, b, higher_is_better=higher_is_better)
    other = compare_pair(b, a, higher_is_better=higher_is_better)
    assert (one.better, one.worse, one.equal) == (other.worse, other.better, other.equal)
    assert (one.n, one.n_finite, one.n_undefined) == (other.n, other.n_finite, other.n_undefined)
    assert one.p_wilcoxon == pytest.approx(other.p_wilcoxon)
    if one.n:
        assert one.rank_biserial == pytest.approx(-other.rank_biserial)
        assert 0 < one.p_permutation <= 1
        assert 0 < one.p_wilcoxon <= 1
        assert -1 <= one.rank_biserial <= 1
    # a random flip and its mirror image are not both among those drawn: only exact tests are equal
    if one.n <= 16:
        assert one.p_permutation == other.p_permutation
    if one.n_finite:
        assert one.mean_difference == pytest.approx(-other.mean_difference)


@given(st.lists(st.tuples(exact_numbers, exact_numbers), min_size=1, max_size=12), exact_numbers)
@settings(max_examples=40, deadline=None)
def test_a_constant_added_to_both_changes_nothing(pairs, shift):
    a, b = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    plain, moved = (compare_pair(a + s, b + s, higher_is_better=True) for s in (0.0, shift))
    assert plain == moved


@given(st.lists(st.one_of(st.floats(0, 1), st.none(), st.just(NAN)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_adjusted_p_is_no_smaller_keeps_the_order_and_stays_below_1(values):
    adjusted = holm(values)
    known = [n for n, p in enumerate(values) if p is not None and not math.isnan(p)]
    assert all(values[n] <= adjusted[n] <= max(1, values[n]) for n in known)
    assert all(adjusted[n] <= adjusted[m] for n in known for m in known if values[n] <= values[m])
    assert sum(p is None for p in adjusted) == sum(p is None for p in values)


# ---- many at once


def test_many_pairs_at_once_are_compared_as_one_by_one():
    rng = np.random.default_rng(6)
    a, b = rng.uniform(size=(2, 4, 30))
    b[1] = a[1]
    a[2, :3], b[2, 5] = INF, NAN
    for found, x, y in zip(compare_pairs([(x, y, False) for x, y in zip(a, b)]), a, b):
        alone = compare_pair(x, y, higher_is_better=False)
        assert (found.p_permutation, found.p_wilcoxon, found.n) == (alone.p_permutation, alone.p_wilcoxon, alone.n)
        assert found.ci95 == pytest.approx(alone.ci95)


# ---- many p-values


def test_holm_by_hand():
    # 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1 raised to the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stops_at_1_and_passes_what_is_no_p():
    adjusted = holm([0.6, None, 0.7, NAN])
    assert adjusted[:3] == [1, None, 1]
    assert math.isnan(adjusted[3])


def test_holm_of_one_p_is_that_p():
    assert holm([0.03]) == [0.03]
