"""Counts, overlap, surface distances and volumes of one prediction against its reference; no files, no statistics."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from medseg.metrics.boundary import boundary_iou
from medseg.metrics.centreline import centreline_dice
from medseg.metrics.codes import Box, Labels, Mask, Value, check_spacing, encode, judged, present_values, union
from medseg.metrics.counts import (
    Counts,
    Status,
    counts,
    dice,
    iou,
    pair_counts,
    precision,
    recall,
    relative_volume_difference,
    specificity,
    status,
)
from medseg.metrics.surfaces import (
    SURFACES,
    TIE_TOLERANCE,
    Distances,
    Surface,
    SurfaceMetrics,
    surface_distances,
    surface_metrics,
)
from medseg.metrics.surfels import Floats

__all__ = [
    "EXTRA",
    "SURFACES",
    "TIE_TOLERANCE",
    "Box",
    "Counts",
    "Distances",
    "Floats",
    "Labels",
    "Mask",
    "PairMetrics",
    "Status",
    "Surface",
    "SurfaceMetrics",
    "Value",
    "both_empty",
    "boundary_iou",
    "centreline_dice",
    "counts",
    "dice",
    "iou",
    "judged",
    "measure",
    "missing_prediction",
    "precision",
    "present_values",
    "recall",
    "relative_volume_difference",
    "specificity",
    "status",
    "surface_distances",
    "surface_metrics",
]

EXTRA = ("boundary_iou", "cldice")
"""Measures that are worked out only when asked for."""
_NAN, _INF = float("nan"), float("inf")


@dataclass(frozen=True)
class PairMetrics:
    """All measures of one label in one case, in the columns of the report; NaN: not defined, or not asked for."""

    status: Status
    tp: int | None
    fp: int | None
    fn: int | None
    dice: float
    iou: float
    precision: float
    recall: float
    hd_mm: float
    hd95_mm: float
    assd_mm: float
    nsd: float
    reference_ml: float
    prediction_ml: float
    volume_difference_ml: float
    specificity: float
    masd_mm: float
    relative_volume_difference: float
    boundary_iou: float = _NAN
    cldice: float = _NAN


def measure(
    prediction: Labels,
    reference: Labels,
    values: Collection[Value],
    *,
    spacing_mm: Sequence[float],
    voxel_mm3: float | None = None,
    ignore_value: int | None = None,
    surface: Surface = "surfel",
    nsd_tolerance_mm: float | Mapping[Value, float] = 1.0,
    extra: Collection[str] = (),
) -> dict[Value, PairMetrics]:
    """Every measure for each of `values`. Both maps: (I, J) or (I, J, K) integer, of one shape.

    Voxels where the reference is `ignore_value` belong to neither map. Volumes of 2D maps are NaN. `voxel_mm3` is the
    volume of a voxel where axes are not at right angles; None: the product of the spacing. Distances take the axes to
    be at right angles. `nsd_tolerance_mm` is one for all or one for each of `values`; it is also how near the contour
    boundary IoU looks. `extra` names those of `EXTRA` that are wanted; clDice needs scikit-image. Raises `ValueError`
    if the shapes differ, a map is not integer, the spacing or a tolerance is no length, a value has no tolerance, or
    an extra measure is unknown.
    """
    if unknown := set(extra) - set(EXTRA):
        raise ValueError(f"extra measures {sorted(unknown)} are unknown, expected some of {list(EXTRA)}")
    tolerances = _tolerances(values, nsd_tolerance_mm)
    check_spacing(spacing_mm, reference.ndim)
    pair = encode(prediction, reference, values, ignore_value)
    boxes = pair.boxes()
    voxel_ml = _voxel_ml(spacing_mm, voxel_mm3)
    result = {}
    for value, c in pair_counts(pair, values, boxes).items():
        distances = _WITHOUT_SURFACE.get(status(c))
        asked = dict.fromkeys(extra, _NAN if status(c) == "both_empty" else 0.0)
        if distances is None:
            masks = pair.masks(value, union(boxes[code] for code in pair.codes(value) if code in boxes))
            tolerance = tolerances[value]
            distances = surface_metrics(*masks, spacing_mm=spacing_mm, surface=surface, nsd_tolerance_mm=tolerance)
            if "boundary_iou" in asked:
                asked["boundary_iou"] = boundary_iou(*masks, spacing_mm=spacing_mm, within_mm=tolerance)
            if "cldice" in asked:
                asked["cldice"] = centreline_dice(*masks)
        result[value] = _row(c, distances, voxel_ml, specificity(c, pair.n_judged), asked)
    return result


def missing_prediction(
    reference_voxels: int, *, spacing_mm: Sequence[float], voxel_mm3: float | None = None
) -> PairMetrics:
    """The row of a case nobody predicted: only the volume of the reference is known. `voxel_mm3` as for `measure`."""
    volume = reference_voxels * _voxel_ml(spacing_mm, voxel_mm3)
    unknown = _NAN, _NAN, _NAN, _NAN
    return PairMetrics("missing_prediction", None, None, None, *unknown, *unknown, volume, _NAN, _NAN, _NAN, _NAN, _NAN)


def both_empty(*, spacing_mm: Sequence[float]) -> PairMetrics:
    """The row of a label that neither map holds; of its voxels all that are judged are true negatives."""
    return _row(Counts(0, 0, 0), _WITHOUT_SURFACE["both_empty"], _voxel_ml(spacing_mm, None), 1.0, {})


def _row(
    c: Counts, distances: SurfaceMetrics, voxel_ml: float, specific: float, asked: Mapping[str, float]
) -> PairMetrics:
    return PairMetrics(
        status=status(c),
        tp=c.tp,
        fp=c.fp,
        fn=c.fn,
        dice=dice(c),
        iou=iou(c),
        precision=precision(c),
        recall=recall(c),
        hd_mm=distances.hd_mm,
        hd95_mm=distances.hd95_mm,
        assd_mm=distances.assd_mm,
        nsd=distances.nsd,
        reference_ml=c.reference * voxel_ml,
        prediction_ml=c.prediction * voxel_ml,
        volume_difference_ml=(c.prediction - c.reference) * voxel_ml,
        specificity=specific,
        masd_mm=distances.masd_mm,
        relative_volume_difference=relative_volume_difference(c),
        **asked,
    )


# what stands for distances where at least one of the two has no surface
_WITHOUT_SURFACE = {
    "both_empty": SurfaceMetrics(_NAN, _NAN, _NAN, _NAN, _NAN),
    "missed": SurfaceMetrics(_INF, _INF, _INF, _INF, 0.0),
    "spurious": SurfaceMetrics(_INF, _INF, _INF, _INF, 0.0),
}


def _tolerances(values: Collection[Value], given: float | Mapping[Value, float]) -> dict[Value, float]:
    if isinstance(given, Mapping):
        if without := [value for value in values if value not in given]:
            raise ValueError(f"no NSD tolerance for {without}, only for {list(given)}")
        tolerances = {value: float(given[value]) for value in values}
    else:
        tolerances = dict.fromkeys(values, float(given))
    if wrong := [mm for mm in tolerances.values() if not 0 <= mm < math.inf]:
        raise ValueError(f"NSD tolerance of {wrong[0]} mm found, expected 0 or more")
    return tolerances


def _voxel_ml(spacing_mm: Sequence[float], voxel_mm3: float | None) -> float:
    if len(spacing_mm) != 3:
        return _NAN
    return (math.prod(spacing_mm) if voxel_mm3 is None else voxel_mm3) / 1000
