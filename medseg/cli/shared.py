"""What the verbs share: exit codes, common options, and how a command ends; no verb."""

from __future__ import annotations

import logging
import re
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape

import medseg
from medseg.terminal import err, out

OK, SOME_FAILED, USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def _named_device(name: str) -> str:
    """Refuses what names no device, where none is looked for."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise typer.BadParameter(f"{name!r} found, expected auto, cpu, cuda or cuda:N")
    return name


AnyDevice = Annotated[
    str,
    typer.Option(callback=_named_device, help="As for the other verbs; this one needs no GPU and works on the CPU."),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more, and show tracebacks.")]
DatasetArg = Annotated[
    Path, typer.Argument(metavar="DATASET", help="nnU-Net or Decathlon folder, images/ + labels/, or a CSV/JSON list.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; repeatable.")
]

SeriesUid = Annotated[
    str | None,
    typer.Option(metavar="UID", help="DICOM: which series, where there are several; `medseg check` lists them."),
]
ResampleTilt = Annotated[
    bool, typer.Option("--resample-tilt", help="DICOM: shift the planes of a tilted gantry onto an upright grid.")
]
ResampleGaps = Annotated[
    bool, typer.Option("--resample-gaps", help="DICOM: interpolate missing planes and unequal distances linearly.")
]


class Precision(str, Enum):
    """Number formats of `--precision`."""

    auto = "auto"
    full = "32"
    bf16 = "bf16"


def new_app(name: str, **more: Any) -> typer.Typer:
    """A command line of medseg; tracebacks and completion are not its business."""
    return typer.Typer(
        name=name,
        add_completion=False,
        pretty_exceptions_enable=False,
        # plain help: the framed one cuts off names of options at 80 columns
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        **more,
    )


def log(verbose: bool) -> None:
    """What the work logs goes to the terminal: warnings, or all of it."""
    logger = logging.getLogger("medseg")
    logger.handlers.clear()
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    handler = RichHandler(console=err, show_time=False, show_path=verbose, markup=False)
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.addHandler(handler)


def silence() -> None:
    """Of several processes that work together only the first one speaks; of the others, errors alone are shown."""
    out.quiet = True
    warnings.simplefilter("ignore")
    for handler in logging.getLogger("medseg").handlers:
        handler.setLevel(logging.ERROR)


def print_report(report: Any) -> None:
    """The table of a report."""
    out.print(report.text_table(), markup=False)


def failed_cases(results: Any = (), report: Any = None) -> list[str]:
    """One line for each case that was not done, with the reason."""
    lines = [f"{r.case}: {r.reason}" for r in results if r.status in ("failed", "not_done")]
    if report is not None:
        lines += [f"{f.case}: {f.reason}" for f in report.failures]
    return lines


def finish(line: str, failed: list[str] | None = None, bad: bool = False) -> None:
    """The last lines of a command. Exits with 1 where cases failed, or where the outcome is `bad` otherwise."""
    out.print(escape(line))
    for reason in failed or []:
        err.print(f"[red]failed:[/red] {escape(reason)}")
    if failed or bad:
        raise typer.Exit(SOME_FAILED)


def settings_of(assignments: list[str] | None, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings of `--set`, and those that other options stand for."""
    return medseg.settings_from(assignments or [], more or {})
