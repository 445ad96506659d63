"""Lesions one by one: connected components of one prediction matched with those of its reference; no whole labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from medseg.metrics.codes import Box, Labels, Mask, Value, check_spacing, encode, union
from medseg.metrics.surfaces import Surface, surface_metrics

Outcome = Literal["tp", "fp", "fn"]
Matching = Literal["one_to_one", "merged"]
_Labels = npt.NDArray[np.int32]
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

# the longest way through the 240 × 240 × 155 mm of a BraTS volume, as the challenge rounds it
BRATS_PENALTY_MM = 374.0
# the challenge grows the reference by neighbours that share a face or an edge: 18 in 3D (8 in 2D)
_GROWTH_CONNECTIVITY = 2
# of matchings with one total IoU the one with more pairs: below any difference of IoU that means something
_MORE_PAIRS = 1e-9
# spacings of files are single precision: a volume of three is known to 2e-7 of itself
_VOLUME_TIE = 1e-6
_SLAB_VOXELS = 1 << 20


@dataclass(frozen=True)
class LesionRule:
    """What a lesion is and which prediction finds it. All fields fit into JSON.

    `connectivity`: voxels hang together by a face (1), an edge (2) or a corner (3; in 2D the same as 2).
    `matching` `one_to_one`: components of both maps whose IoU is above `minimal_iou` can be a pair, each in one pair at
    most; of all choices the one with the largest total IoU (Hungarian method; above 0.5 there is no choice).
    `merged` (BraTS): the reference is grown by `dilation` voxels to find out which of its components are one lesion;
    all predicted components that touch the grown lesion are together its prediction, and may be that of another too.

    Reference lesions of `minimal_mm3` or less (2D: mm²) are not judged, nor is what finds them. `unmatched_hd95_mm`
    counts for each missed and each spurious lesion; None: the mean is over found ones. `empty_dice` and
    `empty_hd95_mm` are given where there is nothing to judge; None: NaN.
    """

    name: str
    matching: Matching = "one_to_one"
    connectivity: int = 3
    minimal_iou: float = 0.0
    dilation: int = 0
    minimal_mm3: float = 0.0
    unmatched_hd95_mm: float | None = None
    empty_dice: float | None = None
    empty_hd95_mm: float | None = None


def _brats(name: str, *, dilation: int, minimal_mm3: float) -> LesionRule:
    return LesionRule(
        name,
        "merged",
        dilation=dilation,
        minimal_mm3=minimal_mm3,
        unmatched_hd95_mm=BRATS_PENALTY_MM,
        empty_dice=1.0,
        empty_hd95_mm=0.0,
    )


LESION_RULES: Mapping[str, LesionRule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            LesionRule("default"),
            LesionRule("panoptic", minimal_iou=0.5),
            _brats("brats2023", dilation=3, minimal_mm3=50),
            _brats("brats2023_men", dilation=1, minimal_mm3=50),
            _brats("brats2023_met", dilation=1, minimal_mm3=2),
        )
    }
)
"""The rules that have a name.

