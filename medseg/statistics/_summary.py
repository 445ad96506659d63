"""The summary of one list of measures: mean, spread, quartiles, interval."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.statistics._intervals import SEED, Floats, mean_intervals, quantile, unit_codes


@dataclass(frozen=True)
class Summary:
    """What a list of measures says.

    `n` values are defined (not NaN), `n_finite` of them are finite. `mean`, `sd` and `ci95` are those of the finite
    ones; `median`, `q1` and `q3` include infinite ones. None: too few values.
    """

    mean: float | None
    sd: float | None
    median: float | None
    q1: float | None
    q3: float | None
    ci95: tuple[float, float] | None
    n: int
    n_finite: int


def summarise(
    values: Sequence[float] | Floats, *, groups: Sequence[Hashable] | None = None, seed: int = SEED
) -> Summary:
    """Mean, spread and quartiles of `values`; NaN is left out.

    `ci95` is the bootstrap interval of the mean, BCa (Efron 1987), or the percentile interval where BCa is not
    defined, widened for few units (Hesterberg 2015); None below three resampling units. `groups` names the unit of
    each value, such as a patient: values of one group are drawn together.
    """
    return summarise_all([values], groups=groups, seed=seed)[0]


def summarise_all(
    lists: Iterable[Sequence[float] | Floats], *, groups: Sequence[Hashable] | None = None, seed: int = SEED
) -> list[Summary]:
    """`summarise` of each of `lists`, whose values all belong to the same `groups`; faster than one by one."""
    arrays = [np.asarray(values, dtype=np.float64) for values in lists]
    # naming the units takes longer than a summary: once for each length, which is one where there are groups
    codes = {n: unit_codes(groups, n) for n in {len(array) for array in arrays}}
    units = [codes[len(array)] for array in arrays]
    finite = [np.isfinite(array) for array in arrays]
    intervals = mean_intervals(((a[f], u[f]) for a, u, f in zip(arrays, units, finite)), seed=seed)
    return [_summary(array, interval) for array, interval in zip(arrays, intervals)]


def _summary(array: Floats, interval: tuple[float, float] | None) -> Summary:
    defined = np.sort(array[~np.isnan(array)])
    ordinary = array[np.isfinite(array)]
    # sums of equal numbers are rounded: their mean would lie beside them
    constant = len(ordinary) > 0 and bool(np.ptp(ordinary) == 0)
    mean = ordinary[0] if constant else ordinary.mean() if len(ordinary) else None
    spread = 0.0 if constant else ordinary.std(ddof=1) if len(ordinary) > 1 else None
    return Summary(
        mean=None if mean is None else float(mean),
        sd=None if len(ordinary) < 2 or spread is None else float(spread),
        median=quantile(defined, 0.5),
        q1=quantile(defined, 0.25),
        q3=quantile(defined, 0.75),
        ci95=interval,
        n=len(defined),
        n_finite=len(ordinary),
    )
