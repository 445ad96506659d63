"""What happens to scores before they become labels (a conditional random field) and to labels after; nothing on disk.

Labels are cleaned on the file's grid: small parts go, holes are filled, and `choose` finds out where that helps.

The field, on the network's grid, is the fully connected one of Krähenbühl & Koltun (NIPS 2011), which DeepLab v1 and v2
end with, cut off at a distance as in Teichmann & Cipolla (ConvCRF, BMVC 2019). With p the network's probabilities,
mean-field inference starts at Q = p and repeats, for every voxel i and label l at once,

    Q_i(l) ∝ p_i(l) · exp( μ · Σ_m w_m Σ_{j≠i} k_m(i, j) / √(n_m(i) n_m(j)) · Q_j(l) ),    n_m(i) = Σ_j k_m(i, j)
    smoothness   k_1(i, j) = exp( −|x_i − x_j|² / 2 smoothness_mm² )
    appearance   k_2(i, j) = exp( −|x_i − x_j|² / 2 appearance_mm² − |I_i − I_j|² / 2 intensity_sd² )

with x in mm and I the normalised image, all channels together; μ is Potts' price of two different labels. Dividing by
√(n_i n_j), n with the voxel itself, is what the authors' own program does (its default, `NORMALIZE_SYMMETRIC`): weights
mean the same at a border, in any dimension and for any width. That program lets a voxel also send a message to itself;
here, as in the paper's formula, it does not: a voxel without neighbours keeps what the network said.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medseg.config import PostprocessConfig
from medseg.metrics import Counts, Labels, Mask, dice
from medseg.metrics.codes import Box, union
from medseg.statistics import summarise

log = logging.getLogger(__name__)

# nothing is more certain than this: its logarithm stays small beside the rounding of float32 in 1 − p
LEAST_PROBABILITY = 1e-5
# pairs are done in slabs of so many voxels: on a processor they stay in its cache; a graphics card wants long work
SLAB_VOXELS = {"cpu": 2**17}
SLAB_VOXELS_ELSEWHERE = 2**24
# e^−40 is nothing beside n ≥ 1; smaller still, numbers turn denormal and a processor several times slower
LEAST_EXPONENT = -40.0
# a neighbour exactly on the radius is inside, whatever the rounding of mm / mm
ROUNDING = 1e-6

# a label map is read in chunks of so many voxels: they stay in a processor's cache
CHUNK_VOXELS = 2**20
# fewer cases say nothing about others
LEAST_CASES = 5
# a smaller change of the mean Dice is not worth a setting
LEAST_DIFFERENCE = 5e-4
# minimum sizes that are tried, as shares of the smallest part in any reference: nothing real is below it, and a part
# that is predicted too small still has a chance
SIZE_SHARES = (0.125, 0.25, 0.5, 1.0)

Integers = npt.NDArray[np.intp]
# (K, *S) → (K, *S): the sum over all other voxels in reach, each times its kernel
Kernel = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def refine(
    config: PostprocessConfig,
    scores: torch.Tensor,
    image: torch.Tensor,
    *,
    spacing_mm: Sequence[float],
    regions: bool = False,
) -> torch.Tensor:
    """Probabilities (K, *S) float32 after what `config` asks for; `scores` themselves where it asks for nothing.

    `scores` (K, *S): probabilities; `image` (C, *S): what the network saw, with voxels `spacing_mm` apart. With
    `regions` every channel is a yes or no of its own. Runs where `scores` are and holds what `held_by_field` tells.
    Raises `ValueError` where shapes do not fit.
    """
    if not config.crf:
        return scores
    shape = tuple(scores.shape[1:])
    if tuple(image.shape[1:]) != shape or len(spacing_mm) != len(shape):
        raise ValueError(
            f"image of {tuple(image.shape[1:])} voxels with {len(spacing_mm)} spacings found, expected {shape}"
        )
    reach = [min(config.crf_radius_mm / s, config.crf_radius_voxels) for s in spacing_mm]
    if all(r + ROUNDING < 1 for r in reach):
        log.warning(
            "postprocess.crf_radius_mm %g is below the spacing %s: no voxel has a neighbour, the field changes nothing",
            config.crf_radius_mm,
            [round(s, 3) for s in spacing_mm],
        )
    image = image.to(scores.device, torch.float32)
    terms = [
        _Term(weight * config.crf_compatibility, kernel, 1 / (1 + kernel(image.new_ones((1, *shape)))).sqrt_())
        for weight, kernel in (
            (config.crf_smoothness_weight, _smoothness(config, reach, spacing_mm)),
            (config.crf_appearance_weight, _appearance(config, reach, spacing_mm, image)),
        )
        if weight > 0
    ]
    return _mean_field(scores.float(), terms, iterations=config.crf_iterations, regions=regions)


def held_by_field(channels: int, image_channels: int) -> int:
    """Numbers in float32 that `refine` holds of a voxel at its peak, scores and image among them.

    As it was seen to, within 0.1, with 1 to 12 channels and images of 1 and 4: eight states of the scores in the
    messages of smoothness, the image twice, and the scale of each of two terms.
    """
    return 8 * channels + 2 * image_channels + 2


def clean(config: PostprocessConfig, labels: Labels, values: Mapping[str, int], *, voxel_mm3: float) -> Labels:
    """Label map (*S) after what `config` asks for; `labels` themselves where nothing changes.

    `labels` (*S): integer, 0 is background; `values`: the value of each label that `config` names; `voxel_mm3`: the
    volume of a voxel, of pictures its area in mm², of signals its length in mm. First only the largest part of a label
    is kept (of equal ones the first in scan order), then parts below the minimum size go, then enclosed background is
    filled. Parts hang together by faces, edges and corners (26, in 2D 8 neighbours), so background leaks through faces
    only (6, in 2D 4). A hole that reaches the border of the image is none, and a line (1D) has no holes. Of labels
    around each other the innermost takes the hole. Holds a copy of the map and, to fill holes, six bytes a voxel of the
    largest part's bounding box. Raises `KeyError` for a label without a value.
    """
    wanted = {values[name]: name for name in (*config.largest_component, *config.min_size_mm3, *config.fill_holes)}
    if not wanted:
        return labels
    result = labels
    shells: list[tuple[int, Box]] = []
    for value, parts in _find_parts(labels, wanted).items():
        name = wanted[value]
        # a part exactly as large as the least stays, whatever the rounding
        gone = parts.sizes * voxel_mm3 < config.min_size_mm3.get(name, 0) * (1 - ROUNDING)
        if name in config.largest_component:
            gone |= ~_largest(parts.sizes)
        if gone.any():
            result = labels.copy() if result is labels else result
            result.reshape(-1)[parts.voxels(gone)] = 0
        if name in config.fill_holes:
            shells += [(value, box) for box in parts.boxes(~gone)]
    # a part that another one encloses has the smaller box
    for value, box in sorted(shells, key=lambda shell: math.prod(s.stop - s.start for s in shell[1])):
        if (hole := _find_holes(result[box], value)) is not None:
            result = labels.copy() if result is labels else result
            result[box][hole] = value
    return result


@dataclass(frozen=True)
class Choice:
    """What helped on validation cases: `settings` of `postprocess` to lay over, and what each one tried did.

    `table`: one row per label and setting tried, for JSON: `label`, `what` (the setting's name), `mm3` (a minimum
    size, else None), `cases`, mean Dice `before` and `after`, their `difference` with the 95 % interval `low` to
    `high` (None: too few cases), and whether it was `kept`. `warnings`: in words, why nothing could be chosen.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    table: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def choose(
    cases: Iterable[tuple[Labels, Labels, float]],
    values: Mapping[str, int],
    *,
    ignore_value: int | None = None,
) -> Choice:
    """The settings of `clean` that raise the Dice of a label, each label and each setting on its own.

    `cases`: predicted and reference label map (*S) and the `voxel_mm3` of `clean`, read once, one after the other;
    `values`: the value of each label; voxels where the reference is `ignore_value` are not counted. A setting helps if
    the mean of the paired differences of Dice over cases is above `LEAST_DIFFERENCE` and the bootstrap interval of that
    mean above 0. Of the largest part and the minimum sizes that help, the best is kept. A case where neither map has
    the label is left out; where a setting makes it so, which is right, its Dice goes from 0 to 1. Settings are judged
    one at a time and there are several per label: judge what they do together before it is used. Raises `ValueError`
    where the shapes of a case differ.
    """
    found: dict[str, list[_Found]] = {name: [] for name in values}
    count = 0
    for prediction, reference, voxel_mm3 in cases:
        count += 1
        if prediction.shape != reference.shape:
            raise ValueError(f"prediction of {prediction.shape} voxels found, expected {reference.shape}")
        for name, one in _look(prediction, reference, values, voxel_mm3, ignore_value).items():
            found[name].append(one)
    if count < LEAST_CASES:
        reason = f"post-processing: {count} validation cases are too few to choose it by, expected {LEAST_CASES}"
        log.warning(reason)
        return Choice(warnings=(reason,))
    table = [row for name in values for row in _rows(name, found[name])]
    kept = [row for row in table if row["kept"]]
    settings: dict[str, Any] = {
        what: tuple(row["label"] for row in kept if row["what"] == what) for what in ("largest_component", "fill_holes")
    }
    settings["min_size_mm3"] = {row["label"]: row["mm3"] for row in kept if row["what"] == "min_size_mm3"}
    return Choice({what: value for what, value in settings.items() if value}, tuple(table))


