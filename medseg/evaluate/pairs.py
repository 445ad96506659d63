"""Which files belong together, and label maps of a pair on one grid; nothing is measured."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from medseg.errors import DataError, GeometryError
from medseg.grid import ROUNDING_TOLERANCE, Array, Grid
from medseg.metrics import Labels
from medseg.readers import ENDINGS, Geometry, is_image_file, read_label, same_kind_or_raise, split_ending, why_absent
from medseg.readers.probabilities import ENDINGS as PROBABILITIES

# share of a voxel that two grids may be apart at a corner: headers hold 32-bit numbers and rounded quaternions
GRID_TOLERANCE_VOXELS = ROUNDING_TOLERANCE
_NAMED_AT_MOST = 10
# Unicode's control characters, and ends of lines and paragraphs
_NO_TEXT = ("Cc", "Zl", "Zp")


@dataclass(frozen=True)
class Pair:
    """The files of one case; `prediction` is None where it is missing."""

    case: str
    prediction: Path | None
    reference: Path
    image: Path | None = None
    probabilities: Path | None = None


@dataclass(frozen=True)
class Failure:
    """A case that could not be evaluated, and why."""

    case: str
    reason: str


@dataclass(frozen=True)
class Found:
    """The pairs to judge, sorted by case, the cases that cannot be judged, and what looks odd."""

    pairs: tuple[Pair, ...]
    failures: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Maps:
    """Both label maps of a pair on the grid of the reference, whose `geometry` says where that is; `resampled` tells
    that the prediction was on another.

    `oddities`: what looks odd in the headers, in sentences.
    """

    prediction: Labels
    reference: Labels
    geometry: Geometry
    resampled: bool
    oddities: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid:
        """Shape and affine of the reference."""
        return self.geometry.grid


def find_pairs(
    predictions: Path, references: Path, *, images: Path | None = None, probabilities: Path | None = None
) -> Found:
    """Every reference with the prediction, the image and the probabilities of its case.

    A case is named by its files without their ending: `a.nii.gz` belongs to `a.NRRD`, whatever the spelling of endings
    and of accents; an image may also be called `a_0000.nii.gz`. Hidden files, files with other endings and folders in
    the folder are passed over. Two files given belong together whatever their names. A case in two files is a failure
    of that case. Raises `DataError` for folders that are not there, hold no label maps, or are one and the same.
    """
    what = ("label maps", "label maps", "images", "probabilities")
    for path, content in zip((predictions, references, images, probabilities), what):
        if path is not None and (reason := why_absent(path)):
            raise DataError(f"{path}: {reason}, expected a folder of {content} or one file; check the path")
    if predictions.samefile(references):
        raise DataError(
            f"{predictions}: given as predictions and as references; every measure would be perfect. Give two folders"
        )
    if predictions.is_file() and references.is_file():
        only = case_name(references.name)
        expected, predicted = {only: [references]}, {only: [predictions]}
    else:
        only = None
        expected = _label_maps(references)
        predicted = _label_maps(predictions, expected)
    pictured = _beside(images, ENDINGS, only)
    chances_of = _beside(probabilities, PROBABILITIES, only)
    pairs, failures = [], []
    for case, files in sorted(expected.items()):
        double = next((f for f in (files, predicted.get(case, [])) if len(f) > 1), None)
        if double is not None:
            names = named([printable(f.name) for f in double])
            reason = f"{printable(str(double[0]))}: one case in {len(double)} files ({names}); keep one"
            failures.append(Failure(case, reason))
            continue
        prediction = _single(predicted.get(case, []))
        image = _single(pictured.get(case) or pictured.get(f"{case}_0000") or [])
        pairs.append(Pair(case, prediction, files[0], image, _single(chances_of.get(case, []))))
    if probabilities is not None and not any(pair.probabilities for pair in pairs):
        raise DataError(
            f"{probabilities}: no probabilities of any case found, expected files named as the references and ending "
            f"in {', '.join(PROBABILITIES)}"
        )
    warnings = _oddities(pairs, expected, predicted)
    blurred = [case for case, files in sorted(pictured.items()) if len(files) > 1]
    if blurred:
        warnings.append(f"{len(blurred)} images are there in two files and were not shown: {named(blurred)}")
    return Found(tuple(pairs), tuple(failures), tuple(warnings))


def read_maps(prediction: Path, reference: Path, *, resample_prediction: bool = False) -> Maps:
    """Both label maps on the reference's grid.

    Raises `GeometryError` if the grids differ, unless the prediction may be resampled (nearest neighbour, 0 outside).
    """
    same_kind_or_raise(prediction, reference)
    found, expected = read_label(prediction), read_label(reference)
    oddities = (
        *(f"the header of the prediction looks odd ({oddity})" for oddity in found.geometry.warnings),
        *(f"the header of the reference looks odd ({oddity})" for oddity in expected.geometry.warnings),
    )
    if found.geometry.matches(expected.geometry, tolerance=GRID_TOLERANCE_VOXELS):
        return Maps(found.array, expected.array, expected.geometry, resampled=False, oddities=oddities)
    if found.grid.spatial_dims != expected.grid.spatial_dims:
        raise GeometryError(
            f"{prediction}: {found.grid.spatial_dims} axes found (shape {found.grid.shape}), expected "
            f"{expected.grid.spatial_dims} as the reference has ({expected.grid.shape}); save both with the same "
            "axes: a plane of its own does not say where it lies in a volume"
        )
    if resample_prediction:
        back = _back(prediction, found.geometry, expected.geometry)
        moved = _nearest(found.array, back, expected.grid.shape)
        return Maps(moved, expected.array, expected.geometry, resampled=True, oddities=oddities)
    raise GeometryError(
        f"{prediction}: {_difference(found.grid, expected.grid)}; save the prediction on the reference's grid, or pass "
        "--resample-prediction"
    )


def case_name(name: str) -> str:
    """The case of a file: its name without a known ending, in one spelling of accents, as text that can be written."""
    stem = name.removesuffix(".npz") if name.endswith(".npz") else split_ending(name)[0]
    return printable(unicodedata.normalize("NFC", stem))


def printable(text: str) -> str:
    """`text` on one line: bytes of file names that are no UTF-8, and line breaks and the like, shown as their codes."""
    known = text.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _NO_TEXT else c for c in known)


def named(names: Sequence[str], *, most: int = _NAMED_AT_MOST) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def counted(n: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _label_maps(folder: Path, cases: Collection[str] = ()) -> dict[str, list[Path]]:
    """Files by case; `cases` are those looked for."""
    files = _files_by_case(folder, ENDINGS)
    if files:
        return files
    reason = f"{folder}: no label maps found, expected files ending in {', '.join(ENDINGS)}"
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    of_cases = [name for name in inside if case_name(name) in cases]
    if of_cases:
        # as TotalSegmentator writes it
        reason = (
            f"{folder}: a folder for each case found ({named([printable(name) for name in of_cases])}), expected one "
            "file for each with the values of all labels; join the files of a case (TotalSegmentator: run it with --ml)"
        )
    elif inside:
        reason += f"; there are folders in it ({named([printable(name) for name in inside])}): give one of these"
    raise DataError(reason)


def _files_by_case(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    try:
        inside = [folder] if folder.is_file() else sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for path in inside:
        known = is_image_file(path) or (path.suffix == ".npz" and not path.name.startswith("."))
        if known and path.name.lower().endswith(tuple(endings)) and not os.path.isdir(path):
            files.setdefault(case_name(path.name), []).append(path)
    return files


def _oddities(
    pairs: Sequence[Pair], expected: Mapping[str, Sequence[Path]], predicted: Mapping[str, Sequence[Path]]
) -> list[str]:
    alone = sorted(set(predicted) - set(expected))
    same = [p.case for p in pairs if p.prediction is not None and _are_one(p.prediction, p.reference)]
    warnings = [f"{len(alone)} predictions without a reference were left out: {named(alone)}"] if alone else []
    if same:
        warnings.append(f"in {len(same)} cases prediction and reference are one and the same file: {named(same)}")
    return warnings


def _are_one(a: Path, b: Path) -> bool:
    return not why_absent(a) and not why_absent(b) and a.samefile(b)


def _single(files: Sequence[Path]) -> Path | None:
    return files[0] if len(files) == 1 else None


def _beside(path: Path | None, endings: Sequence[str], only: str | None) -> dict[str, list[Path]]:
    """Files by case in a folder; a single file belongs to the `only` case whatever its name."""
    if path is None:
        return {}
    return {only: [path]} if only is not None and path.is_file() else _files_by_case(path, endings)


def _back(prediction: Path, found: Geometry, expected: Geometry) -> Array:
    """Voxel of the reference → voxel of the prediction. Raises `GeometryError` for planes that do not lie in one."""
    if found.plane is None or expected.plane is None:
        return np.asarray(np.linalg.solve(found.grid.affine, expected.grid.affine), np.float64)
    known = min(len(found.plane), len(expected.plane))
    start = np.array([[0, 0, 1]])
    there = expected.plane[:known] - found.plane[:known, 2:] @ start
    back = np.concatenate([np.linalg.lstsq(found.plane[:known, :2], there, rcond=None)[0], start])
    reached = replace(expected, plane=found.plane[:known] @ back)
    if not reached.matches(expected, tolerance=GRID_TOLERANCE_VOXELS):
        raise GeometryError(
            f"{prediction}: a plane at another height or angle than that of the reference found, expected the same; "
            "check that both are of one slice"
        )
    return back


def _nearest(labels: Labels, back: Array, shape: tuple[int, ...]) -> Labels:
    n = len(shape)
    moved = ndimage.affine_transform(
        labels, back[:n, :n], back[:n, n], output_shape=shape, order=0, mode="grid-constant", cval=0
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
    if n == 2:
        return "a plane at another place in space, or mirrored, found, expected that of the reference"
    return "axes in other directions than those of the reference found, expected the same"


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
