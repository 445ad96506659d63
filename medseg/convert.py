"""One file, folder or archive into one file of another format; formats themselves are those of readers and writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.config import BACKGROUND
from medseg.errors import ConfigError, DataError
from medseg.progress import Progress, silent
from medseg.readers import Geometry, SeriesOptions, is_series, nifti, read_image, read_images, read_label, split_ending
from medseg.readers.dicom_files import holds_dicom
from medseg.readers.segments import Segmentation, SegmentInfo
from medseg.readers.series import SourceImages, choose_series, source_images
from medseg.versions import versions
from medseg.writers import IMAGE_ENDINGS, write_image, write_label

if TYPE_CHECKING:
    from medseg.writers.dicom_source import LabelledSeries

__all__ = ["ConvertOptions", "Converted", "convert"]

DICOM_ENDINGS = (".dcm",)


@dataclass(frozen=True)
class ConvertOptions:
    """What is asked of a conversion; `to`: nifti, dicom-seg, rtstruct, or None: what the ending says.

    `source`: the DICOM series that a label map was made from. `labels`: names and values of its labels; None: those in
    its header. `series`: which of several series, of the input or of `source`, and what may be resampled.
    """

    to: str | None = None
    source: Path | None = None
    labels: Mapping[str, int | tuple[int, ...]] | None = None
    series: SeriesOptions = field(default_factory=SeriesOptions)


@dataclass(frozen=True)
class Converted:
    """What was written to `path`. `warnings`: what is odd about the input, and what was resampled."""

    path: Path
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    warnings: tuple[str, ...] = ()


def convert(
    source: str | Path, output: str | Path, options: ConvertOptions | None = None, *, progress: Progress = silent
) -> Converted:
    """One file in another format at `output`, whole or not at all.

    To NIfTI: a DICOM series (folder, zip archive, multi-frame file), a DICOM SEG, or any readable image. To DICOM SEG
    or RTSTRUCT: a label map and, as `options.source`, the series it was made from. Raises `ConfigError` for a wrong
    ending, path or option; `DataError` or `GeometryError` with the reason where the input is no single regular volume,
    or where label map and series do not fit: nothing is written then.
    """
    source, output, options = Path(source), Path(output), options or ConvertOptions()
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder; check the path")
    if output.is_dir() or (output.exists() and output.resolve() == source.resolve()):
        raise ConfigError(f"{output}: {'a folder' if output.is_dir() else 'the input itself'}; choose another -o")
    return _writer(output, options.to)(source, output, options, progress)


_Writer = Callable[[Path, Path, ConvertOptions, Progress], Converted]


def _writer(output: Path, to: str | None) -> _Writer:
    if to is not None and to not in _BY_NAME:
        raise ConfigError(f"--to {to}: expected {', '.join(_BY_NAME)}")
    ending = split_ending(output.name)[1] or output.suffix
    endings, writer = _BY_NAME[to] if to else next((v for v in _BY_NAME.values() if ending.lower() in v[0]), ((), None))
    if writer is None or ending.lower() not in endings:
        wanted = endings or tuple(dict.fromkeys(e for known, _ in _BY_NAME.values() for e in known))
        raise ConfigError(f"{output}: ending {ending or 'missing'} found, expected {' or '.join(wanted)}; change -o")
    return writer


def _to_nifti(source: Path, output: Path, options: ConvertOptions, progress: Progress) -> Converted:
    if _is_segmentation(source):
        return _segmentation_to_nifti(source, output, options)
    if options.source is not None or options.labels is not None:
        raise ConfigError(f"{source}: no DICOM SEG; --source and --labels are for label maps that become DICOM")
    if is_series(source):
        chosen = choose_series(source, options.series)
        image = read_images((source,), series=chosen, tick=lambda done, total: progress("read", done, total, ""))
    elif options.series != SeriesOptions():
        raise ConfigError(
            f"{source}: no DICOM; --series, --resample-tilt and --resample-gaps are for DICOM series alone"
        )
    else:
        image = read_image(source, finite=False)
    write_image(output, image)
    return Converted(output, image.grid.shape, image.grid.spacing_mm, image.geometry.warnings)


def _segmentation_to_nifti(source: Path, output: Path, options: ConvertOptions) -> Converted:
    from medseg.readers.segmentation import read_segmentation

    images = None if options.source is None else _source_images(options.source, output, options)
    made = read_segmentation(source, like=None if images is None else images.geometry.grid)
    write_label(output, made.array, Geometry(made.grid), names=made.names, inferred=False)
    return Converted(output, made.grid.shape, made.grid.spacing_mm)


def _to_dicom_seg(source: Path, output: Path, options: ConvertOptions, _: Progress) -> Converted:
    from medseg.writers.dicom_seg import write_dicom_seg

    return _to_dicom(source, output, options, write_dicom_seg)


def _to_rtstruct(source: Path, output: Path, options: ConvertOptions, _: Progress) -> Converted:
    from medseg.writers.rtstruct import write_rtstruct

    return _to_dicom(source, output, options, write_rtstruct)


def _to_dicom(
    source: Path, output: Path, options: ConvertOptions, write: Callable[[Path, LabelledSeries], Path]
) -> Converted:
    from medseg.writers.dicom_source import labelled_series
    from medseg.writers.provenance import Algorithm

    if is_series(source):
        raise ConfigError(f"{source}: DICOM found, expected a label map such as mask.nii.gz, to be written as DICOM")
    if options.source is None:
        raise ConfigError(
            f"{output}: a DICOM object refers to the images it was made from; give their series with --source FOLDER"
        )
    label, images = read_label(source, spatial_dims=3), _source_images(options.source, output, options)
    segments = tuple(SegmentInfo(value, name) for value, name in sorted(_names(source, options).items()))
    algorithm = Algorithm(version=versions("medseg")["medseg"])
    if not nifti.is_inferred(source):
        # who drew it is not known: that somebody helped claims the least
        algorithm = replace(algorithm, kind="SEMIAUTOMATIC")
    segmentation = Segmentation(label.array, label.grid, segments)
    write(output, labelled_series(images, segmentation, algorithm=algorithm))
    return Converted(output, label.grid.shape, label.grid.spacing_mm, images.geometry.warnings)


def _names(source: Path, options: ConvertOptions) -> dict[int, str]:
    """Name of every value; empty where nobody gave any."""
    if options.labels is None:
        return nifti.label_names(source)
    regions = [name for name, value in options.labels.items() if isinstance(value, tuple)]
    if regions:
        raise ConfigError(f"--labels: `{regions[0]}` stands for several values, expected one for each label")
    return {int(v): n for n, v in options.labels.items() if n != BACKGROUND and not isinstance(v, tuple)}


def _source_images(source: Path, output: Path, options: ConvertOptions) -> SourceImages:
    if not source.exists():
        raise ConfigError(f"--source {source}: no such file or folder; check the path")
    inside = source.is_dir() and source.resolve() in output.resolve().parents
    if output.exists() and (inside or output.resolve() == source.resolve()):
        raise ConfigError(f"{output}: one of the images of --source, or beside them; choose another -o")
    images = source_images(source, options.series)
    if images.resampled:
        raise DataError(
            f"{source}: resampled planes are in no file, so that nothing can refer to them; leave out --resample-tilt "
            "and --resample-gaps, and use a label map on the planes as they are"
        )
    return images


def _is_segmentation(source: Path) -> bool:
    if not source.is_file() or split_ending(source.name)[1] or not holds_dicom(source):
        return False
    from medseg.readers.segmentation import is_dicom_segmentation

    return is_dicom_segmentation(source)


# what `to` may be, by the endings of its files; the first one of an ending is what it stands for
_BY_NAME: dict[str, tuple[tuple[str, ...], _Writer]] = {
    "nifti": (IMAGE_ENDINGS, _to_nifti),
    "dicom-seg": (DICOM_ENDINGS, _to_dicom_seg),
    "rtstruct": (DICOM_ENDINGS, _to_rtstruct),
}
