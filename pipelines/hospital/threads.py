"""Threads of a part of the node, of which none may end unseen: with the first one that fails, all end."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

import medseg

log = logging.getLogger(__name__)

LOOK_S = 0.2
# so long they may finish what they are doing
JOIN_S = 10.0


class Threads:
    """Runs functions beside each other until `stop`; each is given it, and ends soon after it is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._threads: list[threading.Thread] = []
        self._failed: list[str] = []

    def start(self, name: str, function: Callable[[threading.Event], None]) -> None:
        """Begins one more."""
        # a part that has to end does so, even where one of its threads waits for a disk that is gone
        thread = threading.Thread(target=self._run, args=(name, function), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def every(self, name: str, seconds: float, function: Callable[[], object], *, after_s: float = 0.0) -> None:
        """Begins one more, that calls `function` again and again, with a pause between, first after `after_s` seconds.

        What passes by itself (a database that restarts, a model being replaced) is logged once, and tried again.
        """

        def repeat(stop: threading.Event) -> None:
            stop.wait(after_s)
            _repeat(name, seconds, function, stop)

        self.start(name, repeat)

    def wait(self) -> None:
        """Until `stop` is set or one has failed, then until all have ended. Raises `MedsegError` for the failed one."""
        while not self._stop.wait(LOOK_S):
            if any(not thread.is_alive() for thread in self._threads):
                break
        self._stop.set()
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if self._failed:
            raise medseg.MedsegError(self._failed[0])

    def _run(self, name: str, function: Callable[[threading.Event], None]) -> None:
        try:
            function(self._stop)
            if not self._stop.is_set():
                self._failed.append(f"{name} has ended by itself; this part of the node ends, to be started again")
        except Exception as error:  # noqa: BLE001
            # told by wait(), in the thread that can end the process
            self._failed.append(f"{name} has failed: {told(error)}; this part of the node ends, to be started again")


def _repeat(name: str, seconds: float, function: Callable[[], object], stop: threading.Event) -> None:
    is_down = False
    while not stop.is_set():
        try:
            function()
            if is_down:
                log.info("%s works again", name)
            is_down = False
        except (sa.exc.SQLAlchemyError, medseg.MedsegError, OSError) as error:
            if not is_down:
                log.error("%s does not work: %s; it is tried again", name, told(error))
            is_down = True
        stop.wait(seconds)


def told(error: BaseException) -> str:
    """What kind of error it is and where it came from; its own words only where they are ours, else they may quote."""
    if isinstance(error, medseg.MedsegError):
        return str(error)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "medseg" in f.filename or "hospital" in f.filename
    ]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    words = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{words}{where}"
