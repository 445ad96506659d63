"""The exceptions medseg raises for mistakes and bad input, as a tree; nothing else lives here."""

from __future__ import annotations

from collections.abc import Sequence


class MedsegError(Exception):
    """Everything medseg refuses on purpose: the message says what was found, what was expected, what to do."""


class ConfigError(MedsegError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(MedsegError):
    """A file or a data set cannot be used as it is."""


class CasesError(DataError):
    """No case of several could be done; `failed` has a line for each."""

    def __init__(self, message: str, failed: Sequence[str]) -> None:
        super().__init__(message)
        self.failed = tuple(failed)


class GeometryError(DataError):
    """Two grids that must agree do not, or a grid is impossible."""


class ModelError(MedsegError):
    """A model folder is incomplete, damaged, or does not fit what it is used for."""


class TrainingError(MedsegError):
    """Training broke down: the loss became NaN, memory ran out, a state cannot be resumed."""


class PeerError(TrainingError):
    """Another process of the same training ended; what went wrong is told there."""
