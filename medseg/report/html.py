"""The page report.html: an evaluation laid out for a reader, in one file that needs no network; no measuring."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medseg.errors import DataError
from medseg.evaluate import Evaluation
from medseg.evaluate.summary import METRICS
from medseg.readers import is_picture
from medseg.report.figures import MAX_DOTS, Dot, Picture, contour_pictures, place, strip

logger = logging.getLogger(__name__)

# pages above this take long to open from a mail; pictures of the least bad cases are left out first
MAX_PICTURE_BYTES = 11_000_000
MAX_TABLE_ROWS = 4000
MAX_CASE_LABELS = 10
METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "Precision",
    "recall": "Recall",
    "hd_mm": "HD (mm)",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "nsd": "NSD",
    "reference_ml": "Reference (ml)",
    "prediction_ml": "Prediction (ml)",
    "volume_difference_ml": "Difference (ml)",
}
TERM_NAMES = {
    **{name: text.removesuffix(" (mm)") for name, text in METRIC_NAMES.items()},
    "surface": "Surface",
    "volumes": "Volumes",
    "status": "Status",
    "mean": "Mean, median",
    "ci95": "95% interval",
    "foreground": "Over labels",
    "ignore": "Ignored voxels",
}
STATUS_NAMES = {
    "ok": "ok",
    "both_empty": "both empty",
    "missed": "missed",
    "spurious": "spurious",
    "missing_prediction": "no prediction",
}
_CASE_COLUMNS = ("dice", "iou", "precision", "recall", "hd95_mm", "nsd", "reference_ml", "volume_difference_ml")


@dataclass(frozen=True)
class LabelView:
    """One line of the overview: a label, its numbers, and its cases as a strip plot with a box (all in 0–1)."""

    name: str
    value: str
    colour: str
    measures: Mapping[str, Any]
    dots: Sequence[Dot]
    box: tuple[float, float, float] | None


@dataclass(frozen=True)
class CaseView:
    """One of the worst cases: its worst labels (name, colour, Dice, status), pictures, and why there are none."""

    name: str
    dice: float
    labels: Sequence[tuple[str, str, float, str]]
    n_better: int
    pictures: Sequence[Picture]
    reason: str


def render(evaluation: Evaluation) -> str:
    """The whole page as text. Case names and reasons are escaped; nothing is loaded from elsewhere."""
    environment = Environment(
        loader=PackageLoader("medseg.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(breakable=breakable, fixed=fixed, signed=signed, status=STATUS_NAMES.__getitem__)
    table, shown = evaluation.table, _shown_rows(evaluation.table)
    cases = _case_views(evaluation)
    # a picture has pixels but no millimetres
    unit = "px" if all(is_picture(pair.reference) for pair in evaluation.pairs.values()) else "mm"
    low = _axis_start(table["dice"])
    return environment.get_template("report.html.jinja").render(
        summary=evaluation.summary,
        colours=evaluation.colours,
        labels=[_label_view(evaluation, name, low) for name in evaluation.labels],
        ticks=[(low + (1 - low) * n / 4, n / 4) for n in range(5)],
        thinned=table["case"].nunique() > MAX_DOTS,
        cases=cases,
        volumes=any(picture.caption for case in cases for picture in case.pictures),
        rows=shown.to_dict("records"),
        n_rows=len(table),
        case_columns=[c for c in _CASE_COLUMNS if table[c].notna().any()],
        metrics=[m for m in METRICS if table[m].notna().any()],
        n_missed=int((table["status"] == "missed").sum()),
        n_spurious=int((table["status"] == "spurious").sum()),
        absent=[name for name, measures in evaluation.summary["labels"].items() if not measures["dice"]["n"]],
        names=TERM_NAMES,
        metric_names={name: text.replace("(mm)", f"({unit})") for name, text in METRIC_NAMES.items()},
        unit=unit,
        with_images=any(pair.image is not None for pair in evaluation.pairs.values()),
    )


def breakable(text: str) -> Markup:
    """Escaped text in which a line may end after each underscore."""
    return Markup("_<wbr>").join(text.split("_"))


def fixed(value: Any, digits: int = 3) -> str:
    """A number for the eye: fixed digits, ∞ for infinite, – where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if value == "inf" or math.isinf(value):
        return "∞"
    return f"{value:.{digits}f}"


def signed(value: Any, digits: int = 2) -> str:
    """As `fixed`, with a sign."""
    text = fixed(value, digits)
    return text.replace("-", "−") if text.startswith("-") or text in ("–", "∞") else f"+{text}"


def _axis_start(dice: pd.Series[float]) -> float:
    lowest = dice.min()
    return 0.0 if math.isnan(lowest) else min(0.8, math.floor(lowest * 5) / 5)


def _shown_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The table, worst first; what is not defined goes to the end."""
    return table.sort_values("dice", kind="stable", na_position="last").head(MAX_TABLE_ROWS)


def _label_view(evaluation: Evaluation, name: str, low: float) -> LabelView:
    rows = evaluation.table[(evaluation.table["name"] == name) & evaluation.table["dice"].notna()]
    measures = evaluation.summary["labels"][name]
    dice = measures["dice"]
    box = None if dice["n"] < 5 else tuple(place(dice[key], low=low) for key in ("q1", "median", "q3"))
    values = rows["dice"].tolist()
    titles = [f"{case}: {value:.3f}" for case, value in zip(rows["case"], values)]
    value = evaluation.labels[name]
    return LabelView(
        name=name,
        value="+".join(map(str, value)) if isinstance(value, tuple) else str(value),
        colour=evaluation.colours[name],
        measures=measures,
        dots=strip(values, titles, low=low),
        box=None if box is None else (box[0], box[1], box[2]),
    )


def _case_views(evaluation: Evaluation) -> list[CaseView]:
    views, size = [], 0
    for worst in evaluation.summary["worst_cases"]:
        pictures, reason = _pictures(evaluation, worst["case"])
        size += sum(len(picture.data_uri) for picture in pictures)
        if size > MAX_PICTURE_BYTES:
            break
        views.append(_case_view(evaluation, worst["case"], worst["dice"], pictures, reason))
    return views


def _case_view(evaluation: Evaluation, case: str, dice: float, pictures: Sequence[Picture], reason: str) -> CaseView:
    rows = evaluation.table[(evaluation.table["case"] == case) & (evaluation.table["status"] != "both_empty")]
    if len(rows) > MAX_CASE_LABELS:
        rows = rows.sort_values("dice", kind="stable")
    shown = rows.head(MAX_CASE_LABELS)
    labels = [
        (name, evaluation.colours[name], value, status)
        for name, value, status in zip(shown["name"], shown["dice"], shown["status"])
    ]
    return CaseView(case, dice, labels, len(rows) - len(shown), pictures, reason)


def _pictures(evaluation: Evaluation, case: str) -> tuple[tuple[Picture, ...], str]:
    try:
        return contour_pictures(evaluation.pairs[case], evaluation), ""
    except DataError as error:
        logger.warning("no pictures of %s: %s", case, error)
        return (), str(error)
