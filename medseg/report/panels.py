"""What the page shows by label: strips with numbers for each measure, and charts over volume; no layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from medseg.evaluate import Evaluation
from medseg.report.charts import Axis, axis, dots_per_label, scatter, share_axis, strip
from medseg.report.page import figure

METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "Precision",
    "recall": "Recall",
    "specificity": "Specificity",
    "nsd": "NSD",
    "boundary_iou": "Boundary IoU",
    "cldice": "clDice",
    "hd_mm": "HD (mm)",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "masd_mm": "MASD (mm)",
    "reference_ml": "Reference (ml)",
    "prediction_ml": "Prediction (ml)",
    "volume_difference_ml": "Difference (ml)",
    "relative_volume_difference": "Relative difference",
}
# what the strips can show
PANEL_METRICS = ("dice", "nsd", "hd95_mm", "assd_mm")
# quartiles of fewer cases are the cases themselves
MIN_BOX = 5
# with two dots any chart is a line
MIN_PLOT = 3


@dataclass(frozen=True)
class PanelRow:
    """A label's cases on one measure: the strip and its numbers."""

    name: str
    measure: Mapping[str, Any]
    chart: Markup


@dataclass(frozen=True)
class Panel:
    """One measure over all labels on one axis; `thinned`: not every case has a dot."""

    metric: str
    title: str
    ticks: Sequence[tuple[float, str]]
    rows: Sequence[PanelRow]
    boxes: bool
    thinned: bool
    infinite: bool


@dataclass(frozen=True)
class VolumePlots:
    """A label's charts over volume; `agreement` is None where there are no limits to draw."""

    name: str
    n: int
    dice: Markup
    bland_altman: Markup
    agreement: Mapping[str, Any] | None


def make_panels(evaluation: Evaluation, row_of: Mapping[Any, int], metric_names: Mapping[str, str]) -> list[Panel]:
    """A panel for each measure of `PANEL_METRICS` that has a number. `row_of`: index of the table → embedded row."""
    table = evaluation.table[evaluation.table["status"] != "missing_prediction"]
    by_label = dict(tuple(table.groupby("name", sort=False)))
    return [
        _panel(metric, metric_names[metric], evaluation, table, by_label, row_of)
        for metric in PANEL_METRICS
        if table[metric].notna().any()
    ]


def _panel(
    metric: str,
    title: str,
    evaluation: Evaluation,
    table: pd.DataFrame,
    by_label: Mapping[Any, pd.DataFrame],
    row_of: Mapping[Any, int],
) -> Panel:
    values = table[metric].to_numpy(dtype=float)
    scale = axis(values) if metric.endswith("_mm") else share_axis(values)
    limit = dots_per_label(len(evaluation.labels))
    rows = []
    for name in evaluation.labels:
        measure = evaluation.summary["labels"][name][metric]
        if measure["n"]:
            rows.append(PanelRow(name, measure, _strip(by_label[name], metric, title, measure, scale, row_of, limit)))
    return Panel(
        metric=metric,
        title=title,
        ticks=scale.ticks,
        rows=rows,
        boxes=any(row.measure["n"] >= MIN_BOX for row in rows),
        thinned=any(row.measure["n"] > limit for row in rows),
        infinite=scale.infinite,
    )


def _strip(
    cases: pd.DataFrame,
    metric: str,
    title: str,
    measure: Mapping[str, Any],
    scale: Axis,
    row_of: Mapping[Any, int],
    limit: int,
) -> Markup:
    quartiles = [float(measure[key]) for key in ("q1", "median", "q3")]
    words = ", ".join(
        f"{said} {figure(q, metric)}" for said, q in zip(("lower quartile", "median", "upper"), quartiles)
    )
    text = f"{title} of {cases['name'].iloc[0]} in {measure['n']} cases: {words}"
    return strip(
        cases[metric].to_numpy(dtype=float),
        scale,
        text,
        rows=_rows(cases, row_of),
        limit=limit,
        box=quartiles if measure["n"] >= MIN_BOX else None,
    )


def make_volume_plots(evaluation: Evaluation, row_of: Mapping[Any, int]) -> list[VolumePlots]:
    """Dice over volume and Bland–Altman for each label with `MIN_PLOT` cases; none where volumes are not defined."""
    table = evaluation.table[~evaluation.table["status"].isin(("missing_prediction", "both_empty"))]
    table = table[table["volume_difference_ml"].notna()]
    shares = share_axis(table["dice"].to_numpy(dtype=float))
    limit = dots_per_label(len(evaluation.labels))
    by_label = dict(tuple(table.groupby("name", sort=False)))
    agreement = evaluation.summary["volumes"]
    return [
        VolumePlots(
            name,
            len(by_label[name]),
            _over_volume(by_label[name], shares, row_of, limit),
            _agreement(by_label[name], agreement.get(name), row_of, limit),
            agreement.get(name),
        )
        for name in evaluation.labels
        if name in by_label and len(by_label[name]) >= MIN_PLOT
    ]


def _over_volume(cases: pd.DataFrame, shares: Axis, row_of: Mapping[Any, int], limit: int) -> Markup:
    volumes = cases["reference_ml"].to_numpy(dtype=float)
    scale = axis(volumes)
    return scatter(
        volumes,
        cases["dice"].to_numpy(dtype=float),
        scale,
        shares,
        f"Dice of {cases['name'].iloc[0]} against the volume of the reference, {len(cases)} cases, "
        f"{figure(volumes.min(), 'ml_ml')} to {figure(volumes.max(), 'ml_ml')} ml",
        titles=("Reference (ml, log)" if scale.log else "Reference (ml)", "Dice"),
        rows=_rows(cases, row_of),
        limit=limit,
    )


def _agreement(cases: pd.DataFrame, limits: Mapping[str, Any] | None, row_of: Mapping[Any, int], limit: int) -> Markup:
    reference = cases["reference_ml"].to_numpy(dtype=float)
    differences = cases["volume_difference_ml"].to_numpy(dtype=float)
    means = reference + differences / 2
    lines = [(0.0, "nil")]
    said = ""
    if limits is not None:
        low, bias, high = limits["low_ml"], limits["bias_ml"], limits["high_ml"]
        lines += [(low, "limit"), (bias, "bias"), (high, "limit")]
        said = (
            f": bias {figure(bias, 'difference_ml')} ml, "
            f"95% limits {figure(low, 'difference_ml')} to {figure(high, 'difference_ml')} ml"
        )
    heights = np.array([*differences, *(height for height, _ in lines)])
    # room above and below, and zero always in sight
    room = 0.08 * max(float(np.ptp(heights)), 1e-6)
    scale = axis(means)
    return scatter(
        means,
        differences,
        scale,
        Axis(float(heights.min()) - room, float(heights.max()) + room),
        f"Difference of volumes of {cases['name'].iloc[0]} against their mean, {len(cases)} cases{said}",
        titles=("Mean of both (ml, log)" if scale.log else "Mean of both (ml)", "Prediction − reference (ml)"),
        rows=_rows(cases, row_of),
        limit=limit,
        lines=lines,
    )


def _rows(cases: pd.DataFrame, row_of: Mapping[Any, int]) -> list[int]:
    # −1: left out of the embedded table, nothing to show for that dot
    return [row_of.get(index, -1) for index in cases.index]
