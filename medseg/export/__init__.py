"""A trained model for other programs: ONNX Runtime, MONAI's bundle tools. One door, and a module for each form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.catalogue import find_model
from medseg.errors import ConfigError
from medseg.export.agreement import Checked, Free, min_shape
from medseg.export.bundle import write_bundle
from medseg.export.onnx import write_onnx
from medseg.export.outputs import check_output
from medseg.model import Model, check_choices, chosen_settings, read_best, read_model
from medseg.progress import Progress, silent

__all__ = ["Exported", "export_model"]


@dataclass(frozen=True)
class Exported:
    """What was written to `path`.

    `free`: the axes of an image that may have any length, `batch and sizes` (of `min_shape` or more), `batch` or
    `nothing`; the others have that of `patch_size`. `difference`: how far the logits were from PyTorch's at most, as a
    share of the largest, over `images` images.
    """

    path: Path
    patch_size: tuple[int, ...]
    min_shape: tuple[int, ...]
    free: Free
    difference: float
    images: int


def export_model(
    model: str | Path, output: str | Path, *, to: str, overwrite: bool = False, progress: Progress = silent
) -> Exported:
    """Write the model in a run folder, or one of a name of `list_models()`, for other programs.

    `to` `onnx`: one file, the network alone, with labels and preprocessing in its metadata. `to` `bundle`: a MONAI
    Bundle, a new folder or a file that ends in `.zip`, with preprocessing and windows too. Before anything is written
    the network in the new form is compared with PyTorch on the CPU. `overwrite`: replace a file or a bundle that is
    there; other files in the bundle's folder stay.

    Raises `ConfigError` for several networks (a cross-validation), a wrong `to` or output, or a missing extra;
    `ModelError` for a damaged model, and with the figures where the two do not agree.
    """
    if to not in _FORMS:
        raise ConfigError(f"--to {to}: expected {' or '.join(_FORMS)}")
    output = Path(output)
    check_output(output, to=to, overwrite=overwrite)
    trained = _only_model(model)
    checked = _FORMS[to](trained, output, progress)
    patch = trained.config.windows.patch_size
    return Exported(output, patch, min_shape(trained), checked.free, checked.difference, checked.images)


_Write = Callable[[Model, Path, Progress], Checked[Any]]
# what `to` may be, and who writes it
_FORMS: dict[str, _Write] = {"onnx": write_onnx, "bundle": write_bundle}


def _only_model(name: str | Path) -> Model:
    """The one network of a model, as it was trained, with the windows and the cleaning that were chosen for it."""
    folder = find_model(name)
    best = read_best(folder)
    if best is not None:
        raise ConfigError(
            f"{folder}: a cross-validation found, whose masks are the mean of its networks, expected one network; "
            f"export its run folders one by one ({', '.join(str(folder / m) for m in best.models)})"
        )
    chosen = chosen_settings((folder,), ("windows", "postprocess"))
    check_choices(folder, chosen)
    # a window of image pooling fits whole images, and would bind the network to one size: it is told of instead
    return read_model(folder, {section: values for section, values in chosen.items() if section != "network"})
