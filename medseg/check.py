"""The look at every file of a data set, or at DICOM series, before any work: findings and facts; nothing is changed."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.cases import Case, Dataset, dicom_cases
from medseg.consistency import inconsistencies
from medseg.datasets import read_dataset
from medseg.errors import DataError, GeometryError
from medseg.findings import SEVERITIES, CaseFacts, Finding, Intensities, Severity, measure_intensities
from medseg.grid import PARALLEL_TOLERANCE, ROUNDING_TOLERANCE, Grid, nearest_ras, turned
from medseg.metrics.codes import members
from medseg.progress import Progress, silent
from medseg.readers import (
    Geometry,
    Image,
    LabelMap,
    finite_or_raise,
    is_picture,
    read_image,
    read_images,
    read_label,
    same_kind_or_raise,
)
from medseg.readers.image2d import label_palette

log = logging.getLogger(__name__)

# compression with losses changes values
LOSSY = (".jpg", ".jpeg")
# odd headers, which are one program's: of so many files alike they are told one by one
CORRECT, MOST_ALIKE = "correct the header", 3
# voxels that are hashed at a time, as float32
HASHED = 2**20
# of images that are there twice
APART = "remove one, or give both one group, lest one trains and the other validates"
# warnings that are told before a training, and the number of the others
MOST_TOLD = 5


@dataclass(frozen=True)
class Findings:
    """All findings, errors first, and the facts of every case that could be read."""

    dataset: Dataset
    findings: tuple[Finding, ...]
    facts: tuple[CaseFacts, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What keeps the data set from being used as it is."""
        return tuple(f for f in self.findings if f.severity == "error")

    def log_warnings(self) -> None:
        """The first warnings, and how many more there are, for who goes on with the data set all the same."""
        warnings = _without_repetition(f for f in self.findings if f.severity == "warning")
        for finding in warnings[:MOST_TOLD]:
            log.warning("%s", finding)
        if len(warnings) > MOST_TOLD:
            log.warning("%d more warnings; `medseg check %s` shows all", len(warnings) - MOST_TOLD, self.dataset.path)

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """The table: severity, case, file, found, expected, fix."""
        return [(f.severity, f.case, f.file, f.found, f.expected, f.fix) for f in self.findings]


def check_dataset(dataset: Path | str | Dataset, *, jobs: int = 1, progress: Progress = silent) -> Findings:
    """Reads every file of a data set (listed already, or at a path) once, and says what is wrong or odd.

    A broken file is a finding and never ends the scan. Raises `DataError`
    only where there is no data set.
    """
    if not isinstance(dataset, Dataset):
        dataset = read_dataset(Path(dataset))
    scans: list[_Scan] = []
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for scan in pool.map(lambda case: _scanned(case, dataset), dataset.cases):
            scans.append(scan)
            progress("check", len(scans), len(dataset.cases), scan.case.id)
    found = [Finding(p.severity, p.case, str(p.file), p.found, p.expected, p.fix) for p in dataset.problems]
    found += _duplicates(scans)
    found += _shared_channels(scans)
    for scan in scans:
        found += scan.findings
    facts = tuple(scan.facts for scan in scans if scan.facts is not None)
    palettes = {scan.case.id: (scan.case.label, scan.palette) for scan in scans if scan.case.label and scan.palette}
    found += inconsistencies(dataset, facts, palettes)
    return Findings(dataset, tuple(sorted(found, key=lambda f: SEVERITIES.index(f.severity))), facts)


def _without_repetition(findings: Iterable[Finding]) -> list[Finding]:
    """Of what is odd about the headers of many files, the first ones, and how many more there are; all else."""
    kept: list[Finding] = []
    more: dict[Finding, int] = defaultdict(int)
    seen: dict[Finding, int] = defaultdict(int)
    for finding in findings:
        alike = replace(finding, case="", file="")
        seen[alike] += 1
        if finding.fix != CORRECT or seen[alike] <= MOST_ALIKE:
            kept.append(finding)
        else:
            more[alike] += 1
    return [*kept, *(replace(alike, found=f"{n} more: {alike.found}") for alike, n in more.items())]


@dataclass(frozen=True)
class SeriesFacts:
    """What one DICOM series is. `case`: its name in `medseg infer`; `reason`: why it is no volume, empty where it is.

    `key`: what `--series` takes; empty with `modality`, `shape` and `spacing_mm` where its files cannot be read.
    """

    case: str
    key: str
    modality: str
    files: int
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    warnings: tuple[str, ...]
    reason: str


