"""The elements of a DICOM file, one after the other up to its pixels: for files that nobody has looked at yet.

No recursion, no value longer than a name, nothing but skips over the rest: time and memory are bounded whatever the
file is. What the values mean is said in dicom_facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO, Literal

from pydicom.datadict import dictionary_VR
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from medseg.errors import DataError
from medseg.readers.dicom_files import DEFLATED, MARK, MARK_AT, DicomFile

# the headers of enhanced objects of 5000 frames have 10 MiB
MOST_HEADER_BYTES = 64 * 2**20
# such an object has 100 elements for each frame; so many take four seconds
MOST_ELEMENTS = 2**20
# reports nest 10 to 15 sequences; pydicom's parser goes down by recursion and ends at 200
MOST_DEPTH = 64
# 324 characters of a name in up to 4 bytes, with what switches between alphabets
MOST_VALUE_BYTES = 4096

TRANSFER_SYNTAX, META_CLASS, META_INSTANCE = 0x00020010, 0x00020002, 0x00020003
IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
_DAMAGED = "damaged or cut off; send it again"


@dataclass(frozen=True)
class Header:
    """The values (cut at `MOST_VALUE_BYTES`) of those top-level elements that were asked for, by tag, as written.

    `vrs`: their types, empty where the file does not tell. `pixels`: whether pixels follow.
    """

    values: Mapping[int, bytes]
    vrs: Mapping[int, str]
    syntax: str
    pixels: bool

    @property
    def big_endian(self) -> bool:
        """How binary numbers are written."""
        return self.syntax == BIG_ENDIAN


def walk(file: DicomFile, stream: BinaryIO, wanted: frozenset[int]) -> Header:
    """Looks at every element before the pixels, at all depths, and keeps the `wanted` ones of the top.

    Raises `DataError` naming the file where it is no DICOM file, is cut off (in the pixels too), is deflated, has a
    wanted element twice, or goes beyond `MOST_HEADER_BYTES`, `MOST_ELEMENTS` or `MOST_DEPTH`.
    """
    try:
        return _Walk(file, stream, wanted).done()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the disk") from error


@dataclass
class _Level:
    """Where in the nesting the walk is: among the items of a sequence, or among elements. `end`: None is a mark."""

    items: bool
    end: int | None
    implicit: bool


@dataclass
class _Walk:
    file: DicomFile
    stream: BinaryIO
    wanted: frozenset[int]
    at: int = 0
    size: int = 0
    count: int = 0
    order: Literal["little", "big"] = "little"
    values: dict[int, bytes] = field(default_factory=dict)
    vrs: dict[int, str] = field(default_factory=dict)

    def done(self) -> Header:
        self.size = self.stream.seek(0, 2)
        self.stream.seek(0)
        syntax = self.meta()
        self.order = "big" if syntax == BIG_ENDIAN else "little"
        pixels = self.dataset(syntax == IMPLICIT)
        return Header(self.values, self.vrs, syntax, pixels)

    def meta(self) -> str:
        """Group 0002, explicit little endian by the standard; gives the transfer syntax."""
        if self.size < MARK_AT + 4 or self.read(MARK_AT + 4)[MARK_AT:] != MARK:
            raise self.error("no DICM at byte 128 found, expected a DICOM file (PS3.10); send it as one")
        while self.peek(2) == b"\2\0":
            tag, vr, length = self.head(implicit=False)
            if not (vr.isascii() and vr.isalpha()) or length == _UNDEFINED:
                raise self.error(f"a header of the file itself found that is {_DAMAGED}")
            self.take(tag, vr, length)
        syntax = self.values.get(TRANSFER_SYNTAX, b"").decode("ascii", "replace").strip(" \0")
        if not syntax:
            raise self.error("no transfer syntax found, expected one in its beginning; send it again")
        if syntax in DEFLATED:
            raise self.error(
                "deflated as a whole, which is refused (it may inflate without bound); send it uncompressed"
            )
        return syntax

    def dataset(self, implicit: bool) -> bool:
        """Walks all that is before the pixels, and over them; whether there are some."""
        levels = [_Level(False, None, self.is_implicit(implicit, inside=False))]
        while True:
            level = levels[-1]
            if level.end is not None and self.at >= level.end:
                if self.at > level.end:
                    raise self.error(f"lengths that contradict each other found: {_DAMAGED}")
                levels.pop()
            elif level.items:
                self.item(levels)
            elif len(levels) == 1 and self.at == self.size:
                return False
            elif self.element(levels):
                return True

    def item(self, levels: list[_Level]) -> None:
        """The head of the next item of a sequence, or its end."""
        level = levels[-1]
        tag, _, length = self.head(implicit=True)
        if tag == _SEQUENCE_END and level.end is None:
            levels.pop()
        elif tag == _ITEM:
            implicit = self.is_implicit(level.implicit, inside=True)
            levels.append(_Level(False, self.end(length), implicit))
        else:
            raise self.error(f"a sequence without items found: {_DAMAGED}")

    def element(self, levels: list[_Level]) -> bool:
        """The next element of a data set; whether it is that of the pixels of the file."""
        level, top = levels[-1], len(levels) == 1
        tag, vr, length = self.head(level.implicit)
        if tag == _ITEM_END and level.end is None and not top:
            levels.pop()
        elif tag >> 16 in (0, 2, 0xFFFE):
            raise self.error(f"elements found that no data set has: {_DAMAGED}")
        elif top and tag in PIXELS:
            self.pixels(length)
            return True
        elif _is_sequence(tag, vr, length):
            if len(levels) > 2 * MOST_DEPTH:
                raise self.error(f"more than {MOST_DEPTH} sequences inside each other found; it is not taken")
            levels.append(_Level(True, self.end(length), level.implicit))
        elif length == _UNDEFINED:
            self.fragments()
        elif top:
            self.take(tag, vr, length)
        else:
            self.skip(length)
        return False

    def pixels(self, length: int) -> None:
        """Over the pixels, by their length or from fragment to fragment: cut-off ones are told."""
        if length == _UNDEFINED:
            self.fragments(limit=self.size)
        elif self.at + length > self.size:
            raise self.error(f"{self.size - self.at} of {length} bytes of pixels found: cut off; send it again")

    def fragments(self, limit: int = MOST_HEADER_BYTES) -> None:
        while True:
            tag, _, length = self.head(implicit=True, limit=limit)
            if tag == _SEQUENCE_END:
                return
            if tag != _ITEM or length == _UNDEFINED:
                raise self.error(f"compressed pixels without their parts found: {_DAMAGED}")
            self.skip(length, limit)

    # ---- bytes

    def head(self, implicit: bool, limit: int = MOST_HEADER_BYTES) -> tuple[int, str, int]:
        """Tag, type (empty: not told) and length of the next element."""
        self.count += 1
        if self.count > MOST_ELEMENTS:
            raise self.error(f"more than {MOST_ELEMENTS:,} elements found; it is not taken")
        data = self.read(8, limit)
        tag = self.number(data[:2]) << 16 | self.number(data[2:4])
        vr = data[4:6]
        # as pydicom does: what is no type at all is the length of an element without one
        if implicit or not (b"AA" <= vr <= b"ZZ"):
            return tag, "", self.number(data[4:8])
        length = self.number(self.read(4, limit)) if vr in _LONG else self.number(data[6:8])
        return tag, vr.decode("ascii", "replace"), length

    def take(self, tag: int, vr: str, length: int) -> None:
        if tag not in self.wanted:
            self.skip(length)
            return
        if tag in self.values:
            # which of them holds is a matter of the reader
            raise self.error(f"element ({tag >> 16:04X},{tag & 0xFFFF:04X}) found twice, expected once; send it again")
        self.values[tag] = self.read(min(length, MOST_VALUE_BYTES))
        self.vrs[tag] = vr
        self.skip(length - len(self.values[tag]))

    def is_implicit(self, assumed: bool, *, inside: bool) -> bool:
        """Whether elements are written without their types: as pydicom, by the first one."""
        if inside and assumed:
            return True
        vr = self.peek(6)[4:]
        return assumed if len(vr) < 2 else not all(0x40 < byte < 0x5B for byte in vr)

    def end(self, length: int) -> int | None:
        return None if length == _UNDEFINED else self.at + length

    def peek(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.stream.seek(self.at)
        return data

    def read(self, count: int, limit: int = MOST_HEADER_BYTES) -> bytes:
        self.check(count, limit)
        data = self.stream.read(count)
        if len(data) != count:
            raise self.error(f"its header ends in the middle of an element: {_DAMAGED}")
        self.at += count
        return data

    def skip(self, count: int, limit: int = MOST_HEADER_BYTES) -> None:
        self.check(count, limit)
        self.at += count
        self.stream.seek(self.at)

    def check(self, count: int, limit: int) -> None:
        if self.at + count > self.size:
            raise self.error(f"its header ends in the middle of an element: {_DAMAGED}")
        if self.at + count > limit:
            raise self.error(f"more than {MOST_HEADER_BYTES // 2**20} MiB before the pixels found; it is not taken")

    def number(self, data: bytes) -> int:
        return int.from_bytes(data, self.order)

    def error(self, words: str) -> DataError:
        return DataError(f"{self.file}: {words}")


def _is_sequence(tag: int, vr: str, length: int) -> bool:
    if vr == "SQ" or (length == _UNDEFINED and vr in ("", "UN")):
        return True
    if vr not in ("", "UN"):
        return False
    return not tag & 0x10000 and _is_known_sequence(tag)


@lru_cache(maxsize=8192)
def _is_known_sequence(tag: int) -> bool:
    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:
        return False
