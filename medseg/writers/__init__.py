"""Label maps and images become files that are whole or not there; DICOM objects have writers of their own."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError, GeometryError
from medseg.readers import Geometry, Image, is_picture, read_geometry, split_ending
from medseg.writers import image2d, nifti

__all__ = [
    "all_or_none",
    "atomic_path",
    "held_room",
    "ignores_case",
    "is_disk_full",
    "label_ending",
    "remove_stale_temporaries",
    "write_image",
    "write_label",
    "write_text",
]

log = logging.getLogger(__name__)

# of whole images, not masks
IMAGE_ENDINGS = (".nii.gz", ".nii")
# of a temporary file: machine, process, which of our imports in it, which file of those
_TEMPORARY = re.compile(r"\..*\.medseg-([0-9a-f]{8})-([0-9]+)-([0-9a-f]{8})[0-9a-f]{8}(\..*)?", re.DOTALL)
_THIS_IMPORT = uuid.uuid4().hex[:8]
# no file is written for so long without a change; only where a process cannot be asked whether it lives
STALE_AFTER_S = 3600.0
# of the block of `all_or_none` that this thread is in: whole files that wait for their names, by temporary name
_waiting: ContextVar[dict[Path, Path] | None] = ContextVar("_waiting", default=None)


def label_ending(source: Path) -> str:
    """The ending of the mask of `source`: `.png` for pictures, `.nii.gz` for all else."""
    return ".png" if is_picture(source) else ".nii.gz"


def write_label(
    path: Path,
    array: npt.NDArray[Any],
    like: Image | Geometry | Path,
    *,
    names: Mapping[int, str],
    inferred: bool = True,
) -> Path:
    """Writes `array`, integers (*grid.shape) of 0 to 65535, on the grid of `like`; gives back `path`.

    `path` ends in `.nii.gz`, `.nii` or `.png`. uint8, or uint16 where a value above 255 is named or there. `names` goes
    into the header as JSON: a NIfTI extension of code 6 (comment), a PNG text `labels`; so does, in NIfTI, that no
    model of ours made the labels (`inferred` False). The same input gives the same bytes. Raises `DataError` for a
    folder that cannot be written or values that do not fit, `GeometryError` for another shape.
    """
    # the axes of the array say whether a file (I, J, 1) is meant as a plane
    geometry = read_geometry(like, spatial_dims=array.ndim) if isinstance(like, Path) else like
    geometry = geometry.geometry if isinstance(geometry, Image) else geometry
    if array.shape != geometry.grid.shape:
        raise GeometryError(f"{path}: mask of shape {array.shape} found, expected {geometry.grid.shape} as its image")
    stored = _stored(path, array, names)
    ending = split_ending(path.name)[1]
    if ending not in (".nii.gz", ".nii", ".png"):
        raise DataError(f"{path}: masks are written as .nii.gz, .nii or .png; choose one of these")
    with atomic_path(path) as temporary:
        if ending == ".png":
            image2d.write(temporary, stored, names)
        else:
            nifti.write(temporary, stored, geometry, names, inferred=inferred)
    return path


def write_image(path: Path, image: Image) -> Path:
    """Writes `image` as NIfTI (`.nii.gz` or `.nii`) in its own type; several channels are a fourth axis.

    Gives back `path`. What the reader has said of it (`geometry.warnings`) goes into the header as JSON: an extension
    of code 6 (comment). The same input gives the same bytes. Raises `DataError` for another ending and a folder that
    cannot be written.
    """
    if split_ending(path.name)[1].lower() not in IMAGE_ENDINGS:
        raise DataError(f"{path}: images are written as {' or '.join(IMAGE_ENDINGS)}; choose one of these")
    with atomic_path(path) as temporary:
        nifti.write_image(temporary, image.array, image.geometry)
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same ending, hidden) that becomes `path` when the block ends without an error.

    In a block of `all_or_none` it does so when that one ends. The name tells machine and process, for
    `remove_stale_temporaries`. Makes the folder. Raises `DataError` where it cannot be written or is full; then nothing
    is left behind.
    """
    temporary, waiting = _temporary(path), _waiting.get()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        if waiting is None:
            temporary.replace(path)
        else:
            _refuse_place(path)
            waiting[temporary] = path
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        # a name is left over only if something went wrong above
        if not waiting or temporary not in waiting:
            _removed(temporary)


@contextmanager
def all_or_none() -> Iterator[None]:
    """What `atomic_path` writes in the block takes the place of what is there once all of it is whole.

    Where the block raises, what was there before stays as it was, and nothing is left behind. Raises `DataError` where
    a file cannot get its name; then what was there before is there again.
    """
    waiting: dict[Path, Path] = {}
    before = _waiting.set(waiting)
    try:
        yield
        _name_all(waiting)
    finally:
        _waiting.reset(before)
        for temporary in waiting:
            _removed(temporary)


