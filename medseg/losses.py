"""What training minimises: cross-entropy + soft Dice, for labels and for regions; nothing of the logits' size is kept.

Everything a loss is made of are sums over voxels. They are taken in chunks, in float64, with gradients written by
hand: beside the logits themselves one number a voxel waits for the way back, and the only volume made is the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from medseg.config import DataConfig, LossConfig
from medseg.metrics.codes import members
from medseg.preprocess import IGNORE_INDEX

# scores done at a time: they stay in a core's cache on a CPU, and fill a GPU without weighing on its memory
CHUNK = {"cpu": 2**19, "cuda": 2**25}


def loss(
    config: LossConfig,
    data: DataConfig,
    logits: torch.Tensor,
    label: torch.Tensor,
    *,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scalar loss of `logits` (B, K, *S) against `label` (B, *S) as `preprocess` encodes it. 0 where all is ignored.

    Cross-entropy is a mean over voxels, soft Dice (Milletari et al. 2016, arXiv:1606.04797, with sums instead of
    squares) a mean over the labels, or the regions, that the batch has: the soft Dice of one that it lacks is 0
    whatever is predicted (Tilborghs et al. 2022, arXiv:2207.09521), which teaches nothing and would only make the
    others count less. Cross-entropy alone teaches that it is not there.

    `reduce` sums a vector (float64) over the ranks of a distributed training, so that every rank has the loss of the
    batch of all of them. Its gradient must be summed over ranks as well, as that of
    `torch.distributed.nn.functional.all_reduce` is; the mean of the ranks' gradients is then the gradient of that loss.
    """
    made = (
        _label_sums(config, data, logits, label) if not data.is_regions else _region_sums(config, data, logits, label)
    )
    parts = torch.cat([made.entropy[None], made.weight[None], *_dice_parts(config, made)])
    if reduce is not None:
        parts = reduce(parts)
    entropy = parts[0] / parts[1].clamp(min=1)
    total = config.cross_entropy_weight * entropy + config.dice_weight * _dice_loss(config, parts[2:])
    return total if logits.dtype == torch.float64 else total.float()


@dataclass(frozen=True)
class _Sums:
    """Over the voxels of a batch that are not ignored, in float64.

    `entropy` () and `weight` (), the number of summands; `overlap`, `predicted`, `reference` (B, R): of probability
    inside the reference, of probability, and of voxels, for every label (but the background) or region.
    """

    entropy: torch.Tensor
    weight: torch.Tensor
    overlap: torch.Tensor
    predicted: torch.Tensor
    reference: torch.Tensor


def _dice_parts(config: LossConfig, sums: _Sums) -> list[torch.Tensor]:
    """What a batch on several ranks sums for its soft Dice: sums by label, or the ratios of single samples."""
    if config.batch_dice:
        return [sums.overlap.sum(0), sums.predicted.sum(0), sums.reference.sum(0)]
    ratio, present = _ratio(config, sums.overlap, sums.predicted, sums.reference)
    return [ratio.sum()[None], present.sum()[None]]


def _dice_loss(config: LossConfig, parts: torch.Tensor) -> torch.Tensor:
    if config.batch_dice:
        ratio, present = _ratio(config, *parts.view(3, -1))
        parts = torch.stack([ratio.sum(), present.sum()])
    return (parts[1] - parts[0]) / parts[1].clamp(min=1)


