"""DICOM series: which are in a folder or an archive, and one of them as a volume. Never InstanceNumber, never names."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, MedsegError
from medseg.readers._axes import channels_first, place, plane, spatial_shape
from medseg.readers._image import Geometry, Image
from medseg.readers.dicom_files import (
    DicomFile,
    Listed,
    Unreadable,
    digest,
    each_open,
    header_value,
    header_word,
    list_dicom,
    read_dataset,
    read_headers,
)
from medseg.readers.dicom_frames import MOST_VOXELS, TAGS, frames_of, plane_distance, refuse_interleaved
from medseg.readers.dicom_pixels import Tick, no_tick, read_planes
from medseg.readers.dicom_reslice import even_steps, fill_gaps, set_upright, upright_shape
from medseg.readers.dicom_stack import Stack, affine_of, check_regular, stack

if TYPE_CHECKING:
    from pydicom import Dataset

log = logging.getLogger(__name__)

# DICOM files that hold no image of a patient, but what was made of some or is said about them
OBJECTS = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTIMAGE", "RTRECORD", "SR", "PR", "KO", "REG", "FID", "DOC", "M3D")
# by the beginnings of their classes: waveforms, presentation states, spectra, raw data and what is registered or
# segmented, reports, documents, plans, and the index of a disc
NO_IMAGES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("9.", "11.", "4.2", "66", "67", "88.", "104.", "481.", "78.")
)
NO_IMAGES += ("1.2.840.10008.1.3.10",)
# and those of images: a file of one of these without Rows and Columns is cut off; of another class it is no image
IMAGES = tuple(f"1.2.840.10008.5.1.4.1.1.{n}." for n in (1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 20, 30, 77, 128, 130))
# elements of an image that stand before its pixels
_OF_IMAGES = ("ImagePositionPatient", "BitsAllocated")
_UID = re.compile(r"[0-9.]{1,64}")
_GROUPING = (
    *("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "SeriesNumber", "Rows", "Columns"),
    "SOPClassUID",
)


@dataclass(frozen=True)
class SeriesOptions:
    """Which series, and what may be done to it. `uid`: SeriesInstanceUID, or the name that `find_series` gives one
    without; None: the only one. `resample_tilt`, `resample_gaps`: bring what is no regular volume onto one."""

    uid: str | None = None
    resample_tilt: bool = False
    resample_gaps: bool = False


@dataclass(frozen=True)
class Series:
    """The files of one series in a `source` (folder, archive, file), in no order. `key`: its UID, or a name of ours
    where that is blank. `folder`: the deepest one that all files are in. `options`: what may be done to it."""

    source: Path
    key: str
    modality: str
    files: tuple[DicomFile, ...]
    folder: Path
    options: SeriesOptions = SeriesOptions()

    @property
    def digits(self) -> str:
        """Eight hexadecimal digits made of the UID: safe in the name of a file."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:8]

    def sha256(self) -> str:
        """One digest of all files, whatever their names and order: of the sorted digests of each, a line each."""
        return digest(self.files)


@dataclass(frozen=True)
class Found:
    """What is in a source. `objects`: how many DICOM files are no images, by modality; `others`: no DICOM at all."""

    source: Path
    series: tuple[Series, ...]
    objects: dict[str, int]
    unreadable: tuple[Unreadable, ...]
    others: int

    def unreadable_for(self, uid: str | None) -> tuple[Unreadable, ...]:
        """The unreadable files that could be slices of the series `uid`, or of any."""
        # a UID that the end of the file cuts is the beginning of another one
        return tuple(file for file in self.unreadable if uid is None or uid.startswith(file.series))


@dataclass(frozen=True, eq=False)
class SourceImages:
    """What a DICOM object needs that is made from a series and refers to it.

    `headers`: the whole headers without pixels, of classic images one for each plane, in the order of the volume; of
    multi-frame files one each. `frames`: for each plane of the files its place in `headers` and its frame there, from
    0; `positions` (K, 3): the centre of its first pixel as the file says, LPS mm. `geometry`: the volume (I, J, K) of
    columns, rows, planes. `resampled`: its planes are not those of the files.
    """

    headers: tuple[Dataset, ...]
    frames: tuple[tuple[int, int], ...]
    positions: npt.NDArray[np.float64]
    geometry: Geometry
    resampled: bool


