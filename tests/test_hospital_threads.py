"""The threads of a part of the node: what passes is tried again, what ends ends all."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from hospital_peers import wait_for

import medseg
from medseg_pipelines.hospital.threads import Threads, told


@pytest.mark.parametrize(
    "error", [medseg.ModelError("a model is being replaced"), sa.exc.TimeoutError("no connection is free")]
)
def test_what_passes_by_itself_is_told_once_and_tried_again(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    stop, calls = threading.Event(), []

    def work() -> None:
        calls.append(len(calls))
        if len(calls) < 4:
            raise error

    threads = Threads(stop)
    caplog.set_level("INFO")
    threads.every("work", 0.01, work)
    wait_for(lambda: len(calls) > 5)
    stop.set()
    threads.wait()
    assert caplog.text.count(f"work does not work: {told(error)}; it is tried again") == 1
    assert caplog.text.count("work works again") == 1


def test_a_thread_that_ends_by_itself_ends_all() -> None:
    stop = threading.Event()
    threads = Threads(stop)
    threads.every("other", 0.01, lambda: None)
    threads.start("short", lambda _: None)
    with pytest.raises(medseg.MedsegError, match="short has ended by itself"):
        threads.wait()
    assert stop.is_set()
