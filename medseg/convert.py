"""One file, folder or archive into one file of another format; formats themselves are those of readers and writers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import ConfigError
from medseg.progress import Progress, silent
from medseg.readers import SeriesOptions, read_image, read_images, split_ending
from medseg.readers.dicom_files import holds_dicom
from medseg.readers.series import choose_series
from medseg.writers import IMAGE_ENDINGS, write_image

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """What was written to `path`. `warnings`: what is odd about the input, and what was resampled."""

    path: Path
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    warnings: tuple[str, ...] = ()


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    series: SeriesOptions | None = None,
    progress: Progress = silent,
) -> Converted:
    """A DICOM series (folder, zip archive, multi-frame file) or any readable image into `output`, whole or not at all.

    `to`: nifti; None: what the ending of `output` says. `series`: which series of several, and whether a tilt or gaps
    may be resampled. Raises `ConfigError` for a wrong ending or path; `DataError` or `GeometryError` with the reason
    where the input is no single regular volume: nothing is written then.
    """
    source, output = Path(source), Path(output)
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder; check the path")
    if output.is_dir() or (output.exists() and output.resolve() == source.resolve()):
        raise ConfigError(f"{output}: {'a folder' if output.is_dir() else 'the input itself'}; choose another -o")
    return _writer(output, to)(source, output, series or SeriesOptions(), progress)


_Writer = Callable[[Path, Path, SeriesOptions, Progress], Converted]


def _writer(output: Path, to: str | None) -> _Writer:
    if to is not None and to not in _BY_NAME:
        raise ConfigError(f"--to {to}: expected {', '.join(_BY_NAME)}")
    ending = split_ending(output.name)[1] or output.suffix
    endings, writer = _BY_NAME[to] if to else next((v for v in _BY_NAME.values() if ending.lower() in v[0]), ((), None))
    if writer is None or ending.lower() not in endings:
        wanted = endings or tuple(e for known, _ in _BY_NAME.values() for e in known)
        raise ConfigError(f"{output}: ending {ending or 'missing'} found, expected {' or '.join(wanted)}; change -o")
    return writer


def _to_nifti(source: Path, output: Path, series: SeriesOptions, progress: Progress) -> Converted:
    if _is_series(source):
        chosen = choose_series(source, series)
        image = read_images((source,), series=chosen, tick=lambda done, total: progress("read", done, total, ""))
    elif series != SeriesOptions():
        raise ConfigError(
            f"{source}: no DICOM; --series, --resample-tilt and --resample-gaps are for DICOM series alone"
        )
    else:
        image = read_image(source, finite=False)
    write_image(output, image)
    return Converted(output, image.grid.shape, image.grid.spacing_mm, image.geometry.warnings)


def _is_series(source: Path) -> bool:
    return source.is_dir() or (not split_ending(source.name)[1] and holds_dicom(source))


# what `to` may be, by the endings of its files
_BY_NAME: dict[str, tuple[tuple[str, ...], _Writer]] = {"nifti": (IMAGE_ENDINGS, _to_nifti)}
