"""Two methods on the same units: the difference with its interval, paired tests, effect sizes, and many p-values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import rankdata

from medseg.statistics._intervals import BATCH_NUMBERS, SEED, Floats, mean_intervals, quantile, unit_codes

PERMUTATIONS = 9999
# Holm multiplies the smallest p by how many there are: at so many flips each it can still fall to 1 %
_FLIPS_PER_TEST = 100
# a p of 1 % of the first flips is known to a tenth of itself: further flips would decide nothing
_ENOUGH = 100
# up to here all outcomes are counted: of the ranks by their sum, of the sign flips one by one
_EXACT_RANKS = 100
_EXACT_FLIPS = 16
# doubles carry 16 digits, of which a difference and a mean lose a few
_DIGITS = 12
_SMALLEST = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class PairedTest:
    """What sets method a apart from method b on the same cases; None: too few values, or not defined.

    `n_cases` cases have a value of both, `n_finite` of them a finite difference; where `n_undefined` neither has one,
    where `n_one_undefined` only one. `mean_difference` (a − b) and `ci95` are over finite differences,
    `median_difference` over all. The tests compare `n` units, the patients where groups are given: in `better` of
    them a is better, in `worse` b is. `rank_biserial` and `cohens_dz` are positive where a is better.
    """

    n: int
    n_cases: int
    n_finite: int
    n_undefined: int
    n_one_undefined: int
    better: int
    worse: int
    equal: int
    mean_difference: float | None
    median_difference: float | None
    ci95: tuple[float, float] | None
    p_wilcoxon: float | None
    p_permutation: float | None
    rank_biserial: float | None
    cohens_dz: float | None


def compare_pair(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    higher_is_better: bool,
    groups: Sequence[Hashable] | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = SEED,
) -> PairedTest:
    """Compare two methods by a measure of the same cases, two-sided.

    A case in which either value is NaN is left out and counted. A distance may be inf (the method missed): inf − inf
    is 0; any other difference with inf is ±inf and takes the largest rank.

    `groups` names the patient of each case. `ci95` then resamples patients, and the tests use one number a patient:
    the mean of its differences, or, where some are infinite, ±inf after the sign that most of these have (if as many
    have either sign, the mean of the finite ones).

    Wilcoxon's signed-rank test (1945) leaves out units without a difference and averages tied ranks; exact up to 100
    units, above by the normal approximation with correction for ties. The permutation test flips signs; its statistic
    is the mean, or the sum of signed ranks where a difference is infinite. It counts all flips up to 16 units; above
    p = (k + 1)/(flips + 1), k of the `permutations` random flips being as extreme (Phipson & Smyth 2010). Without any
    difference p is 1. `rank_biserial`: rank sum in favour of a minus that of b, over both (Kerby 2014). `cohens_dz`:
    mean / SD. Raises `ValueError` if the lengths differ.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    pairs = [(first, second, higher_is_better)]
    return compare_pairs(pairs, groups=groups, permutations=permutations, seed=seed)[0]


def compare_pairs(
    pairs: Iterable[tuple[Floats, Floats, bool]],
    *,
    groups: Sequence[Hashable] | None = None,
    family: int | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = SEED,
) -> list[PairedTest]:
    """`compare_pair` of each of (a, b, higher_is_better) on the same cases; faster than one by one.

    `family`: how many of the p-values are adjusted together; None: all. The permutation test makes 100 random flips
    for each of them if that is more than `permutations`, so that an adjusted p can be as small as 0.01. Where 100 of
    the first flips are as extreme it stops, and p stays one (Besag & Clifford 1991).
    """
    codes: dict[int, npt.NDArray[np.intp]] = {}
    made = []
    for first, second, higher_is_better in pairs:
        if first.shape != second.shape:
            raise ValueError(f"{len(first)} values of one method with {len(second)} of the other")
        if len(first) not in codes:
            codes[len(first)] = unit_codes(groups, len(first))
        made.append(_Pair.of(first, second, higher_is_better, codes[len(first)]))
    intervals = mean_intervals(((pair.ordinary, pair.ordinary_units) for pair in made), seed=seed)
    flips = max(permutations, _FLIPS_PER_TEST * (len(made) if family is None else family))
    permuted = _permutation([pair.favour for pair in made], permutations, flips, seed)
    return [pair.test(ci95, p) for pair, ci95, p in zip(made, intervals, permuted)]