def check_series(source: Path | str, *, progress: Progress = silent) -> tuple[SeriesFacts, ...]:
    """Reads every DICOM series in a folder, archive or file, pixels too, and says which are one regular volume.

    Empty where there is a data set in one of the four forms, no DICOM file, or nothing at all.
    """
    source = Path(source)
    # unlike that of a Path, this `exists` does not raise behind a closed folder
    forms = (source / name for name in ("dataset.json", "images", "imagesTr"))
    if not os.path.exists(source) or any(map(os.path.exists, forms)):
        return ()
    cases = dicom_cases(source)
    facts = []
    for number, case in enumerate(cases, start=1):
        facts.append(_series_facts(case))
        progress("check", number, len(cases), case.id)
    return tuple(facts)


def _series_facts(case: Case) -> SeriesFacts:
    series = case.series
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    reason = ""
    try:
        image = read_images(case.images, series=series)
        shape, spacing, warnings = image.grid.shape, image.grid.spacing_mm, image.geometry.warnings
    except DataError as error:
        reason = str(error)
    key, modality, files = ("", "", 0) if series is None else (series.key, series.modality, len(series.files))
    return SeriesFacts(case.id, key, modality, files, shape, spacing, warnings, reason)


# ---- one case


@dataclass
class _Scan:
    """What one case gave; collected while its files are read."""

    case: Case
    findings: list[Finding] = field(default_factory=list)
    facts: CaseFacts | None = None
    channel_hashes: list[str] = field(default_factory=list)
    stored_hash: str = ""
    image_hash: str | None = None
    label_hash: str | None = None
    intensities: list[Intensities] = field(default_factory=list)
    palette: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add(self, severity: Severity, file: Path, found: str, expected: str, fix: str) -> None:
        self.findings.append(Finding(severity, self.case.id, str(file), found, expected, fix))

    def add_error(self, file: Path, error: DataError) -> None:
        # our messages read: FILE: what was found, expected what; what to do
        text = str(error).removeprefix(f"{file}: ")
        rest, _, fix = text.partition("; ")
        found, _, expected = rest.partition(", expected ")
        self.add("error", file, found, expected or "a readable file", fix or "replace the file")


def _scanned(case: Case, dataset: Dataset) -> _Scan:
    try:
        return _scan(case, dataset)
    except MemoryError as error:
        scan = _Scan(case)
        found = f"more than the memory of this machine holds ({error or 'MemoryError'})"
        scan.add("error", case.images[0], found, "a case that fits", "free memory, or cut or coarsen image and label")
        return scan


def _scan(case: Case, dataset: Dataset) -> _Scan:
    scan = _Scan(case)
    images = _scan_images(scan, dataset)
    label = _scan_label(scan, dataset, images[0].grid.spatial_dims if images else None)
    if images and label is not None and case.label is not None:
        _compare(scan, case.label, label.geometry, images[0].geometry)
    if images:
        grid = images[0].grid
        scan.facts = CaseFacts(
            case.id,
            grid.shape,
            grid.spacing_mm,
            _axcodes(grid),
            str(images[0].array.dtype),
            (channels := sum(image.array.shape[0] for image in images)),
            _count_values(label.array) if label is not None else {},
            tuple(scan.intensities) if len(scan.intensities) == channels else (),
            scan.image_hash or "",
            tuple(h for h, of in zip(scan.channel_hashes, scan.intensities) if of.lowest < of.highest),
            scan.stored_hash,
        )
    return scan


def _scan_images(scan: _Scan, dataset: Dataset) -> list[Image]:
    """The images of a case without their warnings lost; empty if any could not be read."""
    images: list[Image] = []
    stored = hashlib.blake2b(digest_size=16)
    for file in scan.case.images:
        try:
            image = read_image(file, channels=_expected_channels(scan.case, dataset), finite=False)
        except DataError as error:
            scan.add_error(file, error)
            continue
        for warning in image.geometry.warnings:
            scan.add("warning", file, warning, "a header with one meaning", CORRECT)
        try:
            finite_or_raise(image, file)
        except DataError as error:
            scan.add_error(file, error)
        else:
            _find_constant(scan, file, image)
            scan.intensities += [measure_intensities(channel) for channel in image.array]
        if images:
            _compare(scan, file, image.geometry, images[0].geometry)
        images.append(image)
        stored.update(_stored_hash(image.array).encode())
        scan.channel_hashes += [_hash(channel, image.grid) for channel in image.array]
    if len(images) < len(scan.case.images):
        return []
    scan.stored_hash = stored.hexdigest()
    found = scan.channel_hashes
    scan.image_hash = found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
    return images


def _expected_channels(case: Case, dataset: Dataset) -> int | None:
    if len(case.images) > 1:
        return 1
    # colour that will be read as grey is worth a note: so it is read as it is
    if is_picture(case.images[0]) and len(dataset.channels) == 1:
        return None
    return len(dataset.channels)


