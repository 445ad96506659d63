"""How long work tells the outside how far it is: one callback type; who shows it, and how, is not known here."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then: `stage` in a word, `done` of `total` (cases, or seconds while training), and a detail."""

    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None: ...


def silent(stage: str, done: float, total: float, detail: str = "") -> None:
    """Progress that nobody watches."""