def _ratio(
    config: LossConfig, overlap: torch.Tensor, predicted: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft Dice, 0 where the reference is empty, and 1 where it is not."""
    present = (reference > 0).to(overlap.dtype)
    return present * (2 * overlap + config.smooth) / (predicted + reference + config.smooth), present


# ---- labels, of which every voxel has one


def _label_sums(config: LossConfig, data: DataConfig, logits: torch.Tensor, label: torch.Tensor) -> _Sums:
    target = label.flatten(1)
    edge = _edge(label, IGNORE_INDEX).flatten(1) if config.boundary_weight else None
    sums = _LabelSums.apply(logits, target, edge, config)  # type: ignore[no-untyped-call]
    entropy, weight, overlap, predicted, reference = sums
    return _Sums(entropy, weight, overlap[:, 1:], predicted[:, 1:], reference[:, 1:])


class _LabelSums(torch.autograd.Function):
    """The sums of `_Sums` over a softmax, background included.

    Kept are the logits as they came and log p of the target.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, edge: torch.Tensor | None, config: LossConfig
    ) -> tuple[torch.Tensor, ...]:
        flat = logits.flatten(2)
        batch, channels, voxels = flat.shape
        overlap = flat.new_zeros(batch * channels, dtype=torch.float64)
        predicted = flat.new_zeros(batch, channels, dtype=torch.float64)
        reference, entropy, weight = (torch.zeros_like(x) for x in (overlap, overlap[0], overlap[0]))
        log_target = flat.new_empty(batch, voxels, dtype=_working_type(flat))
        first = channels * torch.arange(batch, device=flat.device)[:, None]
        for part in _chunks(flat):
            valid, index = _valid_index(target[:, part])
            all_p = _scores(flat, part).log_softmax(1)
            log_p = all_p.gather(1, index[:, None])[:, 0].masked_fill_(~valid, 0)
            log_target[:, part] = log_p
            uneven = all_p.mean(1).masked_fill_(~valid, 0) if config.label_smoothing else None
            here = valid.to(log_p.dtype)
            predicted += all_p.exp_().mul_(here[:, None]).sum(-1)
            bins = (index + first).flatten()
            overlap.scatter_add_(0, bins, (log_p.exp() * here).flatten().double())
            # single precision counts the voxels of a chunk exactly
            reference += here.new_zeros(len(reference)).scatter_add_(0, bins, here.flatten())
            w = _entropy_weight(config, here, None if edge is None else edge[:, part])
            weight += w.sum(dtype=torch.float64)
            entropy += (w * _entropy(config, log_p, uneven)).sum(dtype=torch.float64)
        ctx.save_for_backward(logits, target, log_target, *(() if edge is None else (edge,)))
        ctx.config = config
        shape = (batch, channels)
        reference = reference.view(shape)
        ctx.mark_non_differentiable(weight, reference)
        return entropy, weight, overlap.view(shape), predicted, reference

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, log_target, *rest = ctx.saved_tensors
        config: LossConfig = ctx.config
        flat = logits.flatten(2)
        gradient = torch.empty_like(flat)
        g_entropy, g_overlap, g_predicted = (grads[n].to(log_target.dtype) for n in (0, 2, 3))
        smoothing = config.label_smoothing
        for part in _chunks(flat):
            valid, index = _valid_index(target[:, part])
            log_p, here = log_target[:, part], valid.to(log_target.dtype)
            w = g_entropy * _entropy_weight(config, here, rest[0][:, part] if rest else None)
            w = w * _focal_slope(config, log_p)
            p = _scores(flat, part).softmax(1).mul_(here[:, None])
            # with a = ∂loss/∂p: ∂loss/∂z = p (a − Σ p a), and (p − target) of cross-entropy beside it
            change = p * g_predicted[:, :, None]
            inside = log_p.exp() * here * g_overlap.gather(1, index)
            slope = w - (change.sum(1) + inside)
            change.addcmul_(p, slope[:, None])
            if smoothing:
                change -= (smoothing / flat.shape[1] * w)[:, None]
            gradient[..., part] = change.scatter_add_(1, index[:, None], (inside - (1 - smoothing) * w)[:, None])
        return gradient.view_as(logits), None, None, None


def _valid_index(target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, v): which voxels count, and their output channel; 0 for the others."""
    valid = target != IGNORE_INDEX
    return valid, target.long().masked_fill_(~valid, 0)


def _entropy(config: LossConfig, log_p: torch.Tensor, uneven: torch.Tensor | None) -> torch.Tensor:
    """−log p of the target, smoothed (Szegedy et al. 2016, arXiv:1512.00567) or focal (Lin 2017, arXiv:1708.02002).

    `uneven` is the mean of log p over all labels.
    """
    if uneven is not None:
        return (config.label_smoothing - 1) * log_p - config.label_smoothing * uneven
    if config.focal:
        return -log_p * (-torch.expm1(log_p)) ** config.focal
    return -log_p


def _focal_slope(config: LossConfig, log_p: torch.Tensor) -> torch.Tensor | float:
    """What focal loss multiplies the gradient of cross-entropy by: (1−p)^γ − γ p (1−p)^(γ−1) log p."""
    if not config.focal:
        return 1.0
    # the product with log p is 0 at p = 1, where the power may be infinite
    rest = (-torch.expm1(log_p)).clamp_(min=1e-12)
    return rest**config.focal - config.focal * log_p.exp() * rest ** (config.focal - 1) * log_p


# ---- regions, each of which a voxel has or has not


def _region_sums(config: LossConfig, data: DataConfig, logits: torch.Tensor, label: torch.Tensor) -> _Sums:
    regions = tuple(members(data.labels[name]) for name in data.foreground)
    member, kind = _membership(regions, data.ignore_value, label.device)
    edge = _edge(kind[label.long()], -1).flatten(1) if config.boundary_weight else None
    target = label.flatten(1)
    sums = _RegionSums.apply(logits, target, member, data.ignore_value, edge, config)  # type: ignore[no-untyped-call]
    return _Sums(*sums)


class _RegionSums(torch.autograd.Function):
    """The sums of `_Sums` over sigmoids. Kept: the logits as they came; the way back looks up the regions once more."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        member: torch.Tensor,
        ignore: int | None,
        edge: torch.Tensor | None,
        config: LossConfig,
    ) -> tuple[torch.Tensor, ...]:
        flat = logits.flatten(2)
        batch, channels, _ = flat.shape
        overlap, predicted, reference = flat.new_zeros(3, batch, channels, dtype=torch.float64)
        entropy, weight = torch.zeros_like(overlap[0, 0]), torch.zeros_like(overlap[0, 0])
        ctx.save_for_backward(logits, target, member, *(() if edge is None else (edge,)))
        ctx.config, ctx.ignore = config, ignore
        for part in _chunks(flat):
            z = _scores(flat, part)
            here, inside = _look_up(member, target[:, part], ignore, z.dtype)
            w = _entropy_weight(config, here, None if edge is None else edge[:, part])
            weight += channels * w.sum(dtype=torch.float64)
            log_p = F.logsigmoid(torch.where(inside, z, -z))
            uneven = None if not config.label_smoothing else F.logsigmoid(z) - z / 2
            entropy += (w[:, None] * _entropy(config, log_p, uneven)).sum(dtype=torch.float64)
            p = z.sigmoid().mul_(here[:, None])
            predicted += p.sum(-1)
            overlap += p.mul_(inside).sum(-1)
            reference += (inside & here.bool()[:, None]).sum(-1)
        ctx.mark_non_differentiable(weight, reference)
        return entropy, weight, overlap, predicted, reference

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, member, *rest = ctx.saved_tensors
        config: LossConfig = ctx.config
        flat = logits.flatten(2)
        gradient = torch.empty_like(flat)
        g_entropy, g_overlap, g_predicted = (grads[n].to(_working_type(flat)) for n in (0, 2, 3))
        smoothing = config.label_smoothing
        for part in _chunks(flat):
            z = _scores(flat, part)
            here, inside = _look_up(member, target[:, part], ctx.ignore, z.dtype)
            w = g_entropy * _entropy_weight(config, here, rest[0][:, part] if rest else None)
            p = z.sigmoid()
            aim = inside * (1 - smoothing) + smoothing / 2 if smoothing else inside.to(z.dtype)
            change = (p - aim).mul_(w[:, None])
            if config.focal:
                change *= _focal_slope(config, F.logsigmoid(torch.where(inside, z, -z)))
            slope = g_predicted[:, :, None] + g_overlap[:, :, None] * inside
            gradient[..., part] = change.add_(slope.mul_(here[:, None]).mul_(p).mul_(1 - p))
        return gradient.view_as(logits), None, None, None, None, None


