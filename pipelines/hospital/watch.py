"""A watched folder: DICOM files and zip archives that have stopped growing are taken in, then moved out of the way."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import sqlalchemy as sa

import medseg
from medseg_pipelines.hospital.intake import Intake, NoRoomError, RefusedError
from medseg_pipelines.hospital.jobs import digest
from medseg_pipelines.hospital.settings import WatchSettings
from medseg_pipelines.hospital.store import BLOCK, Store
from medseg_pipelines.hospital.threads import told

log = logging.getLogger(__name__)

TAKEN, REFUSED = "taken", "refused"
# what those who write files by and by call them until they are whole
UNFINISHED = (".part", ".tmp", ".crdownload", ".filepart")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
MARK, MARK_AT = b"DICM", 128


@dataclass(frozen=True)
class _State:
    """What a file is known by as long as nobody writes to it."""

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int


class Watcher:
    """Looks at a folder and all below it. A file is taken once it is as it was at the look before; links are not files.

    What was taken lies in `taken` then, all else in `refused`, at the place below the folder that it had. A process
    that is killed in between takes the file again, which changes nothing.
    """

    def __init__(self, settings: WatchSettings, intake: Intake, store: Store, *, most_bytes: int) -> None:
        self._folder, self._intake, self._store, self._most_bytes = settings.folder, intake, store, most_bytes
        self._sent_by = f"folder-{digest(str(settings.folder))[:8]}"
        self._before: dict[Path, _State] = {}
        self._left: dict[Path, _State] = {}
        self._unreadable: set[Path] = set()

    def look(self) -> int:
        """Takes what is to be taken; how many files of the folder that were. Raises `OSError`, `ConfigError`."""
        if self._folder.is_symlink() or not self._folder.is_dir():
            raise medseg.ConfigError(
                f"watch: {self._folder}: no folder found (a link is none); make it, or change `folder`"
            )
        now = dict(self._files())
        stable = [path for path, state in now.items() if self._before.get(path) == state]
        self._before = now
        self._left = {path: state for path, state in self._left.items() if now.get(path) == state}
        self._unreadable &= now.keys()
        done = 0
        for path in sorted(stable):
            if path in self._left:
                continue
            try:
                place = TAKEN if self._taken(path, now[path]) else REFUSED
            except NoRoomError as error:
                log.warning("watch: nothing is taken: %s", error)
                break
            except _ChangedError:
                continue
            except _UnreadableError as error:
                if path not in self._unreadable:
                    log.error("watch: a file cannot be read (%s); it is tried again, after the others", error)
                self._unreadable.add(path)
                continue
            except PermissionError as error:
                log.error("watch: a file may not be read (%s); give this process the right to", error.strerror)
                self._left[path] = now[path]
                continue
            except (OSError, sa.exc.SQLAlchemyError, medseg.ConfigError):
                # no fault of a file
                raise
            except Exception as error:  # noqa: BLE001
                # one file that nothing here is prepared for must not keep out all others, again at each start
                self._refused(None, f"a file that cannot be looked at: {told(error)}")
                place = REFUSED
            self._move(path, place, now[path])
            done += 1
        return done

    def _files(self) -> Iterator[tuple[Path, _State]]:
        for folder, folders, files, handle in os.fwalk(self._folder, follow_symlinks=False):
            here = Path(folder)
            folders[:] = [n for n in folders if not n.startswith(".") and not (here == self._folder and _is_ours(n))]
            for name in files:
                if name.startswith(".") or name.lower().endswith(UNFINISHED):
                    continue
                try:
                    found = os.stat(name, dir_fd=handle, follow_symlinks=False)
                except FileNotFoundError:
                    # renamed by who writes it
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield here / name, _state(found)

    def _taken(self, path: Path, state: _State) -> bool:
        """Whether all of a file was taken in. Raises `NoRoomError`, `_ChangedError`."""
        self._intake.check_room(state.size)
        if path.name.upper() == "DICOMDIR":
            # lists the files beside it
            return True
        if state.size > self._most_bytes and path.suffix.lower() != ".zip":
            return self._refused(None, f"{state.size} bytes found, expected at most {self._most_bytes}")
        with self._store.new_file() as copy:
            _copy(path, copy, state)
            if path.suffix.lower() == ".zip":
                # its ending tells that it is one
                archive = copy.with_suffix(".zip")
                try:
                    copy.rename(archive)
                    return self._archive_taken(archive)
                finally:
                    archive.unlink(missing_ok=True)
            return self._file_taken(copy)

    def _archive_taken(self, archive: Path) -> bool:
        if not medseg.is_archive(archive):
            return self._refused(None, "no zip archive found, expected one; make it again")
        taken, refused = 0, 0
        try:
            for member in medseg.each_unpacked(archive, self._store.new_file, most_bytes=self._most_bytes):
                if member.path is None:
                    refused += not self._refused(None, f"a member of an archive: {member.reason}")
                elif _is_dicom(member.path) and member.name.upper() != "DICOMDIR":
                    self._intake.check_room()
                    is_taken = self._file_taken(member.path)
                    taken, refused = taken + is_taken, refused + (not is_taken)
        except medseg.DataError as error:
            return self._refused(None, str(error).removeprefix(f"{archive}: "))
        if not taken and not refused:
            return self._refused(None, "no DICOM file found in an archive, expected some")
        return not refused

    def _file_taken(self, copy: Path) -> bool:
        try:
            self._intake.take(copy, sent_by=self._sent_by)
        except RefusedError:
            return False
        return True

    def _refused(self, path: Path | None, reason: str) -> bool:
        self._intake.refuse(path, sent_by=self._sent_by, reason=reason)
        return False

    def _move(self, path: Path, place: str, state: _State) -> None:
        """Out of the way; where that fails, it is left, and not taken again as long as nobody writes to it."""
        below = path.relative_to(self._folder)
        try:
            with ExitStack() as opened:
                source = _folder(opened, self._folder, below.parent.parts)
                target = _folder(opened, self._folder, (place, *below.parent.parts), make=True)
                if _state(os.stat(path.name, dir_fd=source, follow_symlinks=False)) == state:
                    os.rename(path.name, _free_name(target, below), src_dir_fd=source, dst_dir_fd=target)
        except FileNotFoundError:
            # whoever wrote it has taken it away
            return
        except OSError as error:
            # names of files can be a patient's
            log.error("watch: a file that was dealt with cannot be moved to `%s` (%s)", place, error.strerror)
            self._left[path] = state


class _ChangedError(Exception):
    """A file that is no longer the one that was looked at."""


class _UnreadableError(Exception):
    """A file on a disk that does not give it; the text says why."""


def _copy(path: Path, copy: Path, state: _State) -> None:
    """Raises `_ChangedError` where the file is written to, replaced or gone meanwhile, and `_UnreadableError`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise _ChangedError from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _ChangedError from error
        if isinstance(error, PermissionError):
            raise
        raise _UnreadableError(error.strerror) from error
    with os.fdopen(handle, "rb") as source, copy.open("wb") as target:
        if _state(os.fstat(handle)) != state:
            raise _ChangedError
        while block := _read(source):
            target.write(block)
            if target.tell() > state.size:
                raise _ChangedError
        if _state(os.fstat(handle)) != state or target.tell() != state.size:
            raise _ChangedError


def _read(source: BinaryIO) -> bytes:
    try:
        return source.read(BLOCK)
    except OSError as error:
        raise _UnreadableError(error.strerror) from error


def _state(found: os.stat_result) -> _State:
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _is_ours(name: str) -> bool:
    return name in (TAKEN, REFUSED)


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(MARK_AT + len(MARK))[MARK_AT:] == MARK


def _folder(opened: ExitStack, root: Path, below: tuple[str, ...], *, make: bool = False) -> int:
    """A folder below `root`, reached by no link: whoever may write there could lead a file anywhere by one."""
    handle = os.open(root, _FOLDER)
    opened.callback(os.close, handle)
    for name in below:
        if make:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=handle)
        handle = os.open(name, _FOLDER, dir_fd=handle)
        opened.callback(os.close, handle)
    return handle


def _free_name(folder: int, file: Path) -> str:
    names = (file.name, *(f"{file.stem}-{number}{file.suffix}" for number in range(2, 10_000)))
    for name in names:
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return name
    raise FileExistsError(errno.EEXIST, "too many of one name are there")
