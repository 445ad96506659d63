"""What a data set is like, measured on its files: shapes, spacings, intensities, sizes of labels; nothing is chosen."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg.cases import Case, Dataset, spread_evenly
from medseg.config import IGNORE
from medseg.errors import DataError
from medseg.findings import CaseFacts, is_flat
from medseg.progress import Progress, silent
from medseg.readers import file_sha256, is_picture, read_geometry, read_images, read_label, stored_in

# above this many cases an even selection is measured: medians have settled long before
MAX_MEASURED = 100
# voxels of each case that intensities are measured on
SAMPLED = 5000
# of a digest, enough to tell the images of one data set from those of another
DIGITS = 16


@dataclass(frozen=True)
class Fingerprint:
    """What was measured. Shapes and spacings of 3D images are in right-anterior-superior order of the axes.

    Not where they are not `turned`: then in the order of the files.
    """

    spatial_dims: int
    pictures: bool
    cases: int
    shapes: tuple[tuple[int, ...], ...]
    spacings_mm: tuple[tuple[float, ...], ...]
    label_values: tuple[int, ...]
    foreground: tuple[dict[str, float], ...]
    """For each channel: mean, sd and the 0.5 and 99.5 percentiles (p005, p995) inside the labels.

    Of the whole images where no measured case has a label.
    """
    nonzero_share: float
    """Median share of voxels that are not 0 in the first channel."""
    lowest: tuple[float, ...] = ()
    """For each channel: median over cases of the smallest intensity."""
    label_voxels: tuple[dict[int, int], ...] = ()
    """For each case: voxels by value in the label file, without background and ignored ones."""
    coloured: int = 0
    """Pictures in colour among all cases."""
    anywhere: tuple[dict[str, float], ...] = ()
    """As `foreground`, of the whole images."""
    turned: bool = True
    left_right: tuple[int, ...] = (0,)
    """Of 3D images, the axes that run from left to right in one case or another."""


def measure(
    dataset: Dataset, *, facts: Sequence[CaseFacts] = (), turned: bool = True, progress: Progress = silent
) -> Fingerprint:
    """Read the data set (up to 100 cases, spread evenly) and describe it. Raises `DataError` naming a bad file.

    `facts`: what is known of all cases already, which tells of values and colours in those that are not measured.
    `turned`: whether the axes of volumes are to be turned, as `preprocess.orient` says.
    """
    labelled = [c for c in dataset.cases if c.label is not None]
    if not labelled:
        raise DataError(f"{dataset.path}: no case with a label found; run `medseg check`")
    chosen = spread_evenly(labelled, MAX_MEASURED)
    dims = _spatial_dims(labelled)
    channels = max(1, len(dataset.channels))
    shapes, spacings, nonzero, lowest, counts = [], [], [], [], []
    left_right: set[int] = set()
    inside = _Samples(channels)
    anywhere = _Samples(channels)
    for n, case in enumerate(chosen):
        progress("measure", n, len(chosen), case.id)
        image = read_images(case.images, spatial_dims=dims, channels=channels)
        array = image.array
        label = read_label(_labelled(case), spatial_dims=dims).array
        if label.shape != array.shape[1:]:
            raise DataError(f"{case.label}: shape {label.shape} found, image has {array.shape[1:]}; run `medseg check`")
        order = _axis_order(image.grid.affine, dims)
        left_right.add(0 if turned else order[0])
        order = order if turned else tuple(range(dims))
        shapes.append(tuple(array.shape[1:][a] for a in order))
        spacings.append(tuple(image.grid.spacing_mm[a] for a in order))
        nonzero.append(float((array[0] != 0).mean()))
        lowest.append([float(channel.min()) for channel in array])
        counts.append({int(v): int(c) for v, c in zip(*np.unique(label, return_counts=True))})
        inside.add(array, (label > 0) & (label != _ignore_value(dataset)))
        anywhere.add(array, np.ones_like(label, dtype=bool))
    return Fingerprint(
        spatial_dims=dims,
        pictures=is_picture(chosen[0].images[0]),
        cases=len(labelled),
        shapes=tuple(shapes),
        spacings_mm=tuple(spacings),
        label_values=tuple(sorted(set().union(*counts, *(f.label_voxels for f in facts)))),
        # a data set whose measured cases are all empty still has images
        foreground=inside.statistics() or anywhere.statistics(),
        nonzero_share=float(np.median(nonzero)),
        lowest=tuple(float(v) for v in np.median(lowest, axis=0)),
        label_voxels=tuple(
            {v: c for v, c in found.items() if v not in (0, _ignore_value(dataset))} for found in counts
        ),
        coloured=sum(f.is_coloured for f in facts),
        anywhere=anywhere.statistics(),
        turned=turned,
        left_right=tuple(sorted(left_right)),
    )


class _Samples:
    """Intensities of every channel, as many from each case: a large organ must not speak for all patients."""

    def __init__(self, channels: int) -> None:
        self._found: list[list[np.ndarray]] = [[] for _ in range(channels)]

    def add(self, array: np.ndarray, where: np.ndarray) -> None:
        """`SAMPLED` voxels of `array` (C, *S) spread evenly over `where` (*S); none of a case where nothing is."""
        voxels = np.flatnonzero(where)
        if len(voxels):
            voxels = voxels[np.arange(SAMPLED) * len(voxels) // SAMPLED]
            for channel, found in zip(array, self._found):
                found.append(channel[np.unravel_index(voxels, channel.shape)].astype(np.float64))

    def statistics(self) -> tuple[dict[str, float], ...]:
        """For each channel mean, sd and percentiles; empty where nothing was added."""
        return tuple(_statistics(np.concatenate(found)) for found in self._found if found)


def data_sha256(
    cases: Sequence[Case], *, file_digest: Callable[[Path], str] = file_sha256, progress: Progress = silent
) -> str:
    """SHA-256 over those of the files of `cases`, images before label, in the order of the cases' names.

    The same files at another place are the same data; the files that a header names count as it does. Raises
    `DataError` for a file that cannot be read.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    files = [file for case in ordered for file in case.files]
    digest = hashlib.sha256()
    for n, path in enumerate(files):
        progress("hash", n, len(files), path.name)
        digest.update(file_digest(path).encode())
    return digest.hexdigest()


