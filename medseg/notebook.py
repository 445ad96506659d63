"""Findings of something long, kept in a file as they are made, so that a kill costs one of them."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medseg.errors import TrainingError
from medseg.writers import write_text

log = logging.getLogger(__name__)


class Notebook:
    """Findings by their keys in a file, a line of JSON each; `path` None: nothing is kept.

    What the file holds counts if it was begun with the same `about`; else it is begun anew. Keys and findings are what
    JSON can hold, NaN included. A line that a kill tore, or that is none of ours, is as if it were not there. Raises
    `DataError` where the file cannot be begun, `TrainingError` where it cannot be added to.
    """

    def __init__(self, path: Path | None, about: str) -> None:
        self._path = path
        self._saved = 0.0
        self._found: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        first = json.dumps({"about": about}) + "\n"
        text = _read(path)
        if not text.startswith(first):
            write_text(path, first)
            return
        self._found = {_key(line["key"]): line for line in _lines(text.removeprefix(first))}
        if not text.endswith("\n"):
            # what was torn must not join the next line
            self._add("\n")
        log.info("%s: %d findings from before", path, len(self._found))

    @property
    def goes_on(self) -> bool:
        """Whether there are findings from before."""
        return bool(self._found)

    def knows(self, key: Sequence[Any]) -> bool:
        """Whether there is a finding from before by this key."""
        return _key(key) in self._found

    def once(self, key: Sequence[Any], make: Callable[[], Any]) -> Any:
        """What is known by this key; else what `make` finds, kept.

        Raises `TrainingError` where it cannot be kept: it is no failure of what was tried.
        """
        line = self._found.get(_key(key))
        if line is not None:
            self._saved += line["seconds"]
            return line["found"]
        start = time.perf_counter()
        made = make()
        self._add(json.dumps({"key": list(key), "seconds": time.perf_counter() - start, "found": made}) + "\n")
        return made

    def clock(self) -> float:
        """Seconds since some moment, to which those count that findings from before took."""
        return time.perf_counter() + self._saved

    def _add(self, text: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise TrainingError(
                f"{self._path}: cannot be written ({error.strerror or error}); free space or change the permissions. "
                "Training itself is done: then finish it with --resume"
            ) from error


def _key(key: Sequence[Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        log.warning("%s: cannot be read (%s) and is begun anew", path, error.strerror or error)
        return ""


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for words in text.splitlines():
        try:
            line = json.loads(words)
            if isinstance(line["key"], list) and math.isfinite(line["seconds"]) and "found" in line:
                yield line
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.debug("no finding: %.80s (%s)", words, type(error).__name__)
