"""What a measured child process writes about itself while it runs, so that a killed one still tells where it was."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Stages:
    """Seconds by stage, kept in a JSON file. The stage `start` is the interpreter's own, before the first line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {"start": time.time() - float(os.environ["BENCHMARK_BEGAN"])}
        self.facts: dict[str, Any] = {}
        self.current = "start"
        self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the stage `name`."""
        outer, self.current = self.current, name
        self.write()
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.current = outer

    def write(self) -> None:
        """Put on disk what is known so far."""
        rounded = {k: round(v, 4) for k, v in self.seconds.items()}
        self.path.write_text(json.dumps({"stage": self.current, "seconds": rounded, "facts": self.facts}))


def read_job() -> dict[str, Any]:
    """The job whose file is the only argument."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job
