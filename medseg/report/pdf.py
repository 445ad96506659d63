"""The report on paper: an evaluation as a PDF that can be filed or mailed; no measuring."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.image import imread

from medseg.evaluate import Evaluation
from medseg.evaluate.pairs import counted, named
from medseg.readers import is_picture
from medseg.report.charts import MAX_DOTS, Axis, axis, scattered, share_axis, spread
from medseg.report.html import TERM_NAMES, folder_remover, left_out, notes
from medseg.report.page import STATUS_NAMES, fixed, in_words, label_marks, moment, signed
from medseg.report.panels import MIN_BOX
from medseg.report.paper import (
    INK,
    LEFT,
    LINE,
    QUIET,
    RIGHT,
    WARNING,
    Paper,
    plain_text,
)
from medseg.report.worst import WorstCase, read_worst

TITLE = "Segmentation report"
# what fits one sheet; the others stand in the table of the page and in metrics.csv
MAX_AGREEMENT_PLOTS = 6
MAX_NAMED = 12
MAX_CASE_LABELS = 6
_ROW = 0.25
_Row = TypeVar("_Row")
_MARK = 0.3


@dataclass(frozen=True)
class _Column:
    """A column of the table of labels: where its right edge is, and how a label's measures fill it."""

    title: str
    right: float
    text: Callable[[Mapping[str, Any]], str]
    bold: bool = False


def write_pdf(evaluation: Evaluation, file: Path | BinaryIO, worst: Sequence[WorstCase] | None = None) -> None:
    """Write the report as A4 sheets: summary, distributions, volumes, subgroups and lesions where asked for, worst
    cases, definitions and versions.

    `worst`, where `read_worst` was called already. Text can be searched and copied. The same evaluation and files give
    the same bytes. A case whose files cannot be read any more is shown without pictures and with the reason.
    """
    worst = read_worst(evaluation) if worst is None else worst
    paper = Paper()
    with plain_text():
        _summary(paper, evaluation)
        _distributions(paper, evaluation)
        _volumes(paper, evaluation)
        _subgroups(paper, evaluation.summary["subgroups"])
        _lesions(paper, evaluation)
        _worst_cases(paper, evaluation, worst)
        _definitions(paper, evaluation)
        if paper.lacks_letters:
            paper.paragraph("□: a letter that this paper's font has not; report.html shows it.", size=8, colour=QUIET)
        summary = evaluation.summary
        paper.save(
            file,
            title=TITLE,
            creator=f"medseg {summary['versions'].get('medseg', '')}".strip(),
            created=datetime.fromisoformat(summary["created"]),
        )


def _summary(paper: Paper, evaluation: Evaluation) -> None:
    summary = evaluation.summary
    paper.begin()
    paper.text(LEFT, paper.y + 0.12, TITLE, size=20, bold=True)
    whose = "its reference" if summary["n_cases"] == 1 else "their references"
    said = f"{counted(summary['n_cases'], 'case')} compared with {whose}, "
    said += f"{counted(len(evaluation.labels), 'label')} · {summary['created'][:10]}"
    paper.text(LEFT, paper.y + 0.47, said, size=9.5, colour=QUIET)
    paper.y += 0.75
    _facts(paper, evaluation)
    _notices(paper, evaluation)
    unit = "px" if all(is_picture(pair.reference) for pair in evaluation.pairs.values()) else "mm"
    shown = [name for name in evaluation.labels if summary["labels"][name]["dice"]["n"]]
    _heading(paper, "Dice by label", room=4 * _ROW)
    _label_table(paper, evaluation, shown, unit)


def _facts(paper: Paper, evaluation: Evaluation) -> None:
    summary, status = evaluation.summary, evaluation.table["status"]
    dice = summary["foreground"]["dice"]
    left_out = summary["n_failed"] + summary["n_missing_prediction"]
    interval = f"95% interval {_interval(dice)}" if dice["ci95"] else "too few cases for an interval"
    n_expected = int(status.isin(("ok", "missed")).sum())
    facts = [
        ("Mean Dice over labels and cases", fixed(dice["mean"]), interval),
        ("Missed", str(int((status == "missed").sum())), f"of {n_expected} expected"),
        ("Spurious", str(int((status == "spurious").sum())), "in the prediction only"),
        ("Not evaluated", str(left_out), f"of {counted(summary['n_cases'] + left_out, 'case')}"),
    ]
    widths = [2.3, 1.45, 1.55, 1.47]
    x = LEFT
    paper.card(LEFT, paper.y, RIGHT - LEFT, 1.0)
    for (title, number, note), width in zip(facts, widths):
        if x > LEFT:
            paper.rule(x, paper.y, x, paper.y + 1.0)
        paper.text(x + 0.15, paper.y + 0.2, title, size=8, colour=QUIET)
        paper.text(x + 0.15, paper.y + 0.5, number, size=19, bold=True)
        paper.text(x + 0.15, paper.y + 0.8, note, size=8, colour=QUIET)
        x += width
    paper.y += 1.0


