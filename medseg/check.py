"""The look at every file of a data set, or at DICOM series, before any work: findings and facts; nothing is changed."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medseg.cases import Case, Dataset, dicom_cases
from medseg.datasets import read_dataset
from medseg.errors import DataError
from medseg.grid import ROUNDING_TOLERANCE, Grid
from medseg.metrics.codes import members
from medseg.progress import Progress, silent
from medseg.readers import Image, LabelMap, finite_or_raise, is_picture, read_image, read_images, read_label

log = logging.getLogger(__name__)

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# spacing or extent this many times above or below the median of the data set
OUTLIER_FACTOR = 3.0
# fewer cases than this have no meaningful median
OUTLIER_CASES = 5


@dataclass(frozen=True)
class Finding:
    """One row of the table; `case` is empty where it concerns the whole data set."""

    severity: Severity
    case: str
    file: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        subject = ": ".join(dict.fromkeys(part for part in (self.case, self.file) if part))
        expected = f", expected {self.expected}" if self.expected else ""
        return f"{subject}{': ' if subject else ''}{self.found}{expected}; {self.fix}"


@dataclass(frozen=True)
class CaseFacts:
    """What the scan measured of a case; `axcodes` as in RAS, empty for 2D; `label_voxels`: voxels by label value."""

    case: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    axcodes: str
    dtype: str
    channels: int
    label_voxels: Mapping[int, int]


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
        for scan in pool.map(lambda case: _scan(case, dataset), dataset.cases):
            scans.append(scan)
            progress("check", len(scans), len(dataset.cases), scan.case.id)
    found = [Finding(p.severity, p.case, str(p.file), p.found, p.expected, p.fix) for p in dataset.problems]
    for scan in scans:
        found += scan.findings
    facts = tuple(scan.facts for scan in scans if scan.facts is not None)
    found += _duplicates(scans)
    found += _mixtures(facts)
    found += _lost_colour(dataset, facts)
    found += _outliers(facts)
    found += _unused_labels(dataset, facts)
    return Findings(dataset, tuple(sorted(found, key=lambda f: SEVERITIES.index(f.severity))), facts)


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
    if not source.exists() or any((source / name).exists() for name in ("dataset.json", "images", "imagesTr")):
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
    image_hash: str | None = None
    label_hash: str | None = None

    def add(self, severity: Severity, file: Path, found: str, expected: str, fix: str) -> None:
        self.findings.append(Finding(severity, self.case.id, str(file), found, expected, fix))

    def add_error(self, file: Path, error: DataError) -> None:
        # our messages read: FILE: what was found, expected what; what to do
        text = str(error).removeprefix(f"{file}: ")
        rest, _, fix = text.partition("; ")
        found, _, expected = rest.partition(", expected ")
        self.add("error", file, found, expected or "a readable file", fix or "replace the file")


def _scan(case: Case, dataset: Dataset) -> _Scan:
    scan = _Scan(case)
    images = _scan_images(scan, dataset)
    label = _scan_label(scan, dataset, images[0].grid.spatial_dims if images else None)
    if images and label is not None and case.label is not None:
        _compare(scan, case.label, label.grid, images[0].grid)
    if images:
        grid = images[0].grid
        scan.facts = CaseFacts(
            case.id,
            grid.shape,
            grid.spacing_mm,
            _axcodes(grid),
            str(images[0].array.dtype),
            sum(image.array.shape[0] for image in images),
            _count_values(label.array) if label is not None else {},
        )
    return scan


def _scan_images(scan: _Scan, dataset: Dataset) -> list[Image]:
    """The images of a case without their warnings lost; empty if any could not be read."""
    images: list[Image] = []
    digest = hashlib.blake2b(digest_size=16)
    for file in scan.case.images:
        try:
            image = read_image(file, channels=_expected_channels(scan.case, dataset), finite=False)
        except DataError as error:
            scan.add_error(file, error)
            continue
        for warning in image.geometry.warnings:
            scan.add("warning", file, warning, "a header with one meaning", "correct the header")
        try:
            finite_or_raise(image, file)
        except DataError as error:
            scan.add_error(file, error)
        else:
            _find_constant(scan, file, image)
        if images:
            _compare(scan, file, image.grid, images[0].grid)
        images.append(image)
        digest.update(_hash(image.array).encode())
    if len(images) < len(scan.case.images):
        return []
    scan.image_hash = digest.hexdigest()
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
    try:
        label = read_label(file, spatial_dims=spatial_dims)
    except DataError as error:
        scan.add_error(file, error)
        return None
    for warning in label.geometry.warnings:
        scan.add("warning", file, warning, "a header with one meaning", "correct the header")
    if label.file_dtype.kind == "f":
        scan.add("note", file, f"labels stored as {label.file_dtype}, all whole numbers", "integers", "nothing to do")
    present = _count_values(label.array)
    if not any(value != 0 for value in present):
        scan.add("warning", file, "an empty label map", "at least one label", "check that nothing is to be labelled")
    else:
        scan.label_hash = _hash(label.array)
    if dataset.labels is not None:
        known = {0, *_values(dataset.labels)}
        unknown = sorted(set(present) - known)
        if unknown:
            number = sum(present[value] for value in unknown)
            listed = ", ".join(str(value) for value in unknown[:10])
            scan.add(
                "error",
                file,
                f"label values {listed} in {number} voxels that dataset.json does not name",
                f"values {', '.join(str(v) for v in sorted(known)[:10])}{', …' if len(known) > 10 else ''}",
                "name them in dataset.json or correct the label",
            )
    return label


def _compare(scan: _Scan, file: Path, grid: Grid, image_grid: Grid) -> None:
    if grid.shape != image_grid.shape:
        scan.add("error", file, f"shape {grid.shape}", f"{image_grid.shape} as its image", "resample it to the image")
    elif not grid.matches(image_grid):
        close = grid.matches(image_grid, tolerance=ROUNDING_TOLERANCE)
        apart = np.abs(grid.affine - image_grid.affine).max()
        scan.add(
            "warning" if close else "error",
            file,
            f"affine differs by up to {apart:.4g} mm",
            "the affine of its image",
            "differs by rounding only: nothing to do"
            if close
            else "copy the image's header, or resample it to the image",
        )


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
                    "remove one, or give both one group, lest one trains and the other validates",
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


def _mixtures(facts: Sequence[CaseFacts]) -> list[Finding]:
    found = []
    for case, dims, usual in _odd_ones(facts, lambda f: len(f.shape)):
        found.append(Finding("error", case, "", f"{dims} axes", f"{usual} as most cases", "make data sets of one kind"))
    for case, channels, usual in _odd_ones(facts, lambda f: f.channels):
        # grey and colour pictures are brought together on reading
        if {channels, usual} != {1, 3} or not _is_flat(facts, case):
            fix = "make data sets of one kind"
            found.append(Finding("error", case, "", f"{channels} channels", f"{usual} as most cases", fix))
    codes = Counter(f.axcodes for f in facts if f.axcodes)
    if len(codes) > 1:
        listed = ", ".join(f"{code} {number}" for code, number in codes.most_common())
        found.append(Finding("note", "", "", f"orientations are mixed: {listed}", "", "nothing to do: axes are turned"))
    return found


def _lost_colour(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    coloured = [f.case for f in facts if len(f.shape) == 2 and f.channels == 3]
    if not coloured or len(dataset.channels) != 1:
        return []
    found = f"{len(coloured)} of {len(facts)} pictures are in colour and will be read as grey"
    return [Finding("note", "", "", found, "", "to keep the colour, name 3 channels in a dataset.json")]


def _odd_ones(facts: Sequence[CaseFacts], value: Callable[[CaseFacts], int]) -> list[tuple[str, int, int]]:
    """Cases whose value is not the most frequent one: (case, value, most frequent)."""
    if not facts:
        return []
    usual = Counter(value(f) for f in facts).most_common(1)[0][0]
    return [(f.case, value(f), usual) for f in facts if value(f) != usual]


def _is_flat(facts: Sequence[CaseFacts], case: str) -> bool:
    return any(len(f.shape) == 2 for f in facts if f.case == case)


def _outliers(facts: Sequence[CaseFacts]) -> list[Finding]:
    found = []
    dims = Counter(len(f.shape) for f in facts)
    alike = [f for f in facts if len(f.shape) == dims.most_common(1)[0][0]]
    if len(alike) < OUTLIER_CASES:
        return []
    measures: tuple[tuple[str, Callable[[CaseFacts], npt.NDArray[np.float64]]], ...] = (
        ("spacing", lambda f: np.sort(f.spacing_mm)),
        ("extent", lambda f: np.sort(np.asarray(f.shape) * f.spacing_mm)),
    )
    for name, measure in measures:
        # sorted by size: turned images are compared like with like
        values = np.stack([measure(f) for f in alike])
        ratio = values / np.median(values, axis=0)
        odd = ((ratio > OUTLIER_FACTOR) | (ratio < 1 / OUTLIER_FACTOR)).any(axis=1)
        for n in np.flatnonzero(odd):
            found.append(
                Finding(
                    "warning",
                    alike[n].case,
                    "",
                    f"{name} {_mm(values[n])} mm",
                    f"about {_mm(np.median(values, axis=0))} mm as the median",
                    "check that it belongs to this data set",
                )
            )
    return found


def _unused_labels(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    if dataset.labels is None:
        return []
    present = {value for f in facts for value in f.label_voxels}
    unused = [name for name, value in dataset.labels.items() if name != "ignore" and not present & set(members(value))]
    unused = [name for name in unused if dataset.labels[name] != 0]
    if not unused:
        return []
    listed = ", ".join(unused[:8]) + (", …" if len(unused) > 8 else "")
    file = str(dataset.path / "dataset.json") if dataset.path.is_dir() else str(dataset.path)
    return [
        Finding(
            "warning",
            "",
            file,
            f"{len(unused)} labels are in no case: {listed}",
            "each label in at least one case",
            "remove them from the labels, or they train on nothing",
        )
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


def _hash(array: npt.NDArray[Any]) -> str:
    digest = hashlib.blake2b(f"{array.shape}{array.dtype}".encode(), digest_size=16)
    # voxel (i, j, k) in the order of NIfTI, where this copies nothing
    digest.update(np.ascontiguousarray(array.T).data)
    return digest.hexdigest()


def _axcodes(grid: Grid) -> str:
    """Where each voxel axis points to, as in RAS (to the right, front, top); empty in 2D."""
    if grid.spatial_dims != 3:
        return ""
    directions = grid.affine[:3, :3] / grid.spacing_mm
    strongest = np.abs(directions).argmax(axis=0)
    return "".join(("LPI", "RAS")[int(directions[w, v] > 0)][w] for v, w in enumerate(strongest))


def _mm(values: npt.NDArray[np.float64]) -> str:
    return " × ".join(f"{v:.3g}" for v in values)
