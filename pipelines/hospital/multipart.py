"""An answer of several parts (RFC 2046, multipart/related), read piece by piece: each part goes to its own file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

# of the lines before a part
MOST_HEAD = 2**14
_BOUNDARY = re.compile(r'boundary\s*=\s*(?:"([^"\r\n]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


class PartsError(Exception):
    """An answer that has no parts, or that was cut off in the middle of one."""


def each_part(
    blocks: Iterable[bytes],
    content_type: str,
    new_file: Callable[[], AbstractContextManager[Path]],
    *,
    most_bytes: int,
) -> Iterator[Path]:
    """The file of each part in turn; what is left of it when the next one is asked for is removed by `new_file`.

    Never more than a block is held in memory. Raises `PartsError`, for a part of more than `most_bytes` too.
    """
    found = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/") or found is None:
        raise PartsError("an answer that is not of several parts")
    mark = b"\r\n--" + (found[1] or found[2]).encode("latin-1", "replace")
    stream = _Stream(blocks)
    # the first boundary may begin the answer
    stream.held = bytearray(b"\r\n")
    stream.copy_until(mark, None, most_bytes)
    while stream.take(2) != b"--":
        stream.head()
        with new_file() as path:
            with path.open("wb") as file:
                stream.copy_until(mark, file.write, most_bytes)
            yield path


class _Stream:
    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self.held = bytearray()

    def more(self) -> None:
        block = next(self._blocks, None)
        if block is None:
            raise PartsError("an answer that was cut off")
        self.held += block

    def take(self, count: int) -> bytes:
        while len(self.held) < count:
            self.more()
        taken = bytes(self.held[:count])
        del self.held[:count]
        return taken

    def head(self) -> None:
        """Over the lines before a part; the two bytes that end the line of the boundary are taken already."""
        while (end := (b"\r\n" + self.held).find(_HEAD_END)) < 0:
            if len(self.held) > MOST_HEAD:
                raise PartsError(f"a part with more than {MOST_HEAD} bytes of lines before it")
            self.more()
        del self.held[: end + len(_HEAD_END) - 2]

    def copy_until(self, mark: bytes, write: Callable[[bytes], object] | None, most_bytes: int) -> None:
        """Gives what comes before `mark` to `write`, and goes behind it."""
        copied = 0
        while (end := self.held.find(mark)) < 0:
            # a mark may have begun in the last bytes
            sure = max(len(self.held) - len(mark) + 1, 0)
            copied += sure
            if copied > most_bytes:
                raise PartsError(f"a part of more than {most_bytes} bytes")
            if write is not None:
                write(bytes(self.held[:sure]))
            del self.held[:sure]
            self.more()
        if copied + end > most_bytes:
            raise PartsError(f"a part of more than {most_bytes} bytes")
        if write is not None:
            write(bytes(self.held[:end]))
        del self.held[: end + len(mark)]
