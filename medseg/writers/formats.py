"""The files of a segmented case by format: what each is called, what it needs, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from typing_extensions import NotRequired, TypedDict

from medseg.cases import Case
from medseg.errors import ConfigError, DataError, MedsegError
from medseg.grid import Grid
from medseg.readers import Geometry, file_sha256, is_image_file, is_picture, read_images
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.readers.series import SourceImages, series_geometry, source_images
from medseg.writers import all_or_none, atomic_path, label_ending, write_label
from medseg.writers.probabilities import ProbabilityStore, write_probabilities, write_regions
from medseg.writers.provenance import Algorithm

if TYPE_CHECKING:
    from medseg.writers.dicom_source import LabelledSeries

NIFTI, DICOM_SEG, REGIONS = "nifti", "dicom-seg", "regions"


class WrittenFile(TypedDict):
    """A file beside a mask: its name in the folder, and the SHA-256 of its bytes.

    `refers_to`: other formats of the case that it refers to; records of before do not tell, nor do files without.
    """

    name: str
    sha256: str
    refers_to: NotRequired[list[str]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """A segmented case, for files of it.

    `labels` (*grid.shape) integers. `source`: the headers of its DICOM series, where a format needs them. `channels`:
    how many the model takes. `quality`: by label `expected`, `low` and `high`. `revision`: which attempt at this series
    a DICOM object is of. `formats`: all that were asked for: one may refer to another. `scores`: what was kept of the
    network's probabilities.
    """

    case: Case
    labels: npt.NDArray[Any]
    grid: Grid
    segments: tuple[SegmentInfo, ...]
    algorithm: Algorithm
    source: SourceImages | None = None
    channels: int = 1
    quality: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    revision: int = 1
    formats: tuple[str, ...] = (NIFTI,)
    scores: ProbabilityStore | None = None

    @property
    def like(self) -> Path | Geometry:
        """What a NIfTI file lies on: the file of the image, or of a series the grid that was read."""
        # what a file says of itself is read again
        if self.case.series is None:
            return self.case.images[0]
        # the grid of a plane does not tell where it lies
        return Geometry(self.grid) if self.grid.spatial_dims == 3 else series_geometry(self.case.series, spatial_dims=2)

    @cached_property
    def segmentation(self) -> Segmentation:
        """The labels with their names."""
        return Segmentation(self.labels, self.grid, self.segments)

    @cached_property
    def labelled(self) -> LabelledSeries:
        """The labels on the planes of their series. Raises as `labelled_series`."""
        from medseg.writers.dicom_source import labelled_series

        if self.source is None:
            raise _no_series(self.case, [n for n in self.formats if FORMATS[n].needs_series])
        geometry, labels = self.source.geometry.grid, self.segmentation
        if self.grid.spatial_dims == 2:
            # a plane of a 2D model lies in space again
            labels = Segmentation(self.labels.reshape(geometry.shape), geometry, self.segments)
        with _told_of(self.case):
            return labelled_series(self.source, labels, algorithm=self.algorithm, revision=self.revision)

    @cached_property
    def picture(self) -> npt.NDArray[np.uint8]:
        """The overview of the case as RGB. The image is read once more: what the network sees is not what people do."""
        from medseg.overview import draw_overview

        one = len(self.case.images) > 1 or (is_picture(self.case.images[0]) and self.channels in (1, 3))
        image = read_images(
            self.case.images[:1],
            spatial_dims=self.grid.spatial_dims,
            channels=1 if one else self.channels,
            series=self.case.series,
        )
        voxels, shown = image.array[0], self.segmentation
        if self.grid.spatial_dims == 2 and not is_picture(self.case.images[0]):
            # (column, row), from a DICOM header downwards, else upwards
            flip = slice(None, None, 1 if self.case.series else -1)
            spacing = self.grid.spacing_mm
            voxels, labels = voxels[:, flip].T, self.labels[:, flip].T
            shown = Segmentation(labels, Grid(labels.shape, np.diag([*spacing[::-1], 1.0])), self.segments)
        maker = f"{self.algorithm.name} · version {self.algorithm.version} · model {self.algorithm.model_sha256[:12]}"
        return draw_overview(voxels, shown, quality=self.quality, warnings=self.warnings, maker=maker)


def check_formats(names: Sequence[str]) -> None:
    """Raises `ConfigError` for a name that is no format, one given twice, or none at all."""
    wrong = [name for name in names if name not in FORMATS]
    if wrong or not names or len(set(names)) < len(names):
        found = wrong[0] if wrong else ",".join(names) or "none"
        raise ConfigError(f"--format {found}: expected one or several of {', '.join(FORMATS)}, each once")


def file_name(case: Case, name: str) -> str:
    """What the file of a case in the format `name` is called, seen from the folder of its mask."""
    found = FORMATS[name]
    return f"{found.folder}{case.id}{found.ending or label_ending(case.images[0])}"


def file_names(case: Case) -> dict[str, str]:
    """What the files of a case are called, by format, of all there are."""
    return {name: file_name(case, name) for name in FORMATS}


def references(name: str, formats: Iterable[str]) -> list[str]:
    """Those of `formats` that a file in the format `name` refers to when they are written with it."""
    return [other for other in FORMATS[name].refers_to if other in formats]


def names_other(path: Path, other: Path) -> bool:
    """Whether the DICOM object in `path` names the one in `other`, both as they were written here."""
    from pydicom.filereader import read_file_meta_info

    return str(read_file_meta_info(other).MediaStorageSOPInstanceUID).encode("ascii") in path.read_bytes()


def source_for(case: Case, formats: Sequence[str]) -> SourceImages | None:
    """The headers that DICOM objects of a case refer to; None where no such format is asked for.

    Raises `DataError` where the case is no DICOM series, or one that nothing can refer to. A file or folder that cannot
    be read has none: reading it says why.
    """
    needing = [name for name in formats if FORMATS[name].needs_series]
    if not needing:
        return None
    if case.series is None:
        if case.images[0].is_dir() or not is_image_file(case.images[0]):
            return None
        raise _no_series(case, needing)
    from medseg.writers.dicom_source import check_references

    images = source_images(case.series)
    with _told_of(case):
        check_references(images)
    return images


def write_files(folder: Path, outcome: Outcome, probabilities: Path | None = None) -> dict[str, WrittenFile]:
    """Writes a case in all its formats into `folder`, and its scores to `probabilities`; gives the files, by format.

    Each is whole or not there. Where one cannot be written all is left as it was before: a case is done or it is not.
    Raises `DataError` or `GeometryError`.
    """
    with all_or_none():
        for name in outcome.formats:
            FORMATS[name].write(folder / file_name(outcome.case, name), outcome)
        if probabilities is not None and outcome.scores is not None:
            write_probabilities(probabilities, outcome.scores, outcome.like)
    written: dict[str, WrittenFile] = {}
    for name in outcome.formats:
        called = file_name(outcome.case, name)
        written[name] = WrittenFile(name=called, sha256=file_sha256(folder / called))
        if others := references(name, outcome.formats):
            written[name]["refers_to"] = others
    return written


def _nifti(path: Path, outcome: Outcome) -> None:
    write_label(path, outcome.labels, like=outcome.like, names=outcome.segmentation.names)


def _dicom_seg(path: Path, outcome: Outcome) -> None:
    from medseg.writers.dicom_seg import write_dicom_seg

    write_dicom_seg(path, outcome.labelled)


def _rtstruct(path: Path, outcome: Outcome) -> None:
    from medseg.writers.rtstruct import write_rtstruct

    write_rtstruct(path, outcome.labelled)


def _dicom_sr(path: Path, outcome: Outcome) -> None:
    from medseg.writers.dicom_sr import write_dicom_sr

    with_segmentation = DICOM_SEG in references("dicom-sr", outcome.formats)
    write_dicom_sr(path, outcome.labelled, quality=outcome.quality, with_segmentation=with_segmentation)


def _dicom_sc(path: Path, outcome: Outcome) -> None:
    from medseg.writers.dicom_sc import write_dicom_sc

    write_dicom_sc(path, outcome.labelled, outcome.picture)


def _picture(path: Path, outcome: Outcome) -> None:
    from medseg.writers.image2d import write_rgb

    with atomic_path(path) as temporary:
        write_rgb(temporary, outcome.picture)


def _regions(path: Path, outcome: Outcome) -> None:
    if outcome.scores is None:
        raise ValueError("no scores were kept")
    write_regions(path, outcome.scores, outcome.like)


@dataclass(frozen=True)
class _Format:
    """`ending`: what follows the name of the case; empty: that of a mask. `needs_series`: it refers to DICOM images.

    `needs_scores`: it says more than the mask does. `folder`: where it lies beside the mask, with a slash. `refers_to`:
    formats that it refers to where they are asked for too.
    """

    ending: str
    write: Callable[[Path, Outcome], None]
    needs_series: bool = False
    needs_scores: bool = False
    folder: str = ""
    refers_to: tuple[str, ...] = ()


FORMATS: dict[str, _Format] = {
    NIFTI: _Format("", _nifti),
    DICOM_SEG: _Format(".seg.dcm", _dicom_seg, needs_series=True),
    "rtstruct": _Format(".rtstruct.dcm", _rtstruct, needs_series=True),
    "dicom-sr": _Format(".sr.dcm", _dicom_sr, needs_series=True, refers_to=(DICOM_SEG,)),
    "dicom-sc": _Format(".summary.dcm", _dicom_sc, needs_series=True),
    "picture": _Format(".picture.png", _picture),
    # a mask of its own name and grid, with a channel for each: not to be taken for one more case
    REGIONS: _Format(".nii.gz", _regions, needs_scores=True, folder="regions/"),
}


def _no_series(case: Case, needing: Sequence[str]) -> DataError:
    return DataError(
        f"{case.images[0]}: no DICOM series found, expected one for {', '.join(needing)}, which refers to the images "
        "it was made from; give the series, or ask for --format nifti or picture"
    )


@contextmanager
def _told_of(case: Case) -> Iterator[None]:
    """What is raised names the case's file."""
    try:
        yield
    except MedsegError as error:
        raise type(error)(f"{case.images[0]}: {error}") from error
