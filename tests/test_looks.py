"""How many held-back cases a look sees, and what it says where its time is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from medseg import looks
from medseg.looks import Ear, Look, ToldToEndError, look

Judge = Callable[[Sequence[Any], Ear], dict[str, float]]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], tuple[list[Any], Judge, list[int]]]:
    """Cases that take so many seconds each, what judges them, and the numbers of those that were judged to the end."""

    def made(seconds: Sequence[float]) -> tuple[list[Any], Judge, list[int]]:
        now, seen = [0.0], []
        monkeypatch.setattr(looks.time, "perf_counter", lambda: now[0])
        cases = [SimpleNamespace(number=n, seconds=s) for n, s in enumerate(seconds)]

        def judge(given: Sequence[Any], ear: Ear) -> dict[str, float]:
            (case,) = ear.before_each(given)
            for window in range(1, 11):
                now[0] += case.seconds / 10
                ear.tick(window / 10)
            seen.append(case.number)
            return {"liver": 0.1 * case.number} if case.number else {}

        return cases, judge, seen

    return made


def said(found: Look) -> dict[str, float]:
    return {name: pytest.approx(value) for name, value in found.scores.items()}


def test_as_many_cases_as_fit_into_a_moment_are_seen(judge: Any) -> None:
    cases, one, seen = judge([1.0] * 9)
    found = look(one, cases, lambda: 0, watched=None, limit_s=60, moment_s=5.5)
    assert seen == [0, 2, 4, 6, 8]
    assert found.watched == 5
    assert found.seconds == pytest.approx(5.0)
    # a label counts in the cases that have it
    assert said(found) == {"liver": pytest.approx(0.5)}


def test_a_look_that_is_broken_off_says_what_was_seen(judge: Any) -> None:
    # the first case is a small crop, which tells little of the others
    cases, one, seen = judge([1.0] + [20.0] * 7)
    found = look(one, cases, lambda: 0, watched=None, limit_s=50, moment_s=7.5)
    assert seen == [0, 1, 2]
    assert said(found) == {"liver": pytest.approx(0.15)}
    # of cases that take so long one is a look
    assert found.watched == 1
    assert found.seconds == pytest.approx(51 / 3, rel=0.05)


def test_the_cases_stay_the_same_while_they_take_about_as_long(judge: Any) -> None:
    cases, one, seen = judge([1.0] * 9)
    assert look(one, cases, lambda: 0, watched=3, limit_s=60, moment_s=5.5).watched == 3
    assert seen == [0, 4, 8]
    # a cold start, long over
    assert look(one, cases, lambda: 0, watched=1, limit_s=60, moment_s=5.5).watched == 5


def test_a_case_that_was_not_seen_to_the_end_asks_for_twice_the_time(judge: Any) -> None:
    cases, one, seen = judge([10.0] * 3)
    assert look(one, cases, lambda: 0, watched=None, limit_s=4, moment_s=1) == Look({}, None, 8)
    assert not seen


def test_a_case_that_is_done_is_not_thrown_away(judge: Any) -> None:
    cases, one, seen = judge([10.0])
    # the time is over in the last window
    assert look(one, cases, lambda: 0, watched=None, limit_s=9.5, moment_s=1).watched == 1
    assert seen == [0]


def test_a_signal_ends_a_look_within_a_case(judge: Any) -> None:
    cases, one, seen = judge([10.0] * 3)
    asked = iter([0, 0, 0, 15])
    with pytest.raises(ToldToEndError):
        look(one, cases, lambda: next(asked), watched=3, limit_s=60, moment_s=60)
    assert not seen
