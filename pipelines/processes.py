"""A training as a process of its own: started in its folder, watched, stopped with its state saved; why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medseg_pipelines.trial import FAILURE, INTERRUPTED, OUTPUT

SECONDS_TO_STOP = 120.0
SECONDS_BETWEEN_LOOKS = 0.5
# what torchrun and srun tell a process of the others that were started with it
TOGETHER = ("TORCHELASTIC_", "SLURM_", "MASTER_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")


def attempt(
    folder: Path,
    quiet_s: float | None,
    *,
    started: Callable[[int], None] | None = None,
    forbidden: threading.Event | None = None,
) -> int:
    """The exit code of the process that does what job.json in `folder` asks; negative: killed by that signal.

    −SIGALRM: it was stopped because it showed no progress for `quiet_s`. `started` gets its number. Once `forbidden` is
    set the folder is another's: the process is killed and nothing more is written. Ctrl-C, and whatever else is raised
    here, lets it save its state.
    """
    command = [sys.executable, "-m", "medseg_pipelines.trial", str(folder)]
    with (folder / OUTPUT).open("ab") as output:
        # a session of its own: Ctrl-C reaches it through this process, exactly once
        process = subprocess.Popen(
            command, env=_environment_of_one(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            if started is not None:
                started(process.pid)
            return _watch(process, folder / OUTPUT, quiet_s, forbidden)
        except BaseException:
            _stop(process)
            raise


def reason_of(folder: Path, code: int, quiet_s: float | None = None) -> str:
    """Why the process ended with `code`, in words. Raises `KeyboardInterrupt` where somebody stopped it."""
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == -signal.SIGALRM:
        return f"made no progress for {quiet_s:.0f} s and was stopped; see {folder / OUTPUT}"
    written = read_json(folder / FAILURE)
    if written is not None:
        return str(written["reason"])
    if code == -signal.SIGKILL:
        return "killed from outside, most likely because memory ran out; give it a smaller train.batch_size or patch"
    return f"ended with code {code}; see {folder / OUTPUT}"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or the file broke off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def link_cache(link: Path, cache: Path) -> None:
    """Preprocessing is the same for all: the folder of a training shows the shared cache, where links can be made."""
    cache.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
            link.symlink_to(cache.resolve(), target_is_directory=True)


def _environment_of_one() -> dict[str, str]:
    """A training of one fold is alone, also where this program is one of several tasks."""
    return {name: value for name, value in os.environ.items() if not name.startswith(TOGETHER)}


def _watch(
    process: subprocess.Popen[bytes], output: Path, quiet_s: float | None, forbidden: threading.Event | None
) -> int:
    changed, since = _changed_at(output), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(SECONDS_BETWEEN_LOOKS)
        if forbidden is not None and forbidden.is_set():
            process.kill()
            return process.wait()
        # by our own clock: that of the disk may differ
        if (now := _changed_at(output)) != changed:
            changed, since = now, time.monotonic()
        if quiet_s is not None and time.monotonic() - since > quiet_s:
            _stop(process)
            return -signal.SIGALRM


def _changed_at(path: Path) -> int | None:
    """When the file was changed; None: it is not there, or its disk is away."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask to save and stop; kill what does not."""
    with _deaf():
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    # a second Ctrl-C must not leave the process behind
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
