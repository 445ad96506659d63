"""The log of a run folder, which one training at a time writes; how it is shown is in terminal.py."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from medseg.errors import ConfigError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


@contextmanager
def log_file(folder: Path) -> Iterator[None]:
    """Everything that is logged also goes into log.txt, which one training at a time holds.

    So does where the process was when a fault ended it. Raises `ConfigError` where the folder cannot be written, or
    another training is writing into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another -o") from error
    if handler.stream is not None and _is_held_by_another(handler.stream):
        handler.close()
        raise ConfigError(f"{folder}: another training is writing into it; wait for its end, or choose another -o")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("medseg")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        with faults_told(handler.stream or sys.stderr):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextmanager
def faults_told(file: TextIO) -> Iterator[None]:
    """A fault that ends the process, of the memory or of a file that is mapped, leaves in `file` where it happened.

    Unless that is told elsewhere already.
    """
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(file)
    try:
        yield
    finally:
        faulthandler.disable()


class _LogFile(logging.FileHandler):
    """A log that falls silent where nothing more can be written (disk full): what is wrong is told elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the library's name
        """What is left to write goes nowhere, so that closing the file does not fail over it."""
        if self.stream is None or not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def _is_held_by_another(file: TextIO) -> bool:
    """Whether another process holds the file; else this one does, until it is closed or the process ends."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError as error:
        # some network file systems have no locks
        log.debug("%s cannot be held (%s)", file.name, error.strerror)
    return False
