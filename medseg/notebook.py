"""Findings of something long, kept in a file as they are made, so that a kill costs one of them; of any matter."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medseg.errors import DataError

log = logging.getLogger(__name__)

ABOUT = "about"


class Notebook:
    """Findings by their keys in a file, a line of JSON each; `path` None: nothing is kept.

    What the file holds counts if it was begun with the same `about`; else it is begun anew. Keys and findings are what
    JSON can hold, NaN included. A line that a kill tore is as if it were not there.
    """

    def __init__(self, path: Path | None, about: str) -> None:
        self._path = path
        self._saved = 0.0
        lines = [] if path is None or not path.is_file() else _lines(path)
        known = bool(lines) and lines[0] == {ABOUT: about}
        self._found = {_key(line["key"]): line for line in lines[1:]} if known else {}
        if path is not None:
            # a torn line at the end must not join the next one
            kept = [{ABOUT: about}, *self._found.values()]
            self._write(path, "w", "".join(f"{json.dumps(line)}\n" for line in kept))
        if self._found:
            log.info("%s: %d findings from before", path, len(self._found))

    def once(self, key: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What is known by this key; else what `make` finds, kept. Raises `DataError` where the disk is full."""
        text = _key(key)
        line = self._found.get(text)
        if line is not None:
            self._saved += line["seconds"]
            return line["found"]
        start = time.perf_counter()
        made = make()
        line = {"key": list(key), "seconds": time.perf_counter() - start, "found": made}
        if self._path is not None:
            self._write(self._path, "a", json.dumps(line) + "\n")
        return made

    def clock(self) -> float:
        """Seconds since some moment, to which those count that findings from before took."""
        return time.perf_counter() + self._saved

    @staticmethod
    def _write(path: Path, mode: str, text: str) -> None:
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); free space, then go on") from error


def _key(key: Sequence[Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and (ABOUT in line or {"key", "seconds", "found"} <= line.keys()):
            found.append(line)
    return found
