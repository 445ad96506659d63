"""Whether a folder may take a report or a comparison: what others left there is never replaced; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from medseg.errors import DataError

Kind = Literal["report", "comparison"]


def holds_earlier(folder: Path, kind: Kind) -> bool:
    """Whether `folder` holds an earlier summary.json of this `kind`, which a new one may replace.

    Raises `DataError` for one of the other kind or of another program: it is not ours to replace; and for one that
    cannot be read.
    """
    file = folder / "summary.json"
    try:
        if not file.exists():
            return False
        found = _kind(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}), so that it may be of another program; see to it, or give "
            "another folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: no whole JSON found, expected a folder for the {kind} alone; delete it if it is of an earlier "
            f"{kind}, or give another folder"
        ) from error
    if found != kind:
        what = "written by another program" if found is None else f"that of a {found} found"
        raise DataError(f"{file}: {what}, expected a folder for the {kind} alone; give another one")
    return True


def _kind(found: Any) -> Kind | None:
    if not isinstance(found, dict) or "schema_version" not in found:
        return None
    return "comparison" if "comparisons" in found else "report"
