"""The verb convert: from one format to another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import medseg
from medseg.cli.shared import SOME_FAILED, AnyDevice, ResampleGaps, ResampleTilt, SeriesUid, Verbose, finish, log
from medseg.terminal import err, shown_progress


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Folder or zip archive of a DICOM series, DICOM file, or any image."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="File to write: .nii.gz or .nii.")],
    series: SeriesUid = None,
    resample_tilt: ResampleTilt = False,
    resample_gaps: ResampleGaps = False,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Turn a DICOM series, or any other image, into NIfTI.

    What is no single regular volume is refused with the reason, and no file is written.
    """
    log(verbose)
    options = medseg.SeriesOptions(series, resample_tilt, resample_gaps)
    try:
        with shown_progress() as progress:
            done = medseg.convert(source, output, series=options, progress=progress)
    except medseg.DataError as error:
        logging.getLogger("medseg").debug("traceback", exc_info=True)
        err.print(f"[red]refused:[/red] {escape(str(error))}")
        raise typer.Exit(SOME_FAILED) from error
    for warning in done.warnings:
        err.print(f"[yellow]note:[/yellow] {escape(warning)}")
    size, spacing = (" × ".join(f"{n:.4g}" for n in numbers) for numbers in (done.shape, done.spacing_mm))
    finish(f"{done.path}: {size} voxels of {spacing} mm")
