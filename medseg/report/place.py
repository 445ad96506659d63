"""Whether a folder may take a report or a comparison: what others left there is never replaced; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from medseg.errors import DataError

Kind = Literal["report", "comparison"]


def holds_earlier(folder: Path, kind: Kind) -> bool:
    """Whether `folder` holds an earlier summary.json of this `kind`, which a new one may replace.

    Raises `DataError` for one of the other kind or of another program: it is not ours to replace.
    """
    file = folder / "summary.json"
    if not file.exists():
        return False
    found = _kind(file)
    if found != kind:
        what = "written by another program" if found is None else f"that of a {found} found"
        raise DataError(f"{file}: {what}, expected a folder for the {kind} alone; give another one")
    return True


def _kind(file: Path) -> Kind | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "schema_version" not in found:
        return None
    return "comparison" if "comparisons" in found else "report"