def _notices(paper: Paper, evaluation: Evaluation) -> None:
    summary, failed = evaluation.summary, left_out(evaluation)
    n_all = summary["n_cases"] + summary["n_failed"] + summary["n_missing_prediction"]
    if summary["n_cases"] < n_all:
        title = f"{n_all - summary['n_cases']} of {counted(n_all, 'case')} in none of these numbers"
        _heading(paper, title, colour=WARNING)
    for case, reason in failed[:MAX_NAMED]:
        paper.paragraph(f"• {case}: {reason}", size=8.5)
    if len(failed) > MAX_NAMED:
        paper.paragraph(f"and {len(failed) - MAX_NAMED} more; summary.json names them all", size=8.5)
    if summary["missing_predictions"]:
        paper.paragraph(f"• Without a prediction: {named(summary['missing_predictions'], most=MAX_NAMED)}", size=8.5)
    said = notes(evaluation)
    if said:
        _heading(paper, "Worth knowing")
    for note in said:
        paper.paragraph(f"• {note}", size=8.5)


def _label_table(paper: Paper, evaluation: Evaluation, names: Sequence[str], unit: str) -> None:
    columns = (
        _Column("Mean Dice", 3.3, lambda m: fixed(m["dice"]["mean"]), bold=True),
        _Column("95% interval", 4.25, lambda m: _interval(m["dice"])),
        _Column("Median", 4.76, lambda m: fixed(m["dice"]["median"])),
        _Column(f"HD95 ({unit})", 5.5, lambda m: fixed(m["hd95_mm"]["median"], 2)),
        _Column("NSD", 5.95, lambda m: fixed(m["nsd"]["mean"])),
        _Column("Cases", 6.42, lambda m: str(m["dice"]["n"])),
        _Column("Missed", 6.93, lambda m: str(m["dice"]["n_missed"])),
        _Column("Spurious", RIGHT, lambda m: str(m["dice"]["n_spurious"])),
    )

    def fill(name: str) -> None:
        measures, y = evaluation.summary["labels"][name], paper.y + _ROW / 2
        _label_name(paper, evaluation, name, y, width=1.85)
        for column in columns:
            text = column.text(measures)
            event = column.title in ("Missed", "Spurious") and text != "0"
            colour = WARNING if event else INK
            paper.text(column.right, y, text, size=8.5, side="right", bold=column.bold or event, colour=colour)

    _table(paper, "Label", [(column.title, column.right) for column in columns], names, fill)
    paper.y += 0.08
    paper.paragraph(
        "HD95: median over cases; NSD: mean. Spurious: found where the reference has nothing.", size=7.5, colour=QUIET
    )


def _distributions(paper: Paper, evaluation: Evaluation) -> None:
    table = evaluation.table
    names = [name for name in evaluation.labels if evaluation.summary["labels"][name]["dice"]["n"]]
    if not names or evaluation.summary["n_cases"] < 2:
        return
    scale = share_axis(table["dice"].to_numpy(dtype=float))
    start, height = 2.95, 0.42

    def head() -> None:
        for share, text in scale.ticks:
            paper.text(start + share * (RIGHT - start), paper.y + 0.1, text, size=7.5, colour=QUIET, side="center")
        paper.y += 0.25

    _heading(paper, "How Dice is spread", room=0.6 + min(len(names), 8) * height)
    paper.paragraph(
        f"Each dot is a case. From {MIN_BOX} cases on, the box spans their middle half; the thick bar is the median.",
        size=8,
        colour=QUIET,
    )
    paper.y += 0.1
    head()
    for name in names:
        if paper.room(height):
            head()
        dice = evaluation.summary["labels"][name]["dice"]
        _label_name(paper, evaluation, name, paper.y + height / 2, width=2.05)
        for share, _ in scale.ticks:
            x = start + share * (RIGHT - start)
            paper.rule(x, paper.y + 0.03, x, paper.y + height - 0.03)
        values = table.loc[table["name"] == name, "dice"].to_numpy(dtype=float)
        paper.dots(
            [
                (
                    start + scale.place(values[n]) * (RIGHT - start),
                    paper.y + 0.1 + (height - 0.2) * scattered(rank),
                )
                for rank, n in enumerate(spread(values, MAX_DOTS))
            ]
        )
        if dice["n"] >= MIN_BOX:
            q1, median, q3 = (start + scale.place(dice[key]) * (RIGHT - start) for key in ("q1", "median", "q3"))
            paper.box(q1, paper.y + 0.07, q3 - q1, height - 0.14, edge=INK)
            paper.rule(median, paper.y + 0.07, median, paper.y + height - 0.07, colour=INK, weight=2)
        paper.y += height


