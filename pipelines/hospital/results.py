"""What a job has made: a folder of files with a manifest of them, in its place as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from medseg_pipelines.hospital.store import sha256_of, sync_folder

MANIFEST = "manifest.json"
ENDINGS = {"nifti": ".nii.gz", "picture": ".png"}


def file_name(format: str) -> str:
    """What the file of a format is called in the folder of a job: nothing of a patient."""
    return f"{format}{ENDINGS.get(format, '.dcm')}"


def inputs_of(files: Iterable[str]) -> str:
    """What a result was made of: the contents of the images, by which the store names its files."""
    names = "\n".join(sorted(PurePath(file).name for file in files))
    return hashlib.sha256(names.encode()).hexdigest()


def read_result(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a job's folder says; None where there is none, or a file is not what it says.

    `files`: by format the `file` in the folder, its `sha256` and `size` in bytes; `picture` among them where there is
    one. `seconds` by stage, `quality` by label, `warnings`, `look`: as in the library's record.
    """
    try:
        result = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all(sha256_of(folder / made["file"]) == made["sha256"] for made in result["files"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if whole else None


def write_result(made: Path, result: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Moves the folder `made`, which holds the files of `result`, to `place`; on the disk when this ends.

    What is whole there already, and made of the same `inputs`, stays and is given back: a worker that has lost its
    lease may have been first. `made` is on the same disk, and gone after this.
    """
    text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    (made / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(made)
    while True:
        there = read_result(place)
        if there is not None and there.get("inputs") == result.get("inputs"):
            shutil.rmtree(made)
            return there
        _move_aside(place, made.parent)
        try:
            made.rename(place)
        except OSError:
            if not place.exists():
                raise
            # another one was quicker
            continue
        sync_folder(place.parent)
        return dict(result)


def _move_aside(place: Path, folder: Path) -> None:
    """Removes what is broken at `place`, so that nobody sees it half gone."""
    aside = folder / f"{uuid.uuid4().hex}.broken"
    try:
        place.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)
