"""The verb convert: from one format to another."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import SOME_FAILED, AnyDevice, ResampleGaps, ResampleTilt, SeriesUid, Verbose, finish, log
from medseg.terminal import err, shown_progress


class Target(str, Enum):
    """What a file may become."""

    nifti = "nifti"
    dicom_seg = "dicom-seg"
    rtstruct = "rtstruct"


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Folder or zip archive of a DICOM series, DICOM file, or any image."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="File to write: .nii.gz, .nii, or .dcm.")
    ],
    source_series: Annotated[
        Path | None,
        typer.Option("--source", metavar="SERIES", help="DICOM series that a label map was made from, for .dcm."),
    ] = None,
    to: Annotated[Target | None, typer.Option(help="What to write; left out: by the ending, a SEG for .dcm.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE|RUN", help="Names of the labels; left out: those in the header of the label map."),
    ] = None,
    series: SeriesUid = None,
    resample_tilt: ResampleTilt = False,
    resample_gaps: ResampleGaps = False,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Turn a DICOM series, a DICOM SEG or any image into NIfTI; a label map into DICOM SEG or RTSTRUCT.

    What is no single regular volume is refused with the reason, and no file is written.
    """
    log(verbose)
    options = medseg.ConvertOptions(
        to=None if to is None else to.value,
        source=source_series,
        labels=None if labels is None else medseg.read_labels(labels),
        series=medseg.SeriesOptions(series, resample_tilt, resample_gaps),
    )
    try:
        with shown_progress() as progress:
            done = medseg.convert(source, output, options, progress=progress)
    except medseg.DataError as error:
        logging.getLogger("medseg").debug("traceback", exc_info=True)
        err.print(f"[red]refused:[/red] {escape(str(error))}")
        raise typer.Exit(SOME_FAILED) from error
    for warning in done.warnings:
        err.print(f"[yellow]note:[/yellow] {escape(warning)}")
    size, spacing = (" × ".join(f"{n:.4g}" for n in numbers) for numbers in (done.shape, done.spacing_mm))
    finish(f"{done.path}: {size} voxels of {spacing} mm")
