"""Looks at held-back cases while training goes on: how many cases, what ends a look early; when, is said in fit.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.cases import spread_evenly
from medseg.preprocess import Prepared

log = logging.getLogger(__name__)

# what a look may take however little has passed
LEAST_S = 2.0


class ToldToEndError(Exception):
    """A signal came while cases were judged, which may take longer than a cluster waits."""


class TooLongError(Exception):
    """A look has taken the time that there was for it."""


class Ear:
    """Hears between cases and between their windows what ends a look: a signal, or `limit_s` seconds that are over."""

    def __init__(self, told: Callable[[], int], limit_s: float = math.inf) -> None:
        self._told = told
        self._limit_s = limit_s
        self._began = time.perf_counter()

    def before_each(self, cases: Sequence[Prepared]) -> Iterator[Prepared]:
        """The cases, one by one."""
        for case in cases:
            self._listen()
            yield case

    def tick(self, share: float) -> None:
        """After some windows, with the share of the case that is done."""
        # what is done need not be broken off
        if share < 1:
            self._listen()

    def _listen(self) -> None:
        if self._told():
            raise ToldToEndError
        if time.perf_counter() - self._began > self._limit_s:
            raise TooLongError


@dataclass(frozen=True)
class Look:
    """What came of one: Dice by label, empty where not one case could be seen.

    For the next one: how many cases it sees, `watched`, None where that is not known; the `seconds` to have for it.
    """

    scores: dict[str, float]
    watched: int | None
    seconds: float


def look(
    judge: Callable[[Sequence[Prepared], Ear], dict[str, float]],
    cases: Sequence[Prepared],
    told: Callable[[], int],
    *,
    watched: int | None,
    limit_s: float,
    moment_s: float,
) -> Look:
    """Let `judge` say the Dice of `watched` of the `cases`, spread evenly; None: of as many as fit into `moment_s`.

    At most `limit_s` seconds long: of cases that take more, those that were seen till then count. Where that was none,
    the next look is to have twice the time.
    """
    start = time.perf_counter()
    ear = Ear(told, limit_s)
    found: list[dict[str, float]] = []
    try:
        if watched is None:
            found.append(judge(cases[:1], ear))
            # caches are warm from the second on, so that more may fit than this says
            watched = _fitting(len(cases), moment_s, time.perf_counter() - start)
        for case in spread_evenly(cases, watched)[len(found) :]:
            found.append(judge([case], ear))
    except TooLongError:
        log.info("a look at held-back cases is broken off after %.0f s, with %d judged", limit_s, len(found))
    seconds = time.perf_counter() - start
    if not found:
        return Look({}, None, 2 * limit_s)
    each = seconds / len(found)
    fitting = _fitting(len(cases), moment_s, each)
    # the cases stay the same unless their number is far off, so that one look can be put beside the next
    if watched is None or not watched <= 2 * fitting or not fitting <= 2 * watched:
        watched = fitting
    return Look(_means(found), watched, each * watched)


def _fitting(count: int, moment_s: float, each_s: float) -> int:
    return max(1, min(count, int(moment_s / max(1e-6, each_s))))


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each label over the cases that have it."""
    names = dict.fromkeys(name for scores in found for name in scores)
    return {name: float(np.mean([scores[name] for scores in found if name in scores])) for name in names}
