"""How far the probabilities of the cases can be believed: files to counts, counts to a summary; no pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.errors import GeometryError
from medseg.evaluate.pairs import GRID_TOLERANCE_VOXELS
from medseg.metrics import Labels, Value
from medseg.metrics.calibration import Bins, Reliability, reliability
from medseg.metrics.codes import members
from medseg.readers import Geometry, is_picture
from medseg.readers.probabilities import read_probabilities


def measure_calibration(
    path: Path, reference: Labels, geometry: Geometry, *, like: Path, ignore_value: int | None
) -> Reliability:
    """The probabilities in `path` against `reference` (*S), which was read from `like` and lies there.

    Raises `GeometryError` if the probabilities lie elsewhere, `DataError` if they cannot be read.
    """
    found = read_probabilities(path, spatial_dims=reference.ndim, picture=is_picture(like))
    shape = tuple(found.shape[1:])
    if shape != reference.shape or (
        found.geometry is not None and not found.geometry.matches(geometry, tolerance=GRID_TOLERANCE_VOXELS)
    ):
        raise GeometryError(
            f"{path}: probabilities on a grid of {shape} found, expected that of the reference, {reference.shape}"
        )
    values = found.values or tuple(range(found.shape[0]))
    return reliability(found, reference, values, regions=found.regions, ignore_value=ignore_value)


def summarise_calibration(found: Reliability | None, labels: Mapping[str, Value]) -> dict[str, Any] | None:
    """Error and curve over all voxels and for each label that has probabilities; strict JSON."""
    if found is None:
        return None
    # a region of one value and the label of that value are the same
    channels = {_members(value): bins for value, bins in found.labels.items()}
    return {
        "n_cases": found.n_cases,
        **_curve(found.overall),
        "labels": {name: _curve(channels[_members(v)]) for name, v in labels.items() if _members(v) in channels},
    }


def _members(value: Value) -> frozenset[int]:
    return frozenset(members(value))


def _curve(bins: Bins) -> dict[str, Any]:
    return {
        "ece": _number(bins.ece),
        "bins": [
            {
                "low": each.low,
                "high": each.high,
                "n": each.n,
                "confidence": _number(each.confidence),
                "correct": _number(each.correct),
            }
            for each in bins.curve
        ],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
