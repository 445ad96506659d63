"""The worker's side of the process that infers: started, asked, watched, killed when it takes too much, replaced."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import psutil

from medseg_pipelines.hospital.request import Request

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "medseg_pipelines.hospital.child")
# so long the libraries may take to load, on a slow disk too
START_S = 300.0
LOOK_S, MEMORY_LOOK_S = 0.2, 0.4
KILL_S = 10.0
GB = 10**9

End = Literal["done", "refused", "failed", "dropped"]


@dataclass(frozen=True)
class Outcome:
    """How a request ended: `done`; `refused`, for good; `failed`, for now; `dropped`, because nobody wants it any more.

    A crash, too much time and too much memory are failures that `reason` tells apart.
    """

    end: End
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


class StartError(Exception):
    """No process that infers can be started: no fault of any job."""


class _BrokenError(Exception):
    """The process has ended, or talks nonsense."""


class Children:
    """The process that infers and those that follow it, one at a time. Used by one thread, which must outlive them.

    `output`: the file for what libraries print in them, which may hold a patient's data and is no log; it begins anew
    with every request, and that of a process that broke is kept beside it, ending in `.broken`.
    """

    def __init__(
        self,
        output: Path,
        *,
        most_s: float,
        most_memory_gb: float,
        threads: int | None = None,
        command: Sequence[str] = COMMAND,
        start_s: float = START_S,
    ) -> None:
        self._output, self._command, self._threads = output, tuple(command), threads
        self._most_s, self._most_memory, self._start_s = most_s, most_memory_gb * GB, start_s
        self._running: _Running | None = None

    @property
    def process_id(self) -> int | None:
        """Of the process that runs now."""
        return None if self._running is None else self._running.process.pid

    def start(self, dropped: Callable[[], bool] = lambda: False) -> bool:
        """Has a process ready; False where `dropped` was true before. Raises `StartError`."""
        return self._ready(dropped) is not None

    def ask(
        self, request: Request, *, step: Callable[[str], None], dropped: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Has the request done; `step` is told what is done of it, `dropped` asked whether to give it up.

        Raises `StartError`.
        """
        running = self._ready(dropped)
        if running is None:
            return Outcome("dropped")
        os.truncate(self._output, 0)
        try:
            outcome = self._watch(running, request, step, dropped)
        except _BrokenError as error:
            self._break()
            return Outcome("failed", f"the process that infers broke down: {error}")
        except BaseException:
            self.close()
            raise
        if outcome.end in ("dropped", "failed"):
            # a library or a GPU that has failed once may do so until its process ends
            self.close()
        return outcome

    def close(self) -> None:
        """Kills the process, with all that it has started."""
        if self._running is not None:
            self._running.kill()
            self._running = None

    def _ready(self, dropped: Callable[[], bool]) -> _Running | None:
        if self._running is not None:
            if not self._running.has_ended():
                return self._running
            log.warning("the process that infers has ended while it waited; another one is started")
            self.close()
        running = self._running = _Running(self._command, self._output, self._threads)
        deadline = time.monotonic() + self._start_s
        try:
            while not dropped():
                answer = running.answer(LOOK_S)
                if answer is not None and answer.get("ready"):
                    return running
                if time.monotonic() > deadline:
                    raise _BrokenError(f"it is not ready after {self._start_s:g} s")
        except _BrokenError as error:
            self._break()
            raise StartError(
                f"no process that infers can be started ({error}); {_broken(self._output)} says more"
            ) from error
        self.close()
        return None

    def _watch(
        self, running: _Running, request: Request, step: Callable[[str], None], dropped: Callable[[], bool]
    ) -> Outcome:
        running.send(request.line())
        deadline = time.monotonic() + self._most_s
        look_at = time.monotonic() + MEMORY_LOOK_S
        while True:
            if dropped():
                return Outcome("dropped")
            answer = running.answer(LOOK_S)
            if answer is not None and answer.get("job") == request.job:
                if "step" in answer:
                    step(str(answer["step"]))
                if answer.get("end") == "done" and isinstance(answer.get("result"), dict):
                    return Outcome("done", result=answer["result"])
                if answer.get("end") == "refused":
                    return Outcome("refused", str(answer.get("reason")))
                if answer.get("end") == "failed":
                    return Outcome("failed", str(answer.get("reason")))
            if time.monotonic() > deadline:
                return Outcome(
                    "failed",
                    f"it took more than {self._most_s:g} s and was ended; raise worker.most_s if it should not",
                )
            if time.monotonic() < look_at:
                continue
            # finding the processes of a process reads those of the whole machine
            look_at = time.monotonic() + MEMORY_LOOK_S
            if (memory := running.memory()) > self._most_memory:
                return Outcome(
                    "failed",
                    f"it took {memory / GB:.1f} GB of memory, more than the {self._most_memory / GB:g} GB of "
                    "worker.most_memory_gb, and was ended",
                )

    def _break(self) -> None:
        """Ends what has broken, and keeps what it printed."""
        self.close()
        if self._output.exists():
            self._output.replace(_broken(self._output))