def find_series(source: Path, only: Sequence[Path] = ()) -> Found:
    """The series in a folder and all below it (of `only` these files in it), a zip archive, or a file.

    Raises `DataError` where it cannot be read.
    """
    parts = [list_dicom(path) for path in only or [source]]
    listed = Listed(
        tuple(file for part in parts for file in part.files),
        tuple(file for part in parts for file in part.unreadable),
        sum(part.others for part in parts),
    )
    groups: dict[tuple[str, ...], list[tuple[DicomFile, str]]] = {}
    objects: Counter[str] = Counter()
    unreadable = list(listed.unreadable)
    for file, header in _headers(listed.files, unreadable):
        modality = header_word(header, "Modality")
        if modality in OBJECTS or _is_no_image(header):
            objects[modality or "no image"] += 1
            continue
        if header_value(header, "Rows") is None or header_value(header, "Columns") is None:
            if not _is_cut_image(file, header):
                objects["no image"] += 1
                continue
            # not to be left out: it could be the last slice of a series
            reason = "an image without Rows and Columns found: cut off; copy the file again, or remove it"
            unreadable.append(Unreadable(file, reason, _series_uid(header)))
            continue
        groups.setdefault(_group(source, file, header), []).append((file, modality))
    series = []
    for number, (group, members) in enumerate(sorted(groups.items(), key=lambda item: item[1][0][0]), start=1):
        files = tuple(file for file, _ in members)
        # blank ones are told apart by what else ties their files; what is no UID is not shown: it may be anything
        key = group[0] if _UID.fullmatch(group[0]) else f"no-uid-{number}"
        series.append(Series(source, key, members[0][1], files, _common_folder(source, files)))
    return Found(source, tuple(series), dict(objects), tuple(unreadable), listed.others)


def choose_series(source: Path, options: SeriesOptions | None = None) -> Series:
    """The one series in a source, or that of `options.uid`.

    Raises `DataError` for none, several without a choice, and for any DICOM file that cannot be read, unless its header
    says that it is of another series: it could be a slice of the series.
    """
    options = options or SeriesOptions()
    uid, found = options.uid, find_series(source)
    refuse_unreadable(found, uid)
    if not found.series:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.objects.items()))
        raise DataError(f"{source}: {kinds or 'no DICOM file'} found, expected a series of images; check the path")
    chosen = [s for s in found.series if uid is None or s.key == uid]
    if len(chosen) == 1:
        return replace(chosen[0], options=options)
    told = "; ".join(f"{s.key} ({s.modality}, {_count(len(s.files), 'file')})" for s in found.series[:5])
    more = f" and {len(found.series) - 5} more" if len(found.series) > 5 else ""
    if uid is not None:
        raise DataError(f"{source}: no series {uid} found, expected one of {told}{more}; correct --series")
    raise DataError(
        f"{source}: {len(found.series)} series found, expected one: {told}{more}; choose one with --series UID"
    )


def refuse_unreadable(found: Found, uid: str | None = None) -> None:
    """Raises `DataError` where DICOM files could not be read that could be slices of the series `uid`, or of any."""
    unreadable = found.unreadable_for(uid)
    if unreadable:
        more = len(unreadable) - 1
        raise DataError(f"{unreadable[0]}{f' ({more} more files are like it)' if more else ''}")


def read_series(
    series: Series, *, spatial_dims: int | None = None, channels: int | None = None, tick: Tick = no_tick
) -> Image:
    """A series as a volume (1, I, J, K): columns, rows, planes; RAS affine in mm.

    What is odd or was resampled stands in `geometry.warnings`. `tick` is told files done and in all. Raises `DataError`
    or `GeometryError` that says what was found, what was expected and what to do: never a wrong volume.
    """
    laid = _lay_out(series)
    planes = read_planes(series.files, laid.made.frames, laid.shape, tick=tick)
    made = laid.made
    if laid.tilted:
        made, moved = set_upright(made, planes)
        planes = planes if moved is None else moved
    if laid.uneven:
        planes = fill_gaps(made, planes)
    geometry = _geometry(laid, series.source, spatial_dims)
    return Image(channels_first(series.source, planes.T, geometry.grid.shape, channels), geometry)


def series_geometry(series: Series, *, spatial_dims: int | None = None) -> Geometry:
    """Where the voxels of `read_series` are, from the headers alone. Raises as it does, but for pixels."""
    return _geometry(_lay_out(series), series.source, spatial_dims)


def source_images(source: Path | Series, options: SeriesOptions | None = None) -> SourceImages:
    """Headers and geometry of a series for what is made from it; `options` choose in a path. Raises as `choose_series`
    and `read_series`."""
    series = source if isinstance(source, Series) else choose_series(source, options)
    laid = _lay_out(series)
    # the files in the order of their first plane
    order = list(dict.fromkeys(f.file for f in laid.made.frames))
    headers = tuple(header for _, header in read_headers([series.files[n] for n in order]))
    frames = tuple((order.index(f.file), f.index) for f in laid.made.frames)
    positions = np.stack([f.position for f in laid.made.frames])
    return SourceImages(headers, frames, positions, _geometry(laid, series.source, 3), laid.tilted or laid.uneven)


# ---- as a format among others


def read(
    path: Path, *, spatial_dims: int | None, channels: int | None, labels: bool
) -> tuple[npt.NDArray[Any], Geometry]:
    """Voxels (C, …) and geometry of the only series at `path`. Raises `DataError`, `GeometryError`."""
    image = read_series(choose_series(path), spatial_dims=spatial_dims, channels=channels)
    return image.array, image.geometry


def read_geometry(path: Path, *, spatial_dims: int | None) -> Geometry:
    """Geometry from the headers alone. Raises `DataError`, `GeometryError`."""
    return series_geometry(choose_series(path), spatial_dims=spatial_dims)


