"""How far saved probabilities can be believed: reliability curves and calibration error; numpy only, no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.metrics.codes import Labels, Value, members

BINS = 15
"""Bins of one width, as in Guo et al. 2017."""
# voxels that are looked at together: a few arrays of float64 of this length
_VOXELS = 1 << 20
# network probabilities rounded to float32 or sixteen bits leave the range by less
_RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Bin:
    """Voxels with a probability above `low` (the first: from 0) up to `high`: their number, their mean probability and
    the share of them that is right; NaN where there are none."""

    low: float
    high: float
    n: int
    confidence: float
    correct: float


@dataclass(frozen=True, eq=False)
class Bins:
    """By bin (B,): voxels (`count`), the sum of their probabilities (`confidence`) and how many are right (`correct`).

    `a + b`: as if the voxels of both had been looked at together.
    """

    count: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    correct: npt.NDArray[np.int64]

    def __add__(self, other: Bins) -> Bins:
        if len(self.count) != len(other.count):
            raise ValueError(f"{len(self.count)} bins and {len(other.count)}: expected one number of bins")
        return Bins(self.count + other.count, self.confidence + other.confidence, self.correct + other.correct)

    @staticmethod
    def empty(bins: int) -> Bins:
        """No voxel yet."""
        return Bins(np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins, np.int64))

    @property
    def n(self) -> int:
        """Voxels in all bins."""
        return int(self.count.sum())

    @property
    def ece(self) -> float:
        """Expected calibration error, 0 to 1: Σ over bins of n/N · |share right − mean probability|; NaN: no voxels.

        Naeini et al. 2015; Guo et al. 2017, equation 3.
        """
        n = self.n
        return float(np.abs(self.correct - self.confidence).sum() / n) if n else float("nan")

    @property
    def curve(self) -> tuple[Bin, ...]:
        """The reliability curve, empty bins included."""
        edges = np.arange(len(self.count) + 1) / len(self.count)
        some = np.maximum(self.count, 1)
        means = (np.where(self.count > 0, total / some, np.nan) for total in (self.confidence, self.correct))
        return tuple(
            Bin(float(low), float(high), int(n), float(confidence), float(correct))
            for low, high, n, confidence, correct in zip(edges[:-1], edges[1:], self.count, *means)
        )


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins of one or, by `a + b`, several cases.

    `overall`: of labels the probability of the strongest one, right where the reference has it (Guo et al. 2017); of
    regions all of them pooled. `labels`: each channel by itself, right where the reference has it (class-wise
    calibration, Kull et al. 2019). Background is most of a volume: the error of a label says more than the overall one.
    """

    overall: Bins
    labels: Mapping[Value, Bins]
    n_cases: int = 1

    def __add__(self, other: Reliability) -> Reliability:
        if list(self.labels) != list(other.labels):
            raise ValueError(f"channels {list(self.labels)} and {list(other.labels)}: expected the same")
        labels = {value: bins + other.labels[value] for value, bins in self.labels.items()}
        return Reliability(self.overall + other.overall, MappingProxyType(labels), self.n_cases + other.n_cases)

    @property
    def ece(self) -> float:
        """Expected calibration error of `overall`."""
        return self.overall.ece

    @property
    def curve(self) -> tuple[Bin, ...]:
        """Reliability curve of `overall`."""
        return self.overall.curve


def reliability(
    probabilities: Iterable[npt.NDArray[Any]],
    reference: Labels,
    values: Sequence[Value],
    *,
    regions: bool = False,
    bins: int = BINS,
    ignore_value: int | None = None,
) -> Reliability:
    """Bins of one case. `probabilities`: the channels one after the other, each (*reference.shape), 0 to 1.

    An array (C, …) will do, or what reads one channel at a time: only one is held. `values`: what each channel stands
    for, of labels background (0) too; `regions`: channels overlap, each is a yes or no of its own. Of equal
    probabilities the first channel is the strongest. Voxels where the reference is `ignore_value` are left out. Raises
    `ValueError` for other shapes, another number of channels, or numbers that are no probabilities.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins found, expected at least 1")
    kept = None if ignore_value is None else (reference != ignore_value).ravel()
    truth = reference.ravel()
    best: npt.NDArray[Any] | None = None
    right = np.zeros(0 if regions else truth.size, bool)
    labels: dict[Value, Bins] = {}
    count = 0
    for channel in probabilities:
        if count == len(values) or channel.shape != reference.shape:
            raise ValueError(
                f"channel {count + 1} of shape {channel.shape} found, expected {len(values)} of {reference.shape}"
            )
        value = values[count]
        count += 1
        found = Bins.empty(bins)
        flat = channel.ravel()
        if best is None and not regions:
            best = np.full(truth.size, -1, np.result_type(flat.dtype, np.float32))
        for start in range(0, truth.size, _VOXELS):
            piece = slice(start, start + _VOXELS)
            some, has = flat[piece], _has(truth[piece], value)
            _check(some)
            found += _sorted_in(some, has, None if kept is None else kept[piece], bins)
            if best is not None:
                stronger = some > best[piece]
                best[piece][stronger] = some[stronger]
                right[piece][stronger] = has[stronger]
        labels[value] = labels[value] + found if value in labels else found
    if count != len(values):
        raise ValueError(f"{count} channels found, expected {len(values)}")
    overall = Bins.empty(bins)
    if best is not None:
        for start in range(0, truth.size, _VOXELS):
            piece = slice(start, start + _VOXELS)
            overall += _sorted_in(best[piece], right[piece], None if kept is None else kept[piece], bins)
    else:
        overall = sum(labels.values(), overall)
    return Reliability(overall, MappingProxyType(labels))


def _has(truth: npt.NDArray[Any], value: Value) -> npt.NDArray[np.bool_]:
    found = truth == members(value)[0]
    for member in members(value)[1:]:
        found |= truth == member
    return np.asarray(found)


def _sorted_in(some: npt.NDArray[Any], right: Any, kept: Any, bins: int) -> Bins:
    if kept is not None:
        some, right = some[kept], right[kept]
    # most voxels have a probability of 0 for most labels: they are counted and not sorted
    some_hits = np.flatnonzero(some > 0)
    above, true = some[some_hits], right[some_hits]
    # above `low`, up to `high`
    at = np.clip(np.ceil(above * np.float32(bins)).astype(np.intp) - 1, 0, bins - 1)
    count = np.bincount(at, minlength=bins)
    correct = np.bincount(at[true], minlength=bins)
    confidence = np.bincount(at, weights=above, minlength=bins).astype(np.float64, copy=False)
    count[0] += some.size - len(some_hits)
    correct[0] += np.count_nonzero(right) - np.count_nonzero(true)
    return Bins(count, confidence, correct)


def _check(some: npt.NDArray[Any]) -> None:
    low, high = float(some.min(initial=0)), float(some.max(initial=1))
    # NaN compares as neither
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
        raise ValueError(f"numbers from {low:g} to {high:g} found, expected probabilities, 0 to 1")
