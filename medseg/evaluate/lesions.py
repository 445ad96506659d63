"""Lesions of a whole evaluation: their table and their summary; matching happens in the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from medseg.metrics import Value
from medseg.metrics.lesions import LesionMetrics, LesionRule, measure_lesions

LESION_COUNTS = ("n_reference", "n_prediction", "tp", "fp", "fn")
LESION_MEASURES = ("sensitivity", "precision", "f1", "sq", "rq", "pq", "lesion_dice", "lesion_hd95_mm")
LESION_COLUMNS = ("case", "label", "name", *LESION_COUNTS, *LESION_MEASURES)


def no_lesions(value: Value, spatial_dims: int, rule: LesionRule) -> LesionMetrics:
    """What `rule` says of a label that neither map holds."""
    nothing = np.zeros((1,) * spatial_dims, np.uint8)
    return measure_lesions(nothing, nothing, [value], spacing_mm=(1.0,) * spatial_dims, rule=rule)[value]


def lesion_row(found: LesionMetrics) -> dict[str, float]:
    """Counts and measures of one label in one case, in the columns of lesions.csv."""
    return {name: getattr(found, name) for name in (*LESION_COUNTS, *LESION_MEASURES)}


def lesion_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per judged case and label."""
    return pd.DataFrame(list(rows), columns=list(LESION_COLUMNS)).astype(dict.fromkeys(LESION_COUNTS, "int64"))


def summarise_lesions(
    table: pd.DataFrame,
    names: Sequence[str],
    rule: LesionRule,
    summarised: Callable[[pd.DataFrame, str], dict[str, Any]],
) -> dict[str, Any]:
    """Lesions counted over all cases, and each measure summarised over cases, by label.

    `summarised` gives the summary of one column of rows.
    """
    return {
        "rule": dataclasses.asdict(rule),
        "labels": {name: _label(table[table["name"] == name], rule, summarised) for name in names},
    }


def _label(
    rows: pd.DataFrame, rule: LesionRule, summarised: Callable[[pd.DataFrame, str], dict[str, Any]]
) -> dict[str, Any]:
    counted = {name: int(rows[name].sum()) for name in LESION_COUNTS}
    tp, fp, fn = (counted[name] for name in ("tp", "fp", "fn"))
    f1 = _ratio(2 * tp, 2 * tp + fp + fn)
    quality: dict[str, float | None] = {"sq": None, "rq": None, "pq": None}
    if rule.matching == "one_to_one":
        # the mean over pairs of one case, times their number, is the sum over them
        shares = rows.loc[rows["tp"] > 0, "sq"] * rows.loc[rows["tp"] > 0, "tp"]
        sq = float(shares.sum()) / tp if tp else None
        pq = None if f1 is None else 0.0 if sq is None else sq * f1
        quality = {"sq": sq, "rq": f1, "pq": pq}
    return {
        "n_cases": len(rows),
        **counted,
        "f1": f1,
        "sensitivity": _ratio(tp, tp + fn),
        "precision": _ratio(tp, tp + fp),
        **quality,
        "per_case": {measure: summarised(rows, measure) for measure in LESION_MEASURES},
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
