"""An evaluation in the form of nnU-Net's summary.json, for tools that read it; files are written elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medseg.evaluate.pairs import Pair, printable
from medseg.metrics import Value

_COUNTS = ("FP", "TP", "FN", "TN", "n_pred", "n_ref")


def nnunet_summary(
    table: pd.DataFrame, labels: Mapping[str, Value], pairs: Mapping[str, Pair], voxels: Mapping[str, int]
) -> dict[str, Any]:
    """`metric_per_case`, `mean` and `foreground_mean` as nnU-Net v2 writes them (nnunetv2.evaluation).

    `voxels`: judged voxels by case. Labels are called by their values, regions as `(1, 2)`. Means over cases leave out
    NaN, that over labels does not; cases without a prediction are left out. NaN stays: it is what nnU-Net writes.
    """
    keys = {name: str(value) for name, value in labels.items()}
    per_case: list[dict[str, Any]] = []
    for case, rows in table[table["status"] != "missing_prediction"].groupby("case", sort=False):
        pair = pairs[str(case)]
        per_case.append(
            {
                "metrics": {keys[row["name"]]: _measures(row, voxels[str(case)]) for row in rows.to_dict("records")},
                "prediction_file": printable(str(pair.prediction)),
                "reference_file": printable(str(pair.reference)),
            }
        )
    measures = ("Dice", "IoU", *_COUNTS)
    mean = {
        key: {m: _mean_of_defined([case["metrics"][key][m] for case in per_case]) for m in measures}
        for key in keys.values()
    }
    foreground = {m: _mean([of_label[m] for of_label in mean.values()]) for m in measures}
    return {"foreground_mean": foreground, "mean": mean, "metric_per_case": per_case}


def _measures(row: Mapping[Any, Any], voxels: int) -> dict[str, float]:
    tp, fp, fn = int(row["tp"]), int(row["fp"]), int(row["fn"])
    return {
        "Dice": float(row["dice"]),
        "IoU": float(row["iou"]),
        "FP": fp,
        "TP": tp,
        "FN": fn,
        "TN": voxels - tp - fp - fn,
        "n_pred": fp + tp,
        "n_ref": fn + tp,
    }


def _mean_of_defined(values: Sequence[float]) -> float:
    return _mean([value for value in values if not math.isnan(value)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
