"""Several processes of one command line: which of them this is, and how they are started, told to end, and end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from medseg.cli.shared import INTERRUPTED, OK, PREEMPTED, SOME_FAILED
from medseg.terminal import err

# the name under which our own processes know each other; what torchrun starts has another
OURS = "medseg"
# what a process has to say when another one failed, it says within this time
SECONDS_TO_END = 10.0
SECONDS_BETWEEN_LOOKS = 0.1
# of a process that was told to end before it could listen
TOLD_TOO_EARLY = {-signal.SIGTERM: PREEMPTED, -signal.SIGINT: INTERRUPTED}


def rank() -> int:
    """The number of this process among those that torchrun, SLURM or `start` started; 0 where it is alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("RANK", 0))
    return int(os.environ.get("SLURM_PROCID", 0)) if _is_one_of_srun() else 0


def on_this_machine() -> int | None:
    """How many processes were started together on this machine, where their starter tells it."""
    name = "LOCAL_WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_NTASKS_PER_NODE"
    told = os.environ.get(name, "")
    return int(told) if told.isdecimal() else None


def is_one_of_several() -> bool:
    """Whether others were started together with this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or _is_one_of_srun()


def has_a_starter() -> bool:
    """Whether `start` started this process, and waits for its end."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == OURS


def start(arguments: Sequence[str], count: int) -> int:
    """Run `medseg` with `arguments` in `count` processes on this machine, and give the exit code of all together.

    Where one fails the others are ended; signals go to all of them; should this process be killed, they end too.
    """
    environment = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": OURS,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    # processes that each use all cores are in each other's way
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "medseg", *arguments],
            env=environment | {"RANK": str(n), "LOCAL_RANK": str(n)},
            # nothing is ever written there: it closes when this process ends
            stdin=subprocess.PIPE,
            # a session of its own: Ctrl-C reaches it through this process, exactly once
            start_new_session=True,
        )
        for n in range(count)
    ]
    before = {
        number: signal.signal(number, lambda told, _: _tell(processes, told))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        return _watch(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            process.kill()
            process.wait()


def end_with_the_one_that_started_us() -> None:
    """Of the processes of `start`: without it nobody would end the others when one fails, or tell them of a signal."""
    if has_a_starter():
        threading.Thread(target=_wait_for_the_end_of_input, daemon=True).start()


def _is_one_of_srun() -> bool:
    # a shell on a node is told of as many tasks as were asked for, and so are its commands, each of which is alone
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not by_hand and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _wait_for_the_end_of_input() -> None:
    while os.read(0, 1):
        continue
    os._exit(SOME_FAILED)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _tell(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline = None
    while True:
        codes = {
            n: TOLD_TOO_EARLY.get(code, code)
            for n, process in enumerate(processes)
            if (code := process.poll()) is not None
        }
        # one that was told to end may leave another in a call that no signal reaches, such as finding each other
        if any(code != OK for code in codes.values()) and deadline is None:
            deadline = time.monotonic() + SECONDS_TO_END
        # those that do not end by themselves have nothing to say
        if len(codes) == len(processes) or (deadline is not None and time.monotonic() > deadline):
            return _outcome(codes)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _outcome(codes: Mapping[int, int]) -> int:
    """The code of all from those of the processes, by number: the first process speaks first."""
    killed = [n for n, code in codes.items() if code < 0]
    for n in killed:
        name = signal.Signals(-codes[n]).name
        why = ", most likely because memory ran out" if name == "SIGKILL" else ""
        err.print(f"[red]error:[/red] process {n} was ended by {name}{why}")
    return next((code for code in codes.values() if code > 0), SOME_FAILED if killed else OK)
