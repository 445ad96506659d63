"""The report of an evaluation: a table, a summary and a page, in memory and as a folder; measuring happens below."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medseg.evaluate import EvaluateOptions, Evaluation, Failure, Pair, evaluate_folders, evaluate_pairs
from medseg.progress import Progress, silent
from medseg.report.html import fixed, render
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

    def save(self, folder: Path | str) -> Path:
        """Write metrics.csv, summary.json and report.html into `folder`, each whole or not at all; returns it."""
        target = Path(folder)
        _write(target / "metrics.csv", self.table.to_csv(index=False, lineterminator="\n"))
        _write(target / "summary.json", json.dumps(self.summary, indent=2, allow_nan=False) + "\n")
        _write(target / "report.html", render(self.evaluation))
        return target

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
    jobs: int = 1,
    progress: Progress = silent,
) -> Report:
    """Compare a folder of predictions (or one file) with one of references, case by case and label by label.

    `images` is a folder of the images themselves, for the pictures. Raises `DataError` where predictions are missing
    (unless `allow_missing`) or no case can be evaluated.
    """
    return Report(
        evaluate_folders(
            Path(predictions),
            Path(references),
            options,
            images=None if images is None else Path(images),
            jobs=jobs,
            progress=progress,
        )
    )


def report_pairs(
    pairs: Iterable[tuple[str, Path | None, Path, Path | None]],
    options: EvaluateOptions | None = None,
    *,
    groups: Mapping[str, str] | None = None,
) -> Report:
    """The report of listed files: (case, prediction or None where it is missing, reference, image or None).

    `groups` maps a case to its patient: intervals then resample patients. Raises `DataError` if no case is left.
    """
    return Report(evaluate_pairs([Pair(*pair) for pair in pairs], options or EvaluateOptions(), groups=groups))


def _text_row(name: str, dice: Mapping[str, Any]) -> tuple[str, str, str, str, str, str, str]:
    interval = "–" if dice["ci95"] is None else " to ".join(fixed(v) for v in dice["ci95"])
    counts = str(dice["n"]), str(dice["n_missed"]), str(dice["n_spurious"])
    return (name, fixed(dice["mean"]), interval, fixed(dice["median"]), *counts)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        # a file name may hold bytes that are no text; they are shown as their codes
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
