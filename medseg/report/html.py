"""The page report.html: an evaluation laid out for a reader, in one file that needs no network; no measuring."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from medseg.evaluate import Evaluation, Pair
from medseg.evaluate.pairs import case_name, printable
from medseg.readers import is_picture
from medseg.report.charts import reliability
from medseg.report.figures import PICTURE_PIXELS, Picture
from medseg.report.page import STATUS_NAMES, digits, environment, fixed, label_marks
from medseg.report.panels import METRIC_NAMES, MIN_BOX, make_panels, make_volume_plots
from medseg.report.scene import prepare_viewer
from medseg.report.worst import WorstCase, read_worst

__all__ = ["STATUS_NAMES", "fixed", "label_marks", "render"]

# pages above 15 MB take long to open from a mail; pictures of the least bad cases are left out first
MAX_PICTURE_BYTES = 4_000_000
# 45 bytes each; the lowest stay
MAX_TABLE_ROWS = 40_000
PAGE_ROWS = 100
MAX_CASE_LABELS = 10
# the first charts stand open, the others behind a line that opens them
OPEN_PLOTS = 12
TERM_NAMES = {
    **{name: text.removesuffix(" (mm)") for name, text in METRIC_NAMES.items()},
    "surface": "Surface",
    "volumes": "Volumes",
    "agreement": "Agreement",
    "status": "Status",
    "mean": "Mean, median",
    "ci95": "95% interval",
    "cases_needed": "Sample size",
    "foreground": "Over labels",
    "groups": "Patients",
    "subgroups": "Subgroups",
    "lesions": "Lesions",
    "calibration": "Calibration",
    "ignore": "Ignored voxels",
}
_CASE_COLUMNS = ("dice", "iou", "precision", "recall", "hd95_mm", "nsd", "reference_ml", "volume_difference_ml")


@dataclass(frozen=True)
class CaseView:
    """One of the worst cases: its worst labels (name, colour, Dice, status), pictures, and why there are none."""

    name: str
    dice: float
    labels: Sequence[tuple[str, str, float, str]]
    n_better: int
    pictures: Sequence[Picture]
    reason: str


def render(evaluation: Evaluation, worst: Sequence[WorstCase] | None = None) -> str:
    """The whole page as text; `worst`, where `read_worst` was called already.

    Case names and reasons are escaped; nothing is loaded from elsewhere.
    """
    worst = read_worst(evaluation) if worst is None else worst
    summary, table = evaluation.summary, evaluation.table
    shown = table.sort_values("dice", kind="stable", na_position="last").head(MAX_TABLE_ROWS)
    row_of = dict(zip(shown.index, range(len(shown))))
    cases = _case_views(evaluation, worst)
    links = {case.name: f"case-{n}" for n, case in enumerate(cases, start=1)}
    # a picture has pixels but no millimetres
    unit = "px" if all(is_picture(pair.reference) for pair in evaluation.pairs.values()) else "mm"
    metric_names = {name: text.replace("(mm)", f"({unit})") for name, text in METRIC_NAMES.items()}
    columns = [c for c in _CASE_COLUMNS if table[c].notna().any()]
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            summary=summary,
            n_patients=summary["n_groups"],
            picture_pixels=PICTURE_PIXELS,
            labels=evaluation.labels,
            colours=evaluation.colours,
            marks=label_marks(evaluation),
            panels=make_panels(evaluation, row_of, metric_names),
            plots=make_volume_plots(evaluation, row_of),
            open_plots=OPEN_PLOTS,
            min_box=MIN_BOX,
            notes=notes(evaluation),
            left_out=left_out(evaluation),
            subgroups=_subgroups(summary["subgroups"]),
            lesions=summary["lesions"],
            calibration=_calibration(summary["calibration"]),
            viewer=prepare_viewer([case.scene for case in worst if case.scene is not None]),
            cases=cases,
            volumes=any(picture.caption for case in cases for picture in case.pictures),
            with_images=any(pair.image is not None for pair in evaluation.pairs.values()),
            rows=shown.head(PAGE_ROWS).to_dict("records"),
            n_shown=len(shown),
            n_rows=len(table),
            links=links,
            data=_embedded_rows(shown, evaluation, columns, metric_names, links),
            case_columns=columns,
            metrics=[m for m in METRIC_NAMES if m in table and table[m].notna().any()],
            n_expected=int(table["status"].isin(("ok", "missed")).sum()),
            n_missed=int((table["status"] == "missed").sum()),
            n_spurious=int((table["status"] == "spurious").sum()),
            absent=[name for name, measures in summary["labels"].items() if not measures["dice"]["n"]],
            names=TERM_NAMES,
            metric_names=metric_names,
            unit=unit,
        )
    )


def left_out(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Failed cases with the reason, which does not name the file again where it is called as the case."""
    found, short = [], folder_remover(evaluation.pairs.values())
    for failure in evaluation.failures:
        start, colon, rest = short(failure.reason).partition(": ")
        named = colon and "/" not in start and case_name(start) == failure.case
        found.append((failure.case, rest if named else start + colon + rest))
    return found


def notes(evaluation: Evaluation) -> list[str]:
    """What is worth knowing before the numbers are read, as sentences."""
    warnings = map(folder_remover(evaluation.pairs.values()), evaluation.summary["warnings"])
    return [*(warning[:1].upper() + warning[1:] for warning in warnings), *reach(evaluation.summary)]


def without_folders(text: str, pairs: Iterable[Pair]) -> str:
    """`text` with file names for the paths of `pairs`: folders of a machine tell a reader nothing, or too much."""
    return folder_remover(pairs)(text)


