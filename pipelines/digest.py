"""A data set before any work: a look at its files, and one digest of all: where it changes, results say nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import medseg


def checked(data: Any, given: Mapping[str, Any] | None = None) -> medseg.Findings:
    """A data set that was read, as it says, after a look at all files with the section `given` laid over that.

    Raises `ConfigError` where the section is impossible, `DataError` where the files have errors.
    """
    findings = medseg.check_dataset(medseg.told(data, given or {}))
    if findings.errors:
        listed = "\n".join(f"  {error}" for error in findings.errors[:20])
        raise medseg.DataError(f"{data.path}: {len(findings.errors)} errors found, nothing was trained\n{listed}")
    return replace(findings, dataset=data)


def data_sha256(findings: medseg.Findings) -> str:
    """SHA-256 over the cases of a data set with the bytes of their files, wherever these lie.

    The files that a header names count as it does.
    Raises `DataError` where a file cannot be read.
    """
    data = findings.dataset
    described = {
        "channels": data.channels,
        "labels": data.labels,
        "region_values": data.region_values,
        "folds": None if data.folds is None else [[fold.train, fold.val] for fold in data.folds],
        "cases": [
            [
                case.id,
                case.group,
                [_file(path) for path in case.images],
                None if case.label is None else _file(case.label),
            ]
            for case in data.cases
        ],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _file(path: Path) -> list[Any]:
    # the ending decides how the bytes are read; those of the voxels may lie in files that a header names
    return [x for file in medseg.stored_in(path) for x in (file.suffix, file.stat().st_size, medseg.file_sha256(file))]
