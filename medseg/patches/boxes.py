"""Boxes out of volumes, over their edges too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def cut(volume: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """The box `start` … `start + size` of the last axes of `volume`; voxels outside are 0."""
    lead = volume.ndim - len(size)
    inside, pad = [slice(None)] * lead, []
    for first, length, whole in zip(start, size, volume.shape[lead:]):
        inside.append(slice(max(first, 0), max(0, min(first + length, whole))))
        pad.append((min(length, max(0, -first)), min(length, max(0, first + length - whole))))
    part = volume[tuple(inside)]
    if not any(a or b for a, b in pad):
        return part
    return F.pad(part, [n for pair in reversed(pad) for n in pair])
