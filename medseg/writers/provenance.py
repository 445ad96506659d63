"""Who made a segmentation, from what, and the unique identifiers that follow from it; no files."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg.config import COLOURS
from medseg.errors import DataError
from medseg.readers.segments import Segmentation, SegmentInfo

# of all UIDs of ours: the name space of DICOM's identifiers by RFC 4122 is that of ISO OIDs
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "medseg")
IMPLEMENTATION_UID = f"2.25.{_NAMESPACE.int}"
MAX_VALUE = 65535


@dataclass(frozen=True)
class Algorithm:
    """What made the labels: `kind` as DICOM says it; the hashes are empty where no trained model was at work."""

    name: str = "medseg"
    version: str = "0"
    model_sha256: str = ""
    config_sha256: str = ""
    kind: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"] = "AUTOMATIC"

    @property
    def device_uid(self) -> str:
        """A UID of the program with this model and configuration, whatever it works on."""
        return _uid("device", self.name, self.version, self.model_sha256, self.config_sha256)


@dataclass(frozen=True)
class Origin:
    """What decides the identifiers of an object: the source, its revision, and who made the labels.

    With a model's hash, that is all: the same images, model and configuration give one object, however often it is made
    and wherever. Without one, `labels_sha256` tells objects apart.
    """

    series_uid: str
    instance_uids: tuple[str, ...]
    revision: int
    algorithm: Algorithm
    labels_sha256: str

    def uid(self, *purpose: str) -> str:
        """A UID for `purpose` (2.25. and a UUID of version 5 as a number, PS3.5 annex B.2)."""
        made_by = (self.algorithm.model_sha256, self.algorithm.config_sha256)
        labels = "" if self.algorithm.model_sha256 else self.labels_sha256
        return _uid(self.series_uid, sorted(self.instance_uids), self.revision, *made_by, labels, *purpose)


def _uid(*known: object) -> str:
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(known)).int}"


def labels_sha256(segmentation: Segmentation) -> str:
    """SHA-256 of the label map, its grid, and its names and colours."""
    digest = hashlib.sha256()
    names = [(s.value, s.name, s.colour) for s in segmentation.segments]
    digest.update(json.dumps([segmentation.grid.shape, names]).encode())
    digest.update(np.round(segmentation.grid.affine, 6).tobytes())
    digest.update(np.ascontiguousarray(segmentation.array, dtype="<u2").tobytes())
    return digest.hexdigest()


def complete_segments(segmentation: Segmentation) -> tuple[SegmentInfo, ...]:
    """All segments in order of their values: those named, and `label N` for values without a name; each with a colour.

    Raises `DataError` for values outside 1 to 65535, for names given twice, or where nothing is named and nothing is
    labelled.
    """
    array, named = segmentation.array, segmentation.segments
    if array.dtype.kind not in "uib":
        raise DataError(f"label map of type {array.dtype} found, expected integers")
    values = [segment.value for segment in named]
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > MAX_VALUE or any(not 0 < v <= MAX_VALUE for v in values):
        raise DataError(
            f"label values {min([low, *values])} to {max([high, *values])} found, expected 0 (background, without a "
            f"name) and 1 to {MAX_VALUE}; renumber the labels"
        )
    if len(set(values)) < len(values):
        raise DataError(f"values {sorted(values)} found, expected each once; give every label a value of its own")
    present = set(segmentation.voxels) - {0}
    nameless = [SegmentInfo(value, f"label {value}") for value in sorted(present - set(values))]
    segments = sorted([*named, *nameless], key=lambda segment: segment.value)
    if not segments:
        raise DataError("no labels found and none named, expected at least one; a DICOM object needs a segment")
    return tuple(_coloured(segments))


def _coloured(segments: Sequence[SegmentInfo]) -> list[SegmentInfo]:
    return [
        SegmentInfo(s.value, s.name, s.colour or COLOURS[number % len(COLOURS)]) for number, s in enumerate(segments)
    ]