@dataclass(frozen=True)
class _Pair:
    """Differences by case, and by unit in favour of a: NaN where a unit has none."""

    differences: Floats
    units: npt.NDArray[np.intp]
    favour: Floats
    noise: float
    n_undefined: int
    n_one_undefined: int

    @staticmethod
    def of(first: Floats, second: Floats, higher_is_better: bool, units: npt.NDArray[np.intp]) -> _Pair:
        n_units = int(units.max()) + 1 if len(units) else 0
        undefined = np.isnan(first).astype(int) + np.isnan(second)
        kept = undefined == 0
        first, second, units = first[kept], second[kept], units[kept]
        noise = _noise(first, second)
        differences = differences_of(first, second)
        differences[np.abs(differences) <= noise] = 0.0
        of_units = _by_unit(differences, units, n_units)
        of_units[np.abs(of_units) <= noise] = 0.0
        return _Pair(
            differences=differences,
            units=units,
            favour=of_units if higher_is_better else -of_units,
            noise=noise,
            n_undefined=int((undefined == 2).sum()),
            n_one_undefined=int((undefined == 1).sum()),
        )

    @property
    def ordinary(self) -> Floats:
        return self.differences[np.isfinite(self.differences)]

    @property
    def ordinary_units(self) -> npt.NDArray[np.intp]:
        return self.units[np.isfinite(self.differences)]

    def test(self, ci95: tuple[float, float] | None, p_permutation: float | None) -> PairedTest:
        favour, ordinary = self.favour[~np.isnan(self.favour)], self.ordinary
        better, worse = int((favour > 0).sum()), int((favour < 0).sum())
        return PairedTest(
            n=len(favour),
            n_cases=len(self.differences),
            n_finite=len(ordinary),
            n_undefined=self.n_undefined,
            n_one_undefined=self.n_one_undefined,
            better=better,
            worse=worse,
            equal=len(favour) - better - worse,
            mean_difference=_mean(ordinary, self.noise) if len(ordinary) else None,
            median_difference=quantile(np.sort(self.differences), 0.5),
            ci95=ci95,
            p_wilcoxon=_wilcoxon(favour),
            p_permutation=p_permutation,
            rank_biserial=_rank_biserial(favour),
            cohens_dz=_cohens_dz(favour, self.noise),
        )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for how many there are (Holm 1979), in the given order; None and NaN stay and do not count."""
    known = sorted((p, n) for n, p in enumerate(p_values) if p is not None and not math.isnan(p))
    adjusted, highest = list(p_values), 0.0
    for rank, (p, n) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[n] = highest
    return adjusted


def differences_of(first: Floats, second: Floats) -> Floats:
    """First minus second, of any shape: inf minus inf is 0, and NaN stays."""
    same = first == second
    return np.asarray(np.where(same, 0.0, first) - np.where(same, 0.0, second))


def _noise(first: Floats, second: Floats) -> float:
    """Up to here numbers of this size differ by rounding only."""
    sizes = np.abs(np.concatenate([first, second]))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0) * 10.0**-_DIGITS)


def _by_unit(differences: Floats, units: npt.NDArray[np.intp], n_units: int) -> Floats:
    finite = np.isfinite(differences)
    cases = np.bincount(units, minlength=n_units)
    sizes = np.bincount(units, weights=finite, minlength=n_units)
    sums = np.bincount(units, weights=np.where(finite, differences, 0.0), minlength=n_units)
    surplus = np.bincount(units, weights=np.where(finite, 0.0, np.sign(differences)), minlength=n_units)
    means = np.where(surplus == 0, sums / np.maximum(sizes, 1), np.copysign(np.inf, surplus))
    return np.where(cases > 0, means, np.nan)


def _signed_ranks(favour: Floats) -> Floats:
    sizes = np.abs(favour[favour != 0])
    largest = sizes[np.isfinite(sizes)].max(initial=0.0)
    # differences that are equal but for rounding are tied
    sizes = np.round(sizes / largest, _DIGITS) if largest else sizes
    return np.asarray(np.copysign(rankdata(sizes), favour[favour != 0]))


def _wilcoxon(favour: Floats) -> float | None:
    if not len(favour):
        return None
    ranks = _signed_ranks(favour)
    n = len(ranks)
    if n == 0:
        return 1.0
    positive = float(ranks[ranks > 0].sum())
    if n <= _EXACT_RANKS:
        # average ranks are halves: doubled, they are whole
        chances = _rank_sum_chances(np.rint(2 * np.abs(ranks)).astype(int))
        sum_ = round(2 * positive)
        return _probability(2 * min(chances[: sum_ + 1].sum(), chances[sum_:].sum()))
    ties = np.unique(np.abs(ranks), return_counts=True)[1].astype(np.float64)
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((ties**3 - ties).sum()) / 48
    z = (positive - n * (n + 1) / 4) / math.sqrt(variance)
    return _probability(2 * ndtr(-abs(z)))


def _rank_sum_chances(ranks: npt.NDArray[np.int_]) -> Floats:
    """Chance of each sum of those `ranks` that are positive, if each sign is a fair coin."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in ranks:
        shifted = np.zeros_like(chances)
        shifted[rank:] = chances[: len(chances) - rank]
        chances = (chances + shifted) / 2
    return chances


