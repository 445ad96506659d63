"""Where models are: at a path, or by the name of one that comes with medseg. Their files are read elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

from medseg.errors import ModelError

log = logging.getLogger(__name__)

MODELS = Path(__file__).parent / "models"
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


def model_names(folder: Path = MODELS) -> tuple[str, ...]:
    """The names of the models that come with medseg."""
    found = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(path.name for path in found if (path / WEIGHTS).is_file()))


def find_model(model: str | Path, folder: Path = MODELS) -> Path:
    """The folder that `model` stands for: a path that exists, else the model of that name that comes with medseg.

    Raises `ModelError` for a name that is neither, with those that there are.
    """
    path, names = Path(model), model_names(folder)
    is_name = str(model) in names
    if path.exists():
        if is_name:
            log.warning(
                "%s: the folder of that name is taken, not the model that comes with medseg; rename or leave it to "
                "have the other",
                model,
            )
        return path
    if is_name:
        log.info("%s: the model that comes with medseg", model)
        return folder / str(model)
    if len(path.parts) == 1:
        there = f"those are {', '.join(names)}" if names else "there is none in this installation"
        raise ModelError(f"{model}: no such folder, and no model of that name comes with medseg; {there}")
    return path


def weights_file(path: Path) -> Path:
    """The file of weights that `path` stands for: itself, a run folder's, or that of a model that comes with medseg."""
    # a name stands for a model that comes with medseg; what is neither is told as a missing file
    folder = find_model(path) if str(path) in model_names() else path
    return folder / WEIGHTS if folder.is_dir() else path
