"""Counts of voxels and the overlaps that follow from them; no distances, no millimetres."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg.metrics.codes import Box, Labels, Pair, Value, encode, union

Status = Literal["ok", "both_empty", "missed", "spurious", "missing_prediction"]


@dataclass(frozen=True)
class Counts:
    """Voxels that both have (`tp`), only the prediction has (`fp`), only the reference has (`fn`)."""

    tp: int
    fp: int
    fn: int

    @property
    def reference(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def prediction(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp


def counts(
    prediction: Labels, reference: Labels, values: Collection[Value], *, ignore_value: int | None = None
) -> dict[Value, Counts]:
    """Counts for each of `values` in one pass. Both maps: integer, of one shape; a tuple of values is a region.

    Voxels where the reference is `ignore_value` are left out. Raises `ValueError` if the shapes differ.
    """
    pair = encode(prediction, reference, values, ignore_value)
    return pair_counts(pair, values, pair.boxes())


def pair_counts(pair: Pair, values: Iterable[Value], boxes: Mapping[int, Box]) -> dict[Value, Counts]:
    """Counts for each of `values` of a pair that was encoded with them; `boxes` are the pair's."""
    if not boxes:
        return dict.fromkeys(values, Counts(0, 0, 0))
    table = pair.confusion(union(boxes.values()))
    result = {}
    for value in values:
        chosen = pair.codes(value)
        tp = int(table[np.ix_(chosen, chosen)].sum())
        result[value] = Counts(tp, int(table[chosen].sum()) - tp, int(table[:, chosen].sum()) - tp)
    return result


def status(c: Counts) -> Status:
    """Which row of the table of edge cases applies."""
    if not c.reference:
        return "spurious" if c.prediction else "both_empty"
    return "ok" if c.prediction else "missed"


def dice(c: Counts) -> float:
    """2TP / (2TP + FP + FN); NaN where both are empty, 0 where one is."""
    return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def iou(c: Counts) -> float:
    """TP / (TP + FP + FN); NaN where both are empty, 0 where one is."""
    return _ratio(c.tp, c.tp + c.fp + c.fn)


def precision(c: Counts) -> float:
    """TP / (TP + FP); NaN where nothing was predicted."""
    return _ratio(c.tp, c.prediction)


def recall(c: Counts) -> float:
    """TP / (TP + FN); NaN where the reference is empty."""
    return _ratio(c.tp, c.reference)


def specificity(c: Counts, n_judged: int) -> float:
    """TN / (TN + FP) over `n_judged` voxels, those that are not ignored; NaN where the reference fills them all."""
    return _ratio(n_judged - c.tp - c.fp - c.fn, n_judged - c.reference)


def relative_volume_difference(c: Counts) -> float:
    """(prediction − reference) / reference; NaN where the reference is empty, −1 where only the prediction is."""
    return _ratio(c.prediction - c.reference, c.reference)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