@dataclass(frozen=True)
class _Found:
    """One label in one case. Voxels that are ignored count in sizes only.

    By predicted part, in voxels: `sizes`, `counted` and `hits`. `reference`: voxels of the reference; `smallest_mm3`:
    its smallest part (inf: it has none). `hole`: background voxels that the label encloses; `hole_hits`: those of them
    that the reference has.
    """

    voxel_mm3: float
    sizes: Integers
    counted: Integers
    hits: Integers
    reference: int
    smallest_mm3: float
    hole: int
    hole_hits: int

    def dice(self, stays: Mask | None = None, *, filled: bool = False) -> float:
        """Dice of the parts that stay (None: all), with the holes if `filled`; NaN where nothing is on either side."""
        stays = np.ones(len(self.sizes), bool) if stays is None else stays
        tp = int(self.hits[stays].sum()) + filled * self.hole_hits
        predicted = int(self.counted[stays].sum()) + filled * self.hole
        return dice(Counts(tp, predicted - tp, self.reference - tp))

    def at_least(self, mm3: float) -> Mask:
        """Which parts a minimum size leaves."""
        return np.asarray(self.sizes * self.voxel_mm3 >= mm3 * (1 - ROUNDING))


def _look(
    prediction: Labels,
    reference: Labels,
    values: Mapping[str, int],
    voxel_mm3: float,
    ignore_value: int | None,
) -> dict[str, _Found]:
    predicted_parts, true_parts = (_find_parts(m, values.values()) for m in (prediction, reference))
    flat = reference.reshape(-1)
    none = np.zeros(0, np.intp)
    result = {}
    for name, value in values.items():
        true_sizes = true_parts[value].sizes if value in true_parts else none
        sizes = counted = hits = none
        hole = hole_hits = 0
        if value in predicted_parts:
            parts = predicted_parts[value]
            sizes = parts.sizes
            truth, part = flat[parts.voxels()], np.repeat(parts.part, parts.stop - parts.start)
            hits = np.bincount(part[truth == value], minlength=len(sizes))
            counted = sizes if ignore_value is None else np.bincount(part[truth != ignore_value], minlength=len(sizes))
            box = union(parts.boxes())
            if (enclosed := _find_holes(prediction[box], value)) is not None:
                truth = reference[box][enclosed]
                hole, hole_hits = int((truth != ignore_value).sum()), int((truth == value).sum())
        smallest = float(true_sizes.min()) * voxel_mm3 if len(true_sizes) else math.inf
        result[name] = _Found(voxel_mm3, sizes, counted, hits, int(true_sizes.sum()), smallest, hole, hole_hits)
    return result


