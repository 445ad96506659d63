"""How predictions are judged: the choices of an evaluation, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medseg import metrics
from medseg.config import BACKGROUND, IGNORE
from medseg.errors import DataError
from medseg.metrics import Surface, Value


@dataclass(frozen=True)
class EvaluateOptions:
    """How predictions are judged.

    `labels` maps a name to its value, or to all values of a region; None takes the values found in the references. A
    name `background` is left out; one named `ignore` gives `ignore_value`: voxels where the reference has that value
    belong to neither map. `resample_prediction` brings a prediction on another grid to that of the reference (nearest
    neighbour) instead of refusing it; `allow_missing` reports references without a prediction apart instead of refusing
    them all. Raises `DataError` for choices that cannot be.
    """

    labels: Mapping[str, Value] | None = None
    ignore_value: int | None = None
    surface: Surface = "surfel"
    nsd_tolerance_mm: float = 1.0
    resample_prediction: bool = False
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if self.surface not in metrics.SURFACES:
            raise DataError(f"surface {self.surface!r} is unknown, expected {' or '.join(metrics.SURFACES)}")
        if not self.nsd_tolerance_mm >= 0:
            raise DataError(f"NSD tolerance of {self.nsd_tolerance_mm} mm found, expected 0 or more")
        if self.labels is None:
            return
        if self.ignore_value is None and IGNORE in self.labels:
            value = self.labels[IGNORE]
            object.__setattr__(self, "ignore_value", value[0] if isinstance(value, tuple) else value)
        judged = {n: v for n, v in self.labels.items() if n not in (BACKGROUND, IGNORE) and v != 0}
        if not judged:
            raise DataError("labels name nothing but background; give at least one name with its value")
        object.__setattr__(self, "labels", judged)
