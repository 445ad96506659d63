"""Summaries of a list of measures with their uncertainty; no tables, no files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 20240501
_BATCH_NUMBERS = 2_000_000


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
    defined; None below three resampling units. `groups` names the unit of each value, such as a patient: values of
    one group are drawn together.
    """
    array = np.asarray(values, dtype=np.float64)
    names = np.arange(len(array)) if groups is None else np.unique(_texts(groups), return_inverse=True)[1]
    if len(names) != len(array):
        raise ValueError(f"{len(array)} values with {len(names)} groups")
    defined = np.sort(array[~np.isnan(array)])
    finite = np.isfinite(array)
    ordinary = array[finite]
    return Summary(
        mean=float(ordinary.mean()) if len(ordinary) else None,
        sd=float(ordinary.std(ddof=1)) if len(ordinary) > 1 else None,
        median=_quantile(defined, 0.5),
        q1=_quantile(defined, 0.25),
        q3=_quantile(defined, 0.75),
        ci95=_interval(ordinary, names[finite], seed),
        n=len(defined),
        n_finite=len(ordinary),
    )


def _quantile(ascending: Floats, share: float) -> float | None:
    # numpy's linear rule gives NaN beside an infinite neighbour
    if not len(ascending):
        return None
    position = share * (len(ascending) - 1)
    low = math.floor(position)
    fraction = position - low
    if fraction == 0:
        return float(ascending[low])
    if math.isinf(ascending[low + 1]):
        return math.inf
    return float(ascending[low] + fraction * (ascending[low + 1] - ascending[low]))


def _interval(values: Floats, names: npt.NDArray[Any], seed: int) -> tuple[float, float] | None:
    units, unit = np.unique(names, return_inverse=True)
    if len(units) < 3:
        return None
    sums, sizes = np.bincount(unit, weights=values), np.bincount(unit)
    if np.ptp(values) == 0:
        # every resample has this mean
        return float(values[0]), float(values[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # scipy warns where BCa is not defined; the result says so too, and the percentile interval follows
            warnings.simplefilter("ignore")
            low, high = stats.bootstrap(
                (sums, sizes),
                _ratio_of_sums,
                paired=True,
                vectorized=True,
                confidence_level=CONFIDENCE,
                n_resamples=RESAMPLES,
                batch=max(1, _BATCH_NUMBERS // len(units)),
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([low, high]).all():
            return float(low), float(high)
    return None


def _ratio_of_sums(sums: Floats, sizes: Floats, axis: int = -1) -> Floats:
    return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))


def _texts(groups: Sequence[Hashable]) -> list[str]:
    return [str(group) for group in groups]