def _rows(name: str, found: Sequence[_Found]) -> list[dict[str, Any]]:
    """What each setting does to one label; of those that remove parts only the best is kept."""
    before = [one.dice() for one in found]
    rows = [_row(name, "largest_component", None, before, [one.dice(_largest(one.sizes)) for one in found])]
    smallest = min(one.smallest_mm3 for one in found)
    if math.isfinite(smallest):
        for mm3 in sorted({_three_digits(share * smallest) for share in SIZE_SHARES}):
            rows.append(_row(name, "min_size_mm3", mm3, before, [one.dice(one.at_least(mm3)) for one in found]))
    helpful = [row for row in rows if row["kept"]]
    best = max(helpful, key=lambda row: float(row["difference"]), default=None)
    for row in rows:
        row["kept"] = row is best
    return [*rows, _row(name, "fill_holes", None, before, [one.dice(filled=True) for one in found])]


def _row(name: str, what: str, mm3: float | None, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    # an empty map is right where the reference is empty
    pairs = np.array([(b, 1.0 if math.isnan(a) else a) for b, a in zip(before, after) if not math.isnan(b)])
    pairs = pairs.reshape(-1, 2)
    difference = summarise(pairs[:, 1] - pairs[:, 0])
    low, high = difference.ci95 or (None, None)
    helps = len(pairs) >= LEAST_CASES and low is not None and low > 0 and (difference.mean or 0) > LEAST_DIFFERENCE
    mean_before, mean_after = (float(column.mean()) if len(pairs) else None for column in pairs.T)
    row = {"label": name, "what": what, "mm3": mm3, "cases": len(pairs), "before": mean_before, "after": mean_after}
    return row | {"difference": difference.mean, "low": low, "high": high, "kept": helps}


def _three_digits(number: float) -> float:
    """`number` cut, never raised, to three digits: what is exactly as large stays."""
    step = 10.0 ** (math.floor(math.log10(number)) - 2)
    return float(f"{math.floor(number / step * (1 + ROUNDING)) * step:.3g}")


@dataclass(frozen=True)
class _Parts:
    """The connected parts of one label in a map of `shape`, as runs along the last axis.

    `start`, `stop` (R,): the first voxel of a run and the one behind its last, in scan order; `part` (R,): the number
    of its part, from 0 in the order of their first voxels; `sizes` (P,): voxels by part.
    """

    shape: tuple[int, ...]
    start: Integers
    stop: Integers
    part: Integers
    sizes: Integers

    def voxels(self, chosen: Mask | None = None) -> Integers:
        """Places in scan order of the voxels of the `chosen` (P,) parts, or of all."""
        start, stop = self.start, self.stop
        if chosen is not None:
            start, stop = start[chosen[self.part]], stop[chosen[self.part]]
        return _ranges(start, stop)

    def boxes(self, chosen: Mask | None = None) -> list[Box]:
        """Bounding boxes of the `chosen` (P,) parts, or of all."""
        first, last = np.unravel_index(self.start, self.shape), np.unravel_index(self.stop - 1, self.shape)
        low = np.full((len(self.sizes), len(self.shape)), max(self.shape), np.intp)
        high = np.zeros_like(low)
        for axis, (a, b) in enumerate(zip(first, last)):
            np.minimum.at(low[:, axis], self.part, a)
            np.maximum.at(high[:, axis], self.part, b + 1)
        if chosen is not None:
            low, high = low[chosen], high[chosen]
        return [tuple(slice(a, b) for a, b in zip(*box)) for box in zip(low.tolist(), high.tolist())]


def _largest(sizes: Integers) -> Mask:
    """Which of the parts (P,) is the largest; of equal ones the first."""
    return np.asarray(np.arange(len(sizes)) == (sizes.argmax() if len(sizes) else 0))


def _find_parts(labels: Labels, wanted: Collection[int]) -> dict[int, _Parts]:
    """The parts of each of the wanted values that occurs, in one pass over the map (*S)."""
    # runs are few where voxels are many, and islands all over a volume cost no more than those beside each other
    width = labels.shape[-1]
    rows = labels.reshape(-1, width) if labels.size else labels.reshape(0, 1)
    least, most = min(wanted, default=0), max(wanted, default=0)
    found = []
    step = max(1, CHUNK_VOXELS // max(1, width))
    for first in range(0, len(rows), step):
        chunk = rows[first : first + step]
        change = np.ones(chunk.shape, bool)
        np.not_equal(chunk[:, 1:], chunk[:, :-1], out=change[:, 1:])
        start = np.flatnonzero(change)
        value = chunk.reshape(-1)[start]
        chosen = (value >= least) & (value <= most)
        stop = np.append(start[1:], chunk.size)[chosen]
        found.append((value[chosen].astype(np.intp), start[chosen] + first * width, stop + first * width))
    if not found:
        return {}
    values, start, stop = (np.concatenate(column) for column in zip(*found))
    order = np.argsort(values, kind="stable")
    present, begin = np.unique(values[order], return_index=True)
    return {
        int(value): _connect(start[runs], stop[runs], labels.shape)
        for value, runs in zip(present, np.split(order, begin[1:]))
        if value in wanted
    }


def _connect(start: Integers, stop: Integers, shape: tuple[int, ...]) -> _Parts:
    """Runs (R,) as parts: two runs belong together where voxels of them share a face, an edge or a corner."""
    # an empty place behind each axis, so that no neighbour is found around a border
    padded = tuple(n + 1 for n in shape)
    place = np.ravel_multi_index(np.unravel_index(start, shape), padded)
    behind = place + (stop - start)
    here, there = [], []
    for shift in itertools.product((-1, 0, 1), repeat=len(shape) - 1):
        if shift > (0,) * len(shift):
            away = sum(d * math.prod(padded[axis + 1 :]) for axis, d in enumerate(shift))
            low = np.searchsorted(behind, place + away, side="left")
            high = np.maximum(low, np.searchsorted(place, behind + away, side="right"))
            here.append(np.repeat(np.arange(len(start)), high - low))
            there.append(_ranges(low, high))
    pairs = (np.concatenate(here), np.concatenate(there)) if here else (start[:0], start[:0])
    graph = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(len(start), len(start)))
    count, part = connected_components(graph, directed=False)
    sizes = np.bincount(part, weights=stop - start, minlength=count).astype(np.intp)
    return _Parts(shape, start, stop, part.astype(np.intp), sizes)


def _ranges(start: Integers, stop: Integers) -> Integers:
    """start[0], …, stop[0] − 1, start[1], …, stop[1] − 1, …"""
    length = stop - start
    ends = np.cumsum(length)
    return np.asarray(np.repeat(start - ends + length, length) + np.arange(ends[-1] if len(ends) else 0))


def _find_holes(labels: Labels, value: int) -> Mask | None:
    """Background that `value` encloses inside the box `labels` (*S); None where there is none."""
    if labels.ndim == 1 or min(labels.shape) < 3:
        return None
    parts, count = ndimage.label(labels != value)
    enclosed = np.ones(count + 1, bool)
    enclosed[0] = False
    for axis in range(labels.ndim):
        for end in (0, -1):
            enclosed[parts.take(end, axis)] = False
    if not enclosed.any():
        return None
    hole = enclosed[parts]
    hole &= labels == 0
    return hole if hole.any() else None


@dataclass(frozen=True)
class _Term:
    """One pairwise term; `scale` (1, *S) is 1/√n."""

    weight: float
    kernel: Kernel
    scale: torch.Tensor


def _mean_field(scores: torch.Tensor, terms: Sequence[_Term], *, iterations: int, regions: bool) -> torch.Tensor:
    unary = scores.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    unary = unary.logit_() if regions else unary.log_()
    belief = unary.sigmoid() if regions else unary.softmax(dim=0)
    for _ in range(iterations):
        # of two labels with beliefs q and 1 − q only the difference of the messages counts: that of the belief 2q − 1
        sent = belief.mul_(2).sub_(1) if regions else belief
        logits = unary.clone()
        for term in terms:
            logits.addcmul_(term.kernel(sent * term.scale), term.scale, value=term.weight)
        belief = logits.sigmoid_() if regions else logits.softmax(dim=0)
    return belief


def _smoothness(config: PostprocessConfig, reach: Sequence[float], spacing_mm: Sequence[float]) -> Kernel:
    """A Gaussian, axis by axis, so cut off at a box of `reach` voxels."""

    def kernel(field: torch.Tensor) -> torch.Tensor:
        total = field
        for axis, (voxels, spacing) in enumerate(zip(reach, spacing_mm), start=1):
            before, size = total, field.shape[axis]
            total = before.clone()
            for step in range(1, min(math.floor(voxels + ROUNDING), size - 1) + 1):
                tap = math.exp(-0.5 * (step * spacing / config.crf_smoothness_mm) ** 2)
                total.narrow(axis, 0, size - step).add_(before.narrow(axis, step, size - step), alpha=tap)
                total.narrow(axis, step, size - step).add_(before.narrow(axis, 0, size - step), alpha=tap)
        return total - field

    return kernel


def _appearance(
    config: PostprocessConfig, reach: Sequence[float], spacing_mm: Sequence[float], image: torch.Tensor
) -> Kernel:
    """Neighbours inside an ellipsoid of `reach` voxels, one shift after the other; no pair is kept."""
    shape = tuple(image.shape[1:])
    shifts = [
        (shift, math.exp(-0.5 * sum((d * s / config.crf_appearance_mm) ** 2 for d, s in zip(shift, spacing_mm))))
        for shift in _half_neighbourhood(reach, shape)
    ]
    # −|I_i − I_j|² / 2 sd² is then minus the square of a difference
    features = image / (math.sqrt(2) * config.crf_intensity_sd)
    rows = max(1, SLAB_VOXELS.get(image.device.type, SLAB_VOXELS_ELSEWHERE) // max(1, math.prod(shape[1:])))

    def kernel(field: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(field)
        for first in range(0, shape[0], rows):
            for shift, closeness in shifts:
                here, there = _pairs(shape, shift, first, rows)
                alike = (features[here] - features[there]).square_().sum(dim=0).neg_()
                alike.clamp_(min=LEAST_EXPONENT).exp_()
                # i to j and j to i share the weight
                total[here].addcmul_(alike, field[there], value=closeness)
                total[there].addcmul_(alike, field[here], value=closeness)
        return total

    return kernel


def _half_neighbourhood(reach: Sequence[float], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """One of every two opposite shifts inside the ellipsoid with half-axes `reach`, none longer than the image."""
    longest = [min(math.floor(r + ROUNDING), n - 1) for r, n in zip(reach, shape)]
    none = (0,) * len(reach)
    return [
        shift
        for shift in itertools.product(*(range(-n, n + 1) for n in longest))
        if shift > none and sum((d / r) ** 2 for d, r in zip(shift, reach)) <= 1 + ROUNDING
    ]


def _pairs(
    shape: Sequence[int], shift: Sequence[int], first: int, rows: int
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the two voxels of each pair lie, in all channels; one of them in `rows` rows from `first` on."""
    # shift[0] is never negative
    last = max(first, min(first + rows, shape[0] - shift[0]))
    here, there = [slice(None), slice(first, last)], [slice(None), slice(first + shift[0], last + shift[0])]
    for d, n in zip(shift[1:], shape[1:]):
        here.append(slice(max(0, -d), n - max(0, d)))
        there.append(slice(max(0, d), n - max(0, -d)))
    return tuple(here), tuple(there)
