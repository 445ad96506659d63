"""Trials as folders: started one after the other as processes, done once, retried once, and read; no statistics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    """Raises `ConfigError` where the folder of a trial holds a run of another, finished or begun: it would be lost.

    `OSError` where a folder cannot be read.
    """
    for trial in trials:
        if (reason := _lost_by(trial)) is not None:
            raise medseg.ConfigError(reason)


def run_trial(trial: Trial, *, cache: Path, overwrite: bool = False) -> TrialResult:
    """The result that is there already for the same settings, or else that of training now.

    Where there is a run of other settings or data it stays, and the trial fails; with `overwrite` it is lost and all
    begins anew. An attempt that broke off is gone on with, by another medseg too unless `overwrite`; one that fails is
    tried once more unless its settings are wrong. `cache` holds preprocessed cases, by settings and source, for all
    trials. Raises `KeyboardInterrupt` once the process has stopped and its state is whole, `OSError` where the folder
    cannot be read.
    """
    folder = trial.folder
    reason = None if overwrite else _lost_by(trial)
    if reason is not None:
        return TrialResult(trial, reason=reason)
    if _difference(trial, any_version=not overwrite) is not None:
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


def _lost_by(trial: Trial) -> str | None:
    """Why the run in the folder of a trial would be lost if the trial began; None where it is gone on with, or none."""
    finished = (trial.folder / RESULT).exists()
    if not finished and not (trial.folder / STATE).exists():
        return None
    # what is finished is compared with what one medseg has made; what is not is gone on with as by `medseg train`
    other = _difference(trial, any_version=not finished)
    if other is None:
        return None
    return (
        f"{trial.folder}: holds {'a finished run' if finished else 'a begun training'} of something else ({other}), "
        "and a new one would delete it; choose another -o, remove that folder, or replace such runs with --overwrite"
    )


def _difference(trial: Trial, *, any_version: bool) -> str | None:
    """How the job in the folder of a trial differs from what is asked, in words; None: it is the same.

    With `any_version` a job of another medseg is the same where it means the same to this one.
    """
    try:
        job = json.loads((trial.folder / JOB).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{JOB}, which says of what, is missing"
    except ValueError:
        job = None
    if not isinstance(job, dict):
        return f"{JOB}, which says of what, is damaged"
    asked = trial.job
    if any_version and job.get("medseg") != asked["medseg"]:
        job["medseg"] = asked["medseg"]
        with suppress(medseg.ConfigError):
            # settings that it did not have yet are as they were without them
            job["config"] = medseg.make_config(job.get("config") or {}).model_dump(mode="json")
    return first_difference(job, asked)


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
