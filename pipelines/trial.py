"""One trial in a process of its own: train, validate, write result.json; its peak of memory is then its own."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.compare import rows_of

log = logging.getLogger("medseg.trial")

# the last also shows by its time that there was progress
JOB, RESULT, FAILURE, OUTPUT = "job.json", "result.json", "failure.json", "output.txt"
STATE, DESCRIPTION = "last.pt", "model.json"
OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
SECONDS_BETWEEN_LOOKS = 5.0


def main() -> None:
    """Run the trial whose folder is the only argument."""
    # a shell may have started us deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a cluster tells every process of a job that it must go: save and stop, as after Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(Path(sys.argv[1])))


def make_job(
    dataset: Path, data_sha256: str, config: medseg.Config, *, fold: int, folds: int, device: str
) -> dict[str, Any]:
    """What is written into job.json for the process that trains."""
    return {
        "medseg": medseg.__version__,
        "dataset": str(dataset.resolve()),
        "data_sha256": data_sha256,
        "config": config.model_dump(mode="json"),
        "fold": fold,
        "folds": folds,
        "device": device,
    }


class Pulse:
    """Progress that shows in the time of a file, every few seconds at most: whoever watches it knows of a hang."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._shown_at = -math.inf
        self._last: tuple[str, float] | None = None

    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None:
        """The same again is no progress, and the time that is left in a `detail` changes by itself."""
        now = time.monotonic()
        if (stage, done) == self._last or now - self._shown_at < SECONDS_BETWEEN_LOOKS:
            return
        self._last, self._shown_at = (stage, done), now
        try:
            self._file.touch()
        except OSError as error:
            # a disk that is away: what is to be written there ends the training, not this
            log.debug("%s: no progress can be shown (%s)", self._file, error.strerror)


def run(folder: Path) -> int:
    """Do what job.json in `folder` asks and write result.json or failure.json; the code for the exit.

    A state that an earlier attempt left is gone on from.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _end_with_parent()
    try:
        job = json.loads((folder / JOB).read_text(encoding="utf-8"))
        result = _train(job, folder)
    except KeyboardInterrupt:
        return INTERRUPTED
    except medseg.MedsegError as error:
        _write(folder / FAILURE, {"reason": str(error)})
        # a wrong setting stays wrong; what broke down while training may do better once more
        return FAILED if isinstance(error, medseg.TrainingError) else WRONG
    except Exception as error:
        log.error("the trial failed", exc_info=True)
        _write(folder / FAILURE, {"reason": f"{type(error).__name__}: {error}"})
        return FAILED
    _write(folder / RESULT, result)
    return OK


def _train(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    options = medseg.TrainOptions(
        config=medseg.make_config(job["config"], source=str(folder / JOB)),
        fold=job["fold"],
        folds=job["folds"],
        device=job["device"],
        resume=(folder / STATE).is_file(),
        pretrained=None if job.get("pretrained") is None else Path(job["pretrained"]),
    )
    done = medseg.train(job["dataset"], folder, options=options, progress=Pulse(folder / OUTPUT))
    if done.report is None:
        reasons = "; ".join(f"{r.case}: {r.reason}" for r in done.results[:3])
        raise medseg.DataError(f"{folder}: not one held-back case could be judged: {reasons}")
    training = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["training"]
    return {
        "job": job,
        "steps": training["steps"],
        "train_seconds": training["seconds"],
        "device": training["device"],
        "precision": training["precision"],
        "stages": dict(done.seconds),
        "case_seconds": {r.case: sum(r.seconds.values()) for r in done.results if r.status == "done"},
        "rows": rows_of(done.report),
        "failed_cases": {r.case: r.reason for r in done.results if r.status == "failed"}
        | {f.case: f.reason for f in done.report.failures},
        "machine": platform.node(),
        # what was trained before it was ended has its own
        "peak_memory_mb": max(done.gpu_memory_mb, training.get("gpu_memory_mb") or 0.0) or _peak_memory_mb(),
    }


def _peak_memory_mb() -> float:
    """The most memory this process has held."""
    # kilobytes on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _end_with_parent() -> None:
    """Stop as Ctrl-C does when the process that started this one is gone: nobody would read the result."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    medseg.write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
