"""Agreement of measured volumes, and how many cases a wanted precision takes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import ndtri

from medseg.statistics._intervals import CONFIDENCE, MINIMUM_UNITS, Floats, unit_codes

_QUANTILE = float(ndtri((1 + CONFIDENCE) / 2))
# the usual chance to find what is there
POWER = 0.8


@dataclass(frozen=True)
class BlandAltman:
    """Differences prediction − reference in ml: their mean `bias_ml`, SD, and 95% limits of agreement.

    95% of the differences of new cases lie between `low_ml` and `high_ml` if differences are normal. The intervals
    say how well bias and limits themselves are known.
    """

    bias_ml: float
    sd_ml: float
    low_ml: float
    high_ml: float
    n: int
    bias_ci95_ml: tuple[float, float]
    low_ci95_ml: tuple[float, float]
    high_ci95_ml: tuple[float, float]


def bland_altman(prediction_ml: Sequence[float] | Floats, reference_ml: Sequence[float] | Floats) -> BlandAltman | None:
    """Bias and limits of agreement of paired volumes (Bland & Altman 1986); None below three pairs.

    A pair with a volume that is NaN is left out. Limits: bias ± 1.96 SD. Intervals: t with n − 1 degrees of freedom
    and the standard errors SD/√n of the bias and SD·√(3/n) of a limit. Raises `ValueError` if the lengths differ.
    """
    predicted, expected = np.asarray(prediction_ml, dtype=np.float64), np.asarray(reference_ml, dtype=np.float64)
    if predicted.shape != expected.shape:
        raise ValueError(f"{len(predicted)} predicted volumes with {len(expected)} of the reference")
    differences = predicted - expected
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    if n < MINIMUM_UNITS:
        return None
    bias, sd = float(differences.mean()), float(differences.std(ddof=1))
    low, high = bias - _QUANTILE * sd, bias + _QUANTILE * sd
    error = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    of_limit = error * math.sqrt(3)
    return BlandAltman(
        bias_ml=bias,
        sd_ml=sd,
        low_ml=low,
        high_ml=high,
        n=n,
        bias_ci95_ml=(bias - error, bias + error),
        low_ci95_ml=(low - of_limit, low + of_limit),
        high_ci95_ml=(high - of_limit, high + of_limit),
    )


def unit_sd(values: Sequence[float] | Floats, *, groups: Sequence[Hashable] | None = None) -> float | None:
    """SD of independent units as the mean of `values` feels it, for `cases_needed`; None below three units.

    Units are the values, or the groups that they are of, such as patients: what sets the mean of a group apart, times
    its number of values over the usual number, as in the variance of a ratio (Cochran 1977, Sampling Techniques,
    chapter 6). Of groups of one size it is the SD of their means. NaN and infinite values are left out. Raises
    `ValueError` if the lengths differ.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    array, unit = array[finite], np.unique(unit_codes(groups, len(array))[finite], return_inverse=True)[1]
    sizes = np.bincount(unit)
    if len(sizes) < MINIMUM_UNITS:
        return None
    apart = np.bincount(unit, weights=array - array.mean()) / sizes.mean()
    return float(apart.std(ddof=1))


def cases_needed(sd: float, half_width: float) -> int:
    """How many independent cases give a 95% interval of the mean of ± `half_width`, for cases that spread by `sd`.

    n = ⌈(1.96 · sd / half_width)²⌉, the interval of a normal mean solved for n; at least 3, below which no interval
    is given. Raises `ValueError` unless `sd` is finite and 0 or more, `half_width` finite and above 0.
    """
    if not 0 <= sd < math.inf:
        raise ValueError(f"SD of {sd} found, expected a finite number of 0 or more")
    if not 0 < half_width < math.inf:
        raise ValueError(f"half width of {half_width} found, expected a finite number above 0")
    return max(MINIMUM_UNITS, math.ceil((_QUANTILE * sd / half_width) ** 2))


def cases_to_show(sd: float, difference: float) -> int:
    """How many cases show a mean difference that large with a chance of 80%, if differences spread by `sd`.

    n = ⌈((1.96 + 0.84) · sd / difference)²⌉: a two-sided test at 5% of a normal mean, solved for n; at least 3. Raises
    `ValueError` as `cases_needed` does.
    """
    return cases_needed(sd, difference * _QUANTILE / (_QUANTILE + float(ndtri(POWER))))
