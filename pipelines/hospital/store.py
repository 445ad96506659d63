"""Where received files lie: whole and on the disk before anybody is told, under names made of their content alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK = 2**20
GB = 10**9
# holds what the database knows the folder by
MARK = "node.id"


class Store:
    """The folders of a node: `store` (what was received), `incoming`, `refused`, `work` and `results`."""

    def __init__(self, folder: Path, *, least_free_gb: float) -> None:
        self.folder = folder
        self._least_free = least_free_gb * GB
        self.incoming, self.refused, self.work, self.results = (
            folder / name for name in ("incoming", "refused", "work", "results")
        )
        for made in (self.incoming, self.refused, self.work, self.results, folder / "store"):
            made.mkdir(parents=True, exist_ok=True)

    @property
    def free_bytes(self) -> int:
        """What the disk still holds."""
        return shutil.disk_usage(self.folder).free

    def is_here(self) -> bool:
        """Whether the folder is that of the node; where its disk is not mounted any more, an empty one lies there.

        One whose disk gives errors is not there either.
        """
        # that of Path raises for most errors
        return os.path.isfile(self.folder / MARK)

    def has_room(self, size: int = 0) -> bool:
        """Whether `size` bytes more leave what must stay free."""
        return self.free_bytes - size >= self._least_free

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """A name in `incoming` for one file being received; what is still there when the block ends is removed."""
        path = self.incoming / f"{uuid.uuid4().hex}.part"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def keep(self, path: Path, series_id: str, sha256: str) -> Path:
        """Moves a received file to its place for good, on the disk when this ends; the place, below the folder."""
        return self._moved(path, self.folder / "store" / series_id[:2] / series_id / f"{sha256[:32]}.dcm")

    def quarantine(self, path: Path, sha256: str) -> Path:
        """Moves a refused file aside, for a person to look at; the place, below the folder."""
        return self._moved(path, self.refused / f"{sha256[:32]}.bin")

    def sweep(self, older_than_s: float, now: float) -> int:
        """Removes what killed processes left in `incoming`; how many files."""
        removed = 0
        for path in self.incoming.iterdir():
            try:
                if now - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                # its writer has just finished
                continue
        return removed

    def _moved(self, path: Path, place: Path) -> Path:
        place.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(place)
        # of the folder and those above it that are new, else the name may be gone after a power cut
        for folder in (place.parent, place.parent.parent, place.parent.parent.parent):
            sync_folder(folder)
            if folder == self.folder:
                break
        return place.relative_to(self.folder)


def write_mark(folder: Path, node_id: str) -> None:
    """Marks a folder as that of a node; on the disk when this ends."""
    part = folder / f".{MARK}.{uuid.uuid4().hex[:8]}"
    with part.open("x", encoding="ascii") as file:
        file.write(f"{node_id}\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MARK)
    sync_folder(folder)


def read_mark(folder: Path) -> str | None:
    """What a folder is marked with; None where it is not."""
    try:
        return (folder / MARK).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
