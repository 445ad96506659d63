"""A process that answers requests as the one that infers does, but knows no library; `model` says how it behaves.

`python hospital_fake_child.py FOLDER`: appends every job that it begins to FOLDER/begun; what FOLDER/cured names is
done whatever its model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from medseg_pipelines.hospital.request import Request, read_request
from medseg_pipelines.hospital.results import file_name, inputs_of, write_result
from medseg_pipelines.hospital.store import sha256_of

HELD = bytearray()


def tell(**facts: Any) -> None:
    """A line of JSON."""
    print(json.dumps(facts), flush=True)


def done(request: Request) -> None:
    """Files of all formats, with the name of the job in them."""
    for step in ("checked", "inferred"):
        tell(job=request.job, step=step)
    made = Path(request.work) / request.job / "made"
    made.mkdir(parents=True)
    files = {}
    for format in (*request.formats, *(["picture"] if request.picture else [])):
        path = made / file_name(format)
        path.write_text(f"{request.job} {format}")
        files[format] = {"file": path.name, "sha256": sha256_of(path), "size": path.stat().st_size}
    result = {
        "inputs": inputs_of(request.files),
        "files": files,
        "seconds": {"network": 0.5},
        "quality": {},
        "warnings": [],
        "look": False,
    }
    tell(job=request.job, end="done", result=write_result(made, result, Path(request.results)))


def behave(request: Request, how: str) -> None:
    """What a process may do, by the name of it."""
    if how == "refuse":
        tell(job=request.job, end="refused", reason="no single volume")
    elif how == "fail":
        tell(job=request.job, end="failed", reason="the device is in a bad mood")
    elif how == "segv":
        Path(request.work, request.job).mkdir(parents=True, exist_ok=True)
        print("a library complains of Canary^Tweety", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(3)
    elif how == "half":
        os.write(1, b'{"job": "')
        os._exit(1)
    elif how == "garbage":
        os.write(1, b"\xff\xfe no JSON\n")
    elif how == "list":
        os.write(1, b"[1, 2]\n")
    elif how == "closed":
        os.close(1)
    elif how == "another":
        tell(job="of somebody else", end="done", result={"files": {}})
    elif how == "eat":
        HELD.extend(b"1" * 300_000_000)
    elif how == "feed":
        # memory of a process that it has started, in a session of its own
        code = "held = bytearray(b'1' * 300_000_000); import time; time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        Path(sys.argv[1], "started").write_text(str(process.pid))
    elif how == "orphan":
        # dies, and leaves behind what it has started
        Path(sys.argv[1], "started").write_text(str(subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL).pid))
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "log":
        tell(log=30, text="the planes are odd")
        done(request)
        return
    elif how == "slow":
        tell(job=request.job, step="checked")
    if how not in ("refuse", "fail"):
        # it never comes to an end
        time.sleep(600)


def main() -> None:
    """Answers until the standard input ends."""
    folder = Path(sys.argv[1])
    if (folder / "broken").exists():
        print("no such library", file=sys.stderr)
        sys.exit(4)
    tell(ready=True)
    for line in sys.stdin:
        request = read_request(line)
        with (folder / "begun").open("a") as begun:
            begun.write(f"{request.job}\n")
        cured = (folder / "cured").read_text() if (folder / "cured").exists() else ""
        how = "done" if request.job in cured else Path(request.model).name
        if how == "done":
            done(request)
        else:
            behave(request, how)


if __name__ == "__main__":
    main()
