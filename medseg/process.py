"""What the system tells a process and is told by it: signals that end a run, memory there is and was held."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONTROL_GROUPS, OWN_CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Preempted(KeyboardInterrupt):
    """SIGTERM ended the work, as a cluster does that wants its machine back; it goes on where it was left."""


def peak_memory_mb() -> float | None:
    """The most memory this process has held so far, where Linux tells it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    peak = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")), None)
    return None if peak is None else round(int(peak) / 1024, 1)


def machine_memory_bytes() -> int | None:
    """All memory of the machine, where the system tells it, or the less of it that a container or a job may hold.

    Another program's share of it changes nothing.
    """
    if not hasattr(os, "sysconf"):
        return None
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()])


def _memory_limits() -> Iterator[int]:
    """What the control groups of this process and those around them may hold, in bytes, where Linux limits them."""
    if not OWN_CONTROL_GROUPS.is_file():
        return
    for line in OWN_CONTROL_GROUPS.read_text(encoding="utf-8", errors="replace").splitlines():
        # NUMBER:CONTROLLERS:PATH, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (
            (CONTROL_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (CONTROL_GROUPS, "memory.max")
        )
        # of a container the path may be that of the machine around it, which is not seen: then what is at the top holds
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (folder / name).is_file():
                limit = (folder / name).read_text(encoding="ascii").strip()
                # version 2 says "max" where there is none, version 1 a number larger than any memory
                if limit.isdecimal():
                    yield int(limit)


class PeakMemory:
    """The most memory that the process has held: while one case was in the network, and in all."""

    def __init__(self, *, apart: bool) -> None:
        self._apart = apart
        self._most = 0.0

    def begin(self) -> None:
        """A case goes into the network."""
        self._most = max(self._most, peak_memory_mb() or 0.0)
        self._apart = self._apart and _forget_peak_memory()

    def end(self) -> float | None:
        """What was held at most since then."""
        held = peak_memory_mb()
        self._most = max(self._most, held or 0.0)
        return held

    def told(self) -> dict[str, Any]:
        """For the record: the figure of the whole process, and what those of the cases mean."""
        most = max(self._most, peak_memory_mb() or 0.0)
        return {"peak_memory_mb": most or None, "peak_memory_of": "each case" if self._apart else "the process so far"}


def _forget_peak_memory() -> bool:
    """Begin the peak anew; False where the system does not let that be done."""
    try:
        # proc(5): 5 resets the peak resident set size
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@contextmanager
def hearing_signals(hear: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `hear` with their number instead of what they did before. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = {number: handler for number, handler in before.items() if _may_be_heard(handler)}
    try:
        for number in heard:
            signal.signal(number, lambda told, _: hear(told))
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


@contextmanager
def heeding_signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `stop`, a second one ends the process at once.

    After the block the first one raises what it asks for: `KeyboardInterrupt`, or `Preempted` for SIGTERM.
    """
    told: list[int] = []

    def once(number: int) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):
            if _may_be_heard(signal.getsignal(other)):
                signal.signal(other, signal.SIG_DFL)
        told.append(number)
        stop()

    with hearing_signals(once):
        yield
    if told:
        raise end_asked_by(told[0])


def end_asked_by(number: int) -> KeyboardInterrupt:
    """What a signal raises when the work is in order."""
    return Preempted() if number == signal.SIGTERM else KeyboardInterrupt()


def _may_be_heard(handler: Any) -> bool:
    # whoever ignores a signal (nohup) has a reason; None: a handler that Python does not know
    return handler not in (signal.SIG_IGN, None)
