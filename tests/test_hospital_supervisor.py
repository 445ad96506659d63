"""All parts of a node by one command: what becomes of them when it is killed, and what one says that cannot start."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hospital_node import listens, settings_dict, started
from hospital_peers import free_port, wait_for


@contextmanager
def running(root: Path, values: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """`medseg-hospital run`; its log is `root/log`."""
    process = started("run", root, values)
    try:
        yield process
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait(30)
        for one in left:
            if one.is_running():
                one.kill()


def test_a_database_that_is_not_up_yet_does_not_end_the_node(tmp_path: Path) -> None:
    values = settings_dict(tmp_path, database=f"postgresql://medseg@127.0.0.1:{free_port()}/medseg")
    with running(tmp_path, values) as process:
        wait_for(lambda: process.poll() is not None or b"has ended (2); it is started again" in log_of(tmp_path))
        assert process.poll() is None
    assert b"the parts are started, and try again" in log_of(tmp_path)


def log_of(root: Path) -> bytes:
    return (root / "log").read_bytes().replace(b"\n", b" ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_parts_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    values = settings_dict(tmp_path, web={"port": free_port(), "secure": False})
    with running(tmp_path, values) as process:
        wait_for(lambda: listens(values["gateway"]["port"]) and listens(values["web"]["port"]))
        parts = psutil.Process(process.pid).children()
        assert len(parts) == 3
        process.send_signal(signal.SIGKILL)
        gone, left = psutil.wait_procs(parts, timeout=60)
        for one in left:
            one.kill()
        assert len(gone) == 3
    assert not listens(values["gateway"]["port"])
