"""What a terminal, or a log in its place, is shown: progress, and tables that only the command line draws."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# without a terminal a line now and then says that work goes on
SECONDS_BETWEEN_LINES = 20.0
UNKNOWN_FIELD = "not known (whole patch at most)"

log = logging.getLogger(__name__)


class Screen(Console):
    """A console that falls silent where nothing more can be written (reader gone, disk full): the work goes on."""

    def print(self, *objects: Any, **named: Any) -> None:
        """As `Console.print`."""
        self._unless_broken(lambda: super(Screen, self).print(*objects, **named))

    def settle(self) -> None:
        """Write what is still held, before the process ends and would fail over it."""
        self._unless_broken(self.file.flush)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more; the library would end the process."""
        self._fall_silent()

    def _unless_broken(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._fall_silent()
            log.debug("nothing more is shown (%s)", error.strerror)

    def _fall_silent(self) -> None:
        self.quiet = True
        # what the file still holds goes there when the process ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


out = Screen(highlight=False, soft_wrap=True, emoji=False)
err = Screen(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def show_any_name() -> None:
    """What the terminal has no letters for is shown by its codes, as names of files that are no text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def shown_progress() -> Iterator[Any]:
    """A bar on a terminal, else a line now and then; nothing where all is to be silent."""
    if out.quiet:
        yield lambda *_, **__: None
        return
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        _Left(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: float, total: float, detail: str = "") -> None:
            text, count = escape(detail), _count(done, total)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, detail=text, count=count)
            bars.update(tasks[stage], completed=done, total=total, detail=text, count=count)

        yield show


class _Left(TimeRemainingColumn):
    """Time that is left, where the detail of a stage does not tell it."""

    def render(self, task: Task) -> Text:
        return Text() if task.fields["detail"].endswith(" left") else super().render(task)


def _count(done: float, total: float) -> str:
    """`12.4 of 40`."""
    return f"{done:.1f}".removesuffix(".0") + f" of {total:.0f}"


class _Lines:
    """Progress for a log: the first word of a stage after a while, then one line every twenty seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            err.print(f"{stage}: {_count(done, total)}{', ' if detail else ''}{escape(detail)}")


def print_network(report: Any) -> None:
    """The layers of a network as a table, and what they make together."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("kernel", "dilation", "effective", "stride", "output", "step", "field", "parameters", "multiply-adds"):
        table.add_column(name, justify="right")
    for layer in report.layers:
        field = _by(layer.receptive_field) if layer.field_is_exact else "?"
        if layer.sees_whole_image and layer.cumulative_stride is None:
            field = "all"
        step = "" if layer.cumulative_stride is None else _by(layer.cumulative_stride)
        kernel = f"{_by(layer.kernel)}{' max' if layer.kind == 'max pooling' else ''}"
        kernel += {"average pooling": " mean", "transposed convolution": " up", "depthwise convolution": " each"}.get(
            layer.kind, ""
        )
        table.add_row(
            layer.name,
            kernel,
            _by(layer.dilation),
            _by(layer.effective_kernel),
            _by(layer.stride),
            _by(layer.output_size),
            step,
            field,
            f"{layer.parameters:,}",
            f"{layer.multiply_adds:,}",
        )
    # a table that is cut to 80 columns cannot be read: lines may run on
    wide = Console(highlight=False, emoji=False, width=max(out.width, 132), soft_wrap=True)
    wide.print(table)
    for warning in report.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    out.print(f"{report.name}, {report.spatial_dims}D, patch {_by(report.patch)}", markup=False)
    out.print(f"parameters       {report.parameters:,}", markup=False)
    out.print(f"multiply-adds    {report.multiply_adds:,}", markup=False)
    out.print(f"output stride    {_by(report.output_strides)}", markup=False)
    whole = ", and the mean of the whole image" if report.sees_whole_image and report.field_is_exact else ""
    field = _by(report.receptive_field) if report.field_is_exact else f"{UNKNOWN_FIELD}, see the warnings"
    out.print(f"field of view    {field}{whole}", markup=False)
    coverage = (
        f"{report.coverage:.4g} of the field's box reach the output voxel" if report.field_is_exact else "not known"
    )
    out.print(f"coverage         {coverage}", markup=False)


def _by(numbers: Any) -> str:
    words = [f"{n:.4g}" if isinstance(n, float) else str(n) for n in numbers]
    return words[0] if len(set(words)) == 1 else "×".join(words)


def network_line(report: Any) -> str:
    """Name, parameters and field of view of a network."""
    field = _by(report.receptive_field) if report.field_is_exact else UNKNOWN_FIELD
    return f"{report.name}: {report.parameters:,} parameters, field of view {field}"