class _Running:
    """One process, and the thread that reads what it says."""

    def __init__(self, command: Sequence[str], output: Path, threads: int | None) -> None:
        environment = dict(os.environ)
        if threads is not None:
            environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        # appending, so that it can be cut while the process writes
        with output.open("ab") as printed:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=environment,
                # ctrl-C is for the worker; and all of it can be killed by its group
                start_new_session=True,
            )
        self._stdin, self._stdout = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._watched = psutil.Process(self.process.pid)

    def send(self, line: str) -> None:
        """Returns at once: a process that hangs reads no more than its pipe holds."""
        threading.Thread(target=self._write, args=(line.encode(),), daemon=True).start()

    def has_ended(self) -> bool:
        """Whether it is a process no more; its number is kept from others."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def answer(self, wait_s: float) -> dict[str, Any] | None:
        """What it says next; None where it says nothing for so long. Raises `_BrokenError` where it never will."""
        try:
            line = self._lines.get(timeout=wait_s)
        except queue.Empty:
            return None
        if not line.endswith(b"\n"):
            # nothing, or a line that broke off
            raise _BrokenError(self._how_it_ended())
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise _BrokenError("it answered with what is no JSON object")
        if "log" in said:
            log.log(int(said["log"]), "%s", said.get("text"))
            return None
        return said

    def memory(self) -> int:
        """Bytes of memory that it holds, with all that it has started."""
        held = 0
        try:
            held = self._watched.memory_info().rss
            for process in self._started():
                held += process.memory_info().rss
        except psutil.Error:
            # one has ended meanwhile
            return held
        return held

    def kill(self) -> int:
        """Ends it, and all that it has started; its exit code."""
        started = self._started()
        if self.process.returncode is None:
            # while nobody has asked for its exit code, its number is that of its group alone
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:
            try:
                # one that has begun a session of its own
                process.kill()
            except psutil.Error:
                continue
        try:
            code = self.process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            # it waits for a disk that does not answer; the worker must not wait with it
            log.error("process %d does not end when it is killed, and is left behind", self.process.pid)
            return -signal.SIGKILL
        self._reader.join(LOOK_S)
        if not self._reader.is_alive():
            self._stdout.close()
        return code

    def _started(self) -> list[psutil.Process]:
        try:
            return list(self._watched.children(recursive=True))
        except psutil.Error:
            return []

    def _write(self, data: bytes) -> None:
        try:
            self._stdin.write(data)
            self._stdin.flush()
        except OSError as error:
            # `answer` says why
            log.debug("a request was not read to its end (%s)", error.strerror)

    def _read(self) -> None:
        for line in self._stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def _how_it_ended(self) -> str:
        """Why it says nothing more, in words; it is ended, where it is not."""
        deadline = time.monotonic() + LOOK_S
        while not self.has_ended():
            if time.monotonic() > deadline:
                return "it has closed its output"
            time.sleep(0.01)
        code = self.kill()
        if code == -signal.SIGKILL:
            return "it was killed (SIGKILL), by the kernel most likely because memory ran out"
        if code < 0:
            return f"it ended by {signal.Signals(-code).name}"
        return f"it ended with code {code}"


def _broken(output: Path) -> Path:
    return output.with_name(f"{output.name}.broken")