def _permutation(favours: Sequence[Floats], first: int, flips: int, seed: int) -> list[float | None]:
    found: list[float | None] = []
    drawn = []
    for n, favour in enumerate(favours):
        found.append(None if np.isnan(favour).all() else 1.0)
        # what does not move adds nothing, whatever its sign
        moving = np.nan_to_num(favour, nan=0.0, posinf=np.inf, neginf=-np.inf)
        if not np.isfinite(moving).all():
            moving[moving != 0] = _signed_ranks(moving)
        if not moving.any():
            continue
        if np.count_nonzero(moving) <= _EXACT_FLIPS:
            found[n] = _all_flips(moving[moving != 0])
        else:
            drawn.append((n, moving))
    if drawn:
        columns = np.stack([moving for _, moving in drawn], axis=1)
        for (n, _), p in zip(drawn, _random_flips(columns, first, flips, np.random.default_rng(seed))):
            found[n] = _probability(p)
    return found


def _limit(moving: Floats) -> Floats:
    # sums that are equal but for rounding are as extreme
    return np.asarray(np.abs(moving.sum(axis=0)) - 10.0**-_DIGITS * np.abs(moving).sum(axis=0))


def _all_flips(moving: Floats) -> float:
    sums = np.zeros(1)
    for value in moving:
        sums = np.concatenate([sums + value, sums - value])
    return _probability((np.abs(sums) >= _limit(moving)).mean())


def _random_flips(columns: Floats, first: int, flips: int, generator: np.random.Generator) -> Floats:
    """p of each column: of `first` flips of the rows, or of all `flips` if few of the first are as extreme."""
    extreme, made = _as_extreme(columns, first, generator), np.full(columns.shape[1], first)
    rare = np.flatnonzero(extreme < _ENOUGH)
    if flips > first and len(rare):
        extreme[rare] += _as_extreme(columns[:, rare], flips - first, generator)
        made[rare] = flips
    return np.asarray((extreme + 1) / (made + 1))


def _as_extreme(columns: Floats, flips: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    """How many of the random flips of the rows bring the sum of each column at least as far from 0."""
    n = len(columns)
    limit, extreme = _limit(columns), np.zeros(columns.shape[1], dtype=np.intp)
    rows = max(1, BATCH_NUMBERS // max(columns.shape))
    for start in range(0, flips, rows):
        bits = generator.integers(0, 256, (min(rows, flips - start), -(-n // 8)), dtype=np.uint8)
        signs = 1.0 - 2.0 * np.unpackbits(bits, axis=1, count=n)
        extreme += (np.abs(signs @ columns) >= limit).sum(axis=0)
    return extreme


def _rank_biserial(favour: Floats) -> float | None:
    if not len(favour):
        return None
    ranks = _signed_ranks(favour)
    return float(ranks.sum() / np.abs(ranks).sum()) if len(ranks) else 0.0


def _cohens_dz(favour: Floats, noise: float) -> float | None:
    if len(favour) < 2 or not np.isfinite(favour).all() or np.ptp(favour) == 0:
        return None
    return _mean(favour, noise) / float(favour.std(ddof=1))


def _mean(values: Floats, noise: float) -> float:
    mean = float(values.mean())
    return mean if abs(mean) > noise else 0.0


def _probability(p: float) -> float:
    # a chance below what doubles hold is still above 0
    return min(1.0, max(float(p), _SMALLEST))