def folder_remover(pairs: Iterable[Pair]) -> Callable[[str], str]:
    """`without_folders` for many texts: the paths of `pairs` are gone through once."""
    paths = [path for p in pairs for path in (p.prediction, p.reference, p.image, p.probabilities) if path is not None]
    # names that are no text stand in a reason as their bytes
    folders = {form(str(path.parent)) for path in paths for form in (str, printable)} - {".", "/"}
    any_of = "|".join(map(re.escape, sorted(folders, key=len, reverse=True)))
    known = re.compile(rf"(?<![\w/.-])(?:{any_of})/")
    return lambda text: known.sub("", text) if folders else text


def reach(summary: Mapping[str, Any]) -> list[str]:
    """Sentences on what cases of this number cannot tell; none where there are too few for an interval."""
    units, dice = summary["n_groups"], summary["foreground"]["dice"]
    independent, noun = (summary["n_cases"], "case") if units is None else (units, "patient")
    plural = "" if independent == 1 else "s"
    if dice["ci95"] is None:
        return []
    half = (dice["ci95"][1] - dice["ci95"][0]) / 2
    said = [f"With {independent} {noun}{plural} the mean Dice is known to about ±{_rounded(half)}."]
    needed, having, untold = {}, {}, False
    for name, measures in summary["labels"].items():
        own = measures["dice"]
        if own["cases_needed"]:
            needed[name] = own["cases_needed"]["0.02"]
            having[name] = own["n"] if units is None else own["n_groups"]
        # a label that hardly any case has says nothing of how many suffice
        untold = untold or (own["n"] > 0 and not own["cases_needed"])
    lacking = {name: most for name, most in needed.items() if most > having[name]}
    if lacking or (needed and not untold):
        name, most = max((lacking or needed).items(), key=lambda pair: pair[1])
        which = f"{name}, which spreads most" if len(needed) > 1 else name
        if having[name] < independent:
            which = f"{name}, which has a Dice in {having[name]}"
        said.append(f"For ±0.02 about {most} {noun}s {'would be needed' if lacking else 'suffice'} ({which}).")
    return [*said, "Cases of another origin (scanner, site, patients) may fare otherwise."]


def _rounded(half: float) -> str:
    return fixed(half) if half >= 0.0005 else "0.001 or less"


def _subgroups(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of the subgroup table by the column of the metadata they come from."""
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for group in groups:
        columns.setdefault(group["column"], []).append(group)
    return columns


def _calibration(calibration: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The reliability diagrams: all labels together, then each; name None is all."""
    if calibration is None:
        return []
    parts = [(None, calibration), *calibration["labels"].items()]
    return [
        {
            "name": name,
            "ece": part["ece"],
            "chart": reliability(
                part["bins"],
                f"Share correct against confidence{'' if name is None else f' for {name}'}: "
                f"expected calibration error {fixed(part['ece'])}",
            ),
        }
        for name, part in parts
        if any(b["n"] for b in part["bins"])
    ]


def _embedded_rows(
    shown: pd.DataFrame,
    evaluation: Evaluation,
    columns: Sequence[str],
    metric_names: Mapping[str, str],
    links: Mapping[str, str],
) -> dict[str, Any]:
    """The case table for the script: names once, rows as indices into them, numbers by column (None, "inf")."""
    cases = list(dict.fromkeys(shown["case"]))
    labels, statuses = list(evaluation.labels), list(STATUS_NAMES)
    marks = label_marks(evaluation)

    def indices(column: str, names: Sequence[str]) -> list[int]:
        return shown[column].map({name: n for n, name in enumerate(names)}).tolist()

    return {
        "cases": cases,
        "links": [links.get(case, "") for case in cases],
        "labels": [[name, evaluation.colours[name], marks[name]] for name in labels],
        "statuses": [[status, STATUS_NAMES[status]] for status in statuses],
        "columns": [
            {
                "name": metric_names[column],
                "digits": digits(column),
                "signed": "difference" in column,
            }
            for column in columns
        ],
        "case": indices("case", cases),
        "label": indices("name", labels),
        "status": indices("status", statuses),
        "numbers": [_numbers(shown[column], column) for column in columns],
        "page": PAGE_ROWS,
    }


def _numbers(values: pd.Series[float], metric: str) -> list[float | str | None]:
    # rounded here: a browser rounds halves up, and the numbers above the table to even
    rounded = [float(f"{v:.{digits(metric)}f}") for v in values.to_numpy(dtype=float)]
    return [v if math.isfinite(v) else None if math.isnan(v) else "inf" if v > 0 else "-inf" for v in rounded]


def _case_views(evaluation: Evaluation, worst: Sequence[WorstCase]) -> list[CaseView]:
    views, size = [], 0
    short = folder_remover(evaluation.pairs.values())
    for case in worst:
        size += sum(len(picture.data_uri) for picture in case.pictures)
        if size > MAX_PICTURE_BYTES:
            break
        views.append(_case_view(evaluation, case, short(case.reason)))
    return views


def _case_view(evaluation: Evaluation, case: WorstCase, reason: str) -> CaseView:
    rows = evaluation.table[(evaluation.table["case"] == case.name) & (evaluation.table["status"] != "both_empty")]
    if len(rows) > MAX_CASE_LABELS:
        rows = rows.sort_values("dice", kind="stable")
    shown = rows.head(MAX_CASE_LABELS)
    labels = [
        (name, evaluation.colours[name], value, status)
        for name, value, status in zip(shown["name"], shown["dice"], shown["status"])
    ]
    return CaseView(case.name, case.dice, labels, len(rows) - len(shown), case.pictures, reason)
