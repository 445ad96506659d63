"""Zip archives of DICOM files, read in place, or unpacked one member at a time: no name in them is ever a path."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medseg.errors import DataError

# what all members may unpack to: a CT of 4000 slices; and one member: an enhanced multi-frame file of as much
MOST_BYTES = 8 * 2**30
MOST_MEMBER_BYTES = 4 * 2**30
MOST_MEMBERS = 100_000
# of the list of members, which is read as a whole, and takes ten times as much in memory: 160 bytes each
MOST_LIST_BYTES = 2**24
# deflate shrinks scans 2 to 4 times and empty ones 1000 times; more than this is no scan once it is large
MOST_EXPANSION = 200
SMALL_BYTES = 2**28
_BLOCK = 2**20


@dataclass(frozen=True)
class Member:
    """A member of an archive: where it was unpacked to, or None and why not. `name`: the last part, for a look."""

    name: str
    path: Path | None
    reason: str = ""


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip archive, by its ending and its first bytes."""
    if path.suffix.lower() != ".zip" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


class Archive:
    """An open zip archive whose members are known by their number; encrypted ones and folders are none."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self._path, self._file = path, file
        self._infos = file.infolist()
        self._check()

    def members(self) -> Iterator[tuple[int, str]]:
        """Number and last part of the name of every file in it; the name is only for a look at its ending."""
        for number, info in enumerate(self._infos):
            # one without a name is none, and zipfile looks for its last letter
            if info.filename and not info.is_dir():
                yield number, info.filename.replace("\\", "/").rsplit("/", 1)[-1]

    def read(self, number: int) -> BinaryIO:
        """The content of a member in memory: never more than its declared size. Raises `DataError`."""
        content = io.BytesIO()
        self._copy(number, content, self._infos[number].file_size + 1)
        content.seek(0)
        return content

    def unpack(self, number: int, target: Path) -> None:
        """Writes a member to `target`: never more than its declared size. Raises `DataError`, `OSError`."""
        with target.open("wb") as file:
            self._copy(number, file, _BLOCK)

    def size(self, number: int) -> int:
        """What a member says it unpacks to."""
        return self._infos[number].file_size

    def _copy(self, number: int, target: BinaryIO, block: int) -> None:
        declared = self._infos[number].file_size
        copied = sum(target.write(part) for part in self._blocks(number, block))
        if copied != declared:
            raise DataError(
                f"{self._path}: member {number + 1} unpacks to {copied} bytes, expected {declared}; "
                "make the archive again"
            )

    def _blocks(self, number: int, block: int) -> Iterator[bytes]:
        """A member piece by piece; one byte more than declared shows that there would be more."""
        info = self._infos[number]
        if info.flag_bits & 1:
            raise DataError(f"{self._path}: encrypted members found, expected none; unpack it first")
        left = info.file_size + 1
        try:
            with self._file.open(info) as member:
                while left and (part := member.read(min(block, left))):
                    left -= len(part)
                    yield part
        except Exception as error:
            # zipfile and its unpackers have no common class; their words would show the name of the member
            raise DataError(
                f"{self._path}: member {number + 1} is damaged ({type(error).__name__}); make the archive again"
            ) from error

    def _check(self) -> None:
        if len(self._infos) > MOST_MEMBERS:
            raise DataError(
                f"{self._path}: {len(self._infos)} members found, expected at most {MOST_MEMBERS}; split it"
            )
        total = sum(i.file_size for i in self._infos)
        largest = max((i.file_size for i in self._infos), default=0)
        if total > MOST_BYTES or largest > MOST_MEMBER_BYTES:
            raise DataError(
                f"{self._path}: it would unpack to {total / 2**30:.1f} GiB (largest member {largest / 2**30:.1f} GiB), "
                f"expected at most {MOST_BYTES // 2**30} and {MOST_MEMBER_BYTES // 2**30} GiB; split it"
            )
        # the members share the bytes of the file: so a bomb whose members overlap is found too
        if total > SMALL_BYTES and total > MOST_EXPANSION * self._path.stat().st_size:
            raise DataError(
                f"{self._path}: {self._path.stat().st_size} bytes would unpack to {total}, expected at most "
                f"{MOST_EXPANSION} times as many; give the series as a folder if you trust it"
            )


class _Bounded(io.BufferedReader):
    """A file of which no more than `MOST_LIST_BYTES` are read at once, as long as it `is_bounded`."""

    is_bounded = True

    def read(self, size: int | None = -1, /) -> bytes:
        """As of every file. Raises `BadZipFile`."""
        if self.is_bounded and (size or 0) > MOST_LIST_BYTES:
            raise zipfile.BadZipFile(f"a list of members of {size} bytes found, expected at most {MOST_LIST_BYTES}")
        return super().read(size)


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """The archive at `path`, checked before anything is unpacked. Raises `DataError`."""
    with ExitStack() as opened:
        try:
            content = opened.enter_context(_Bounded(io.FileIO(path)))
            file = opened.enter_context(zipfile.ZipFile(content))
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise DataError(f"{path}: not a readable zip archive ({error}); make it again") from error
        content.is_bounded = False
        yield Archive(path, file)


def each_unpacked(
    path: Path, new_file: Callable[[], AbstractContextManager[Path]], *, most_bytes: int
) -> Iterator[Member]:
    """Every member of the archive at `path` but hidden ones, each unpacked to a file of `new_file` until the next one.

    One that is damaged, encrypted or larger than `most_bytes` comes with the reason. Raises `DataError` for an archive
    that cannot be read or would unpack to too much.
    """
    with open_archive(path) as archive:
        for number, name in archive.members():
            if name.startswith("."):
                continue
            if archive.size(number) > most_bytes:
                found = f"{archive.size(number)} bytes found, expected at most {most_bytes}; send it alone"
                yield Member(name, None, found)
                continue
            with new_file() as unpacked:
                try:
                    archive.unpack(number, unpacked)
                except DataError as error:
                    yield Member(name, None, str(error).removeprefix(f"{path}: "))
                    continue
                yield Member(name, unpacked)
