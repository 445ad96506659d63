"""What the measured trainers share: the job they read, a clock that counts training alone, what they tell."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Clock:
    """Seconds of training and, of these, of waiting for data; preparing and judging are not counted."""

    training: float = 0.0
    waiting: float = 0.0
    samples: int = 0
    steps: int = 0
    preparing: float = field(default_factory=lambda: -time.perf_counter())

    def ready(self) -> None:
        """All that comes before the first step is done."""
        self.preparing += time.perf_counter()

    def train(self, batches: Iterator[Any], step: Callable[[Any], int], until: float) -> None:
        """Take steps until `until` seconds of training have passed; `step` gives the samples that it saw."""
        while self.training < until:
            began = time.perf_counter()
            batch = next(batches)
            self.waiting += time.perf_counter() - began
            self.samples += step(batch)
            self.steps += 1
            self.training += time.perf_counter() - began

    def facts(self) -> dict[str, float | int]:
        """For the result."""
        return {
            "training_s": round(self.training, 2),
            "preparing_s": round(self.preparing, 2),
            "steps": self.steps,
            "samples_per_s": round(self.samples / self.training, 3),
            "waiting_share": round(self.waiting / self.training, 4),
        }


def read_job() -> dict[str, Any]:
    """The job whose file is the only argument."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job


def tell(path: Path, facts: dict[str, Any]) -> None:
    """Write `facts`; the file is whole once it is there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts))
    partial.replace(path)
