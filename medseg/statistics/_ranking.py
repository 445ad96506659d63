"""The order of several methods on the same units, and how firm it is."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from medseg.statistics._intervals import CONFIDENCE, MINIMUM_UNITS, SEED, Floats, resampled, unit_codes


@dataclass(frozen=True)
class Ranking:
    """Methods in the order in which they were given.

    `mean_rank`: (methods,), from 1 for always best. `place`: 1 for the lowest mean rank, shared where equal.
    `place_shares`: (methods, methods), the share of bootstrap resamples that gave a method each place, from the first
    on; a place that several share counts to each in part. `place_ci95`: the middle 95% of these places. `kendall_tau`:
    mean of Kendall's τ-b between the order and that of each resample. None below three units. `n` units were ranked.
    """

    mean_rank: Floats
    place: npt.NDArray[np.int_]
    n: int
    place_shares: Floats | None
    place_ci95: npt.NDArray[np.int_] | None
    kendall_tau: float | None

    @property
    def first_share(self) -> Floats | None:
        """Share of resamples in which each method came first: (methods,)."""
        return None if self.place_shares is None else self.place_shares[:, 0]


def rank_methods(
    values: Sequence[Sequence[float]] | Floats,
    *,
    higher_is_better: bool,
    groups: Sequence[Hashable] | None = None,
    seed: int = SEED,
) -> Ranking:
    """Rank methods on every unit, average the ranks, and repeat on bootstrap resamples of the units.

    `values`: (methods, units). Ties share the average rank; NaN is worse than any value; a unit where all are NaN is
    left out. `groups` names the patient of each unit: patients are resampled. The stability of a ranking under the
    bootstrap follows Wiesenfarth et al. 2021 (challengeR). Raises `ValueError` for no method, or other lengths.
    """
    return rank_all([(np.asarray(values, dtype=np.float64), higher_is_better, groups)], seed=seed)[0]


def rank_all(tables: Iterable[tuple[Floats, bool, Sequence[Hashable] | None]], *, seed: int = SEED) -> list[Ranking]:
    """`rank_methods` of each of (values, higher_is_better, groups); faster than one by one."""
    ranked = [_Ranked.of(*table) for table in tables]
    firm = [n for n, one in enumerate(ranked) if len(one.columns) >= MINIMUM_UNITS]
    drawn = dict(zip(firm, resampled([ranked[n].columns for n in firm], seed=seed)))
    return [one.ranking(drawn.get(n)) for n, one in enumerate(ranked)]


@dataclass(frozen=True)
class _Ranked:
    """Mean rank of each method over `n` values, and by unit the sums of ranks with the number of values last."""

    mean_rank: Floats
    n: int
    columns: Floats

    @staticmethod
    def of(array: Floats, higher_is_better: bool, groups: Sequence[Hashable] | None) -> _Ranked:
        if array.ndim != 2 or not len(array):
            raise ValueError(f"values of shape {array.shape} found, expected (methods, units) with a method at least")
        unit = unit_codes(groups, array.shape[1])
        known = ~np.isnan(array).all(axis=0)
        array, unit = array[:, known], unit[known]
        if not array.size:
            return _Ranked(np.full(len(array), np.nan), 0, np.zeros((0, len(array) + 1)))
        ranks = _ranks(array, higher_is_better)
        codes = np.unique(unit, return_inverse=True)[1]
        columns = [np.bincount(codes, weights=row) for row in (*ranks, np.ones(len(unit)))]
        return _Ranked(ranks.mean(axis=1), len(unit), np.stack(columns, axis=1))

    def ranking(self, drawn: Floats | None) -> Ranking:
        place = _places(self.mean_rank[None])[0] if self.n else np.ones(len(self.mean_rank), dtype=int)
        if drawn is None:
            return Ranking(self.mean_rank, place, self.n, None, None, None)
        means = drawn[:, :-1] / drawn[:, -1:]
        tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        return Ranking(
            mean_rank=self.mean_rank,
            place=place,
            n=self.n,
            place_shares=_place_shares(means),
            place_ci95=np.quantile(_places(means), tails, axis=0, method="nearest").T.astype(int),
            kendall_tau=_mean_tau(self.mean_rank, means),
        )


def _ranks(array: Floats, higher_is_better: bool) -> Floats:
    keys = -array if higher_is_better else array
    missing = np.isnan(keys)
    # numbered by size first, so that NaN may come after inf
    order = np.unique(keys[~missing], return_inverse=True)[1].astype(np.float64)
    numbered = np.full(array.shape, float(order.max() + 1))
    numbered[~missing] = order
    return np.asarray(rankdata(numbered, axis=0))


def _places(means: Floats) -> npt.NDArray[np.int_]:
    return np.asarray(rankdata(_rounded(means), method="min", axis=1)).astype(int)


def _place_shares(means: Floats) -> Floats:
    rounded = _rounded(means)
    low = rankdata(rounded, method="min", axis=1)[:, :, None]
    high = rankdata(rounded, method="max", axis=1)[:, :, None]
    position = np.arange(1, means.shape[1] + 1)
    held = (low <= position) & (position <= high)
    return np.asarray((held / (high - low + 1)).mean(axis=0))


def _mean_tau(mean_rank: Floats, means: Floats) -> float | None:
    pairs = np.triu_indices(len(mean_rank), 1)
    whole = np.sign(_rounded(mean_rank[pairs[0]] - mean_rank[pairs[1]]))
    drawn = np.sign(_rounded(means[:, pairs[0]] - means[:, pairs[1]]))
    strength = np.sqrt((whole**2).sum() * (drawn**2).sum(axis=1))
    if not strength.any():
        return None
    # of an order in which all are equal τ is not defined
    defined = strength > 0
    return float(((drawn * whole).sum(axis=1)[defined] / strength[defined]).mean())


def _rounded(means: Floats) -> Floats:
    # mean ranks are sums of halves over a number of units: what differs beyond nine digits is rounding
    return np.round(means, 9)