def _name_all(waiting: Mapping[Path, Path]) -> None:
    """Give all their names, or none: also what interrupts it leaves what was there before."""
    # a single name is changed in one step, which needs no way back
    several = len(waiting) > 1
    old, named = dict[Path, Path](), list[Path]()
    path = Path()
    try:
        for path in waiting.values():
            if several and path.exists():
                old[path] = _temporary(path)
                _second_name(path, old[path])
        for temporary, path in waiting.items():
            if several:
                named.append(path)
            temporary.replace(path)
    except BaseException as error:
        _put_back(named, old)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    finally:
        for spare in old.values():
            _removed(spare)


def _put_back(named: Iterable[Path], old: Mapping[Path, Path]) -> None:
    for path in named:
        if path not in old:
            _removed(path)
            continue
        try:
            old[path].replace(path)
        except OSError as error:
            log.warning("%s: the earlier file cannot be put back (%s), the new one stays", path, error.strerror)


def _second_name(path: Path, other: Path) -> None:
    try:
        other.hardlink_to(path)
    except OSError as error:
        log.debug("%s: no second name (%s), so it is copied", path, error.strerror)
        # a disk without links may keep no rights and times either
        shutil.copyfile(path, other)


@contextmanager
def held_room(folder: Path, size: int) -> Iterator[None]:
    """Keeps `size` bytes of the disk from others until the block ends, for what must be written after it.

    A disk that has no such room is left as it is: the block is done all the same.
    """
    temporary = _temporary(folder / "room")
    try:
        try:
            # zeros would take no room on disks that compress
            temporary.write_bytes(os.urandom(size))
        except OSError as error:
            log.info("%s: no room for %d bytes (%s)", folder, size, error.strerror)
            _removed(temporary)
        yield
    finally:
        _removed(temporary)


def write_text(path: Path, text: str) -> Path:
    """Writes `text` as UTF-8, whole or not at all. Raises `DataError` where the folder cannot be written."""
    with atomic_path(path) as temporary:
        # a file name may hold bytes that are no text; they are shown as their codes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


def remove_stale_temporaries(folder: Path) -> list[str]:
    """Removes what killed processes left of `atomic_path` in `folder` (not below it), and gives the names.

    A file goes if its process was one of this machine and is gone, or if nobody has written to it for an hour. What
    another living process, here or elsewhere, is writing stays.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not _is_stale(path, match):
            continue
        if _removed(path):
            removed.append(path.name)
    return removed


def ignores_case(folder: Path) -> bool:
    """Whether the disk of `folder` takes small and capital letters in names for the same, as those of a Mac or Windows.

    False too where nothing can be written there: whoever writes next tells why.
    """
    probe = _temporary(folder / "name")
    try:
        probe.touch()
        return os.path.exists(probe.with_name(probe.name.upper()))
    except OSError as error:
        log.debug("%s: %s", folder, error)
        return False
    finally:
        _removed(probe)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that the disk or the quota on it is used up."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        found = found.__cause__
    return False


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path.parent}: cannot write {path.name} ({error.strerror or error}); "
        "free space, change the permissions, or choose another folder"
    )


def _refuse_place(path: Path) -> None:
    """Raises `OSError` where no file can become `path`: when it is renamed, others have their names already."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def _temporary(path: Path) -> Path:
    """A hidden name beside `path` that tells its writer."""
    stem, ending = split_ending(path.name)
    writer = f"medseg-{_machine()}-{os.getpid()}-{_THIS_IMPORT}{uuid.uuid4().hex[:8]}"
    # cut: with the writer, a long name would be longer than file systems allow
    return path.with_name(f".{stem[:40]}.{writer}{ending or path.suffix}")


def _removed(path: Path) -> bool:
    """Remove a file that nobody needs; one that cannot be removed (disk that can only be read) stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("%s stays (%s)", path, error.strerror)
        return False
    return True


def _is_stale(path: Path, match: re.Match[str]) -> bool:
    machine, process, writer = match[1], int(match[2]), match[3]
    if machine == _machine():
        if process == os.getpid():
            # an earlier process may have had our number
            return writer != _THIS_IMPORT
        if not _lives(process):
            return True
    try:
        return time.time() - path.stat().st_mtime > STALE_AFTER_S
    except FileNotFoundError:
        # its writer has just renamed it
        return False


def _lives(process: int) -> bool:
    # elsewhere signal 0 is a real one
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@cache
def _machine() -> str:
    """Eight hexadecimal digits: the same only for processes that see each other's numbers."""
    known = [platform.node()]
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    # containers may share a name, and each counts its processes from 1
    known += [boot.read_text().strip()] if os.access(boot, os.R_OK) else []
    known += [str(space.readlink())] if space.is_symlink() else []
    return hashlib.sha256("/".join(known).encode()).hexdigest()[:8]


def _stored(path: Path, array: npt.NDArray[Any], names: Mapping[int, str]) -> npt.NDArray[Any]:
    if array.dtype.kind not in "uib":
        raise DataError(f"{path}: mask of type {array.dtype} found, expected integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: mask values {low} to {high} found, expected 0 to 65535")
    return array.astype(np.uint16 if max([high, *names]) > 255 else np.uint8, copy=False)
