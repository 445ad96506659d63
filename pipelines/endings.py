"""How a command of many trainings ends where it breaks off: its last words and its exit code; nothing is done here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.markup import escape

import medseg
from medseg.terminal import err

log = logging.getLogger("medseg.endings")

SOME_FAILED, USAGE = 1, 2


@dataclass
class Work:
    """What came of the trainings of a command so far: `trained` once one of them has ended, well or not."""

    trained: bool = False


@contextmanager
def work() -> Iterator[Work]:
    """What breaks off in the block is no wrong usage any more: it raises `TrainingError`, since something was done.

    But for a `ConfigError` before anything was `trained`, which passes.
    """
    so_far = Work()
    try:
        yield so_far
    except medseg.TrainingError:
        raise
    except (medseg.DataError, OSError) as error:
        # a disk that is full, away or not to be written; what is whole is gone on from
        raise medseg.TrainingError(f"{_told(error)}; what is finished stays, and the same command goes on") from error
    except medseg.MedsegError as error:
        if isinstance(error, medseg.ConfigError) and not so_far.trained:
            raise
        raise medseg.TrainingError(str(error)) from error


def tell(error: medseg.MedsegError | OSError) -> int:
    """Says in one message why nothing goes on, with a traceback for -v; the exit code: 2 where nothing was done."""
    log.debug("traceback", exc_info=True)
    advice = "; see to it and try again" if isinstance(error, OSError) else ""
    err.print(f"[red]error:[/red] {escape(_told(error))}{advice}")
    return SOME_FAILED if isinstance(error, medseg.TrainingError) else USAGE


def _told(error: medseg.MedsegError | OSError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = error.filename if error.filename is not None else "a file"
    return f"{where}: {error.strerror or error}"
