"""Probabilities of a case on the grid of its file: kept as blocks while they are made, then written channel by channel.

A file holds one channel after the other, but they are made side by side, a block of the volume at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from medseg.errors import DataError, GeometryError
from medseg.readers import Geometry, read_geometry
from medseg.readers.probabilities import STEPS, Channels
from medseg.writers import atomic_path, nifti

__all__ = ["ProbabilityStore", "probabilities_path", "write_probabilities", "write_regions"]

# along the last axis, voxels that are put together at a time, of one channel
PLANES = 48
_Steps = npt.NDArray[np.uint16]
_Box = tuple[slice, ...]


def probabilities_path(folder: Path, case: str) -> Path:
    """Where the probabilities of a case are, beside its mask in `folder`."""
    return folder / "probabilities" / f"{case}.nii.gz"


class ProbabilityStore:
    """Probabilities (C, *shape) in steps of 1/65535, packed into a temporary file without a name in `folder`.

    What is not added is 0, of labels background (the first channel) is 1. The file goes with the process, however it
    ends. Raises `DataError` where `folder` cannot be written, later `OSError` where the disk is full.
    """

    def __init__(self, folder: Path, shape: Sequence[int], channels: Channels) -> None:
        self.shape, self.channels = tuple(shape), channels
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be written ({error.strerror}); free space, change the permissions, or choose "
                "another folder"
            ) from error
        self._blocks: list[list[tuple[_Box, int, int]]] = [[] for _ in channels.names]
        self._end = 0

    def add(self, channel: int, box: _Box, steps: _Steps) -> None:
        """Keep the `steps` of a channel in `box`; what is added later counts."""
        # the first axis fastest, as in the file
        packed = isal_zlib.compress(np.asfortranarray(steps).T, 1)
        self._file.seek(self._end)
        self._file.write(packed)
        self._blocks[channel].append((box, self._end, len(packed)))
        self._end += len(packed)

    def planes(self, channel: int, start: int, stop: int) -> _Steps:
        """The steps of a channel from `start` to `stop` along the last axis, the first axis fastest in memory."""
        whole = np.full(
            (*self.shape[:-1], stop - start), 0 if channel or self.channels.regions else STEPS, np.uint16, order="F"
        )
        for box, place, size in self._blocks[channel]:
            last = box[-1]
            first, end = max(start, last.start), min(stop, last.stop)
            if first >= end:
                continue
            self._file.seek(place)
            stored = np.frombuffer(isal_zlib.decompress(self._file.read(size)), np.uint16)
            block = stored.reshape([s.stop - s.start for s in box], order="F")
            whole[(*box[:-1], slice(first - start, end - start))] = block[..., first - last.start : end - last.start]
        return whole

    def close(self) -> None:
        """Give the room of the blocks back."""
        self._file.close()

    def __enter__(self) -> ProbabilityStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_probabilities(path: Path, store: ProbabilityStore, like: Geometry | Path) -> Path:
    """Writes what `store` holds as NIfTI (I, J, K, C) on the grid of `like`; gives back `path`.

    uint16 with a scale of 1/65535: half the size of float32. A value is off by half a step, and by one more where two
    labels became equal and the mask has the later one: far below what calibration can tell. Planes are (I, J, 1, C),
    those of pictures (rows, columns, 1, C). Names and values of the channels are in the header as JSON: an extension of
    code 6 (comment). Raises `DataError` for a folder that cannot be written, `GeometryError` for another shape.
    """
    return _write(path, store, like, 1 / STEPS)


def write_regions(path: Path, store: ProbabilityStore, like: Geometry | Path) -> Path:
    """Writes the regions of `store` as NIfTI (I, J, K, C), 1 where a region is and 0 elsewhere; gives back `path`.

    Each is whole here, where a label map shows of one only what no later one covers. Shapes, header and errors as those
    of `write_probabilities`.
    """
    return _write(path, store, like, None)


def _write(path: Path, store: ProbabilityStore, like: Geometry | Path, slope: float | None) -> Path:
    """Steps with their `slope`, or without one whether they are above one half."""
    geometry = read_geometry(like, spatial_dims=len(store.shape)) if isinstance(like, Path) else like
    if store.shape != geometry.grid.shape:
        raise GeometryError(
            f"{path}: probabilities of shape {store.shape} found, expected {geometry.grid.shape} as its image"
        )
    planes = _all_planes(store)
    if slope is None:
        # one half is rounded down when it becomes steps: what is above it stays above
        planes = ((some > STEPS // 2).astype(np.uint8) for some in planes)
    with atomic_path(path) as temporary:
        nifti.write_channels(
            temporary, planes, geometry, store.channels.as_json(), len(store.channels.names), slope=slope
        )
    return path


def _all_planes(store: ProbabilityStore) -> Iterator[npt.NDArray[Any]]:
    size = store.shape[-1]
    # planes of one channel up to some MB, whatever their size
    step = max(1, min(PLANES, (1 << 24) // max(1, math.prod(store.shape[:-1]))))
    for channel in range(len(store.channels.names)):
        for start in range(0, size, step):
            yield store.planes(channel, start, min(size, start + step))
