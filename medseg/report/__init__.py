"""The report of an evaluation: a table, a summary and a page, in memory and as a folder; measuring happens below."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medseg.evaluate import (
    EvaluateOptions,
    Evaluation,
    Failure,
    Pair,
    evaluate_folders,
    evaluate_pairs,
    label_tables,
    nnunet,
)
from medseg.progress import Progress, silent
from medseg.report.html import fixed, render
from medseg.report.place import holds_earlier
from medseg.report.worst import WorstCase, read_worst
from medseg.writers import atomic_path

__all__ = ["Report", "evaluate", "report_pairs"]


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` found, ready to be read, printed or saved."""

    evaluation: Evaluation

    @property
    def table(self) -> pd.DataFrame:
        """One row per case and label, in the columns of metrics.csv."""
        return self.evaluation.table

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return self.evaluation.summary

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Cases that could not be evaluated, with the reason."""
        return self.evaluation.failures

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was left out or looks odd, in sentences."""
        return self.evaluation.warnings

    def save(
        self, folder: Path | str, *, nnunet_summary: bool = False, pdf: bool = False, progress: Progress = silent
    ) -> Path:
        """Write the report into `folder` and give it back: all files are made before the first gets its name.

        metrics.csv, summary.json, report.html, labels.ctbl (3D Slicer), labels.label (ITK-SNAP); lesions.csv where
        lesions were asked for; nnunet_summary.json and report.pdf on demand. Such a file of an earlier report goes.
        Raises `DataError` where the folder cannot be written, or holds a summary.json that no report wrote.
        """
        target = Path(folder)
        replaced = holds_earlier(target, "report")
        # the page and the PDF show the same cases
        worst = read_worst(self.evaluation, progress=progress)
        texts = self._texts(worst)
        if nnunet_summary:
            found = self.evaluation
            numbers = nnunet.nnunet_summary(found.table, found.labels, found.pairs, found.voxels)
            texts["nnunet_summary.json"] = json.dumps(numbers, indent=4) + "\n"
        with ExitStack() as files:
            parts = {name: files.enter_context(atomic_path(target / name)) for name in texts}
            for name, part in parts.items():
                # a file name may hold bytes that are no text; they are shown as their codes
                part.write_text(texts[name], encoding="utf-8", errors="backslashreplace", newline="\n")
            if pdf:
                # what draws it takes half a second to import
                from medseg.report.pdf import write_pdf

                write_pdf(self.evaluation, files.enter_context(atomic_path(target / "report.pdf")), worst)
        if replaced:
            for name in {"lesions.csv", "nnunet_summary.json", *([] if pdf else ["report.pdf"])} - set(texts):
                (target / name).unlink(missing_ok=True)
        return target

    @staticmethod
    def check_folder(folder: Path | str) -> None:
        """Raise the `DataError` of `save` where `folder` holds a summary.json that no report wrote: before any work."""
        holds_earlier(Path(folder), "report")

    def _texts(self, worst: Sequence[WorstCase]) -> dict[str, str]:
        found = self.evaluation
        texts = {
            "metrics.csv": _csv(found.table),
            "summary.json": json.dumps(found.summary, indent=2, allow_nan=False) + "\n",
            "report.html": render(found, worst),
            "labels.ctbl": label_tables.slicer_table(found.labels, found.colours),
            "labels.label": label_tables.snap_table(found.labels, found.colours),
        }
        return texts if found.lesions is None else {**texts, "lesions.csv": _csv(found.lesions)}

    def text_rows(self) -> list[tuple[str, ...]]:
        """Dice by label as rows of text, the first being the header."""
        labels = self.summary["labels"]
        rows = [("label", "mean Dice", "95% interval", "median", "cases", "missed", "spurious")]
        rows += [_text_row(name, measures["dice"]) for name, measures in labels.items()]
        if len(labels) > 1:
            events = {key: sum(m["dice"][key] for m in labels.values()) for key in ("n_missed", "n_spurious")}
            rows.append(_text_row("all labels", {**self.summary["foreground"]["dice"], **events}))
        return list(rows)

    def text_table(self) -> str:
        """Dice by label as aligned plain text."""
        rows = self.text_rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
            for row in rows
        )


def evaluate(
    predictions: Path | str,
    references: Path | str,
    options: EvaluateOptions | None = None,
    *,
    images: Path | str | None = None,
    metadata: Path | str | None = None,
    progress: Progress = silent,
) -> Report:
    """Compare a folder of predictions (or one file) with one of references, case by case and label by label.

    `images` is a folder of the images themselves, for the pictures; `metadata` a CSV file with a column `case` and one
    per subgroup, such as site or sex; one called patient, subject or group makes patients the unit of the statistics.
    Raises `DataError` where predictions are missing (unless `allow_missing`) or no case can be evaluated.
    """
    return Report(
        evaluate_folders(
            Path(predictions),
            Path(references),
            options,
            images=None if images is None else Path(images),
            metadata=None if metadata is None else Path(metadata),
            progress=progress,
        )
    )


def report_pairs(
    pairs: Iterable[tuple[str, Path | None, Path, Path | None]],
    options: EvaluateOptions | None = None,
    *,
    groups: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Report:
    """The report of listed files: (case, prediction or None where it is missing, reference, image or None).

    `groups` maps a case to its patient: intervals then resample patients. Raises `DataError` if no case is left.
    """
    listed = [Pair(*pair) for pair in pairs]
    return Report(evaluate_pairs(listed, options or EvaluateOptions(), groups=groups, progress=progress))


def _text_row(name: str, dice: Mapping[str, Any]) -> tuple[str, str, str, str, str, str, str]:
    interval = "–" if dice["ci95"] is None else " to ".join(fixed(v) for v in dice["ci95"])
    counts = str(dice["n"]), str(dice["n_missed"]), str(dice["n_spurious"])
    return (name, fixed(dice["mean"]), interval, fixed(dice["median"]), *counts)


def _csv(table: pd.DataFrame) -> str:
    # inf is literal and NaN an empty cell: pandas' own
    return str(table.to_csv(index=False, lineterminator="\n"))
