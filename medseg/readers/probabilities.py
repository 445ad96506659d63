"""Saved probabilities: those of `medseg infer --save-probabilities` and of nnU-Net, one channel at a time."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, MedsegError
from medseg.readers import Geometry, nifti

__all__ = ["ENDINGS", "STEPS", "Channels", "Probabilities", "read_probabilities"]

ENDINGS = (*nifti.ENDINGS, ".npz")
# a probability is written as a whole number of these steps
STEPS = 65535
# probabilities rounded to sixteen bits leave the range by less
RANGE_TOLERANCE = 1e-3
# the array in nnU-Net's file of a case
_NNUNET_KEY = "probabilities"


@dataclass(frozen=True)
class Channels:
    """What the channels stand for. `values`: of labels one value each, background (0) first; of `regions`, which may
    overlap, all values of each."""

    names: tuple[str, ...]
    values: tuple[int | tuple[int, ...], ...]
    regions: bool = False

    def as_json(self) -> str:
        """The comment in the header of a file."""
        channels = [{"name": n, "values": v if isinstance(v, tuple) else [v]} for n, v in zip(self.names, self.values)]
        return json.dumps({"probabilities": channels, "regions": self.regions}, ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Probabilities:
    """A file of probabilities, (C, *S) by `shape`. To iterate opens it and gives channel after channel (*S) float32.

    `geometry`: where the voxels are; None where the file does not say (nnU-Net). `channels`: None where the file does
    not say: then values are 0, 1, … in order. Iterating raises `DataError` for a damaged file and for numbers that are
    no probabilities.
    """

    path: Path
    shape: tuple[int, ...]
    geometry: Geometry | None = None
    channels: Channels | None = None
    picture: bool = False

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names of the channels."""
        return None if self.channels is None else self.channels.names

    @property
    def values(self) -> tuple[int | tuple[int, ...], ...] | None:
        """What each channel stands for in a label map."""
        return None if self.channels is None else self.channels.values

    @property
    def regions(self) -> bool:
        """Whether channels may overlap, each a yes or no of its own; False where the file does not say."""
        return self.channels is not None and self.channels.regions

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        channels = _npz_channels if self.path.name.lower().endswith(".npz") else _nifti_channels
        for number, channel in enumerate(channels(self), start=1):
            low, high = float(channel.min()), float(channel.max())
            # NaN is neither
            if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
                raise DataError(
                    f"{self.path}: numbers from {low:g} to {high:g} found in channel {number}, expected probabilities "
                    "from 0 to 1; save them after softmax or sigmoid"
                )
            yield channel


