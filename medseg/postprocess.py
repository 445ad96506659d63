"""What happens to scores before they become labels: a conditional random field; on the network's grid, nothing on disk.

The field is the fully connected one of Krähenbühl & Koltun (NIPS 2011), which DeepLab v1 and v2 end with, cut off at a
distance as in Teichmann & Cipolla (ConvCRF, BMVC 2019). With p the network's probabilities, mean-field inference starts
at Q = p and repeats, for every voxel i and label l at once,

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from medseg.config import PostprocessConfig

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
    `regions` every channel is a yes or no of its own. Runs where `scores` are and holds up to nine times their memory.
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