def _volumes(paper: Paper, evaluation: Evaluation) -> None:
    table = evaluation.table[evaluation.table["status"] != "missing_prediction"]
    limits = evaluation.summary["volumes"]
    found = {name: _with_volumes(table[table["name"] == name]) for name in evaluation.labels if limits[name]}
    if not found:
        return
    lowest = sorted(found, key=lambda name: evaluation.summary["labels"][name]["dice"]["mean"])[:MAX_AGREEMENT_PLOTS]
    chosen = [name for name in found if name in lowest]
    width, height = (RIGHT - LEFT - 0.35) / 2, 2.85
    _heading(paper, "Volumes: prediction against reference", room=0.75 + height)
    said = (
        "Across: the mean of both volumes. Up: prediction − reference. Line: mean difference; broken lines: 95% limits "
    )
    said += "of agreement, between which 95% of the differences of new cases lie if differences are normal."
    if len(found) > len(chosen):
        said += f" Shown are the {len(chosen)} of {len(found)} labels with the lowest mean Dice."
    paper.paragraph(said, size=8, colour=QUIET)
    paper.y += 0.15
    for number, name in enumerate(chosen):
        if number % 2 == 0:
            paper.room(height)
        x = LEFT + (number % 2) * (width + 0.35)
        _agreement(paper, evaluation, name, found[name], (x, paper.y, width, height - 0.25))
        if number % 2 or number == len(chosen) - 1:
            paper.y += height


