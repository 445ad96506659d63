"""Trials as folders: started one after the other as processes, done once, retried once, and read; no statistics."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.trial import FAILURE, INTERRUPTED, JOB, OK, RESULT, STATE, WRONG

OUTPUT = "output.txt"
ATTEMPTS = 2
# a trial that takes this many times its training time, and the pause on top, hangs
PATIENCE, PAUSE_S = 4.0, 1800.0
SECONDS_TO_STOP = 120.0


@dataclass(frozen=True)
class Trial:
    """One training of one variant with one seed, in a folder of its own."""

    folder: Path
    variant: str
    seed: int
    dataset: Path
    config: medseg.Config
    fold: int
    folds: int
    device: str

    @property
    def job(self) -> dict[str, Any]:
        """What decides the result, as it is written into job.json."""
        return {
            "medseg": medseg.__version__,
            "dataset": str(self.dataset.resolve()),
            "config": self.config.model_dump(mode="json"),
            "fold": self.fold,
            "folds": self.folds,
            "device": self.device,
        }

    @property
    def key(self) -> str:
        """The same for two trials that would do the same."""
        return hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()

    @property
    def limit_s(self) -> float:
        """Longer than this no healthy trial takes."""
        return PATIENCE * (self.config.train.time_budget_s or 0.0) + PAUSE_S


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial: `content` of its result.json, or the `reason` why there is none."""

    trial: Trial
    content: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    reused: bool = False


def run_trial(trial: Trial, *, cache: Path) -> TrialResult:
    """The result that is there already for the same settings, or else that of training now.

    Other settings begin anew; an attempt that broke off is gone on with; one that fails is tried once more unless its
    settings are wrong. `cache` holds preprocessed cases, by settings and source, for all trials. Raises
    `KeyboardInterrupt` once the process has stopped and its state is whole.
    """
    folder = trial.folder
    if _read(folder / JOB) != trial.job:
        shutil.rmtree(folder, ignore_errors=True)
    found = _read(folder / RESULT)
    if found is not None:
        return TrialResult(trial, found, reused=True)
    folder.mkdir(parents=True, exist_ok=True)
    medseg.write_text(folder / JOB, json.dumps(trial.job, indent=1, ensure_ascii=False) + "\n")
    _link_cache(folder / "cache", cache)
    reason = ""
    for _ in range(ATTEMPTS):
        (folder / FAILURE).unlink(missing_ok=True)
        code = _attempt(folder, trial.limit_s)
        found = _read(folder / RESULT) if code == OK else None
        if found is not None:
            _tidy(folder)
            return TrialResult(trial, found)
        reason = _reason(folder, code, trial.limit_s)
        if code == WRONG:
            break
        if not (folder / STATE).is_file():
            # whatever else is there, such as weights of half an attempt, is in the way of a new one
            (folder / "model.safetensors").unlink(missing_ok=True)
    return TrialResult(trial, reason=reason)


def _attempt(folder: Path, limit_s: float) -> int:
    """The exit code of the process that does the trial; negative: killed by that signal."""
    command = [sys.executable, "-m", "medseg_pipelines.trial", str(folder)]
    with (folder / OUTPUT).open("ab") as output:
        # a session of its own: Ctrl-C reaches it through this process, exactly once
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _stop(process)
            return -signal.SIGALRM
        except BaseException:
            _stop(process)
            raise


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
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(folder: Path, code: int, limit_s: float) -> str:
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == -signal.SIGALRM:
        return f"took more than {limit_s:.0f} s and was stopped; see {folder / OUTPUT}"
    written = _read(folder / FAILURE)
    if written is not None:
        return str(written["reason"])
    if code == -signal.SIGKILL:
        return "killed from outside, most likely because memory ran out; give it a smaller train.batch_size or patch"
    return f"ended with code {code}; see {folder / OUTPUT}"


def _link_cache(link: Path, cache: Path) -> None:
    """Preprocessing is the same for all: the folder of the trial shows the shared cache, where links can be made."""
    cache.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        with contextlib.suppress(OSError):
            link.symlink_to(cache.resolve(), target_is_directory=True)


def _tidy(folder: Path) -> None:
    """Drop what only an unfinished trial needs; the model, its log and its masks stay."""
    (folder / STATE).unlink(missing_ok=True)
    link = folder / "cache"
    if link.is_symlink():
        link.unlink()
    else:
        shutil.rmtree(link, ignore_errors=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # not there, or broken off: then it is done again
        return None
    return content if isinstance(content, dict) else None