`default`: any overlap finds a lesion, as in the WMH (Kuijf et al. 2019) and ISLES (Hernandez Petzsche et al. 2022)
challenges: a small lesion whose outline is off by a voxel has an IoU below 0.5 and was found all the same. Stricter
than these: a prediction that runs over two lesions finds one of them.
`panoptic`: IoU above 0.5 (Kirillov et al. 2019, Panoptic Segmentation).
`brats2023`: the lesion-wise Dice and HD95 of the BraTS 2023 challenge for glioma, sub-Saharan Africa and paediatrics;
`brats2023_men` meningioma, `brats2023_met` metastases. Constants as in the organisers' evaluation
(github.com/rachitsaluja/BraTS-2023-Metrics) and announcement (synapse.org, syn51156910, thread 10357): growth by 3, 1
and 1 voxels with 18 neighbours; components with 26; reference lesions of up to 50, 50 and 2 mm³ left out; a missed or
spurious lesion counts with Dice 0 and 374 mm, a spurious one whatever its size; Dice 1 and 0 mm where there is none.
"""


@dataclass(frozen=True, slots=True)
class Lesion:
    """One lesion: found (`tp`), spurious (`fp`) or missed (`fn`); unmatched: IoU and Dice 0, HD95 that of the rule."""

    outcome: Outcome
    reference_voxels: int
    prediction_voxels: int
    iou: float
    dice: float
    hd95_mm: float


@dataclass(frozen=True)
class LesionMetrics:
    """Counts of lesions of one label, and what follows from them; NaN: not defined.

    `n_reference`: lesions judged, tp + fn; `n_prediction`: predicted components. `sq`, `rq`, `pq`: segmentation,
    recognition and panoptic quality, NaN for a rule that merges. `lesion_dice`: mean over found, missed and spurious
    lesions, the last two with 0; `lesion_hd95_mm`: as the rule says.
    """

    n_reference: int
    n_prediction: int
    tp: int
    fp: int
    fn: int
    sensitivity: float
    precision: float
    f1: float
    sq: float
    rq: float
    pq: float
    lesion_dice: float
    lesion_hd95_mm: float
    lesions: tuple[Lesion, ...]


def measure_lesions(
    prediction: Labels,
    reference: Labels,
    values: Collection[Value],
    *,
    spacing_mm: Sequence[float],
    voxel_mm3: float | None = None,
    ignore_value: int | None = None,
    rule: LesionRule = LESION_RULES["default"],
    surface: Surface = "surfel",
) -> dict[Value, LesionMetrics]:
    """Lesions of each of `values`. Both maps: (I, J) or (I, J, K) integer, of one shape.

    Panoptic quality (Kirillov et al. 2019): PQ = ΣIoU of the pairs / (TP + FP/2 + FN/2) = SQ · RQ; SQ is the mean IoU
    of the pairs (NaN without any), RQ the F1. Voxels where the reference is `ignore_value` belong to neither map, so
    components end there. `voxel_mm3` is the volume of a voxel (2D: mm²) where axes are not at right angles; None: the
    product of the spacing. Raises `ValueError` if the shapes differ, a map is not integer or the spacing is no length.
    """
    check_spacing(spacing_mm, reference.ndim)
    pair = encode(prediction, reference, values, ignore_value)
    boxes = pair.boxes()
    match = _MATCHINGS[rule.matching]
    least = rule.minimal_mm3 * (1 + _VOLUME_TIE) / (math.prod(spacing_mm) if voxel_mm3 is None else voxel_mm3)
    result = {}
    for value in values:
        found = [boxes[code] for code in pair.codes(value) if code in boxes]
        if not found:
            result[value] = _summary([], 0, rule)
            continue
        # growth stays inside the box
        masks = pair.masks(value, _grown(union(found), rule.dilation, reference.shape))
        matched = match(*masks, rule)
        result[value] = _summary(_lesions(matched, rule, least, spacing_mm, surface), matched.prediction.count, rule)
    return result


@dataclass(frozen=True, eq=False)
class _Components:
    """`labels` 1…n, 0 outside, and the `voxels` of each label from 0 on; those of 0 are not counted."""

    labels: _Labels
    voxels: _Ints

    @staticmethod
    def of(mask: Mask, connectivity: int) -> _Components:
        labels, count = _label(mask, connectivity)
        return _Components(labels, _voxels(labels, mask, count))

    @property
    def count(self) -> int:
        return len(self.voxels) - 1


@dataclass(frozen=True, eq=False)
class _Matched:
    """For each lesion of the reference the labels of its prediction and the voxels they share; the rest is spurious."""

    prediction: _Components
    reference: _Components
    found_by: Mapping[int, _Ints]
    shared: _Ints
    spurious: _Ints


def _one_to_one(prediction: Mask, reference: Mask, rule: LesionRule) -> _Matched:
    p, r = (_Components.of(m, rule.connectivity) for m in (prediction, reference))
    rows, columns, shared = _pairs(r.labels, p.labels, prediction & reference, p.count)
    iou = shared / (r.voxels[rows] + p.voxels[columns] - shared)
    near = iou > rule.minimal_iou
    chosen = np.flatnonzero(near)[_assign(rows[near], columns[near], iou[near])]
    shared_by_row = np.zeros(r.count + 1, np.int64)
    shared_by_row[rows[chosen]] = shared[chosen]
    found_by = {int(row): columns[at : at + 1] for row, at in zip(rows[chosen], chosen)}
    return _Matched(p, r, found_by, shared_by_row, _without(p.count, columns[chosen]))


def _merged(prediction: Mask, reference: Mask, rule: LesionRule) -> _Matched:
    p = _Components.of(prediction, rule.connectivity)
    grown = reference
    if rule.dilation:
        structure = _structure(reference.ndim, _GROWTH_CONNECTIVITY)
        grown = ndimage.binary_dilation(reference, structure, iterations=rule.dilation)
    # a grown component is what its own lesion grows to: no lesion needs to be grown by itself
    labels, count = _label(grown, rule.connectivity)
    rows, columns, _ = _pairs(labels, p.labels, grown & prediction, p.count)
    labels[~reference] = 0
    r = _Components(labels, _voxels(labels, reference, count))
    shared = _voxels(labels, prediction & reference, count)
    cuts = np.flatnonzero(np.diff(rows)) + 1
    found_by = {int(row[0]): column for row, column in zip(np.split(rows, cuts), np.split(columns, cuts)) if len(row)}
    return _Matched(p, r, found_by, shared, _without(p.count, columns))


_MATCHINGS = {"one_to_one": _one_to_one, "merged": _merged}


def _lesions(
    matched: _Matched, rule: LesionRule, least: float, spacing_mm: Sequence[float], surface: Surface
) -> list[Lesion]:
    """`least`: of so many voxels or fewer a lesion of the reference is not judged."""
    p, r = matched.prediction, matched.reference
    p_boxes, r_boxes = ndimage.find_objects(p.labels), ndimage.find_objects(r.labels)
    alone = _or_nan(rule.unmatched_hd95_mm)
    lesions = []
    for row in range(1, r.count + 1):
        size = int(r.voxels[row])
        if size <= least:
            continue
        columns = matched.found_by.get(row)
        if columns is None:
            lesions.append(Lesion("fn", size, 0, 0.0, 0.0, alone))
            continue
        shared, other = int(matched.shared[row]), int(p.voxels[columns].sum())
        box = union([r_boxes[row - 1], *(p_boxes[c - 1] for c in columns)])
        mask = _any_of(p.labels[box], columns)
        distances = surface_metrics(mask, r.labels[box] == row, spacing_mm=spacing_mm, surface=surface)
        iou, dice = shared / (size + other - shared), 2 * shared / (size + other)
        lesions.append(Lesion("tp", size, other, iou, dice, distances.hd95_mm))
    return lesions + [Lesion("fp", 0, int(p.voxels[c]), 0.0, 0.0, alone) for c in matched.spurious]


def _summary(lesions: Sequence[Lesion], n_prediction: int, rule: LesionRule) -> LesionMetrics:
    tp, fp, fn = (sum(lesion.outcome == o for lesion in lesions) for o in ("tp", "fp", "fn"))
    total_iou = sum(lesion.iou for lesion in lesions)
    f1 = _ratio(2 * tp, 2 * tp + fp + fn)
    unique = rule.matching == "one_to_one"
    distances = [x.hd95_mm for x in lesions if x.outcome == "tp" or rule.unmatched_hd95_mm is not None]
    return LesionMetrics(
        n_reference=tp + fn,
        n_prediction=n_prediction,
        tp=tp,
        fp=fp,
        fn=fn,
        sensitivity=_ratio(tp, tp + fn),
        precision=_ratio(tp, tp + fp),
        f1=f1,
        sq=_ratio(total_iou, tp) if unique else _NAN,
        rq=f1 if unique else _NAN,
        pq=_ratio(2 * total_iou, 2 * tp + fp + fn) if unique else _NAN,
        lesion_dice=_ratio(sum(x.dice for x in lesions), len(lesions)) if lesions else _or_nan(rule.empty_dice),
        lesion_hd95_mm=_ratio(sum(distances), len(distances)) if lesions else _or_nan(rule.empty_hd95_mm),
        lesions=tuple(lesions),
    )


def _assign(rows: _Ints, columns: _Ints, iou: _Floats) -> _Ints:
    """Which of the pairs (rows[n], columns[n]) are chosen: each row and column once at most, the total IoU largest."""
    lone = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)
    rest = np.flatnonzero(~lone)
    if not len(rest):
        return np.flatnonzero(lone)
    row, i = np.unique(rows[rest], return_inverse=True)
    column, j = np.unique(columns[rest], return_inverse=True)
    n, m = len(row), len(column)
    # A matching that may leave some out becomes one of all: whoever stays alone is matched with its own stand-in, and
    # the stand-ins of a pair with each other. All of it is as sparse as the overlaps are.
    rights, lefts = np.arange(n), np.arange(m)
    starts = np.concatenate([i, rights, n + lefts, n + j])
    ends = np.concatenate([j, m + rights, lefts, m + i])
    weights = np.ones(len(starts))
    weights[: len(rest)] += iou[rest] + _MORE_PAIRS
    graph = sparse.csr_array((weights, (starts, ends)), shape=(n + m, n + m))
    start, end = csgraph.min_weight_full_bipartite_matching(graph, maximize=True)
    partner = np.full(n + m, -1)
    partner[start] = end
    return np.sort(np.concatenate([np.flatnonzero(lone), rest[partner[i] == j]]))


def _pairs(rows: _Labels, columns: _Labels, where: Mask, n_columns: int) -> tuple[_Ints, _Ints, _Ints]:
    """Which labels meet in `where`, by row and then column, and in how many voxels."""
    width = n_columns + 1
    codes, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for slab in _slabs(where.shape):
        inside = where[slab]
        met = rows[slab][inside].astype(np.int64) * width + columns[slab][inside]
        if met.max(initial=0) <= _SLAB_VOXELS:
            # few labels: no sorting
            table = np.bincount(met)
            code = np.flatnonzero(table)
            number = table[code]
        else:
            code, number = np.unique(met, return_counts=True)
        codes.append(code)
        numbers.append(number)
    found, place = np.unique(np.concatenate(codes), return_inverse=True)
    total = np.bincount(place, weights=np.concatenate(numbers), minlength=len(found)).astype(np.int64)
    return found // width, found % width, total


def _voxels(labels: _Labels, where: Mask, count: int) -> _Ints:
    """Voxels of each label in `where`."""
    total = np.zeros(count + 1, np.int64)
    for slab in _slabs(where.shape):
        found = np.bincount(labels[slab][where[slab]])
        total[: len(found)] += found
    return total


def _slabs(shape: Sequence[int]) -> list[slice]:
    # counting needs eight bytes a voxel and more
    step = max(1, _SLAB_VOXELS * shape[0] // max(1, math.prod(shape)))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _label(mask: Mask, connectivity: int) -> tuple[_Labels, int]:
    labels = np.empty(mask.shape, np.int32)
    return labels, int(ndimage.label(mask, _structure(mask.ndim, connectivity), output=labels))


def _any_of(labels: _Labels, wanted: _Ints) -> Mask:
    return np.asarray(np.isin(labels, wanted, kind="table") if len(wanted) > 1 else labels == wanted[0])


def _structure(dims: int, connectivity: int) -> Mask:
    return np.asarray(ndimage.generate_binary_structure(dims, min(connectivity, dims)))


def _without(count: int, taken: _Ints) -> _Ints:
    free = np.ones(count + 1, bool)
    free[0] = False
    free[taken] = False
    return np.flatnonzero(free)


def _grown(box: Box, margin: int, shape: Sequence[int]) -> Box:
    return tuple(slice(max(0, s.start - margin), min(n, s.stop + margin)) for s, n in zip(box, shape))


_NAN = float("nan")


def _or_nan(value: float | None) -> float:
    return _NAN if value is None else value


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else _NAN
