"""Bootstrap intervals of means, and quantiles of lists that hold infinite values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri, stdtrit

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 20240501
# fewer units say nothing about their spread
MINIMUM_UNITS = 3
# random numbers at a time: 16 MB
BATCH_NUMBERS = 2_000_000
_ROUNDING = 1e-12


def unit_codes(groups: Sequence[Hashable] | None, n: int) -> npt.NDArray[np.intp]:
    """The unit of each of `n` values as a number from 0: its group, or the value itself. Raises `ValueError`."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"{n} values with {len(groups)} groups")
    codes: npt.NDArray[np.intp] = np.unique([str(group) for group in groups], return_inverse=True)[1].astype(np.intp)
    return codes


def mean_intervals(
    lists: Iterable[tuple[Floats, npt.NDArray[Any]]], *, seed: int = SEED
) -> list[tuple[float, float] | None]:
    """The bootstrap interval of the mean of each list of finite values; values of one unit are drawn together.

    `lists`: values and the unit of each. BCa (Efron 1987), or the percentile interval where BCa is not defined, both
    widened for few units as Student's t is (the expanded percentile interval of Hesterberg 2015, "What Teachers Should
    Know About the Bootstrap"); None below `MINIMUM_UNITS` units. How often it covers the mean is measured by
    `tests/benchmarks/intervals.py`: three or four units are too few for 95 %, no resample leaves their range. Lists
    with as many units see the same draws: all at once takes a fraction of the time.
    """
    intervals: list[tuple[float, float] | None] = []
    drawn: list[tuple[int, Floats]] = []
    for n, (values, units) in enumerate(lists):
        unit = np.unique(units, return_inverse=True)[1]
        columns = np.stack([np.bincount(unit, weights=values), np.bincount(unit).astype(np.float64)], axis=1)
        intervals.append(None)
        if len(columns) < MINIMUM_UNITS:
            continue
        if np.ptp(values) == 0:
            # every resample has this mean
            intervals[n] = float(values[0]), float(values[0])
        else:
            drawn.append((n, columns))
    for (n, columns), sums in zip(drawn, resampled([columns for _, columns in drawn], seed=seed)):
        intervals[n] = _interval(columns, sums[:, 0] / sums[:, 1])
    return intervals


def resampled(tables: Sequence[Floats], *, seed: int = SEED) -> list[Floats]:
    """Sums of the rows of each table (units, k) over each bootstrap resample of its units: (`RESAMPLES`, k).

    Tables with as many units see the same draws, and are summed at once: drawing takes longer than summing.
    """
    by_size: dict[int, list[int]] = {}
    for n, table in enumerate(tables):
        by_size.setdefault(len(table), []).append(n)
    sums: list[Floats] = [np.zeros(0)] * len(tables)
    for size, same in by_size.items():
        whole = np.concatenate([tables[n] for n in same], axis=1)
        found = np.concatenate([counts @ whole for counts in _counts(size, seed)])
        ends = np.cumsum([tables[n].shape[1] for n in same])
        for n, part in zip(same, np.split(found, ends[:-1], axis=1)):
            sums[n] = part
    return sums


def quantile(ascending: Floats, share: float) -> float | None:
    """The linear quantile of sorted values, infinite ones among them; None of nothing, and between −∞ and ∞."""
    if not len(ascending):
        return None
    position = share * (len(ascending) - 1)
    low = math.floor(position)
    fraction = position - low
    if fraction == 0:
        return float(ascending[low])
    # numpy's linear rule gives NaN beside an infinite neighbour
    ends = ascending[low : low + 2]
    if np.isinf(ends).any():
        far = set(ends[np.isinf(ends)].tolist())
        return far.pop() if len(far) == 1 else None
    return float(ends[0] + fraction * (ends[1] - ends[0]))


def _interval(columns: Floats, means: Floats) -> tuple[float, float]:
    n = len(columns)
    # resamples spread by (n − 1)/n of the variance, and it is known from n − 1 degrees of freedom only
    normal = math.sqrt(n / (n - 1)) * stdtrit(n - 1, np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    total = columns.sum(axis=0)
    left_out = total - columns
    shares = _bca_shares(means, float(total[0] / total[1]), left_out[:, 0] / left_out[:, 1], normal)
    low, high = np.quantile(means, shares if np.isfinite(shares).all() else ndtr(normal))
    return float(low), float(high)


def _bca_shares(means: Floats, estimate: float, left_out: Floats, normal: Floats) -> Floats:
    # Efron 1987, equations 2.3, 3.7 and 6.6; NaN where all resamples lie on one side or nothing varies
    apart = means - estimate
    # a resample of each unit once has the same mean but for rounding
    apart[np.abs(apart) <= _ROUNDING * np.abs(means).max()] = 0.0
    below = ((apart < 0).mean() + (apart <= 0).mean()) / 2
    influence = left_out.mean() - left_out
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = ndtri(below)
        acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
        shifted = bias + normal
        return np.asarray(ndtr(bias + shifted / (1 - acceleration * shifted)))


def _counts(n: int, seed: int) -> Iterator[Floats]:
    """How often each of `n` units is drawn in each resample, in blocks of rows."""
    if RESAMPLES * n <= BATCH_NUMBERS:
        yield _kept_counts(n, seed)
        return
    generator = np.random.default_rng(seed)
    rows = max(1, BATCH_NUMBERS // n)
    for start in range(0, RESAMPLES, rows):
        yield _draw(generator, min(rows, RESAMPLES - start), n)


@lru_cache(maxsize=4)
def _kept_counts(n: int, seed: int) -> Floats:
    # the measures of one report have the same units: drawing takes longer than all the sums
    counts = _draw(np.random.default_rng(seed), RESAMPLES, n)
    counts.flags.writeable = False
    return counts


def _draw(generator: np.random.Generator, rows: int, n: int) -> Floats:
    drawn = generator.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
