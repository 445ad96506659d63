"""The verbs convert and deidentify: files into files of another format, or without what tells whose they are."""

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


def deidentify(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder or zip archive of DICOM files, or one; nothing is changed.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="New folder for the copies.")],
    keep_interval: Annotated[
        bool,
        typer.Option("--keep-interval", help="Move all dates of a patient by the same days; left out: no dates."),
    ] = False,
    retain_patient_characteristics: Annotated[
        bool, typer.Option("--retain-patient-characteristics", help="Keep sex, age (up to 90), size and weight.")
    ] = False,
    retain_device: Annotated[bool, typer.Option("--retain-device", help="Keep which device it was.")] = False,
    retain_uids: Annotated[
        bool, typer.Option("--retain-uids", help="Keep the UIDs: whoever has the originals knows them again.")
    ] = False,
    salt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A secret of 16 bytes or more: exports with the same one fit together; left out: a new one.",
        ),
    ] = None,
    allow_burned_in: Annotated[
        bool, typer.Option("--allow-burned-in", help="Also images that may have names in their pixels. Look at them.")
    ] = False,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Copy DICOM files without what tells whose they are: PS3.15 Basic Profile; pixels and geometry stay.

    What cannot be cleaned (reports, documents, captured screens, broken files) is refused by name, the rest is done.
    """
    log(verbose)
    options = medseg.DeidentifyOptions(
        salt=None if salt_file is None else _salt(salt_file),
        keep_interval=keep_interval,
        retain_uids=retain_uids,
        retain_patient_characteristics=retain_patient_characteristics,
        retain_device=retain_device,
        allow_burned_in=allow_burned_in,
    )
    with shown_progress() as progress:
        done = medseg.deidentify(source, output, options, progress=progress)
    others = f", {done.others} files that are no DICOM left out" if done.others else ""
    finish(
        f"{done.path}: {done.files} files of {done.series} series and {done.patients} patients{others}",
        [f"{refused.file}: {refused.reason}" for refused in done.refused],
    )


def _salt(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise medseg.ConfigError(
            f"--salt-file {path}: cannot be read ({error.strerror}); make one with `openssl rand -hex 32 > {path}`"
        ) from error
