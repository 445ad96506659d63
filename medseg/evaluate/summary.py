"""What summary.json says: an evaluation's table in numbers with their uncertainty; what they mean is said elsewhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import pandas as pd

from medseg.evaluate.calibration import summarise_calibration
from medseg.evaluate.definitions import definitions
from medseg.evaluate.lesions import summarise_lesions
from medseg.evaluate.options import EvaluateOptions
from medseg.evaluate.pairs import Failure
from medseg.metrics import Value
from medseg.metrics.calibration import Reliability
from medseg.statistics import bland_altman, cases_needed, summarise, unit_sd
from medseg.versions import versions

__all__ = ["METRICS", "OVERLAPS", "SCHEMA_VERSION", "SMALL", "WORST_CASES", "Failure", "Judged", "summarise_table"]

SCHEMA_VERSION = 2
OVERLAPS = ("dice", "iou", "precision", "recall", "nsd")
METRICS = (
    *("dice", "iou", "precision", "recall", "hd_mm", "hd95_mm", "assd_mm", "nsd"),
    *("reference_ml", "prediction_ml", "volume_difference_ml"),
    *("specificity", "masd_mm", "relative_volume_difference"),
)
"""Measures of every evaluation, those of the first version of the table first; extra ones follow."""
SUBGROUP_METRICS = ("dice", "nsd", "hd95_mm")
WORST_CASES = 10
SMALL = 10
"""Fewer cases, or patients where they are known, say little about others."""
HALF_WIDTHS = (0.01, 0.02, 0.05)


@dataclasses.dataclass(frozen=True)
class Judged:
    """All that was measured: `table` by case and label, and what was measured only where asked.

    `groups` maps a case to its patient; `metadata`: subgroups by case (index); `resampled`: cases whose prediction was
    on another grid; `skewed`: cases whose axes are not at right angles.
    """

    table: pd.DataFrame
    labels: Mapping[str, Value]
    options: EvaluateOptions
    failures: Sequence[Failure] = ()
    groups: Mapping[str, str] | None = None
    metadata: pd.DataFrame | None = None
    lesions: pd.DataFrame | None = None
    calibration: Reliability | None = None
    resampled: Sequence[str] = ()
    skewed: Sequence[str] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The measures in the table."""
        return (*METRICS, *self.options.extra)

    @property
    def found(self) -> pd.DataFrame:
        """The rows of cases that have a prediction."""
        return self.table[self.table["status"] != "missing_prediction"]

    def patient(self, case: str) -> str:
        """The patient of a case; where none is known, the case itself."""
        return (self.groups or {}).get(case, case)

    def units(self, rows: pd.DataFrame) -> list[str] | None:
        """The patient of each of `rows`; None where patients are not known, so that every case is one."""
        return None if self.groups is None else [self.patient(case) for case in rows["case"]]

    def summary(self, rows: pd.DataFrame, metric: str) -> dict[str, Any]:
        """Strict JSON of one column of `rows`; patients are the units where they are known."""
        fields = dataclasses.asdict(summarise(rows[metric].to_numpy(dtype=float), groups=self.units(rows)))
        return {name: list(value) if isinstance(value, tuple) else _strict(value) for name, value in fields.items()}

    def subgroups(self) -> Iterator[tuple[str, str, set[str], pd.DataFrame]]:
        """Column and value of the metadata, its cases, and the rows of those that have a prediction, if any have."""
        if self.metadata is None:
            return
        for column, values in self.metadata.items():
            for value in values.cat.categories:
                cases = set(values.index[values == value])
                rows = self.found[self.found["case"].isin(cases)]
                if not rows.empty:
                    yield str(column), str(value), cases, rows

    def n_units(self, cases: Sequence[str]) -> int:
        """How many patients `cases` are of, or, where patients are not known, how many cases."""
        n = self.n_patients(cases)
        return len(cases) if n is None else n

    def n_patients(self, cases: Sequence[str]) -> int | None:
        """How many patients `cases` are of; None where patients are not known."""
        return None if self.groups is None else len({self.patient(case) for case in cases})


