"""What happened, for good: lines of JSON, each with the hash of the one before, so that none can be changed unseen.

No patient's data: studies, series and jobs stand by digests, which the database resolves for those who may see it.

What the chain shows: a line that was changed, removed or put in between; a file that was cut or removed although a
later file of the same part stands on it (its first line names that file and the hash of its last line). What it cannot
show, since the hashes have no key: somebody who may write here can make a whole chain anew from any line on, and can
cut or remove the latest file of a part, which then looks like one whose process was killed. Against that, keep what
`medseg-hospital audit` prints (the hash each part ends with) where this machine cannot write, and ask for it later with
`--holds`; or send the files to another machine as they grow.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medseg
from medseg_pipelines.hospital.store import sync_folder

START = "0" * 64
Fact = str | int | float | bool | None
_NAME = re.compile(r"(?P<part>.+)-(?P<stamp>\d{8}T\d{6}\.\d{3})-(?P<process>\d+)\.jsonl")
_BLOCK = 2**16


class Audit:
    """The audit log of one process: a file of its own in `folder`, begun anew with every start."""

    def __init__(self, folder: Path, part: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        follows = _latest(folder, part)
        self.path, self._handle = _create(folder, part)
        sync_folder(folder)
        self._previous, self._size = START, 0
        self._lock = threading.Lock()
        named = {"after": follows.name, "after_hash": _last_hash(follows)} if follows else {}
        self.record("started", part=part, **named)

    def record(self, event: str, **facts: Fact) -> None:
        """Adds a line; it is on the disk when this ends, or not in the file at all. Raises `OSError`."""
        with self._lock:
            entry = {"at": round(time.time(), 3), "event": event} | facts | {"previous": self._previous}
            text = json.dumps(entry, sort_keys=True, allow_nan=False).encode()
            try:
                _write(self._handle, text + b"\n")
                os.fsync(self._handle)
            except OSError:
                # half a line would break the chain for all that come after it
                os.ftruncate(self._handle, self._size)
                raise
            self._size += len(text) + 1
            self._previous = hashlib.sha256(text).hexdigest()

    def close(self) -> None:
        """Ends the file with a line that says so; a file without it was cut, by whatever."""
        self.record("ended")
        os.close(self._handle)


@dataclass(frozen=True)
class AuditFile:
    """What was found in one file. `broken`: numbers, from 1, of lines that do not follow from the one before.

    `torn`: it breaks off inside its last line, as after a power cut; `hashes`: of all its lines.
    """

    path: Path
    part: str
    broken: tuple[int, ...]
    ended: bool
    torn: bool
    hashes: tuple[str, ...]
    after: str | None
    after_hash: str | None

    @property
    def last_hash(self) -> str:
        """What a later file of the part stands on."""
        return self.hashes[-1] if self.hashes else START


@dataclass(frozen=True)
class AuditReport:
    """All files of a folder, by name. `faults`: what is wrong, in words; `heads`: the last hash of each part."""

    files: tuple[AuditFile, ...]
    faults: tuple[str, ...]
    heads: Mapping[str, str]

    def holds(self, sha256: str) -> bool:
        """Whether a line with this hash is there."""
        return any(sha256 in file.hashes for file in self.files)


def check_audit(folder: Path) -> AuditReport:
    """Reads every audit file of a node and follows its chains. Raises `DataError` where there is no such folder."""
    if not folder.is_dir():
        raise medseg.DataError(f"{folder}: no such folder, expected the audit files of a node; check `folder`")
    files = tuple(read_audit(path) for path in sorted(folder.glob("*.jsonl")))
    faults = [
        f"{file.path.name}: line {number} does not follow from the line before"
        for file in files
        for number in file.broken
    ]
    faults += _broken_between(files)
    # of the files of a part the latest is the last one by name
    return AuditReport(files, tuple(faults), {file.part: file.last_hash for file in files})


def read_audit(path: Path) -> AuditFile:
    """One audit file, its chain followed."""
    *lines, rest = path.read_bytes().split(b"\n")
    entries = [_entry(line) for line in lines]
    hashes = tuple(hashlib.sha256(line).hexdigest() for line in lines)
    before = (START, *hashes)
    first, last = (entries[0], entries[-1]) if entries else ({}, {})
    named = _NAME.fullmatch(path.name)
    return AuditFile(
        path=path,
        part=named["part"] if named else path.stem,
        broken=tuple(n for n, entry in enumerate(entries, 1) if entry.get("previous") != before[n - 1]),
        ended=not rest and last.get("event") == "ended",
        torn=bool(rest),
        hashes=hashes,
        after=first.get("after"),
        after_hash=first.get("after_hash"),
    )


def _broken_between(files: Sequence[AuditFile]) -> list[str]:
    by_name = {file.path.name: file for file in files}
    faults = []
    for file in files:
        if file.after is None:
            continue
        before = by_name.get(file.after)
        if before is None:
            faults.append(f"{file.path.name}: stands on {file.after}, which is not here (removed, or moved away)")
        elif before.last_hash != file.after_hash:
            faults.append(
                f"{file.after}: its last line is not the one that {file.path.name} stands on (cut, or added to)"
            )
    return faults


def _entry(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        # counts as a line that follows from nothing
        return {}
    return found if isinstance(found, dict) else {}


def _latest(folder: Path, part: str) -> Path | None:
    mine = [p for p in folder.glob("*.jsonl") if (named := _NAME.fullmatch(p.name)) and named["part"] == part]
    return max(mine, key=lambda path: path.name, default=None)


def _last_hash(path: Path) -> str:
    """Of the last whole line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while size > 0 and tail.rstrip(b"\n").count(b"\n") < 2:
            step = min(_BLOCK, size)
            size = file.seek(size - step)
            tail = file.read(step) + tail
    *whole, _ = tail.split(b"\n")
    return hashlib.sha256(whole[-1]).hexdigest() if whole else START


def _create(folder: Path, part: str) -> tuple[Path, int]:
    while True:
        now = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}"
        path = folder / f"{part}-{stamp}-{os.getpid()}.jsonl"
        try:
            return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o640)
        except FileExistsError:
            # another start in this very millisecond
            time.sleep(0.001)


def _write(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]
