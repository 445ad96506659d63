"""How a command of many trainings ends where it breaks off: its last words and its exit code; nothing is done here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape

import medseg
from medseg.terminal import err

log = logging.getLogger("medseg.endings")

SOME_FAILED, USAGE = 1, 2


@contextmanager
def work() -> Iterator[None]:
    """What is refused in the block is no wrong usage any more: it raises `TrainingError`, since something was done."""
    try:
        yield
    except medseg.TrainingError:
        raise
    except medseg.MedsegError as error:
        raise medseg.TrainingError(f"{error}; what is finished stays, and the same command goes on") from error


def tell(error: medseg.MedsegError | OSError) -> int:
    """Says in one message why nothing goes on, with a traceback for -v; the exit code: 2 where nothing was done."""
    log.debug("traceback", exc_info=True)
    if isinstance(error, OSError):
        # a disk that is full, away or not to be written; what is whole is gone on from
        where = error.filename if error.filename is not None else "a file"
        err.print(f"[red]error:[/red] {escape(f'{where}: {error.strerror or error}')}; see to it and go on")
        return SOME_FAILED
    err.print(f"[red]error:[/red] {escape(str(error))}")
    return SOME_FAILED if isinstance(error, medseg.TrainingError) else USAGE
