"""Which files belong together, and label maps of a pair on one grid; nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from medseg.errors import DataError, GeometryError
from medseg.grid import ROUNDING_TOLERANCE, Grid
from medseg.metrics import Labels
from medseg.readers import ENDINGS, is_image_file, read_label, split_ending

# share of a voxel that two grids may be apart at a corner: headers hold 32-bit numbers and rounded quaternions
GRID_TOLERANCE_VOXELS = ROUNDING_TOLERANCE
_NAMED_AT_MOST = 10


@dataclass(frozen=True)
class Pair:
    """The files of one case; `prediction` is None where it is missing."""

    case: str
    prediction: Path | None
    reference: Path
    image: Path | None = None


def find_pairs(predictions: Path, references: Path, images: Path | None = None) -> tuple[list[Pair], list[str]]:
    """Every reference with its prediction and image, sorted by case, and warnings. Raises `DataError`."""
    for path in (predictions, references, *([] if images is None else [images])):
        if not path.exists():
            raise DataError(f"{path}: does not exist, expected a folder of label maps or one file")
    if predictions.is_file() and references.is_file():
        return [Pair(split_ending(references.name)[0], predictions, references, _only_file(images))], []
    found = _files_by_case(references)
    if not found:
        raise DataError(f"{references}: no label maps found, expected files ending in {', '.join(ENDINGS)}")
    predicted = _files_by_case(predictions)
    pictured = {} if images is None else _files_by_case(images)
    pairs = [
        Pair(
            case,
            _single(predicted.get(case, ())),
            _single(files) or files[0],
            _single(pictured.get(case) or pictured.get(f"{case}_0000") or ()),
        )
        for case, files in sorted(found.items())
    ]
    alone = sorted(set(predicted) - set(found))
    warnings = [f"{len(alone)} predictions without a reference were left out: {named(alone)}"] if alone else []
    return pairs, warnings


def read_pair(prediction: Path, reference: Path, *, resample_prediction: bool = False) -> tuple[Labels, Labels, Grid]:
    """Both label maps on the reference's grid.

    Raises `GeometryError` if the grids differ, unless the prediction may be resampled (nearest neighbour, 0 outside).
    """
    found, expected = read_label(prediction), read_label(reference)
    if found.grid.matches(expected.grid, tolerance=GRID_TOLERANCE_VOXELS):
        return found.array, expected.array, expected.grid
    if resample_prediction and found.grid.spatial_dims == expected.grid.spatial_dims:
        return _nearest(found.array, found.grid, expected.grid), expected.array, expected.grid
    raise GeometryError(
        f"{prediction}: {_difference(found.grid, expected.grid)}; save the prediction on the reference's grid, or pass "
        "--resample-prediction"
    )


def named(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _files_by_case(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in [folder] if folder.is_file() else sorted(folder.iterdir()):
        if path.is_file() and is_image_file(path):
            files.setdefault(split_ending(path.name)[0], []).append(path)
    return files


def _single(files: Sequence[Path]) -> Path | None:
    if len(files) > 1:
        raise DataError(f"{files[0]}: one case in {len(files)} files ({named([f.name for f in files])}); keep one")
    return files[0] if files else None


def _only_file(images: Path | None) -> Path | None:
    return images if images is not None and images.is_file() else None


def _nearest(labels: Labels, from_grid: Grid, to_grid: Grid) -> Labels:
    n = from_grid.spatial_dims
    back = np.linalg.solve(from_grid.affine, to_grid.affine)
    moved = ndimage.affine_transform(
        labels, back[:n, :n], back[:n, n], output_shape=to_grid.shape, order=0, mode="grid-constant", cval=0
    )
    return np.asarray(moved)


def _difference(found: Grid, expected: Grid) -> str:
    if found.shape != expected.shape:
        return f"shape {found.shape} found, expected {expected.shape} of the reference"
    if not np.allclose(found.spacing_mm, expected.spacing_mm, rtol=1e-3):
        return (
            f"spacing {_numbers(found.spacing_mm)} mm found, expected {_numbers(expected.spacing_mm)} of the reference"
        )
    n = found.spatial_dims
    origins = found.affine[:n, n], expected.affine[:n, n]
    if not np.allclose(*origins, atol=1e-2):
        return f"origin {_numbers(origins[0])} mm found, expected {_numbers(origins[1])} of the reference"
    return "axes in other directions than those of the reference found, expected the same"


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
