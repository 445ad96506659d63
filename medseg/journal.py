"""metrics.csv and TensorBoard events of a training, one row an epoch; what the rows tell is measured elsewhere."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from medseg.errors import DataError, TrainingError
from medseg.writers import is_disk_full, write_text

log = logging.getLogger(__name__)

METRICS = "metrics.csv"


@dataclass(frozen=True)
class Row:
    """One epoch; `scores`: Dice of each label, where it was validated."""

    epoch: int
    step: int
    seconds: float
    learning_rate: float
    loss: float
    scores: Mapping[str, float]

    @property
    def dice(self) -> float | None:
        """Their mean."""
        return float(np.mean(list(self.scores.values()))) if self.scores else None


class Journal:
    """Adds rows to what a run folder has; rows beyond the first `kept`, later than the state resumed, are dropped.

    Raises `TrainingError` where the folder cannot be written.
    """

    def __init__(self, folder: Path, labels: Sequence[str], *, kept: int) -> None:
        self._path = folder / METRICS
        self._labels = labels
        self._due: list[list[object]] = []
        rows = self._rows()[:kept]
        header = ["epoch", "step", "seconds", "learning_rate", "loss", "dice", *(f"dice_{n}" for n in labels)]
        text = io.StringIO()
        csv.writer(text).writerows([header, *rows])
        try:
            write_text(self._path, text.getvalue())
            # written row by row: the usual writer's thread would die of a full disk without anybody's knowledge
            self._events = EventsWriter(str(folder / "events"))
            # later steps of an earlier file are not to be shown
            self._happened(int(rows[-1][1]) + 1 if rows else 0, session_log=SessionLog(status=SessionLog.START))
        except (DataError, OSError) as error:
            # no mistake in what was asked: the same may do better once more
            raise TrainingError(f"{folder}: no row can be written ({error}); then go on with --resume") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._events.close()
        except OSError as error:
            log.warning("TensorBoard events are not whole (%s)", error.strerror)

    def write(self, row: Row) -> None:
        """Add a row; where the disk is away, with the next one. Raises `TrainingError` where it is full."""
        numbers = [row.seconds, row.learning_rate, row.loss, row.dice, *(row.scores.get(n) for n in self._labels)]
        shown = {"loss": row.loss, "learning_rate": row.learning_rate}
        shown |= {f"dice/{name}": value for name, value in row.scores.items()}
        self._due.append([row.epoch, row.step, *("" if v is None else f"{v:.6g}" for v in numbers)])
        try:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(self._due)
            self._due.clear()
            for name, value in shown.items():
                self._happened(row.step, summary=scalar(name, value))
            self._events.flush()
        except OSError as error:
            if is_disk_full(error):
                raise TrainingError(
                    f"{self._path.parent}: cannot be written ({error.strerror}); free space, then go on with --resume"
                ) from error
            log.warning("%s: cannot be written (%s); tried again with the next row", self._path, error.strerror)
        said = "" if row.dice is None else f", Dice {row.dice:.4f}"
        log.info("epoch %d, step %d, %.0f s: loss %.4f%s", row.epoch, row.step, row.seconds, row.loss, said)

    def _happened(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def _rows(self) -> list[list[str]]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if len(row) > 1 and row[1].isdecimal()]