def _find_constant(scan: _Scan, file: Path, image: Image) -> None:
    flat = [n for n, channel in enumerate(image.array) if channel.min() == channel.max()]
    if not flat:
        return
    value = image.array[flat[0]].flat[0]
    severity: Severity = "error" if len(flat) == len(image.array) else "warning"
    where = "all voxels are" if len(image.array) == 1 else f"in channel {flat[0]} all voxels are"
    scan.add(severity, file, f"{where} {value:g}", "an image with contrast", "export it again or remove the case")


def _scan_label(scan: _Scan, dataset: Dataset, spatial_dims: int | None) -> LabelMap | None:
    file = scan.case.label
    if file is None:
        return None
    if file.suffix.lower() in LOSSY:
        found = "a JPEG, whose compression changes the values of labels"
        fix = "save it as PNG from where it was drawn; a JPEG that is only converted keeps its wrong values"
        scan.add("error", file, found, "a format without losses", fix)
        return None
    try:
        label = read_label(file, spatial_dims=spatial_dims)
    except DataError as error:
        scan.add_error(file, error)
        return None
    for warning in label.geometry.warnings:
        scan.add("warning", file, warning, "a header with one meaning", CORRECT)
    if label.file_dtype.kind == "f":
        scan.add("note", file, f"labels stored as {label.file_dtype}, all whole numbers", "integers", "nothing to do")
    present = _count_values(label.array)
    if not any(value != 0 for value in present):
        scan.add("warning", file, "an empty label map", "at least one label", "check that nothing is to be labelled")
    else:
        scan.label_hash = _hash(label.array, label.grid)
    if is_picture(file):
        scan.palette = {n: colour for n, colour in label_palette(file).items() if n in present}
    if dataset.labels is not None:
        known = {0, *_values(dataset.labels)}
        unknown = sorted(set(present) - known)
        if unknown:
            number = sum(present[value] for value in unknown)
            listed = ", ".join(str(value) for value in unknown[:10])
            scan.add(
                "error",
                file,
                f"label values {listed} in {number} voxels that have no name",
                f"values {', '.join(str(v) for v in sorted(known)[:10])}{', …' if len(known) > 10 else ''}",
                "name them in the labels of the data set, or correct the file",
            )
    return label


def _compare(scan: _Scan, file: Path, geometry: Geometry, of_image: Geometry) -> None:
    try:
        same_kind_or_raise(file, scan.case.images[0])
    except GeometryError as error:
        scan.add_error(file, error)
        return
    grid, image_grid = geometry.grid, of_image.grid
    same_shape = grid.shape == image_grid.shape
    close = same_shape and grid.matches(image_grid, tolerance=ROUNDING_TOLERANCE)
    if close and not geometry.matches(of_image, tolerance=ROUNDING_TOLERANCE):
        found = "a plane at another place in space, or mirrored"
        fix = "turn it as its image is; copy the image's header only where the pixels lie alike and it was lost"
        scan.add("error", file, found, "the place of its image", fix)
    elif grid.matches(image_grid):
        return
    elif close:
        found = f"affine differs by up to {_apart(grid, image_grid):.4g} mm"
        scan.add("note", file, found, "the affine of its image", "differs by rounding only: nothing to do")
    elif _is_turned(grid, image_grid):
        found = f"axes stored as {_axcodes(grid) or grid.shape}"
        fix = "resample it to the image, which only turns its axes; copying the image's header would mirror or turn it"
        scan.add("error", file, found, f"{_axcodes(image_grid) or image_grid.shape} as its image", fix)
    elif not same_shape:
        scan.add("error", file, f"shape {grid.shape}", f"{image_grid.shape} as its image", "resample it to the image")
    else:
        found = f"affine differs by up to {_apart(grid, image_grid):.4g} mm"
        alike = np.allclose(_directions(grid), _directions(image_grid), atol=PARALLEL_TOLERANCE)
        fix = (
            "copy the image's header if it was lost, or resample it to the image"
            if alike
            else "resample it to the image"
        )
        scan.add("error", file, found, "the affine of its image", fix)


def _apart(grid: Grid, other: Grid) -> float:
    return float(np.abs(grid.affine - other.affine).max())


def _directions(grid: Grid) -> npt.NDArray[np.float64]:
    n = grid.spatial_dims
    return grid.affine[:n, :n] / grid.spacing_mm


def _is_turned(grid: Grid, like: Grid) -> bool:
    """Whether both are the same voxels in another order or direction of the axes."""
    try:
        # no voxels are needed to turn a grid
        _, moved = turned(np.broadcast_to(np.uint8(0), grid.shape), grid, like)
    except GeometryError:
        return False
    return moved.matches(like, tolerance=ROUNDING_TOLERANCE)


