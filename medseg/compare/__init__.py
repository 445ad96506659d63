"""Several methods judged on the same cases: paired statistics, a ranking and a page, in memory and as a folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from medseg.compare.alignment import Aligned, align
from medseg.compare.methods import read_methods
from medseg.compare.page import render
from medseg.compare.results import comparisons, p_words, rankings, summary
from medseg.progress import Progress, silent
from medseg.report.page import fixed, signed
from medseg.report.place import holds_earlier
from medseg.writers import write_text

__all__ = ["Comparison", "compare"]

# rows on a terminal
_SHOWN_AT_MOST = 60

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found, ready to be read, printed or saved.

    `table`: one row per label (and one for all), measure and pair of methods; `ranking`: one per label, measure and
    method; `summary`: what summary.json holds.
    """

    table: pd.DataFrame
    ranking: pd.DataFrame
    summary: dict[str, Any]
    aligned: Aligned

    @property
    def findings(self) -> Sequence[str]:
        """Which method is better, in sentences."""
        return tuple(self.summary["findings"])

    @property
    def warnings(self) -> Sequence[str]:
        """What was left out or looks odd, in sentences."""
        return tuple(self.aligned.warnings)

    def save(self, folder: Path | str) -> Path:
        """Write comparison.csv, ranking.csv, summary.json and compare.html, each whole or not at all; returns it.

        All are made before the first is written. Raises `DataError` where the folder cannot be written, or holds a
        summary.json that no comparison wrote, such as that of a report.
        """
        target = Path(folder)
        self.check_folder(target)
        texts = {
            "comparison.csv": self.table.to_csv(index=False, lineterminator="\n"),
            "ranking.csv": self.ranking.to_csv(index=False, lineterminator="\n"),
            "summary.json": json.dumps(self.summary, indent=2, allow_nan=False) + "\n",
            "compare.html": render(self.aligned, self.table, self.ranking, self.summary),
        }
        for name, text in texts.items():
            write_text(target / name, text)
        return target

    @staticmethod
    def check_folder(folder: Path | str) -> None:
        """Raise the `DataError` of `save` where `folder` holds a summary.json of another kind: before any work."""
        holds_earlier(Path(folder), "comparison")

    def text_rows(self) -> list[tuple[str, ...]]:
        """The first measure by label and pair of methods as rows of text, the first being the header."""
        header = ("label", "methods", "difference", "95% interval", "p (Holm)", "cases", "missed", "spurious")
        rows = self.table[self.table["metric"] == self.summary["metrics"][0]].to_dict("records")
        return [header, *(_text_row(row) for row in rows)]

    def text_table(self) -> str:
        """`text_rows` as aligned plain text; where they are more than a screen or two, those over all labels only."""
        header, *rows = self.text_rows()
        shown = rows if len(rows) <= _SHOWN_AT_MOST else rows[: math.comb(len(self.aligned.methods), 2)]
        more = f"\n{len(rows) - len(shown)} rows by label: comparison.csv" if len(shown) < len(rows) else ""
        rows = [header, *shown]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return (
            "\n".join(
                "  ".join(
                    [row[0].ljust(widths[0]), row[1].ljust(widths[1]), *map(str.rjust, row[2:], widths[2:])]
                ).rstrip()
                for row in rows
            )
            + more
        )


def compare(reports: Sequence[Path | str] | Mapping[str, Path | str], *, progress: Progress = silent) -> Comparison:
    """Compare the methods that left `reports`, case by case and label by label.

    A report is a folder that `evaluate` wrote, or nnU-Net's summary.json (or the folder that holds it). A method is
    called as its folder, as the `NAME` of `NAME=FOLDER`, or as the key of a mapping. Only cases and labels that all
    reports have are compared. Raises `ConfigError` for fewer than two reports, `DataError` for reports that are
    damaged or cannot be compared: other references, surfaces or tolerances.
    """
    aligned = align(read_methods(reports))
    for warning in aligned.warnings:
        logger.warning(warning)
    table = comparisons(aligned, progress)
    ranking = rankings(aligned)
    return Comparison(table, ranking, summary(aligned, table, ranking), aligned)


def _text_row(row: Mapping[Any, Any]) -> tuple[str, ...]:
    interval = "–" if pd.isna(row["ci95_low"]) else f"{signed(row['ci95_low'], 3)} to {signed(row['ci95_high'], 3)}"
    events = (f"{row[f'n_{event}_a']} : {row[f'n_{event}_b']}" for event in ("missed", "spurious"))
    p = p_words(row["p_holm"]).removeprefix("p ").removeprefix("= ")
    return (
        *(row["name"], f"{row['a']} − {row['b']}", signed(row["mean_difference"], 3), interval),
        *(p, fixed(row["n_cases"], 0), *events),
    )
