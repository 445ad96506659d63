"""A fold as a run folder: recognised whoever trained it, refused where it is something else, trained if missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import medseg
from medseg_pipelines.locks import Lock, age_s, is_locked
from medseg_pipelines.processes import attempt, link_cache, read_json, reason_of
from medseg_pipelines.trial import DESCRIPTION, FAILURE, JOB, OK, RESULT, STATE, WRONG, make_job
from medseg_pipelines.trials import ATTEMPTS, first_difference

CONFIG, WEIGHTS, LOG = "config.yaml", "model.safetensors", "log.txt"
VALIDATION = "validation"
# what a run changes while it lives: the cache while it prepares cases, its state every two minutes
PULSE = (LOG, "cache", STATE)
# where the disk has no locks, a run by hand that has changed nothing for so long is taken for dead
QUIET_S = 300.0


@dataclass(frozen=True)
class Weights:
    """A file that every fold begins with."""

    file: Path
    sha256: str


@dataclass(frozen=True)
class Fold:
    """What is to be trained and judged; digests are as model.json has them.

    `data_sha256` is over the files of `training`, `validation_sha256` over those of `held_back`.
    """

    number: int
    folder: Path
    dataset: Path
    config: medseg.Config
    training: tuple[medseg.Case, ...]
    held_back: tuple[medseg.Case, ...]
    data_sha256: str
    validation_sha256: str
    folds: int
    device: str
    pretrained: Weights | None = None

    @property
    def lock(self) -> Path:
        """Beside the folder, which belongs to the run alone."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    @property
    def job(self) -> dict[str, Any]:
        """What is written into job.json for the process that trains."""
        job = make_job(
            self.dataset, self.data_sha256, self.config, fold=self.number, folds=self.folds, device=self.device
        )
        return job | {
            "pretrained": None if self.pretrained is None else str(self.pretrained.file),
            "pretrained_sha256": self._begins_with,
        }

    @property
    def _begins_with(self) -> str | None:
        return None if self.pretrained is None else self.pretrained.sha256

    def refuse_other_weights(self, began_with: str | None) -> None:
        """Raises `ConfigError` where what is in the folder began with other weights; SHA-256, None: with none."""
        if began_with != self._begins_with:
            there = "random weights" if began_with is None else f"the weights {_short(began_with)}"
            asked = "none" if self.pretrained is None else f"{self.pretrained.file} ({_short(self.pretrained.sha256)})"
            raise medseg.ConfigError(
                f"{self.folder}: began with {there}, but {asked} asked; give the --pretrained of before, or choose "
                "another -o"
            )


@dataclass(frozen=True)
class Found:
    """What is in a fold's folder. `description`: model.json.

    `reason`: why it is damaged, not to be touched, or missing although it was done before.
    """

    state: Literal["missing", "done", "damaged", "elsewhere"]
    reason: str = ""
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def postprocess(self) -> dict[str, Any]:
        """The post-processing that was chosen when the training ended, on the cases that it held back."""
        chosen = self.description.get("inference", {}).get("postprocess", {}).get("settings", {})
        return dict(chosen.get("postprocess", {}))


def look(fold: Fold) -> Found:
    """What is there already. A begun training counts as missing: to train the fold is to go on with it.

    So does one whose held-back files have changed: to go on is to choose, segment and judge by those of now.
    Raises `ConfigError` where the folder belongs to other settings, cases or data.
    """
    if fold.folder.exists() and not fold.folder.is_dir():
        raise medseg.ConfigError(f"{fold.folder}: is a file, expected the run folder of a fold; choose another -o")
    if not (fold.folder / DESCRIPTION).is_file():
        return _look_at_begun(fold)
    resumable = (fold.folder / STATE).is_file()
    try:
        description = json.loads((fold.folder / DESCRIPTION).read_text(encoding="utf-8"))
        training, config = description["training"], medseg.make_config(description["config"], source=DESCRIPTION)
        learnt, held_back = training["data_sha256"], training["validation_cases"]
        weights = medseg.file_sha256(fold.folder / WEIGHTS)
        broken = "" if weights == description["weights_sha256"] else f"{WEIGHTS} is not what {DESCRIPTION} describes"
    except (OSError, ValueError, KeyError, TypeError, medseg.MedsegError) as error:
        broken = f"{DESCRIPTION} or {WEIGHTS} is damaged ({type(error).__name__}: {error})"
    if broken:
        # the last state makes the same model once more
        return Found("missing") if resumable else Found("damaged", _delete(fold, broken))
    _refuse_other_settings(fold, config)
    _refuse_other_data(fold, learnt, held_back)
    fold.refuse_other_weights((training.get("pretrained") or {}).get("sha256"))
    stale = _judged_by_others(fold, training.get("validation_sha256"), resumable=resumable)
    judged = (fold.folder / VALIDATION / "report" / "summary.json").is_file()
    if resumable and (stale or not judged):
        return _elsewhere(fold) or Found("missing", stale)
    return Found("done", description=description)


def train_fold(fold: Fold, lock: Lock, *, cache: Path) -> str | None:
    """Train what is missing, in a process of its own, and go on from its last state; the reason where it fails.

    An attempt that breaks down is gone on with once, unless the settings are wrong. Raises `KeyboardInterrupt` once
    the process has stopped and its state is whole.
    """
    folder, reason = fold.folder, ""
    folder.mkdir(parents=True, exist_ok=True)
    medseg.write_text(folder / JOB, json.dumps(fold.job, indent=1, ensure_ascii=False) + "\n")
    link_cache(folder / "cache", cache)
    for _ in range(ATTEMPTS):
        (folder / FAILURE).unlink(missing_ok=True)
        code = attempt(folder, None, started=lock.name_worker, forbidden=lock.lost)
        if lock.lost.is_set():
            return "another machine took it over: this one had shown no sign of life for minutes"
        if code == OK:
            if (folder / "cache").is_symlink():
                (folder / "cache").unlink()
            return None
        reason = reason_of(folder, code)
        if code == WRONG:
            break
    if not (folder / FAILURE).is_file():
        # killed from outside: whoever collects is to know
        medseg.write_text(folder / FAILURE, json.dumps({"reason": reason}) + "\n")
    return reason