def image_digests(
    cases: Sequence[Case], *, file_digest: Callable[[Path], str] = file_sha256, by_channel: bool = True
) -> dict[str, frozenset[str]]:
    """Digests of the image files of each of `cases` by its name: the same image has the same under any name.

    One of all images together and, `by_channel`, one of each that no other patient has: an atlas or a map of
    coordinates tells nothing of whose it is. Of a single image both are the same. The files that a header names count
    as it does. `cases`: all of a data set, or it is not known what they share.
    """
    whole: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for case in cases:
        found = ["".join(map(file_digest, stored_in(path))) for path in case.images]
        whole[case.id] = _short("".join(found))
        parts[case.id] = [_short(one) for one in found]
    return _telling(cases, whole, parts if by_channel else {})


def voxel_digests(
    cases: Sequence[Case], facts: Sequence[CaseFacts], *, by_channel: bool = True
) -> dict[str, frozenset[str]]:
    """As `image_digests`, of the numbers that were read, by channel: the same in whatever file they lie.

    Only of cases whose images a look at all files has read whole; constant channels are no part.
    """
    named = {case.id for case in cases}
    known = [fact for fact in facts if fact.voxels and fact.case in named]
    whole = {fact.case: fact.voxels[:DIGITS] for fact in known}
    parts = {fact.case: [digest[:DIGITS] for digest in fact.channel_voxels] for fact in known}
    return _telling(cases, whole, parts if by_channel else {})


def stored_voxel_digests(facts: Sequence[CaseFacts]) -> dict[str, str]:
    """The `voxel_digests` of earlier versions: of all channels together, in the number type and order of the file."""
    return {fact.case: fact.stored_voxels[:DIGITS] for fact in facts if fact.stored_voxels}


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _telling(
    cases: Sequence[Case], whole: Mapping[str, str], parts: Mapping[str, Sequence[str]]
) -> dict[str, frozenset[str]]:
    """`whole` of each case, and of `parts` what belongs to one patient alone."""
    patients = {case.id: case.group for case in cases}
    sharing: dict[str, set[str]] = defaultdict(set)
    for name, found in parts.items():
        for part in found:
            sharing[part].add(patients[name])
    own = {part for part, of in sharing.items() if len(of) == 1}
    return {name: frozenset((digest, *own.intersection(parts.get(name, ())))) for name, digest in whole.items()}


def _spatial_dims(cases: Sequence[Case]) -> int:
    if is_picture(cases[0].images[0]):
        return 2
    # up to the first volume: one among any number of single slices makes it a data set of volumes
    grids = (read_geometry(case.images[0]).grid for case in cases)
    return 2 if all(is_flat(grid.shape) for grid in grids) else 3


def _axis_order(affine: np.ndarray, dims: int) -> tuple[int, ...]:
    if dims != 3:
        return tuple(range(dims))
    directions = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    order: list[int] = []
    for world in range(3):
        order.append(int(np.argmax([directions[world, a] if a not in order else -1 for a in range(3)])))
    return tuple(order)


def _statistics(voxels: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(voxels, [0.5, 99.5])
    return {"mean": float(voxels.mean()), "sd": float(voxels.std()), "p005": float(low), "p995": float(high)}


def _ignore_value(dataset: Dataset) -> int | None:
    value = (dataset.labels or {}).get(IGNORE)
    return value[0] if isinstance(value, tuple) else value


def _labelled(case: Case) -> Path:
    if case.label is None:
        raise DataError(f"{case.id}: no label file")
    return case.label