def read_probabilities(path: Path, *, spatial_dims: int | None = None, picture: bool = False) -> Probabilities:
    """What is in `path`, from its header alone: `.nii.gz` or `.nii` (I, J, K, C), or nnU-Net's `.npz` (C, K, J, I).

    `spatial_dims`: axes of the label map to compare with; of 2 the axis of length 1 is dropped. `picture`: the `.npz`
    is of a PNG or the like, whose rows nnU-Net does not turn. Raises `DataError` or `GeometryError` naming the file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path, or save probabilities with --save-probabilities")
    if path.name.lower().endswith(".npz"):
        return _read_npz(path, spatial_dims, picture)
    if path.name.lower().endswith(nifti.ENDINGS):
        return _read_nifti(path, spatial_dims)
    raise DataError(f"{path}: ending not known, expected probabilities as {', '.join(ENDINGS)}")


def _read_nifti(path: Path, spatial_dims: int | None) -> Probabilities:
    geometry = nifti.read_geometry(path, spatial_dims=spatial_dims)
    with nifti._open(path) as file:
        header = nifti._read_header(path, file)
        comment = next(nifti.comments(file, int(header.get_data_offset())), b"")
    shape = tuple(int(s) for s in header.get_data_shape())
    if len(shape) < 4 or any(s != 1 for s in shape[4:]):
        raise DataError(
            f"{path}: shape {shape} found, expected probabilities (I, J, K, channels); give the folder `probabilities` "
            "that `medseg infer --save-probabilities` writes, not the masks"
        )
    _scale(path, header)
    channels = _channels(comment)
    if channels is not None and len(channels.names) != shape[3]:
        raise DataError(f"{path}: {shape[3]} channels found, expected {len(channels.names)} as its header names them")
    return Probabilities(path, (shape[3], *geometry.grid.shape), geometry, channels)


def _nifti_channels(found: Probabilities) -> Iterator[npt.NDArray[np.float32]]:
    with nifti._open(found.path) as file:
        header = nifti._read_header(found.path, file)
        dtype = header.get_data_dtype()
        slope, inter = _scale(found.path, header)
        nifti._skip(file, int(header.get_data_offset()) - file.tell())
        for number in range(found.shape[0]):
            stored = _next(found, file, dtype, number).reshape(found.shape[1:], order="F")
            channel = stored.astype(np.float32)
            if (slope, inter) != (1, 0):
                channel *= np.float32(slope)
                channel += np.float32(inter)
            yield channel


def _scale(path: Path, header: Any) -> tuple[float, float]:
    dtype = header.get_data_dtype()
    slope, inter = header.get_slope_inter()
    if dtype.kind not in "uif" or (dtype.kind != "f" and slope in (None, 1)):
        raise DataError(
            f"{path}: voxels of type {dtype} without a scale factor found, expected probabilities from 0 to 1; "
            "write them as real numbers, or set scl_slope"
        )
    return (1.0, 0.0) if slope is None else (float(slope), float(inter))


def _channels(comment: bytes) -> Channels | None:
    """What the header says of the channels; None for a comment of somebody else."""
    try:
        told = json.loads(comment.decode())
        listed, regions = told["probabilities"], bool(told["regions"])
        names = tuple(str(c["name"]) for c in listed)
        values = [tuple(int(v) for v in c["values"]) for c in listed]
        return Channels(names, tuple(v if regions else v[0] for v in values), regions)
    except (ValueError, TypeError, KeyError, IndexError):
        return None


def _read_npz(path: Path, spatial_dims: int | None, picture: bool) -> Probabilities:
    with _NpzFile(path) as file:
        stored, _ = _npy_header(path, file)
    if len(stored) != 4:
        raise DataError(f"{path}: array of shape {stored} found, expected (channels, z, y, x) as nnU-Net writes it")
    space: tuple[int, ...] = stored[1:] if picture else stored[:0:-1]
    # of a picture (1, rows, columns) the first axis is the one too many, else the last
    flat = space[:1] if picture else space[2:]
    if spatial_dims == 2 or picture:
        if flat != (1,):
            raise DataError(f"{path}: array of shape {stored} found, expected one plane; use the probabilities in 2D")
        space = space[1:] if picture else space[:2]
    return Probabilities(path, (stored[0], *space), picture=picture)


def _npz_channels(found: Probabilities) -> Iterator[npt.NDArray[np.float32]]:
    with _NpzFile(found.path) as file:
        _, dtype = _npy_header(found.path, file)
        for number in range(found.shape[0]):
            stored = _next(found, file, dtype, number)
            # z, y, x: the last axis of ours is the first of nnU-Net's, but for pictures
            channel = stored.reshape(found.shape[1:], order="C" if found.picture else "F")
            yield channel.astype(np.float32)


class _NpzFile:
    """The array of probabilities in an nnU-Net file, unpacked as it is read; nothing of it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> IO[bytes]:
        try:
            self._archive = zipfile.ZipFile(self._path)
            self._file = self._archive.open(f"{_NNUNET_KEY}.npy")
        except KeyError as error:
            there = ", ".join(n.removesuffix(".npy") for n in self._archive.namelist()) or "nothing"
            self._archive.close()
            raise DataError(
                f"{self._path}: {there} found, expected the array `{_NNUNET_KEY}`; run nnU-Net with "
                "--save_probabilities"
            ) from error
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._path}: cannot be read ({error}); copy the file again") from error
        return self._file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        self._archive.close()
        if isinstance(error, Exception) and not isinstance(error, MedsegError):
            raise DataError(f"{self._path}: damaged ({error}); copy the file again") from error


def _npy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind != "f" or fortran:
        raise DataError(f"{path}: array of type {dtype} found, expected real numbers in the order of C")
    return tuple(int(s) for s in shape), dtype


def _next(found: Probabilities, file: Any, dtype: np.dtype[Any], number: int) -> npt.NDArray[Any]:
    """The voxels of the next channel, in the order of the file."""
    wanted = math.prod(found.shape[1:]) * dtype.itemsize
    parts, missing = [], wanted
    while missing and (part := file.read(min(missing, 1 << 24))):
        parts.append(part)
        missing -= len(part)
    if missing:
        raise DataError(
            f"{found.path}: {wanted - missing} of {wanted} bytes of channel {number + 1} found: cut off; copy it again"
        )
    return np.frombuffer(b"".join(parts), dtype)