@lru_cache(maxsize=16)
def _membership(
    regions: tuple[tuple[int, ...], ...], ignore: int | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, R) bool: which regions a value of the label file lies in; (values,): a number for each kind of value."""
    rows = 1 + max(0, ignore or 0, *(v for values in regions for v in values))
    member = torch.zeros(rows, len(regions), dtype=torch.bool)
    for column, values in enumerate(regions):
        member[list(values), column] = True
    kind = torch.unique(member, dim=0, return_inverse=True)[1]
    if ignore is not None:
        kind[ignore] = -1
    return member.to(device), kind.to(device)


def _look_up(
    member: torch.Tensor, target: torch.Tensor, ignore: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, v): 1 where a voxel counts; (B, R, v): whether it lies in each region."""
    here = torch.ones_like(target, dtype=dtype) if ignore is None else (target != ignore).to(dtype)
    return here, member[target.long()].movedim(-1, 1)


# ---- both


def _entropy_weight(config: LossConfig, here: torch.Tensor, edge: torch.Tensor | None) -> torch.Tensor:
    """Voxels at a boundary count 1 + `boundary_weight`: U-Net's weight map (Ronneberger 2015) with two steps."""
    return here if edge is None else here * (1 + config.boundary_weight * edge)


def _edge(label: torch.Tensor, ignore: int) -> torch.Tensor:
    """(B, *S) bool: which voxels share a face with one of another label; an ignored neighbour is no other label."""
    edge = torch.zeros_like(label, dtype=torch.bool)
    for axis in range(1, label.ndim):
        size = label.shape[axis] - 1
        one, other = label.narrow(axis, 0, size), label.narrow(axis, 1, size)
        differs = (one != other) & (one != ignore) & (other != ignore)
        edge.narrow(axis, 0, size).logical_or_(differs)
        edge.narrow(axis, 1, size).logical_or_(differs)
    return edge


def _scores(flat: torch.Tensor, part: slice) -> torch.Tensor:
    """(B, K, v) to work on, label by label: rows of voxels are what a processor is quick with."""
    return flat[..., part].to(_working_type(flat), memory_format=torch.contiguous_format)


def _working_type(scores: torch.Tensor) -> torch.dtype:
    """Half-precision scores are worked on in single precision, a chunk at a time."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _chunks(flat: torch.Tensor) -> Iterator[slice]:
    """Cuts the voxels of (B, K, V) into equal parts of about `CHUNK` scores."""
    voxels = flat.shape[2]
    parts = max(1, round(flat.numel() / CHUNK.get(flat.device.type, CHUNK["cuda"])))
    size = max(1, -(-voxels // parts))
    return (slice(start, start + size) for start in range(0, voxels, size))
