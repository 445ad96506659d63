"""Verbs that lead from a data set to a model: demo, check, plan, train."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import medseg
from medseg.cli import processes
from medseg.cli.shared import (
    AnyDevice,
    DatasetArg,
    Device,
    Precision,
    Settings,
    Verbose,
    failed_cases,
    finish,
    log,
    print_report,
    settings_of,
    silence,
)
from medseg.terminal import out, shown_progress


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for everything.")] = Path(
        "demo"
    ),
    time_budget: Annotated[str, typer.Option(help="Time of the training loop, such as 90s or 3m.")] = "3m",
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Train on the sample data (hippocampus MR), segment held-back cases, write a Dice report."""
    log(verbose)
    with shown_progress() as progress:
        result = medseg.demo(output, time_budget=time_budget, device=device, progress=progress)
    print_report(result.report)
    finish(f"Report: {result.folder / 'report.html'}", failed_cases(result.results, result.report))


def check(dataset: DatasetArg, device: AnyDevice = "auto", verbose: Verbose = False) -> None:
    """Look at every file before any work: geometry, labels, ranges, pairs, duplicates.

    DATASET may also be a folder, file or zip archive of DICOM: then its series are listed, with what each is or why it
    is no volume.
    """
    log(verbose)
    with shown_progress() as progress:
        series = medseg.check_series(dataset, progress=progress)
    if series:
        _print_series(dataset, series)
        return
    with shown_progress() as progress:
        findings = medseg.check_dataset(dataset, progress=progress)
    for finding in findings.findings:
        style = {"error": "red", "warning": "yellow"}.get(finding.severity, "dim")
        place = escape(finding.file or finding.case or str(dataset))
        out.print(f"[{style}]{finding.severity}[/{style}] {place}: {escape(finding.found)}", end="")
        out.print(f"; expected {escape(finding.expected)}; {escape(finding.fix)}")
    errors, others = len(findings.errors), len(findings.findings) - len(findings.errors)
    finish(
        f"{dataset}: {len(findings.facts)} cases read, {errors} errors, {others} other findings",
        [],
        errors > 0,
    )


def _print_series(source: Path, series: Any) -> None:
    """A table of the series, a line each, and below it why some are refused."""
    rows = [("case", "modality", "files", "size", "spacing mm", "verdict", "series")]
    for facts in series:
        size, spacing = ("×".join(f"{n:.4g}" for n in numbers) or "-" for numbers in (facts.shape, facts.spacing_mm))
        verdict = "refused" if facts.reason else "noted" if facts.warnings else "volume"
        rows.append((facts.case, facts.modality or "-", str(facts.files), size, spacing, verdict, facts.key or "-"))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        out.print(escape("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()), soft_wrap=True)
    for facts in series:
        for warning in facts.warnings:
            out.print(f"[yellow]note on[/yellow] {escape(facts.case)}: {escape(warning)}")
    refused = [f"{facts.case}: {facts.reason}" for facts in series if facts.reason]
    finish(f"{source}: {len(series)} series found, {len(refused)} refused", refused)


def plan(
    dataset: DatasetArg,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.yaml", help="Where to; left out: printed.")
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Measure a data set and write the full configuration that `train` would use, with a reason beside each choice."""
    log(verbose)
    with shown_progress() as progress:
        made = medseg.plan(dataset, settings=settings_of(settings), device=device, progress=progress)
    text = medseg.dump_yaml(made.config, made.reasons)
    if output is None:
        out.print(text, markup=False)
        return
    medseg.write_text(output, text)
    finish(f"Plan: {output}")


def train(
    context: typer.Context,
    dataset: DatasetArg,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder to write.")],
    config: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="FILE.yaml", help="Settings; left out: planned.")
    ] = None,
    settings: Settings = None,
    fold: Annotated[str, typer.Option(metavar="K|all", help="Fold held back for validation; all: none.")] = "0",
    folds: Annotated[int, typer.Option(help="Number of folds, where the data set has none of its own.", min=2)] = 5,
    time_budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time of the training loop: 90s, 20m, 1.5h.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of a time budget.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in RUN.")] = False,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|RUN|NAME",
            help="Weights to begin with, where they fit: of medseg, MONAI, MedicalNet, torchvision.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.", min=0)] = None,
    precision: Annotated[Precision, typer.Option(help="auto: bf16 where the hardware has it.")] = Precision.auto,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Same seed, same weights, bit for bit; needs --epochs.")
    ] = False,
    device: Device = "auto",
    devices: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Processes that train together, each on a GPU of its own (or the CPU), each with a planned batch.",
            min=1,
        ),
    ] = 1,
    verbose: Verbose = False,
) -> None:
    """Plan, preprocess, train and validate at full resolution.

    SIGTERM saves the state and ends with 75, with --devices and under srun too; torchrun ends with a code of its own.
    """
    arguments = list(context.obj or ())
    if devices > 1 and not processes.is_one_of_several():
        raise typer.Exit(processes.start(arguments, devices))
    started = processes.on_this_machine() if processes.is_one_of_several() else None
    if devices > 1 and started not in (None, devices):
        raise medseg.ConfigError(
            f"--devices {devices}: torchrun or SLURM started {started} processes on this machine, expected {devices}; "
            "leave --devices out, or start as many"
        )
    processes.end_with_the_one_that_started_us()
    log(verbose)
    if processes.rank():
        silence()
    chosen: dict[str, Any] = {"precision": precision.value} if precision is not Precision.auto else {}
    chosen |= {"seed": seed} if seed is not None else {}
    chosen |= {"deterministic": True} if deterministic else {}
    options = medseg.TrainOptions(
        config=config,
        settings=settings_of(settings, {"train": chosen} if chosen else {}),
        fold=_fold(fold),
        folds=folds,
        device=device,
        resume=resume,
        pretrained=pretrained,
        devices=devices,
        command=shlex.join(["medseg", *arguments]) if arguments else None,
    )
    with shown_progress() as progress:
        run = medseg.train(dataset, output, time_budget=time_budget, epochs=epochs, options=options, progress=progress)
    if run.rank:
        return
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
    if run.pretrained is not None:
        out.print(escape(run.pretrained.summary()))
    out.print(f"{run.steps} steps; {spent}; {100 * run.waiting_share:.1f} % of the steps' time was waiting for data")
    if run.report is not None:
        print_report(run.report)
    finish(f"Model: {run.folder}", failed_cases(run.results, run.report))


def _fold(text: str) -> Any:
    if text != "all" and not text.isdecimal():
        raise medseg.ConfigError(f"--fold {text}: expected a number from 0 or all")
    return "all" if text == "all" else int(text)
