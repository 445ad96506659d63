"""Who works on a folder of a shared disk: a lock file that several machines respect, with the pulse of its holder.

A holder that is a dead process of this machine loses its lock at once; one of another machine once its pulse has been
still for `STALE_S`. The disk's own clock is asked: those of the machines may differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.processes import read_json

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("medseg.locks")

PULSE_S = 15.0
STALE_S = 180.0
UNTIL_STALE_S = STALE_S + PULSE_S
"""After so long a lock of a process that was killed on another machine can be had."""
LOOK_S = 3.0


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds. `lost` is set where another has taken it over: then write nothing more."""

    path: Path
    token: str
    lost: threading.Event = field(default_factory=threading.Event)

    def name_worker(self, process: int) -> None:
        """From now on the lock also lives as long as this process of ours: a child that is still saving."""
        if not self.lost.is_set():
            medseg.write_text(self.path, _text(self.token, process))

    def beat(self) -> None:
        """Show that the holder lives; find out whether the lock is still ours.

        Raises `OSError` where the disk does not tell.
        """
        with contextlib.suppress(FileNotFoundError, ValueError):
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(holder, dict) and holder.get("token") == self.token:
                os.utime(self.path)
                return
        self.lost.set()


@contextmanager
def held(path: Path, *, pulse_s: float = PULSE_S, patience_s: float = 0.0) -> Iterator[Lock | None]:
    """The lock `path` for as long as the block lasts; None where another holds it. A stale one is taken over.

    `patience_s`: how long to wait for one that another holds.
    """
    end = time.monotonic() + patience_s
    while (lock := take(path)) is None and time.monotonic() < end:
        time.sleep(min(LOOK_S, max(0.0, end - time.monotonic())))
    if lock is None:
        yield None
        return
    ended = threading.Event()

    def pulse() -> None:
        while not ended.wait(pulse_s) and not lock.lost.is_set():
            try:
                lock.beat()
            except OSError:
                # a share that is away for a moment; for longer, and others take the lock over
                log.warning("%s: no sign of life could be given", path, exc_info=True)

    thread = threading.Thread(target=pulse, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        if (read_json(path) or {}).get("token") == lock.token:
            path.unlink(missing_ok=True)


def take(path: Path) -> Lock | None:
    """The lock, or None where a living process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    for _ in range(2):
        if publish(path, _text(token, None)):
            return Lock(path, token)
        if not _clear(path):
            return None
    return None


def holder_of(path: Path) -> str | None:
    """Where the lock is held, in words; None: nobody holds it, or its holder is dead."""
    holder = read_json(path)
    if holder is None or not _lives(path, holder):
        return None
    return f"{holder.get('host')}, process {holder.get('process')}"


def publish(path: Path, text: str) -> bool:
    """Write a file that is not there yet, whole or not at all; False where another was first."""
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        medseg.write_text(whole, text)
        os.link(whole, path)
    except FileExistsError:
        # a server that was asked twice finds what the first request has made
        return whole.stat().st_nlink > 1
    except OSError:
        # a disk without hard links: the name is taken at once, the text follows
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        whole.unlink(missing_ok=True)
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the file with `flock`, as a training does its log; False where the disk has no locks."""
    if sys.platform == "win32" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        log.debug("%s: cannot be asked for its lock (%s)", path, error.strerror)
    return False


def age_s(path: Path) -> float | None:
    """Seconds since the file changed, by the clock of its disk; None: it is not there."""
    probe = path.with_name(f".{uuid.uuid4().hex}.now")
    try:
        changed = path.stat().st_mtime
        probe.touch()
        return probe.stat().st_mtime - changed
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _clear(path: Path) -> bool:
    """Remove a stale lock; False where it is not stale, or another is removing it."""
    holder = read_json(path)
    if _held_by_the_living(path, holder):
        return False
    guard = path.with_name(f"{path.name}.clearing")
    if not publish(guard, _text("", None)):
        if (age_s(guard) or 0.0) > STALE_S:
            guard.unlink(missing_ok=True)
        return False
    try:
        # another may have cleared it meanwhile, and one more taken it
        if _held_by_the_living(path, read_json(path)):
            return False
        if not path.exists():
            return True
        log.warning("%s: taken over from %s, which is gone", path, (holder or {}).get("host"))
        path.unlink(missing_ok=True)
        return True
    finally:
        guard.unlink(missing_ok=True)


def _held_by_the_living(path: Path, holder: Mapping[str, Any] | None) -> bool:
    if holder is None:
        # gone meanwhile, or its text has not followed yet
        age = age_s(path)
        return age is not None and age <= STALE_S
    return _lives(path, holder)


def _lives(path: Path, holder: Mapping[str, Any]) -> bool:
    if holder.get("machine") == _machine():
        known = [(holder.get(k), holder.get(f"{k}_began")) for k in ("process", "worker")]
        # 0 and below are no process but groups of them
        return any(isinstance(p, int) and 0 < p < 2**31 and _process_lives(p, began) for p, began in known)
    age = age_s(path)
    return age is not None and age <= STALE_S


def _text(token: str, worker: int | None) -> str:
    me = os.getpid()
    content = {
        "token": token,
        "host": platform.node(),
        "machine": _machine(),
        "process": me,
        "process_began": _began(me),
        "worker": worker,
        "worker_began": None if worker is None else _began(worker),
    }
    return json.dumps(content, indent=1) + "\n"


def _machine() -> str:
    """What tells machines, their boots and containers apart: only within one do process numbers mean anything."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_lives(process: int, began: str | None) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    found = _began(process)
    # the number may have gone to another process since
    return found != "" and (began is None or found is None or found == began)


def _began(process: int) -> str | None:
    """When a process began, in ticks since the boot; "" for one that has ended; None where the system does not tell."""
    try:
        # the name may hold blanks and brackets: fields are counted from behind it
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if not Path("/proc/self/stat").exists() else ""
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
