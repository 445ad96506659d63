"""What happened, for good: lines of JSON, each with the hash of the one before, so that none can be changed unseen.

No patient's data: studies, series and jobs stand by digests, which the database resolves for those who may see it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

START = "0" * 64
Fact = str | int | float | bool | None


class Audit:
    """The audit log of one process: a file of its own in `folder`, begun anew with every start."""

    def __init__(self, folder: Path, part: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.path = folder / f"{part}-{stamp}-{os.getpid()}.jsonl"
        self._previous = START
        self._lock = threading.Lock()
        self._file = self.path.open("a", encoding="utf-8")
        self.record("started", part=part)

    def record(self, event: str, **facts: Fact) -> None:
        """Adds a line; it is on the disk when this ends."""
        with self._lock:
            entry = {"at": round(time.time(), 3), "event": event} | facts | {"previous": self._previous}
            text = json.dumps(entry, sort_keys=True, allow_nan=False)
            self._previous = hashlib.sha256(text.encode()).hexdigest()
            self._file.write(text + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the file with a line that says so; a file without it was cut, by whatever."""
        self.record("ended")
        self._file.close()


def broken_links(path: Path) -> Iterator[int]:
    """The numbers, from 1, of the lines in an audit file that do not follow from the line before."""
    previous = START
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            said = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            said = None
        if said != previous:
            yield number
        previous = hashlib.sha256(line.encode()).hexdigest()