def _with_volumes(rows: pd.DataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    prediction, reference = (rows[column].to_numpy(dtype=float) for column in ("prediction_ml", "reference_ml"))
    there = np.isfinite(prediction) & np.isfinite(reference) & (rows["status"] != "both_empty").to_numpy()
    return prediction[there], reference[there]


def _agreement(
    paper: Paper,
    evaluation: Evaluation,
    name: str,
    volumes: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    frame: tuple[float, float, float, float],
) -> None:
    x, y, width, height = frame
    prediction, reference = volumes
    limits = evaluation.summary["volumes"][name]
    means, differences = (prediction + reference) / 2, prediction - reference
    shown = [*differences, limits["low_ml"], limits["high_ml"], 0.0]
    across, up = axis(means), axis(shown, low=min(shown) - 0.05 * float(np.ptp(shown)))
    _label_name(paper, evaluation, name, y + 0.1, width=width - 0.2, x=x)
    between = f"{signed(limits['low_ml'])} to {signed(limits['high_ml'])} ml"
    said = f"mean {signed(limits['bias_ml'])} ml, limits {between}, {counted(limits['n'], 'case')}"
    paper.text(x, y + 0.3, said, size=7.5, colour=QUIET, width=width)
    left, right, top, bottom = x + 0.48, x + width, y + 0.45, y + height - 0.38

    def at(mean: float, difference: float) -> tuple[float, float]:
        return left + across.place(mean) * (right - left), bottom - up.place(difference) * (bottom - top)

    paper.box(left, top, right - left, bottom - top, edge=LINE)
    _ticks(paper, across, up, (left, right, top, bottom))
    paper.text((left + right) / 2, bottom + 0.32, "mean volume (ml)", size=7.5, colour=QUIET, side="center")
    zero = at(0, 0)[1]
    paper.rule(left, zero, right, zero, colour=LINE, weight=1.2)
    bias = at(0, limits["bias_ml"])[1]
    paper.rule(left, bias, right, bias, colour=INK)
    for limit in (limits["low_ml"], limits["high_ml"]):
        paper.dashes(left, at(0, limit)[1], right, at(0, limit)[1])
    paper.dots([at(*differences_of) for differences_of in _thinned(means, differences)])


def _thinned(means: npt.NDArray[np.float64], differences: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    return [(float(means[n]), float(differences[n])) for n in spread(differences, MAX_DOTS)]


def _ticks(paper: Paper, across: Axis, up: Axis, frame: tuple[float, float, float, float]) -> None:
    left, right, top, bottom = frame
    for share, text in across.ticks:
        x = left + share * (right - left)
        paper.rule(x, bottom, x, bottom + 0.04, colour=QUIET)
        paper.text(x, bottom + 0.13, text, size=7, colour=QUIET, side="center")
    for share, text in up.ticks:
        y = bottom - share * (bottom - top)
        paper.rule(left - 0.04, y, left, y, colour=QUIET)
        paper.text(left - 0.07, y, text, size=7, colour=QUIET, side="right")


def _subgroups(paper: Paper, groups: Sequence[Mapping[str, Any]]) -> None:
    if not groups:
        return
    _heading(paper, "Subgroups", room=6 * _ROW)
    titles = (("Cases", 4.3), ("Patients", 5.0), ("Mean Dice", 5.8), ("95% interval", 6.85), ("Median", RIGHT))

    def fill(group: Mapping[str, Any]) -> None:
        dice = group["foreground"]["dice"]
        y = paper.y + _ROW / 2
        small = " (few)" if group["small"] else ""
        paper.text(LEFT, y, f"{group['column']}: {group['value']}{small}", size=8.5, width=2.9)
        patients = "–" if group["n_groups"] is None else str(group["n_groups"])
        texts = (str(group["n_cases"]), patients, fixed(dice["mean"]), _interval(dice), fixed(dice["median"]))
        for text, (_, right) in zip(texts, titles):
            paper.text(right, y, text, size=8.5, side="right")

    _table(paper, "Subgroup", titles, groups, fill)


def _lesions(paper: Paper, evaluation: Evaluation) -> None:
    lesions = evaluation.summary["lesions"]
    if lesions is None:
        return
    _heading(paper, "Lesions", room=6 * _ROW)
    counted = (("Reference", 3.9), ("Prediction", 4.65), ("Found", 5.2), ("Missed", 5.8), ("False", 6.3))
    titles = (*counted, ("F1", 6.9), ("PQ", RIGHT))

    def fill(name: str) -> None:
        found = lesions["labels"][name]
        _label_name(paper, evaluation, name, paper.y + _ROW / 2, width=2.3)
        counts = [str(found[key]) for key in ("n_reference", "n_prediction", "tp", "fn", "fp")]
        for text, (_, right) in zip([*counts, fixed(found["f1"]), fixed(found["pq"])], titles):
            paper.text(right, paper.y + _ROW / 2, text, size=8.5, side="right")

    _table(paper, "Label", titles, list(lesions["labels"]), fill)


def _table(
    paper: Paper,
    first: str,
    titles: Sequence[tuple[str, float]],
    rows: Sequence[_Row],
    fill: Callable[[_Row], None],
) -> None:
    """Rows below `first` and `titles` (with their right edges), whose heading is there again on every sheet."""

    def head() -> None:
        paper.text(LEFT, paper.y + _ROW / 2, first, size=7.5, colour=QUIET)
        for title, right in titles:
            paper.text(right, paper.y + _ROW / 2, title, size=7.5, colour=QUIET, side="right")
        paper.y += _ROW
        paper.rule(LEFT, paper.y, RIGHT, paper.y, colour=QUIET)

    head()
    for row in rows:
        if paper.room(_ROW):
            head()
        fill(row)
        paper.y += _ROW
        paper.rule(LEFT, paper.y, RIGHT, paper.y)


def _worst_cases(paper: Paper, evaluation: Evaluation, worst: Sequence[WorstCase]) -> None:
    if not worst:
        return
    side = (RIGHT - LEFT - 0.3) / 3
    _heading(paper, "Worst cases", room=1.5 + side)
    said = "Lowest mean Dice first. White line: reference; coloured line: prediction; tinted: where they differ. "
    said += "Of a volume, the slices with the most wrong voxels; R, A and S: the patient's right, front and top."
    paper.paragraph(said, size=8, colour=QUIET)
    short = folder_remover(evaluation.pairs.values())
    for case in worst:
        paper.y += 0.15
        paper.room(0.55 + (side + 0.25 if case.pictures else 0.2))
        paper.text(LEFT, paper.y + 0.1, case.name, size=10, bold=True, width=RIGHT - LEFT - 1.7)
        paper.text(RIGHT, paper.y + 0.1, f"mean Dice {fixed(case.dice)}", size=9, side="right")
        _case_labels(paper, evaluation, case.name)
        for number, picture in enumerate(case.pictures):
            x = LEFT + number * (side + 0.15)
            paper.picture(x, paper.y, side, _pixels(picture.data_uri))
            paper.text(x, paper.y + side + 0.1, picture.caption, size=7.5, colour=QUIET, width=side)
        if case.pictures:
            paper.y += side + 0.22
        if case.reason:
            paper.paragraph(f"No picture: {short(case.reason)}", size=8, colour=QUIET)


def _case_labels(paper: Paper, evaluation: Evaluation, case: str) -> None:
    rows = evaluation.table[(evaluation.table["case"] == case) & (evaluation.table["status"] != "both_empty")]
    if len(rows) > MAX_CASE_LABELS:
        rows = rows.sort_values("dice", kind="stable")
    shown = rows.head(MAX_CASE_LABELS)
    # two lines of three: names get the width they need for being told apart
    width = (RIGHT - LEFT) / 3
    for number, (name, dice, status) in enumerate(zip(shown["name"], shown["dice"], shown["status"])):
        x, y = LEFT + (number % 3) * width, paper.y + 0.32 + (number // 3) * 0.19
        said = fixed(dice) if status == "ok" else STATUS_NAMES[status]
        _label_name(paper, evaluation, name, y, width=width - 1.15, x=x)
        paper.text(x + width - 0.2, y, said, size=8, side="right", colour=INK if status == "ok" else WARNING)
    lines = math.ceil(len(shown) / 3)
    paper.y += 0.27 + 0.19 * lines
    if len(rows) > len(shown):
        paper.text(LEFT, paper.y + 0.05, f"and {len(rows) - len(shown)} with a higher Dice", size=7.5, colour=QUIET)
        paper.y += 0.17


def _pixels(data_uri: str) -> npt.NDArray[np.uint8]:
    kind, _, text = data_uri.removeprefix("data:image/").partition(";base64,")
    pixels = imread(io.BytesIO(base64.b64decode(text)), format=kind)[..., :3]
    # of a PNG the shares of full brightness are given
    return np.rint(pixels * 255).astype(np.uint8) if pixels.dtype.kind == "f" else pixels


def _definitions(paper: Paper, evaluation: Evaluation) -> None:
    summary = evaluation.summary
    _heading(paper, "What the numbers mean", room=1.0)
    for term, text in summary["definitions"].items():
        paper.room(0.35)
        paper.y += 0.05
        y = paper.y
        paper.text(LEFT, y + 0.075, TERM_NAMES.get(term, term), size=7.5, bold=True, width=1.5)
        paper.paragraph(in_words(text), size=7.5, left=LEFT + 1.6)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    paper.y += 0.2
    paper.paragraph(f"Made {moment(summary['created'])} with {versions}.", size=8, colour=QUIET)


def _heading(paper: Paper, words: str, *, colour: str = INK, room: float = 0.4) -> None:
    if not paper.room(0.5 + room):
        paper.y += 0.22
    paper.text(LEFT, paper.y + 0.1, words, size=13, bold=True, colour=colour)
    paper.y += 0.32


def _label_name(paper: Paper, evaluation: Evaluation, name: str, y: float, *, width: float, x: float = LEFT) -> None:
    paper.box(x, y - 0.05, 0.1, 0.1, fill=evaluation.colours[name], edge=QUIET)
    left = x + 0.17
    mark = label_marks(evaluation)[name]
    if mark:
        # apart from the name: one that is written from right to left would turn both around
        paper.text(left, y, mark, size=7.5, colour=QUIET, width=_MARK - 0.05)
        left += _MARK
    paper.text(left, y, name, size=8.5, width=x + width - left)


def _interval(measure: Mapping[str, Any]) -> str:
    return "–" if measure["ci95"] is None else f"{fixed(measure['ci95'][0])}–{fixed(measure['ci95'][1])}"
