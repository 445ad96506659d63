"""What the process that infers is asked for, as a line of JSON; who asks and who answers live beside this."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Request:
    """One series for one model.

    `job`: its id, also the name of its folder below `work`, where its `files` are brought together; `results`: the
    folder that is to hold what was made. `weights_sha256`, `description_sha256`: what the `model` must be to the byte;
    empty where it was not written down. `picture`: whether one for the pages is made too. Formats, `tta`, `precision`,
    `device` and resampling as in `medseg.infer`.
    """

    job: str
    series_id: str
    revision: int
    files: tuple[str, ...]
    work: str
    results: str
    model: str
    weights_sha256: str
    description_sha256: str
    formats: tuple[str, ...]
    picture: bool
    tta: str
    precision: str
    device: str
    resample_tilt: bool
    resample_gaps: bool

    def line(self) -> str:
        """As JSON that ends with the line."""
        return json.dumps(asdict(self)) + "\n"


def read_request(line: str) -> Request:
    """The request in a line. Raises `ValueError` where it is none."""
    found = json.loads(line)
    if not isinstance(found, Mapping) or set(found) != {f.name for f in fields(Request)}:
        raise ValueError("no request: other keys than expected")
    values: dict[str, Any] = dict(found)
    return Request(**(values | {"files": tuple(values["files"]), "formats": tuple(values["formats"])}))
