"""A child process under watch: how long it ran, how much memory it took, killed before it takes the machine's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
MB = 1e6

# of memory that must stay free for everybody else on the machine
RESERVE_MB = 2500.0
# a look costs some milliseconds of one core: about a hundredth of what is measured
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Outcome:
    """What became of a child.

    `status`: done, failed, killed_memory or killed_time. `wall_s`: from before its start until its end, interpreter
    and imports included. `peak_mb`: the largest resident set of one process, as the kernel counts it (a killed one:
    as last seen). `peak_tree_mb`: the largest sum over the process and all it started, seen every 100 ms; pages of
    files (libraries) are counted once, as those of the process that has most of them. `cpu_s`: processor time of it and
    of all it waited for, which suffers less from what else the machine does.
    `seconds` and `facts`: what the child itself wrote; `last_stage`: what it was doing when it ended before its time.
    """

    status: str
    wall_s: float
    cpu_s: float
    peak_mb: float
    peak_tree_mb: float
    load_before: float
    seconds: Mapping[str, float]
    facts: Mapping[str, Any]
    last_stage: str | None
    message: str = ""

    def as_row(self) -> dict[str, Any]:
        """As it stands in the results."""
        return asdict(self)


def run_guarded(
    command: Sequence[str],
    *,
    log: Path,
    record: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_mb: float,
    timeout_s: float,
) -> Outcome:
    """Run `command`; its output goes to `log`, what it says about itself is read from `record`.

    It is killed with all it started when these together hold more than `limit_mb`, when the machine has less than
    `RESERVE_MB` left, or after `timeout_s`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if record is not None:
        record.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    began = time.time()
    variables = {**os.environ, **(environment or {}), "BENCHMARK_BEGAN": repr(began)}
    peak = tree_peak = 0.0
    status = ""
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
        try:
            while True:
                pid, code, usage = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                largest, together = tree_memory_mb(child.pid)
                peak, tree_peak = max(peak, largest), max(tree_peak, together)
                if together > limit_mb or available_mb() < RESERVE_MB:
                    status = "killed_memory"
                elif time.time() - began > timeout_s:
                    status = "killed_time"
                if status:
                    pid, code, usage = _end(child)
                    break
                time.sleep(LOOK_EVERY_S)
        except (KeyboardInterrupt, SystemExit):
            # it is in a session of its own, where no signal to this process reaches it
            _end(child)
            raise
    wall = time.time() - began
    child.returncode = os.waitstatus_to_exitcode(code)
    said = json.loads(record.read_text()) if record is not None and record.is_file() else {}
    peak = max(peak, usage.ru_maxrss * 1024 / MB)
    status = status or ("done" if child.returncode == 0 else "failed")
    tail = "" if status != "failed" else " / ".join(log.read_text(errors="replace").splitlines()[-3:])[-400:]
    return Outcome(
        status=status,
        wall_s=round(wall, 3),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 3),
        peak_mb=round(peak, 1),
        peak_tree_mb=round(max(tree_peak, peak), 1),
        load_before=round(load, 2),
        seconds=said.get("seconds", {}),
        facts=said.get("facts", {}),
        last_stage=said.get("stage") if status != "done" else None,
        message=tail,
    )


def _end(child: subprocess.Popen[bytes]) -> tuple[int, int, Any]:
    # the session is the child's own: nothing else is in it
    os.killpg(child.pid, signal.SIGKILL)
    return os.wait4(child.pid, 0)


def tree_memory_mb(root: int) -> tuple[float, float]:
    """(largest, sum) of resident memory of a process and its descendants, in MB."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            found = _parent(int(entry))
            if found is not None:
                parents[int(entry)] = found
    inside = {root}
    grown = True
    while grown:
        more = {p for p, parent in parents.items() if parent in inside} - inside
        inside |= more
        grown = bool(more)
    sizes = [s for s in map(_resident, inside) if s is not None]
    if not sizes:
        return 0.0, 0.0
    own = sum(resident - shared for resident, shared in sizes)
    return max(r for r, _ in sizes) / MB, (own + max(s for _, s in sizes)) / MB


def _parent(pid: int) -> int | None:
    text = _read(f"/proc/{pid}/stat")
    # the name of a process may hold blanks and brackets
    return int(text.rpartition(")")[2].split()[1]) if text else None


def _resident(pid: int) -> tuple[int, int] | None:
    text = _read(f"/proc/{pid}/statm")
    if not text:
        return None
    fields = text.split()
    return int(fields[1]) * PAGE, int(fields[2]) * PAGE


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        # it ended meanwhile
        return ""


def available_mb() -> float:
    """Memory that the machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError("/proc/meminfo has no MemAvailable")
