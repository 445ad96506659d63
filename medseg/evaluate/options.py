"""How predictions are judged: the choices of an evaluation, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from medseg import metrics
from medseg.config import BACKGROUND, IGNORE
from medseg.errors import DataError
from medseg.metrics import Surface, Value
from medseg.metrics.lesions import LESION_RULES, LesionRule

OTHERS = "*"
"""Among tolerances: every label that is not named."""
USUAL_TOLERANCE_MM = 1.0
# label maps are read as 32-bit numbers
_MOST_VALUE = 2**31 - 1


@dataclass(frozen=True)
class EvaluateOptions:
    """How predictions are judged.

    `labels` maps a name to its value, or to all values of a region; None takes the values found in the references. A
    name `background` is left out; one named `ignore` gives `ignore_value`: voxels where the reference has that value
    belong to neither map. `nsd_tolerance_mm`: one number, or one by label name, where `*` stands for all others (1 mm
    unless given). `resample_prediction` brings a prediction on another grid to that of the reference (nearest
    neighbour) instead of refusing it; `allow_missing` reports references without a prediction apart instead of refusing
    them all.

    Measured only where asked: `extra` (`boundary_iou`, `cldice`), `lesions` (a rule of `medseg.metrics.lesions` or its
    name), and calibration from the folder `probabilities`. `group` is the column of the metadata that names patients.
    `jobs`: cases at a time; None: as many as there are cores, 16 at most, no more than half
    of the memory holds, and one where cases are small. Raises
    `DataError` for choices that cannot be.
    """

    labels: Mapping[str, Value] | None = None
    ignore_value: int | None = None
    surface: Surface = "surfel"
    nsd_tolerance_mm: float | Mapping[str, float] = USUAL_TOLERANCE_MM
    resample_prediction: bool = False
    allow_missing: bool = False
    extra: tuple[str, ...] = ()
    lesions: LesionRule | str | None = None
    probabilities: Path | str | None = None
    group: str | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.surface not in metrics.SURFACES:
            raise DataError(f"surface {self.surface!r} is unknown, expected {' or '.join(metrics.SURFACES)}")
        if self.jobs is not None and _whole(self.jobs, "jobs") < 1:
            raise DataError(f"{self.jobs} jobs found, expected 1 or more")
        if self.ignore_value is not None:
            object.__setattr__(self, "ignore_value", _label_value(self.ignore_value, "ignore_value"))
        object.__setattr__(self, "extra", _extra(self.extra))
        object.__setattr__(self, "lesions", _rule(self.lesions))
        if self.labels is not None:
            self._take_labels(_checked_labels(self.labels))
        self._check_tolerances()

    @property
    def lesion_rule(self) -> LesionRule | None:
        """The rule by which lesions are matched, or None where they are not asked for."""
        return _rule(self.lesions)

    @property
    def usual_tolerance_mm(self) -> float:
        """The tolerance of every label that has none of its own."""
        chosen = self.nsd_tolerance_mm
        return chosen.get(OTHERS, USUAL_TOLERANCE_MM) if isinstance(chosen, Mapping) else chosen

    @property
    def own_tolerances_mm(self) -> dict[str, float]:
        """The tolerances of the labels that have one of their own, by name."""
        chosen = self.nsd_tolerance_mm
        return {n: t for n, t in chosen.items() if n != OTHERS} if isinstance(chosen, Mapping) else {}

    def tolerances_mm(self, values: Iterable[Value]) -> dict[Value, float]:
        """The tolerance of each of `values`; labels without names are called as their values."""
        own = self.own_tolerances_mm
        if self.labels is None:
            return {value: own.get(str(value), self.usual_tolerance_mm) for value in values}
        by_value = {self.labels[name]: tolerance for name, tolerance in own.items()}
        return {value: by_value.get(value, self.usual_tolerance_mm) for value in values}

    def told(self, names: Iterable[str]) -> dict[str, Any]:
        """What summary.json says of the choices; the tolerance is one number, or one for each of the labels `names`."""
        own, usual = self.own_tolerances_mm, float(self.usual_tolerance_mm)
        return {
            "surface": self.surface,
            "nsd_tolerance_mm": {name: float(own.get(name, usual)) for name in names} if own else usual,
            "ignore_value": self.ignore_value,
            "extra": list(self.extra),
            "lesions": None if self.lesion_rule is None else self.lesion_rule.name,
            "resample_prediction": bool(self.resample_prediction),
        }

    def _take_labels(self, labels: Mapping[str, Value]) -> None:
        if self.ignore_value is None and IGNORE in labels:
            value = labels[IGNORE]
            if isinstance(value, tuple) and len(value) > 1:
                raise DataError(
                    f"label {IGNORE!r} is the region {value}, expected one value; merge them in the references"
                )
            object.__setattr__(self, "ignore_value", value[0] if isinstance(value, tuple) else value)
        judged = {n: v for n, v in labels.items() if n not in (BACKGROUND, IGNORE) and v not in (0, self.ignore_value)}
        if not judged:
            raise DataError("labels name nothing but background; give at least one name with its value")
        object.__setattr__(self, "labels", judged)

    def _check_tolerances(self) -> None:
        chosen = self.nsd_tolerance_mm
        for tolerance in chosen.values() if isinstance(chosen, Mapping) else [chosen]:
            if not _is_number(tolerance, Real):
                raise DataError(f"NSD tolerance {tolerance!r} found, expected a number of mm, or one by label name")
            if not 0 <= tolerance < math.inf:
                raise DataError(f"NSD tolerance of {tolerance} mm found, expected 0 or more")
        own = self.own_tolerances_mm
        if self.labels is None:
            unknown = [name for name in own if not str(name).isdecimal()]
            known = "values such as 1, as long as no labels give them names"
        else:
            unknown = [name for name in own if name not in self.labels]
            known = ", ".join(self.labels)
        if unknown:
            found = ", ".join(map(str, unknown))
            raise DataError(f"NSD tolerance for unknown labels {found} found, expected some of: {known}")


def _checked_labels(labels: Mapping[str, Value]) -> dict[str, Value]:
    """Names with whole numbers, lists of them as tuples. Raises `DataError` for all else."""
    if not isinstance(labels, Mapping) or not all(isinstance(name, str) and name for name in labels):
        raise DataError(f"labels {labels!r} found, expected names with values, such as {{'liver': 1, 'both': (1, 2)}}")
    found: dict[str, Value] = {}
    for name, value in labels.items():
        if isinstance(value, list | tuple):
            found[name] = tuple(_label_value(each, f"label {name!r}") for each in value)
            if not value or (0 in value and name != BACKGROUND):
                raise DataError(f"label {name!r} is the region {value!r}, expected one value or more, all above 0")
        else:
            found[name] = _label_value(value, f"label {name!r}")
    return found


def _label_value(value: object, what: str) -> int:
    whole = _whole(value, what)
    if not 0 <= whole <= _MOST_VALUE:
        raise DataError(f"{what} is {whole}, expected 0 to {_MOST_VALUE}")
    return whole


def _whole(value: Any, what: str) -> int:
    if not _is_number(value, Integral):
        raise DataError(f"{what}: {value!r} found, expected a whole number")
    return int(value)


def _is_number(value: object, kind: type) -> bool:
    # a bool is a whole number to Python, and nobody's label
    return isinstance(value, kind) and not isinstance(value, bool)


def _extra(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise DataError(f"extra {names!r} found, expected a tuple of {', '.join(metrics.EXTRA)}")
    found = tuple(names)
    unknown = [name for name in found if name not in metrics.EXTRA]
    if unknown:
        raise DataError(f"extra measures {', '.join(unknown)} are unknown, expected {', '.join(metrics.EXTRA)}")
    return tuple(name for name in metrics.EXTRA if name in found)


def _rule(chosen: LesionRule | str | None) -> LesionRule | None:
    if chosen is None or isinstance(chosen, LesionRule):
        return chosen
    if chosen not in LESION_RULES:
        raise DataError(f"lesion rule {chosen!r} is unknown, expected one of {', '.join(LESION_RULES)}")
    return LESION_RULES[chosen]
