"""What summary.json says: an evaluation's table in numbers with their uncertainty, and what each number means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from medseg.evaluate.options import EvaluateOptions
from medseg.metrics import Value
from medseg.statistics import Summary, summarise
from medseg.versions import versions

SCHEMA_VERSION = 1
OVERLAPS = ("dice", "iou", "precision", "recall", "nsd")
METRICS = (
    *("dice", "iou", "precision", "recall", "hd_mm", "hd95_mm", "assd_mm", "nsd"),
    *("reference_ml", "prediction_ml", "volume_difference_ml"),
)
WORST_CASES = 10


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that could not be evaluated, and why."""

    case: str
    reason: str


def summarise_table(
    table: pd.DataFrame,
    labels: Mapping[str, Value],
    failures: Sequence[Failure],
    warnings: Sequence[str],
    options: EvaluateOptions,
    groups: Mapping[str, str] | None,
) -> dict[str, Any]:
    """All that strict JSON can hold of an evaluation. `groups` maps a case to its patient."""
    missing = table["status"] == "missing_prediction"
    judged = table[~missing]
    by_case = judged.groupby("case", sort=True)[list(OVERLAPS)].mean()
    absent = list(dict.fromkeys(table.loc[missing, "case"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "n_cases": len(by_case),
        "n_failed": len(failures),
        "n_missing_prediction": len(absent),
        "foreground": {metric: _summary(by_case.reset_index(), metric, groups) for metric in OVERLAPS},
        "labels": {
            name: {
                "value": list(value) if isinstance(value, tuple) else value,
                **_label(judged, name, len(absent), groups),
            }
            for name, value in labels.items()
        },
        "worst_cases": _worst(judged, by_case["dice"]),
        "missing_predictions": absent,
        "failures": [dataclasses.asdict(failure) for failure in failures],
        "warnings": list(warnings),
        "definitions": _definitions(options),
        "versions": versions("medseg", "numpy", "scipy", "pandas"),
    }


def _label(
    judged: pd.DataFrame, name: str, n_missing_prediction: int, groups: Mapping[str, str] | None
) -> dict[str, Any]:
    rows = judged[judged["name"] == name]
    events = {f"n_{s}": int((rows["status"] == s).sum()) for s in ("missed", "spurious", "both_empty")}
    events["n_missing_prediction"] = n_missing_prediction
    return {metric: {**_summary(rows, metric, groups), **events} for metric in METRICS}


def _summary(rows: pd.DataFrame, metric: str, groups: Mapping[str, str] | None) -> dict[str, Any]:
    units = None if groups is None else [groups.get(case, case) for case in rows["case"]]
    return _plain(summarise(rows[metric].to_numpy(dtype=float), groups=units))


def _worst(judged: pd.DataFrame, dice_by_case: pd.Series[float]) -> list[dict[str, Any]]:
    worst = []
    for case, mean in dice_by_case.dropna().sort_values(kind="stable").head(WORST_CASES).items():
        rows = judged[(judged["case"] == case) & judged["dice"].notna()]
        lowest = rows.sort_values("dice", kind="stable").iloc[0]
        worst.append({"case": str(case), "dice": float(mean), "lowest_label": str(lowest["name"])})
    return worst


def _plain(summary: Summary) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return "inf" if value == float("inf") else value

    fields = dataclasses.asdict(summary)
    return {name: list(value) if isinstance(value, tuple) else number(value) for name, value in fields.items()}


def _definitions(options: EvaluateOptions) -> dict[str, str]:
    surfaces = {
        "surfel": "marching-cubes surface elements weighted by their area, as in DeepMind's surface-distance",
        "voxel": "voxels of the label that have a neighbour outside across a face, as in MONAI",
    }
    texts = {
        "dice": "2TP / (2TP + FP + FN). Not defined where both are empty; 0 where only one of the two has the label.",
        "iou": "TP / (TP + FP + FN), with the same edge cases.",
        "precision": "TP / (TP + FP); not defined where nothing was predicted.",
        "recall": "TP / (TP + FN); not defined where the reference is empty.",
        "surface": f"{options.surface}: {surfaces[options.surface]}; distances follow the voxel spacing.",
        "hd_mm": "Largest distance between the two surfaces. Infinite where only one of the two has the label.",
        "hd95_mm": "The larger of the two directed 95th percentiles of the distances between the surfaces.",
        "assd_mm": "Mean distance over both surfaces, weighted by the size of their elements.",
        "nsd": f"Share of both surfaces that lies within {options.nsd_tolerance_mm:g} mm of the other one.",
        "volumes": "Millilitres, from the voxel spacing; not given for two-dimensional images. Difference: prediction "
        "− reference. In pictures without a physical size a pixel counts as 1 mm.",
        "status": "ok: both have the label. missed: only the reference has it. spurious: only the prediction has it. "
        "both_empty: neither has it; left out of means and counted. missing_prediction: no prediction was found; left "
        "out of all summaries and counted.",
        "mean": "Mean and standard deviation are those of the finite values, with their number where some are infinite "
        "(n_finite). Median and quartiles include infinite values, written as inf.",
        "ci95": "95% bootstrap interval of the mean over cases (BCa, else percentile); not given below three cases.",
        "foreground": "Mean over the labels of each case, then summarised over cases.",
    }
    if options.ignore_value is not None:
        texts["ignore"] = f"Voxels where the reference is {options.ignore_value} belong to neither map."
    return texts
