"""The parts of a node as processes of one machine: started, started again when they end, ended together."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

# a part that ends at once is started again after a second, after two, … up to a minute
FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0
# one that has run so long has worked
WORKED_S = 60.0
LOOK_S = 0.2
# so long parts may finish what they are doing
GRACE_S = 30.0
# in the environment of a part: the process that started it
SUPERVISOR = "MEDSEG_HOSPITAL_SUPERVISOR"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Part:
    """A process: its name for people, and the arguments of `medseg-hospital`."""

    name: str
    arguments: tuple[str, ...]


@dataclass
class _Running:
    """A part and the process that it is now; `due`: when it is to be started again."""

    part: Part
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    due: float = field(default_factory=time.monotonic)


def supervise(parts: Sequence[Part], stop: threading.Event) -> None:
    """Keeps all parts running until `stop`, then ends them: politely first, by force after half a minute."""
    running = [_Running(part) for part in parts]
    try:
        while not stop.wait(LOOK_S):
            for one in running:
                _look(one)
    finally:
        _end(running)


def end_with_supervisor() -> None:
    """A part is told to end when its supervisor is killed: else it held port and queue against the next one."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(supervisor):
        # it was gone before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)


def _look(one: _Running) -> None:
    now = time.monotonic()
    if one.process is not None and (code := one.process.poll()) is not None:
        one.process = None
        one.pause_s = FIRST_PAUSE_S if now - one.started > WORKED_S else min(2 * one.pause_s, MOST_PAUSE_S)
        one.due = now + one.pause_s
        log.error("%s has ended (%s); it is started again in %.0f s", one.part.name, code, one.pause_s)
    if one.process is None and now >= one.due:
        one.started = now
        # a session of its own: ctrl-C reaches the supervisor alone, which ends the parts in order
        one.process = subprocess.Popen(
            [sys.executable, "-m", "medseg_pipelines.hospital", *one.part.arguments],
            start_new_session=True,
            env=os.environ | {SUPERVISOR: str(os.getpid())},
        )
        log.info("%s runs as process %d", one.part.name, one.process.pid)


def _end(running: Sequence[_Running]) -> None:
    living = [one.process for one in running if one.process is not None]
    for process in living:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in living:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            log.warning("process %d does not end; it is killed", process.pid)
            process.kill()
            process.wait()
