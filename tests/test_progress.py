"""How progress is told: seconds a case and time left, worked by hand on a clock that stands still."""

from __future__ import annotations

import pytest

from medseg import progress
from medseg.progress import Pace, spoken


class Clock:
    """Monotonic time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def test_nothing_is_said_before_there_is_something_to_tell_it_from(clock: Clock) -> None:
    pace = Pace(10)
    clock.now += 5
    pace.measure(0.0, skipped=0)
    assert (pace.done, pace.words()) == (0, "")


def test_seconds_a_case_and_time_left(clock: Clock) -> None:
    pace = Pace(40)
    clock.now += 37.5
    pace.measure(12.5, skipped=0)
    # 37.5 s / 12.5 = 3 s; 27.5 cases are left: 82.5 s
    assert (pace.done, pace.words()) == (12.5, "3 s a case, 1 min 22 s left")


def test_cases_that_were_there_say_nothing_about_the_others(clock: Clock) -> None:
    pace = Pace(10)
    clock.now += 60
    pace.measure(0.0, skipped=5)
    clock.now += 8
    pace.measure(2.0, skipped=5)
    assert (pace.done, pace.words()) == (7, "4 s a case, 12 s left")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.417, "0.42 s"),
        (3.14, "3.1 s"),
        (12, "12 s"),
        (59.97, "1 min 0 s"),
        (87, "1 min 27 s"),
        (7512, "2 h 5 min"),
        (0, "0 s"),
    ],
)
def test_times_as_one_says_them(seconds: float, words: str) -> None:
    assert spoken(seconds) == words
