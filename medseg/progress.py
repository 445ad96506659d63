"""How long work tells the outside how far it is: one callback type; who shows it, and how, is not known here."""

from __future__ import annotations

import time
from typing import Protocol


class Progress(Protocol):
    """Called now and then: `stage` in a word, `done` of `total` (cases, or seconds while training), and a detail.

    `done` may be a fraction: 12.4 cases of 40. A detail that ends in ` left` tells the time that is left.
    """

    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None: ...


def silent(stage: str, done: float, total: float, detail: str = "") -> None:
    """Progress that nobody watches."""


class Pace:
    """How long a case takes and how long the rest will; cases that were only skipped say nothing about it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0.0
        self._seconds = 0.0
        self._worked = 0.0
        self._skipped = 0
        self._began = time.monotonic()

    def measure(self, worked: float, *, skipped: int) -> None:
        """Now `worked` cases have been worked on, the last ones in part, and `skipped` were there already."""
        if skipped != self._skipped and not worked:
            # looking at what is there is no part of the work on what is not
            self._began = time.monotonic()
        self.done = worked + skipped
        self._worked, self._skipped = worked, skipped
        self._seconds = time.monotonic() - self._began

    def words(self) -> str:
        """`3.1 s a case, 1 min 27 s left`; nothing before there is something to tell it from."""
        if not self._worked:
            return ""
        each = self._seconds / self._worked
        return f"{spoken(each)} a case, {spoken(round(each * (self.total - self.done)))} left"


def spoken(seconds: float) -> str:
    """Seconds as one says them: 0.42 s, 3.1 s, 12 s, 1 min 27 s, 2 h 5 min."""
    if seconds < 59.95 and seconds != int(seconds):
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