def summarise_table(judged: Judged, warnings: Sequence[str]) -> dict[str, Any]:
    """All that strict JSON can hold of an evaluation."""
    missing = judged.table["status"] == "missing_prediction"
    absent = list(dict.fromkeys(judged.table.loc[missing, "case"]))
    by_case = _by_case(judged, judged.found)
    rule = judged.options.lesion_rule
    subgroups = _subgroups(judged)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "n_cases": len(by_case),
        "n_groups": judged.n_patients(list(by_case["case"])),
        "n_failed": len(judged.failures),
        "n_missing_prediction": len(absent),
        "foreground": _foreground(judged, by_case),
        "labels": {
            name: {
                "value": list(value) if isinstance(value, tuple) else value,
                **_label(judged, name, len(absent)),
            }
            for name, value in judged.labels.items()
        },
        "volumes": {name: _volumes(judged, name) for name in judged.labels},
        "subgroups": subgroups,
        "lesions": None
        if rule is None or judged.lesions is None
        else summarise_lesions(judged.lesions, list(judged.labels), rule, judged.summary),
        "calibration": summarise_calibration(judged.calibration, judged.labels),
        "worst_cases": _worst(judged.found, by_case),
        "missing_predictions": absent,
        "resampled_predictions": list(judged.resampled),
        "failures": [dataclasses.asdict(failure) for failure in judged.failures],
        "warnings": list(warnings),
        "groups": None
        if judged.groups is None
        else {case: judged.patient(case) for case in dict.fromkeys(judged.table["case"])},
        "options": judged.options.told(judged.labels),
        "definitions": definitions(judged.options, groups=judged.groups is not None, subgroups=bool(subgroups)),
        "versions": versions("medseg", "numpy", "scipy", "pandas"),
    }


def _by_case(judged: Judged, rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby("case", sort=True)[[*OVERLAPS, *judged.options.extra]].mean().reset_index()


def _foreground(judged: Judged, by_case: pd.DataFrame) -> dict[str, Any]:
    return {metric: judged.summary(by_case, metric) for metric in (*OVERLAPS, *judged.options.extra)}


def _label(judged: Judged, name: str, n_missing_prediction: int) -> dict[str, Any]:
    rows = judged.found[judged.found["name"] == name]
    events = {**_events(rows), "n_missing_prediction": n_missing_prediction}
    found = {metric: {**judged.summary(rows, metric), **events} for metric in judged.metrics}
    found["dice"] |= {
        "n_groups": judged.n_patients(list(rows.loc[rows["dice"].notna(), "case"])),
        "cases_needed": _cases_needed(judged, rows),
        "needed_of": "cases" if judged.groups is None else "patients",
    }
    return found


def _events(rows: pd.DataFrame) -> dict[str, int]:
    return {f"n_{s}": int((rows["status"] == s).sum()) for s in ("missed", "spurious", "both_empty")}


def _cases_needed(judged: Judged, rows: pd.DataFrame) -> dict[str, int] | None:
    """How many cases, or patients where they are known, a mean Dice of each half width would take."""
    sd = unit_sd(rows["dice"].to_numpy(dtype=float), groups=judged.units(rows))
    if sd is None:
        return None
    return {f"{half_width:g}": cases_needed(sd, half_width) for half_width in HALF_WIDTHS}


def _volumes(judged: Judged, name: str) -> dict[str, Any] | None:
    rows = judged.found[(judged.found["name"] == name) & (judged.found["status"] != "both_empty")]
    found = bland_altman(rows["prediction_ml"].to_numpy(dtype=float), rows["reference_ml"].to_numpy(dtype=float))
    if found is None:
        return None
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(found).items()}


def _subgroups(judged: Judged) -> list[dict[str, Any]]:
    absent = judged.table[judged.table["status"] == "missing_prediction"]
    found = []
    for column, value, cases, rows in judged.subgroups():
        n_absent = absent.loc[absent["case"].isin(cases), "case"].nunique()
        found.append({"column": column, "value": value, **_subgroup(judged, rows, n_absent)})
    return found


def _subgroup(judged: Judged, rows: pd.DataFrame, n_missing_prediction: int) -> dict[str, Any]:
    by_case = _by_case(judged, rows)
    cases = list(by_case["case"])
    labels = {}
    for name in judged.labels:
        own = rows[rows["name"] == name]
        events = {**_events(own), "n_missing_prediction": n_missing_prediction}
        labels[name] = {metric: {**judged.summary(own, metric), **events} for metric in SUBGROUP_METRICS}
    return {
        "n_cases": len(cases),
        "n_groups": judged.n_patients(cases),
        "small": judged.n_units(cases) < SMALL,
        "foreground": _foreground(judged, by_case),
        "labels": labels,
    }


def _worst(found: pd.DataFrame, by_case: pd.DataFrame) -> list[dict[str, Any]]:
    worst = []
    lowest = by_case.dropna(subset=["dice"]).sort_values("dice", kind="stable").head(WORST_CASES)
    for case, mean in zip(lowest["case"], lowest["dice"]):
        rows = found[(found["case"] == case) & found["dice"].notna()]
        label = rows.sort_values("dice", kind="stable").iloc[0]["name"]
        worst.append({"case": str(case), "dice": float(mean), "lowest_label": str(label)})
    return worst


def _strict(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value
