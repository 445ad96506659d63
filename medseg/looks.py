"""Looks at held-back cases while training goes on: how many cases, what ends a look early; when, is said in fit.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.preprocess import Prepared

log = logging.getLogger(__name__)

# what a case may take at the first look, however little has passed
LEAST_S = 2.0


class ToldToEndError(Exception):
    """A signal came while cases were judged, which may take longer than a cluster waits."""


class TooLongError(Exception):
    """A case takes longer than there is time for, about so many `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:.0f} s")
        self.seconds = seconds


class Ear:
    """Hears between cases and between their windows what ends a look: a signal, or a case of more than `limit_s`."""

    def __init__(self, told: Callable[[], int], limit_s: float = math.inf) -> None:
        self._told = told
        self._limit_s = limit_s
        self._began = 0.0

    def before_each(self, cases: Sequence[Prepared]) -> Iterator[Prepared]:
        """The cases, one by one."""
        for case in cases:
            if self._told():
                raise ToldToEndError
            self._began = time.perf_counter()
            yield case

    def tick(self, share: float) -> None:
        """After each window, with the share of the case that is done."""
        if self._told():
            raise ToldToEndError
        seconds = (time.perf_counter() - self._began) / share
        # what is done need not be broken off
        if share < 1 and seconds > self._limit_s:
            raise TooLongError(seconds)


@dataclass(frozen=True)
class Look:
    """What came of one: Dice by label, the seconds that one takes, and how many cases one sees; None: not yet known."""

    scores: dict[str, float]
    seconds: float
    watched: int | None


def look(
    judge: Callable[[Sequence[Prepared], Ear], dict[str, float]],
    cases: Sequence[Prepared],
    told: Callable[[], int],
    *,
    watched: int | None,
    left_s: float,
    moment_s: float,
) -> Look:
    """Let `judge` say the Dice of as many of the `cases`, spread evenly, as can be seen in `moment_s`; at least one.

    The first look, `watched` None, begins with one case, which tells how long one takes. It is broken off, and says
    nothing, where that is more than the `left_s` that looks may take so far.
    """
    start = time.perf_counter()
    if watched is None:
        try:
            scores = judge(cases[:1], Ear(told, max(LEAST_S, left_s)))
        except TooLongError as error:
            log.info("a held-back case takes about %.0f s: there is no time to look at one yet", error.seconds)
            return Look({}, error.seconds, None)
        each = time.perf_counter() - start
        watched = max(1, min(len(cases), int(moment_s / max(1e-6, each))))
        if watched == 1:
            return Look(scores, each, 1)
        start = time.perf_counter()
    picked = np.unique(np.linspace(0, len(cases) - 1, watched).round().astype(int))
    scores = judge([cases[i] for i in picked], Ear(told))
    return Look(scores, time.perf_counter() - start, watched)
