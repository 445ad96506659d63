"""A trained model for other programs: ONNX Runtime, MONAI's bundle tools. One door, and a module for each form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.catalogue import find_model
from medseg.errors import ConfigError
from medseg.export.agreement import Checked, Free
from medseg.export.bundle import check_bundle, write_bundle
from medseg.export.onnx import write_onnx
from medseg.model import Model, check_choices, chosen_settings, read_best, read_model
from medseg.progress import Progress, silent

__all__ = ["Exported", "export_model"]


@dataclass(frozen=True)
class Exported:
    """What was written to `path`.

    `free`: the axes of an image that may have any length, `batch and sizes`, `batch` or `nothing`; the others have that
    of `patch_size`. `difference`: how far the logits were from PyTorch's at most, as a share of the largest, over
    `images` images.
    """

    path: Path
    patch_size: tuple[int, ...]
    free: Free
    difference: float
    images: int


def export_model(model: str | Path, output: str | Path, *, to: str, progress: Progress = silent) -> Exported:
    """Write the model in a run folder, or one of a name of `list_models()`, for other programs.

    `to` `onnx`: one file, the network alone, with labels and preprocessing in its metadata. `to` `bundle`: a MONAI
    Bundle, a new folder or a file that ends in `.zip`, with preprocessing and windows too. Before anything is written
    the network in the new form is compared with PyTorch on the CPU.

    Raises `ConfigError` for several networks (a cross-validation), a wrong `to` or output, or a missing extra;
    `ModelError` for a damaged model, and with the figures where the two do not agree.
    """
    if to not in _FORMS:
        raise ConfigError(f"--to {to}: expected {' or '.join(_FORMS)}")
    check, write = _FORMS[to]
    output = Path(output)
    check(output)
    _check_parent(output)
    trained = _only_model(model)
    checked = write(trained, output, progress)
    return Exported(output, trained.config.windows.patch_size, checked.free, checked.difference, checked.images)


def _check_onnx(output: Path) -> None:
    if output.is_dir() or output.suffix.lower() != ".onnx":
        found = "a folder" if output.is_dir() else f"ending {output.suffix or 'missing'}"
        raise ConfigError(f"{output}: {found} found, expected a file that ends in .onnx; change -o")


def _check_parent(output: Path) -> None:
    """Raises `ConfigError` where a file is in the way of the folder of `output`."""
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"{output}: {there} is a file, expected a folder; change -o")


_Check = Callable[[Path], None]
_Write = Callable[[Model, Path, Progress], Checked[Any]]
# what `to` may be: what is asked of the output, and who writes it
_FORMS: dict[str, tuple[_Check, _Write]] = {
    "onnx": (_check_onnx, write_onnx),
    "bundle": (check_bundle, write_bundle),
}


def _only_model(name: str | Path) -> Model:
    """The one network of a model, with the cleaning of masks that was chosen for it."""
    folder = find_model(name)
    best = read_best(folder)
    if best is not None:
        raise ConfigError(
            f"{folder}: a cross-validation found, whose masks are the mean of its networks, expected one network; "
            f"export its run folders one by one ({', '.join(str(folder / m) for m in best.models)})"
        )
    chosen = chosen_settings((folder,), ("postprocess",))
    check_choices(folder, chosen)
    return read_model(folder, chosen)