# ---- the data set as a whole


def _duplicates(scans: Iterable[_Scan]) -> list[Finding]:
    images: dict[str, list[_Scan]] = defaultdict(list)
    labels: dict[str, list[_Scan]] = defaultdict(list)
    for scan in scans:
        if scan.image_hash is not None:
            images[scan.image_hash].append(scan)
        if scan.label_hash is not None:
            labels[scan.label_hash].append(scan)
    found = []
    for same in images.values():
        first = same[0]
        for scan in same[1:]:
            marked = "the same labels" if scan.label_hash == first.label_hash else "other labels"
            found.append(
                Finding(
                    "warning",
                    scan.case.id,
                    str(scan.case.images[0]),
                    f"the voxels of case {first.case.id}, with {marked}",
                    "different images",
                    APART,
                )
            )
    for same in labels.values():
        first = same[0]
        for scan in same[1:]:
            if scan.image_hash != first.image_hash:
                found.append(
                    Finding(
                        "warning",
                        scan.case.id,
                        str(scan.case.label),
                        f"the label voxels of case {first.case.id}, with another image",
                        "labels drawn for this image",
                        "check which image the label belongs to",
                    )
                )
    return found


def _shared_channels(scans: Sequence[_Scan]) -> list[Finding]:
    """Of different images of several channels, a channel that two patients of more have in common.

    What three or more share is taken for an atlas or a map of coordinates.
    """
    owners: dict[str, dict[str, _Scan]] = defaultdict(dict)
    for scan in scans:
        for digest in scan.facts.channel_voxels if scan.facts is not None and not scan.facts.is_coloured else ():
            owners[digest].setdefault(scan.case.group, scan)
    if len({scan.case.group for scan in scans}) <= 2:
        return []
    pairs = [tuple(of.values()) for of in owners.values() if len(of) == 2]
    apart = {(a.case.id, b.case.id): b.case for a, b in pairs if a.image_hash != b.image_hash}
    return [
        Finding("warning", b, str(case.images[0]), f"a channel of case {a}, with other ones", "different images", APART)
        for (a, b), case in sorted(apart.items())
    ]


# ---- measures


def _values(labels: Mapping[str, int | tuple[int, ...]]) -> set[int]:
    return {v for value in labels.values() for v in members(value)}


def _count_values(array: npt.NDArray[Any]) -> dict[int, int]:
    """Voxels by value."""
    if array.dtype == np.int32:
        values, counts = np.unique(array, return_counts=True)
        return {int(v): int(c) for v, c in zip(values, counts)}
    total = np.zeros(int(np.iinfo(array.dtype).max) + 1, np.int64)
    # slab by slab: bincount works on a copy of 8 bytes a voxel
    for k in range(array.shape[-1]) if array.ndim > 2 else [slice(None)]:
        total += np.bincount(array[..., k].ravel(), minlength=len(total))
    return {int(v): int(total[v]) for v in np.flatnonzero(total)}


def _hash(array: npt.NDArray[Any], grid: Grid) -> str:
    """Of the numbers of `array` (*S) as a network sees them: float32, the axes of a volume as near to RAS as may be."""
    if grid.spatial_dims == 3:
        array = nearest_ras(array, grid)
    digest = hashlib.sha256(f"{array.shape}".encode())
    step = max(1, HASHED // math.prod(array.shape[:-1]))
    for start in range(0, array.shape[-1], step):
        # what float32 does not hold is refused by a training; -0 becomes 0
        with np.errstate(over="ignore", invalid="ignore"):
            numbers = array[..., start : start + step].astype(np.float32) + np.float32(0)
        digest.update(np.ascontiguousarray(numbers.T).data)
    return digest.hexdigest()


def _stored_hash(array: npt.NDArray[Any]) -> str:
    # as weights of before know their images: nothing of this may change
    digest = hashlib.blake2b(f"{array.shape}{array.dtype}".encode(), digest_size=16)
    # voxel (i, j, k) in the order of NIfTI, where this copies nothing
    digest.update(np.ascontiguousarray(array.T).data)
    return digest.hexdigest()


def _axcodes(grid: Grid) -> str:
    """Where each voxel axis points to, as in RAS (to the right, front, top); empty in 2D."""
    if grid.spatial_dims != 3:
        return ""
    directions = _directions(grid)
    strongest = np.abs(directions).argmax(axis=0)
    return "".join(("LPI", "RAS")[int(directions[w, v] > 0)][w] for v, w in enumerate(strongest))
