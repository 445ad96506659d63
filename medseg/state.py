"""The file that a broken-off training goes on from: written whole or not at all, and checked before it is believed."""

from __future__ import annotations

import io
import logging
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from medseg.config import Config
from medseg.errors import ConfigError, DataError, TrainingError
from medseg.writers import atomic_path

log = logging.getLogger(__name__)

STATE = "last.pt"
# raised whenever a state of before can no longer be gone on with
VERSION = 3
# what a state has had in every version, and other projects' checkpoints have not all of
OURS = frozenset({"network", "optimizer", "deck", "generator"})
# settings of training that change nothing of what is learnt, or are checked by themselves
ELSEWHERE = frozenset({"seed", "precision", "deterministic", "save_every_s", "validation_share", "calibration_share"})
END = ("train.epochs", "train.time_budget_s")


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state into the run `folder`. Raises `TrainingError` where there is no room; the one before is kept."""
    # into memory first: torch reports a full disk as an error of its own that names no file
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    path = folder / STATE
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except DataError as error:
        kept = (
            "the state before it is whole: then go on with --resume" if path.is_file() else "nothing is lost but time"
        )
        raise TrainingError(f"{error}; {kept}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The state in the run `folder`, on the CPU. Raises `ConfigError` where it is damaged or of another version."""
    path = folder / STATE
    refused = f"{path}: cannot be resumed, because it is"
    anew = "copy it again from where it is whole, or train into a new folder"
    try:
        # torch looks at the sums of its parts only where they do not fit together
        damaged = zipfile.ZipFile(path).testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        # whoever asks for a state has been told that there is one
        raise ConfigError(
            f"{path}: no such file for this process, but another one of this training has it; expected a run folder on "
            "a disk that all processes share: choose such a one with -o"
        ) from error
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{refused} damaged ({type(error).__name__}: {words}); {anew}") from error
    if damaged is not None:
        raise ConfigError(f"{refused} damaged (its part {damaged} is not what was written); {anew}")
    found = state.get("version", 1) if isinstance(state, dict) else "unknown"
    if found != VERSION:
        raise ConfigError(
            f"{refused} of version {found}, expected {VERSION}; go on with the medseg that wrote it, or train into a "
            "new folder"
        )
    return dict(state)


def is_state(content: object) -> bool:
    """Whether what a file of torch.save holds is such a state, of whatever version."""
    return isinstance(content, Mapping) and content.keys() >= OURS


def arithmetic(precision: str, device: torch.device) -> dict[str, Any]:
    """What a state keeps of how it was computed: other numbers of either round other sums."""
    # on a GPU threads compute nothing that is trained with
    return {"precision": precision, "threads": torch.get_num_threads() if device.type == "cpu" else None}


def check_arithmetic(folder: Path, state: Mapping[str, Any], now: Mapping[str, Any], *, deterministic: bool) -> None:
    """Warn where a fit goes on in another precision than that of the `state`; a state of an earlier medseg has none.

    Raises `ConfigError` where it is `deterministic` and goes on in another precision or with other threads on a CPU.
    """
    ways = {"precision": "--precision {}", "threads": "OMP_NUM_THREADS={} in the environment"}
    for key, way in ways.items():
        was = state.get("arithmetic", now)[key]
        if was is None or now[key] is None or was == now[key]:
            continue
        said = f"{folder / STATE}: was computed with {key} {was}, found {now[key]} here"
        if deterministic:
            raise ConfigError(
                f"{said}; expected the same, since the weights would not be those of an undisturbed training: resume "
                f"with {way.format(was)}, or give that up with --set train.deterministic=false"
            )
        if key == "precision":
            log.warning("%s; %s keeps it as it was", said, way.format(was))


def settings_of(config: Config) -> dict[str, Any]:
    """What a state keeps of how its weights were learnt, by section.key."""
    sections = config.model_dump(mode="json", include={"loss", "augment", "train"})
    return {
        f"{section}.{key}": value
        for section, settings in sections.items()
        for key, value in settings.items()
        if key not in ELSEWHERE
    }


def check_settings(folder: Path, before: Mapping[str, Any] | None, now: Config, *, step: int, elapsed: float) -> None:
    """Warn of what is learnt otherwise from here on than `before`, the settings in the state (None: not known).

    Raises `ConfigError` where that is nothing any more: where the end was changed to one that lies behind, or other
    settings come after it.
    """
    path, asked, train = folder / STATE, settings_of(now), now.train
    # what a later medseg has added was its default before
    others = {
        key: f"{key} {asked[key]} (was {value})"
        for key, value in (before or {}).items()
        if key in asked and asked[key] != value
    }
    changed = ", ".join(text for key, text in others.items() if key not in END)
    anew = "or train into a new folder"
    if train.epochs is not None:
        done, total = f"{step} steps", train.epochs * train.steps_per_epoch
        is_beyond, is_over = step > total, step >= total
        asked_for = f"{train.epochs} epochs of {train.steps_per_epoch} steps"
        least = f"--epochs {math.ceil(step / train.steps_per_epoch)}"
    else:
        done, budget = f"for {elapsed:.0f} s", cast(float, train.time_budget_s)
        is_over = elapsed >= budget
        # a little beyond its own end is every training
        is_beyond = is_over and bool(others.keys() & set(END))
        asked_for, least = f"--time-budget {budget:g}s", f"--time-budget {math.ceil(elapsed)}s"
    if is_beyond:
        raise ConfigError(
            f"{path}: has learnt {done}, more than the {asked_for} that are asked for; expected {least}, which ends it "
            f"here, or more, {anew}"
        )
    if changed and is_over:
        raise ConfigError(
            f"{path}: has learnt {done} and is at its end, so that nothing would be learnt with {changed}; leave that "
            f"as it was, give it more than {least}, {anew}"
        )
    if changed:
        log.warning("%s: from here on with %s, as its weights have not been learnt so far", path, changed)