# ---- finding


def _headers(files: Iterable[DicomFile], unreadable: list[Unreadable]) -> Iterable[tuple[DicomFile, Dataset]]:
    for file, stream in each_open(files):
        try:
            yield file, read_dataset(file, stream, tags=[*_GROUPING, *_OF_IMAGES], stop_before_pixels=True)
        except DataError as error:
            unreadable.append(Unreadable(file, str(error).removeprefix(f"{file}: ")))


def _is_no_image(header: Dataset) -> bool:
    return any(name.startswith(NO_IMAGES) for name in _classes(header)[:1])


def _is_cut_image(file: DicomFile, header: Dataset) -> bool:
    """Whether what has no Rows and Columns must be an image: by its class, or by what it has of one."""
    classes = _classes(header)
    # the end of the file may cut the class itself
    if not classes or any(f"{name}.".startswith(IMAGES) or IMAGES[0].startswith(name) for name in classes):
        return True
    if any(name in header for name in _OF_IMAGES):
        return True
    try:
        whole = [read_dataset(file, s, tags=["PixelData"], stop_before_pixels=False) for _, s in each_open([file])]
    except DataError:
        # damaged behind its header: not known to be harmless
        return True
    return any("PixelData" in dataset for dataset in whole)


def _classes(header: Dataset) -> list[str]:
    """The class in the header, and that of the group before it, which a cut-off file has still."""
    named = (header_value(header, "SOPClassUID"), header_value(header.file_meta, "MediaStorageSOPClassUID"))
    return [str(name).strip(" \0") for name in named if name is not None]


def _series_uid(header: Dataset) -> str:
    return str(header_value(header, "SeriesInstanceUID") or "").strip(" \0")


def _group(source: Path, file: DicomFile, header: Dataset) -> tuple[str, ...]:
    uid = _series_uid(header)
    if uid:
        return (uid,)
    folder = os.path.relpath(file.path.parent, source) if file.member is None and source.is_dir() else ""
    return ("", folder, *(str(header_value(header, name) or "") for name in _GROUPING[1:]))


def _common_folder(source: Path, files: tuple[DicomFile, ...]) -> Path:
    if not source.is_dir():
        return source
    return Path(os.path.commonpath([str(f.path.parent) for f in files]))


# ---- one series as a stack of planes


@dataclass(frozen=True, eq=False)
class _LaidOut:
    """A series as planes that may need resampling, and what its volume will be."""

    made: Stack
    shape: tuple[int, int]
    tilted: bool
    uneven: bool
    size_ijk: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    notes: tuple[str, ...]


def _lay_out(series: Series) -> _LaidOut:
    where, options = str(series.source), series.options
    headers = [header for _, header in read_headers(series.files, TAGS)]
    try:
        told = frames_of(series.files, headers, where)
    except MedsegError:
        raise
    except Exception as error:
        # an element of another type than the standard says, anywhere
        raise DataError(
            f"{where}: headers that cannot be understood found ({type(error).__name__}), expected those of images; "
            "export the series again"
        ) from error
    made = stack(told.frames, where)
    # after the volumes of equal places are counted, which says more
    refuse_interleaved(headers, where)
    notes = list(told.warnings)
    tilted = options.resample_tilt and not made.is_upright
    uneven = options.resample_gaps and not made.is_even
    upright, (rows, columns) = made, told.shape
    if tilted:
        upright, _ = set_upright(made, None)
        rows, columns = upright_shape(made, told.shape)
        moved = float(np.linalg.norm(made.sideways_mm, axis=1).max())
        notes.append(
            f"resampled: planes shifted by up to {moved:.2f} mm, for a tilt of {made.tilt_degrees:.1f} degrees"
        )
    check_regular(upright, where, gaps=uneven)
    count, spacing_mm = len(made.frames), made.step_mm
    if uneven:
        count, spacing_mm = even_steps(made)
        steps = np.diff(made.along_mm)
        notes.append(
            f"resampled: {len(made.frames)} planes {steps.min():.2f} to {steps.max():.2f} mm apart interpolated to "
            f"{count} planes {spacing_mm:.2f} mm apart"
        )
    most = max(count, len(made.frames))
    if most * rows * columns > MOST_VOXELS:
        raise DataError(
            f"{where}: {most} planes of {rows} × {columns} would be made by resampling, expected at most "
            f"{MOST_VOXELS:,} voxels; choose files of one scan"
        )
    if count == 1:
        spacing_mm, name = plane_distance(series.files[0], headers[0])
        notes.append(f"a single plane: the voxel's third side of {spacing_mm:g} mm is that of {name}")
    affine = affine_of(upright, spacing_mm)
    return _LaidOut(made, told.shape, tilted, uneven, (columns, rows, count), affine, tuple(notes))


def _geometry(laid: _LaidOut, source: Path, spatial_dims: int | None) -> Geometry:
    space = spatial_shape(source, laid.size_ijk, spatial_dims)
    return Geometry(place(source, space, laid.affine), warnings=laid.notes, plane=plane(space, laid.affine))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