def failure_of(fold: Fold) -> str | None:
    """Why the last attempt at the fold failed, whoever made it; None where none has failed."""
    written = read_json(fold.folder / FAILURE)
    return None if written is None else str(written.get("reason", "failed"))


def numbers_of(fold: Fold, found: Found) -> dict[str, Any]:
    """What the run says of its training: steps, seconds, device; memory and machine where a process of ours made it."""
    training, result = found.description.get("training", {}), read_json(fold.folder / RESULT) or {}
    return {
        "steps": training.get("steps"),
        "train_seconds": training.get("seconds"),
        "stage_seconds": result.get("stages"),
        "case_seconds": case_seconds(fold),
        "peak_memory_mb": result.get("peak_memory_mb"),
        "machine": result.get("machine"),
        "device": training.get("device"),
        "precision": training.get("precision"),
        "versions": found.description.get("versions"),
        "data_sha256": fold.data_sha256,
        "weights_sha256": found.description.get("weights_sha256"),
        "postprocess": found.postprocess,
    }


def case_seconds(fold: Fold) -> float | None:
    """Mean seconds from file to mask of the held-back cases, by the record of their inference."""
    record = read_json(fold.folder / VALIDATION / "run.json") or {}
    timed = [c["seconds"] for c in record.get("cases", []) if c.get("status") == "done" and c.get("seconds")]
    spent = [sum(seconds.values()) for seconds in timed]
    return sum(spent) / len(spent) if spent else None


def mask_of(folder: Path, case: medseg.Case) -> Path | None:
    """The mask of a case in a folder of masks."""
    return next((p for p in (folder / f"{case.id}{e}" for e in (".nii.gz", ".png")) if p.is_file()), None)


def _look_at_begun(fold: Fold) -> Found:
    job = read_json(fold.folder / JOB)
    if job is not None and job.get("data_sha256") != fold.data_sha256:
        raise medseg.ConfigError(
            f"{fold.folder}: begun with other data ({_short(job.get('data_sha256'))} there, {_short(fold.data_sha256)} "
            "now); choose another -o, or delete it"
        )
    if job is not None:
        fold.refuse_other_weights(job.get("pretrained_sha256"))
    config = fold.folder / CONFIG
    if config.is_file() and (fold.folder / STATE).is_file():
        _refuse_other_settings(fold, medseg.read_config(config))
    return _elsewhere(fold) or Found("missing")


def _elsewhere(fold: Fold) -> Found | None:
    """A run that somebody began by hand, and that holds its log or still writes."""
    if not fold.folder.is_dir() or (fold.folder / JOB).is_file():
        return None
    if is_locked(fold.folder / LOG):
        return Found("elsewhere", f"{fold.folder}: `medseg train` works on it; the same command goes on after its end")
    age = min((age for name in PULSE if (age := age_s(fold.folder / name)) is not None), default=None)
    if age is None or age > QUIET_S:
        return None
    why = f"{fold.folder}: `medseg train` seems to work on it (it wrote {age:.0f} s ago)"
    return Found("elsewhere", f"{why}; if not, wait till that is {QUIET_S:.0f} s ago")


def _refuse_other_settings(fold: Fold, config: medseg.Config) -> None:
    other = first_difference(config.model_dump(mode="json"), fold.config.model_dump(mode="json"))
    if other is not None:
        raise medseg.ConfigError(f"{fold.folder}: trained with other settings ({other}); choose another -o")


def _refuse_other_data(fold: Fold, learnt: str, held_back: Sequence[str]) -> None:
    asked = [case.id for case in fold.held_back]
    if sorted(held_back) != sorted(asked):
        other = sorted(set(held_back) ^ set(asked))
        raise medseg.ConfigError(
            f"{fold.folder}: held back {len(held_back)} cases, which are not the {len(asked)} of fold {fold.number} "
            f"({other[0]} is in one of them only); give the --folds it was trained with, or choose another -o"
        )
    if learnt != fold.data_sha256:
        raise medseg.ConfigError(
            f"{fold.folder}: trained on other data (SHA-256 {_short(learnt)} there, {_short(fold.data_sha256)} now); "
            "choose another -o, or bring the data back"
        )


def _judged_by_others(fold: Fold, judged_by: str | None, *, resumable: bool) -> str:
    """In words, that held-back files are others than those the fold was judged by; "" where they are the same.

    A run of before does not say by which. Raises `ConfigError` where there is no state to judge the fold again from.
    """
    if judged_by in (None, fold.validation_sha256):
        return ""
    there, now = _short(judged_by), _short(fold.validation_sha256)
    stale = f"files of its held-back cases have changed (SHA-256 {there} there, {now} now)"
    if not resumable:
        raise medseg.ConfigError(
            f"{fold.folder}: {stale}, and without {STATE} it cannot be judged again; bring those files or {STATE} "
            "back, or delete the folder and it is trained again"
        )
    return f"{stale}, it is judged again"


def _delete(fold: Fold, what: str) -> str:
    return f"{fold.folder}: {what}; copy it again, or delete it and it is trained again"


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}…"
