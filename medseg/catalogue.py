"""Where models are: at a path, or by the name of one that comes with medseg. Their files are read elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from medseg.errors import ModelError

log = logging.getLogger(__name__)

MODELS = Path(__file__).parent / "models"
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
# what `medseg-crossval` chose, and its record: in a folder that holds run folders
BEST, CROSSVAL = "best.json", "crossval.json"
# the last one is there before the others: a training that has not ended is told as one
OF_A_MODEL = (WEIGHTS, DESCRIPTION, BEST, CROSSVAL, "config.yaml")


def model_names(folder: Path = MODELS) -> tuple[str, ...]:
    """The names of the models that come with medseg."""
    found = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(path.name for path in found if (path / WEIGHTS).is_file()))


def find_model(model: str | Path, folder: Path = MODELS) -> Path:
    """The folder that `model` stands for: a path that exists, else the model of that name that comes with medseg.

    A folder that only has the name of one, such as that of its data set, is passed over. Raises `ModelError` for a name
    that is neither, with those that there are.
    """
    path = Path(model)
    found = shipped_model(model, OF_A_MODEL, folder)
    if found is not None:
        return found
    if len(path.parts) == 1 and not path.exists():
        names = model_names(folder)
        there = f"those are {', '.join(names)}" if names else "there is none in this installation"
        raise ModelError(f"{model}: no such folder, and no model of that name comes with medseg; {there}")
    return path


def shipped_model(name: str | Path, files: Collection[str], folder: Path = MODELS) -> Path | None:
    """The folder of the model of that name that comes with medseg; None where there is none, or a path is meant.

    That is one of a file, or of a folder that has one of `files`. The log says which of the two is taken.
    """
    if str(name) not in model_names(folder):
        return None
    path = Path(name)
    if path.is_dir() and not any((path / file).exists() for file in files):
        log.warning(
            "%s: the model that comes with medseg is taken, not the folder of that name, which holds none of %s",
            name,
            ", ".join(files),
        )
    elif path.exists():
        log.warning(
            "%s: the folder of that name is taken, not the model that comes with medseg; rename or leave it to have "
            "the other",
            name,
        )
        return None
    else:
        log.info("%s: the model that comes with medseg", name)
    return folder / str(name)


def weights_file(path: Path) -> Path:
    """The file of weights that `path` stands for: itself, a run folder's, or that of a model that comes with medseg."""
    # a name stands for a model that comes with medseg; what is neither is told as a missing file
    folder = find_model(path) if str(path) in model_names() else path
    return folder / WEIGHTS if folder.is_dir() else path
