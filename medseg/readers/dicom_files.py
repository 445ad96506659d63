"""DICOM files under a folder, in a zip archive, or alone: found by content, their headers read, never their pixels.

What they make up is in series.py.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from medseg.errors import DataError
from medseg.readers.archive import Archive, is_archive, open_archive

if TYPE_CHECKING:
    from pydicom import Dataset

# DICOM PS3.10: 128 bytes of anything, then this
MARK, MARK_AT = b"DICM", 128
ENDINGS = (".dcm", ".ima", ".dicom")
# deflated as a whole: a file of 1 MB may inflate to 1 GB before a single element is read
DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205")
# the transfer syntax stands within a few hundred bytes of the beginning; a file that hides it farther back is refused
_HEAD_BYTES = 4096
# of an element that cannot be understood: whatever pydicom stumbles over
UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OverflowError, OSError, EOFError),
    *(struct.error, RecursionError),
)
# of this thread: what others do with pydicom is not ours
_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)
_WORD = re.compile(r"[A-Z0-9_ ]{1,16}")
# raw data sets of before 1993 begin with an element of group 0008 up to 0018, or with the meta group
_RAW_STARTS = (b"\2\0\0\0", *(bytes((8, 0, element, 0)) for element in (0x00, 0x01, 0x05, 0x08, 0x12, 0x16, 0x18)))


@dataclass(frozen=True, order=True)
class DicomFile:
    """Where a DICOM file is: a path, or with `member` the file of that number in the zip archive at `path`."""

    path: Path
    member: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} (member {self.member + 1})"


@dataclass(frozen=True)
class Unreadable:
    """A file that should be DICOM and cannot be used, and why. `series`: the UID in it, as far as that can be read."""

    file: DicomFile
    reason: str
    series: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@dataclass(frozen=True)
class Listed:
    """All files of a source: DICOM files, those that should be and are not readable, and how many others there are."""

    files: tuple[DicomFile, ...]
    unreadable: tuple[Unreadable, ...]
    others: int


def list_dicom(source: Path) -> Listed:
    """The DICOM files of a folder with all below it, a zip archive, or a single file; hidden ones are left out.

    What is dead beside them, and has no other ending, counts as unreadable: it could be the last slice of a series.
    Raises `DataError` where the source cannot be read.
    """
    found: list[DicomFile] = []
    unreadable: list[Unreadable] = []
    dead: list[Unreadable] = []
    others = 0
    for file, name, head in _heads(source):
        kind = _kind(head, name)
        if kind == "dicom":
            found.append(file)
        elif kind != "other":
            unreadable.append(Unreadable(file, kind))
        elif reason := _why_dead(head, name):
            dead.append(Unreadable(file, reason))
        else:
            others += 1
    folders = {file.path.parent for file in found}
    beside = [file for file in dead if file.file.path.parent in folders]
    unreadable += beside
    others += len(dead) - len(beside)
    return Listed(tuple(found), tuple(unreadable), others)


def holds_dicom(source: Path) -> bool:
    """Whether a file, a folder or something below it, or a zip archive is DICOM; stops at the first one."""
    return any(_kind(head, name) != "other" for _, name, head in _heads(source))


def each_open(files: Iterable[DicomFile]) -> Iterator[tuple[DicomFile, BinaryIO]]:
    """The files in their order, each open for reading until the next one is asked for. Raises `DataError`."""
    with ExitStack() as kept:
        archive: Archive | None = None
        path: Path | None = None
        for file in files:
            if file.member is None:
                with _open(file.path) as stream:
                    yield file, stream
                continue
            if archive is None or path != file.path:
                archive, path = kept.enter_context(open_archive(file.path)), file.path
            yield file, archive.read(file.member)


def read_headers(files: Sequence[DicomFile], tags: Sequence[str] | None = None) -> Iterator[tuple[DicomFile, Dataset]]:
    """Each file with its header: the elements named by `tags`, or all, but no pixels. Raises `DataError`."""
    for file, stream in each_open(files):
        yield file, read_dataset(file, stream, tags=None if tags is None else list(tags), stop_before_pixels=True)


def read_dataset(file: DicomFile, stream: BinaryIO, *, tags: list[str] | None, stop_before_pixels: bool) -> Dataset:
    """What is in an open file. Raises `DataError` naming it."""
    import pydicom

    try:
        with quiet():
            return pydicom.dcmread(stream, stop_before_pixels=stop_before_pixels, specific_tags=tags)
    except Exception as error:
        # pydicom raises whatever its parser stumbles over, and recursion ends a file of endless sequences
        raise DataError(
            f"{file}: its header is damaged or cut off ({type(error).__name__}); copy the file again, or remove it"
        ) from error


def header_value(dataset: Dataset, name: str) -> Any:
    """The value of an element, or None where it is missing, blank, or cannot be understood."""
    try:
        with quiet():
            value = dataset.get(name)
    except UNREADABLE:
        # a damaged value is as good as none: whoever needs it refuses
        return None
    return None if value is None or value == "" else value


def header_word(dataset: Dataset, name: str) -> str:
    """A code such as CT or MONOCHROME2; empty where there is none, `?` for anything else, which is not to be shown."""
    value = str(header_value(dataset, name) or "").strip()
    return value if not value or _WORD.fullmatch(value) else "?"


def digest(files: Iterable[DicomFile]) -> str:
    """One SHA-256 for a series: of the files' own digests, sorted, a line each. Names and order do not matter.

    The same as `sha256sum FILES | cut -c-64 | sort | sha256sum`.
    """
    found = []
    for _, stream in each_open(files):
        each = hashlib.sha256()
        while block := stream.read(2**20):
            each.update(block)
        found.append(f"{each.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns of and logs every value that is not to the letter, and shows it: it may be a patient's."""
    logging.getLogger("pydicom").addFilter(_may_log)
    token = _is_quiet.set(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _is_quiet.reset(token)


def _may_log(record: logging.LogRecord) -> bool:
    return not _is_quiet.get()


def _heads(source: Path) -> Iterator[tuple[DicomFile, str, bytes]]:
    """Every file that is not hidden: itself, its name, its first bytes."""
    if is_archive(source):
        with open_archive(source) as archive:
            for number, name in archive.members():
                if not name.startswith("."):
                    yield DicomFile(source, number), name, archive.read(number).read(_HEAD_BYTES)
        return
    for path in _files(source):
        with _open(path) as stream:
            yield DicomFile(path), path.name, stream.read(_HEAD_BYTES)


def _files(source: Path) -> Iterator[Path]:
    if source.is_file():
        yield source
        return
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{source}: cannot be listed ({error.strerror}); check the path and its permissions") from error

    for folder, below, names in os.walk(source, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        # a link to a folder above would be walked for ever
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            paths = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
            yield from (path for path in paths if path.is_file())


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    with stream:
        yield stream


def _kind(head: bytes, name: str) -> str:
    """`dicom`, `other`, or why a file that should be DICOM cannot be used."""
    if head[MARK_AT : MARK_AT + 4] == MARK:
        syntax = _transfer_syntax(head)
        if not syntax:
            return "no transfer syntax found at its beginning; write it again, or remove it"
        if syntax in DEFLATED:
            return "deflated as a whole, which is refused (it may inflate without bound); send it uncompressed"
        return "dicom"
    if name.lower().endswith(ENDINGS) or head.startswith(_RAW_STARTS):
        return "DICOM without its mark (DICM at byte 128): cut off, or of before 1993; write it again, or remove it"
    return "other"


def _why_dead(head: bytes, name: str) -> str:
    """Why a file without a known ending (none, or a number as at the end of a UID) can hold nothing; else empty."""
    ending = Path(name).suffix
    if ending and not ending[1:].isdecimal():
        return ""
    found = ""
    if not head:
        found = "0 bytes"
    elif not head.strip(b"\0"):
        found = "nothing but zeros at its beginning"
    elif len(head) < MARK_AT + len(MARK) and not all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head):
        # a short text is a note
        found = f"{len(head)} bytes"
    return found and f"{found} found beside DICOM files, expected one of them; copy the file again, or remove it"


def _transfer_syntax(head: bytes) -> str:
    """Walks the elements of group 0002, explicit little endian by the standard; empty where there is none."""
    at = MARK_AT + 4
    while head[at : at + 2] == b"\2\0":
        long = head[at + 4 : at + 6] in (b"OB", b"UN")
        start = at + 12 if long else at + 8
        size = int.from_bytes(head[at + 8 : at + 12] if long else head[at + 6 : at + 8], "little")
        if head[at + 2 : at + 4] == b"\x10\0":
            return head[start : start + size].decode("ascii", "replace").strip(" \0")
        at = start + size
    return ""
