"""Trials as folders: started one after the other as processes, done once, retried once, and read; no statistics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.processes import attempt as _attempt
from medseg_pipelines.processes import link_cache, read_json, reason_of
from medseg_pipelines.trial import FAILURE, JOB, OK, RESULT, STATE, WRONG, make_job

ATTEMPTS = 2
# a trial that shows no progress for so long hangs: it shows it case by case, and none takes an hour
QUIET_S = 3600.0


@dataclass(frozen=True)
class Trial:
    """One training of one variant with one seed, in a folder of its own."""

    folder: Path
    variant: str
    seed: int
    dataset: Path
    data_sha256: str
    config: medseg.Config
    fold: int
    folds: int
    device: str

    @property
    def job(self) -> dict[str, Any]:
        """What is to be done, as it is written into job.json."""
        return make_job(
            self.dataset, self.data_sha256, self.config, fold=self.fold, folds=self.folds, device=self.device
        )

    @property
    def quiet_s(self) -> float:
        """So long no healthy trial is without progress, however many cases it has and however large they are."""
        train = self.config.train
        # a look at held-back cases, and a way to infer that is tried on one, take up to their share of the training
        return QUIET_S + (train.validation_share + train.calibration_share) * (train.time_budget_s or 0.0)


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial: `content` of its result.json, or the `reason` why there is none."""

    trial: Trial
    content: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    reused: bool = False


def refuse_other_settings(trials: Sequence[Trial]) -> None:
    """Raises `ConfigError` where the folder of a trial holds the finished result of another: it would be lost."""
    for trial in trials:
        job = read_json(trial.folder / JOB)
        other = None if job is None or read_json(trial.folder / RESULT) is None else first_difference(job, trial.job)
        if other is not None:
            raise medseg.ConfigError(
                f"{trial.folder}: holds a finished run of something else ({other}), and a new one would delete it; "
                "choose another -o, or replace such runs with --overwrite"
            )


def run_trial(trial: Trial, *, cache: Path) -> TrialResult:
    """The result that is there already for the same settings, or else that of training now.

    Other settings or data begin anew, and what is there is lost: see `refuse_other_settings`. An attempt that broke off
    is gone on with; one that fails is tried once more unless its settings are wrong. `cache` holds preprocessed cases,
    by settings and source, for all trials. Raises `KeyboardInterrupt` once the process has stopped and its state is
    whole.
    """
    folder = trial.folder
    job = read_json(folder / JOB)
    if job is None or first_difference(job, trial.job) is not None:
        shutil.rmtree(folder, ignore_errors=True)
    found = read_json(folder / RESULT)
    if found is not None:
        return TrialResult(trial, found, reused=True)
    folder.mkdir(parents=True, exist_ok=True)
    medseg.write_text(folder / JOB, json.dumps(trial.job, indent=1, ensure_ascii=False) + "\n")
    link_cache(folder / "cache", cache)
    reason = ""
    for _ in range(ATTEMPTS):
        (folder / FAILURE).unlink(missing_ok=True)
        code = _attempt(folder, trial.quiet_s)
        found = read_json(folder / RESULT) if code == OK else None
        if found is not None:
            _tidy(folder)
            return TrialResult(trial, found)
        reason = reason_of(folder, code, trial.quiet_s)
        if code == WRONG:
            break
        if not (folder / STATE).is_file():
            # whatever else is there, such as weights of half an attempt, is in the way of a new one
            (folder / "model.safetensors").unlink(missing_ok=True)
    return TrialResult(trial, reason=reason)


def _tidy(folder: Path) -> None:
    """Drop what only an unfinished trial needs; the model, its log and its masks stay."""
    (folder / STATE).unlink(missing_ok=True)
    link = folder / "cache"
    if link.is_symlink():
        link.unlink()
    else:
        shutil.rmtree(link, ignore_errors=True)


def first_difference(found: Mapping[str, Any], asked: Mapping[str, Any], within: str = "") -> str | None:
    """The first that differs in two jobs or two settings, in words; None: they give the same result."""
    for key in dict.fromkeys((*asked, *found)):
        if not within and key == "dataset":
            # the same data at another place are the same data
            continue
        name, one, other = f"{within}{key}", found.get(key), asked.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = first_difference(one, other, f"{name}.")
            if inner is not None:
                return inner
        elif one != other:
            return f"{name}: {one} there, {other} asked"
    return None
