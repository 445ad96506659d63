"""What training minimises: cross-entropy + soft Dice, for labels and for regions; no one-hot volumes are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medseg.config import DataConfig, LossConfig
from medseg.preprocess import IGNORE_INDEX


def loss(config: LossConfig, data: DataConfig, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Scalar loss of `logits` (B, K, *S) against `label` (B, *S) as `preprocess` encodes it. 0 where all is ignored."""
    logits = logits.float()
    if data.is_regions:
        return _region_loss(config, data, logits, label)
    target = label.long()
    valid = target != IGNORE_INDEX
    cross_entropy = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum") / valid.sum().clamp(
        min=1
    )
    probability = logits.softmax(dim=1)
    dice = _soft_dice(config, probability, target.masked_fill(~valid, 0), valid)
    return config.cross_entropy_weight * cross_entropy + config.dice_weight * dice


def _soft_dice(
    config: LossConfig, probability: torch.Tensor, target: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """1 − mean soft Dice over foreground labels (Milletari 2016, with sums instead of squares as in nnU-Net)."""
    batch, channels = probability.shape[:2]
    weight = valid.flatten(1).to(probability.dtype)
    flat = probability.flatten(2)
    index = target.flatten(1)
    at_target = flat.gather(1, index[:, None])[:, 0] * weight
    empty = probability.new_zeros(batch, channels)
    overlap = empty.scatter_add(1, index, at_target)
    size_target = empty.scatter_add(1, index, weight)
    size_probability = torch.einsum("bkv,bv->bk", flat, weight)
    return 1 - _ratio(config, overlap, size_probability + size_target)[..., 1:].mean()


def _region_loss(config: LossConfig, data: DataConfig, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    values = [data.labels[name] for name in data.foreground]
    sets = [torch.tensor(v if isinstance(v, tuple) else (v,), device=label.device) for v in values]
    target = torch.stack([torch.isin(label, s) for s in sets], dim=1).to(logits.dtype)
    valid = torch.ones_like(label, dtype=torch.bool)
    if data.ignore_value is not None:
        valid = label != data.ignore_value
    weight = valid[:, None].to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
    probability = logits.sigmoid() * weight
    overlap = (probability * target).flatten(2).sum(-1)
    total = probability.flatten(2).sum(-1) + (target * weight).flatten(2).sum(-1)
    mean_entropy = entropy.sum() / (weight.sum() * len(sets)).clamp(min=1)
    return config.cross_entropy_weight * mean_entropy + config.dice_weight * (1 - _ratio(config, overlap, total).mean())


def _ratio(config: LossConfig, overlap: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    if config.batch_dice:
        overlap, total = overlap.sum(0), total.sum(0)
    return (2 * overlap + config.smooth) / (total + config.smooth)
