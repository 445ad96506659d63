"""Verbs that judge: evaluate, compare."""

from __future__ import annotations

import math
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import medseg
from medseg.cli.shared import (
    AnyDevice,
    Verbose,
    failed_cases,
    finish,
    log,
    print_report,
)
from medseg.terminal import out, shown_progress


class Surface(str, Enum):
    """Definitions of a surface for `--surface`."""

    surfel = "surfel"
    voxel = "voxel"


def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of masks, or one mask.")],
    references: Annotated[Path, typer.Argument(metavar="REFERENCES", help="Folder of label maps, or one.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="REPORT", help="Folder for the report alone.")],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE|RUN", help="Names of the labels: run folder, dataset.json or YAML.")
    ] = None,
    ignore_label: Annotated[
        int | None, typer.Option(metavar="VALUE", help="Leave out voxels where the reference has this value.", min=0)
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Images to draw the contours on.")] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Subgroups: a column `case`, others such as site or age. Columns of few texts are taken as they are, "
            "ages by decade, other numbers by quartile; names, dates and numbers of persons are left out. Nothing else "
            "of the table reaches the report.",
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of the metadata that names patients: they, not scans, are the unit of the statistics. Left "
            "out: one called group, patient, subject, patient_id or subject_id.",
        ),
    ] = None,
    nsd_tolerance_mm: Annotated[
        str,
        typer.Option(
            metavar="T|NAME=T,...",
            help="Tolerance of the surface Dice in mm; by label, as in 1,liver=2 (1 for all but the liver).",
        ),
    ] = "1",
    surface: Annotated[Surface, typer.Option(help="How surfaces are measured.")] = Surface.surfel,
    extra: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="More measures: boundary-iou, cldice (of vessels and other lines)."),
    ] = None,
    lesions: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Judge lesions one by one (lesions.csv). default: any overlap finds one; panoptic: IoU above 0.5; "
            "brats2023, brats2023_men, brats2023_met: as the challenge.",
        ),
    ] = None,
    probabilities: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Calibration from what infer --save-probabilities wrote, or nnU-Net's .npz."),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Report missing predictions instead of refusing.")
    ] = False,
    resample_prediction: Annotated[
        bool,
        typer.Option(
            "--resample-prediction",
            help="Bring predictions to the grid of the reference (nearest neighbour); the report names them.",
        ),
    ] = False,
    nnunet_summary: Annotated[
        bool, typer.Option("--nnunet-summary", help="Write nnunet_summary.json too, in the form of nnU-Net v2.")
    ] = False,
    pdf: Annotated[bool, typer.Option("--pdf", help="Write report.pdf too.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(help="Cases at a time. Left out: one per core, 16 at most, fewer where memory is short.", min=1),
    ] = None,
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Compare masks with references: Dice, distances, volumes, as CSV, JSON and one HTML page.

    A mask belongs to the reference of the same name, whatever their endings: a.nii.gz to a.nrrd. Hidden files, files
    that are no images and folders are passed over; a name that comes twice, a file that cannot be read or a mask on
    another grid costs only its case. Predictions without a reference are left out and named.
    """
    log(verbose)
    _check_folder(output, predictions, references)
    medseg.Report.check_folder(output)
    options = medseg.EvaluateOptions(
        labels=medseg.read_labels(labels) if labels else None,
        ignore_value=ignore_label,
        surface=surface.value,
        nsd_tolerance_mm=_tolerances(nsd_tolerance_mm),
        resample_prediction=resample_prediction,
        allow_missing=allow_missing,
        extra=tuple(name.strip().replace("-", "_") for name in extra.split(",")) if extra is not None else (),
        lesions=lesions,
        probabilities=probabilities,
        group=group,
        jobs=jobs,
    )
    with shown_progress() as progress:
        report = medseg.evaluate(predictions, references, options, images=images, metadata=metadata, progress=progress)
        report.save(output, nnunet_summary=nnunet_summary, pdf=pdf, progress=progress)
    print_report(report)
    finish(f"Report: {output / 'report.html'}", failed_cases((), report))


def compare(
    reports: Annotated[
        list[str],
        typer.Argument(
            metavar="REPORT...",
            help="Two or more report folders, or summaries of nnU-Net; NAME=FOLDER names the method.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the comparison alone.")],
    device: AnyDevice = "auto",
    verbose: Verbose = False,
) -> None:
    """Compare methods on the same cases: paired tests, differences with intervals, a ranking, one HTML page."""
    log(verbose)
    _check_folder(output)
    medseg.Comparison.check_folder(output)
    with shown_progress() as progress:
        comparison = medseg.compare(reports, progress=progress)
        comparison.save(output)
    out.print(comparison.text_table(), markup=False)
    for finding in comparison.findings:
        out.print(finding, markup=False)
    finish(f"Comparison: {output / 'compare.html'}")


def _check_folder(output: Path, *inputs: Path) -> None:
    """Refuse, before any work, a folder that cannot be one, or that of `inputs`, whose files would be replaced."""
    try:
        there = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    except OSError as error:
        raise medseg.ConfigError(
            f"-o {output}: cannot be looked at ({error.strerror}); change the permissions of the folders above it, or "
            "give another folder"
        ) from error
    if not there.is_dir():
        raise medseg.ConfigError(f"-o {output}: {there} is a file, expected a folder for the report; give another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise medseg.ConfigError(
            f"-o {output}: nothing can be written in {there}; change its permissions, or give another folder"
        )
    if output.resolve() in [path.resolve() for path in inputs]:
        raise medseg.ConfigError(
            f"-o {output}: the folder of the masks found, expected one for the report alone, for it would replace "
            f"files such as nnU-Net's summary.json; give {output / 'report'}"
        )


def _tolerances(text: str) -> Any:
    """One number, or numbers by label name in which `*` stands for the labels that are not named."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        name = name.strip() or "*"
        try:
            tolerance = float(number)
        except ValueError:
            tolerance = math.nan
        # NaN is below nothing
        if not 0 <= tolerance < math.inf or name in found:
            raise medseg.ConfigError(
                f"--nsd-tolerance-mm {text}: expected mm of 0 or more, such as 1 or 1,liver=2 (each label once)"
            )
        found[name] = tolerance
    return found["*"] if list(found) == ["*"] else found
