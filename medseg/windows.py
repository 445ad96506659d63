"""Scores of a whole volume from a window that slides over it; what comes in and goes out is on the network's grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medseg.config import WindowsConfig
from medseg.patches import cut

# scores of one window batch: (B, C, *patch) → (B, K, *patch), probabilities
Scorer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Flips:
    """Axes along which windows are mirrored, in all combinations; () is none."""

    axes: tuple[int, ...] = ()

    def combinations(self) -> Iterator[tuple[int, ...]]:
        """Every subset of the axes, the empty one first."""
        for length in range(len(self.axes) + 1):
            yield from itertools.combinations(self.axes, length)


def predict(
    config: WindowsConfig, image: torch.Tensor, scorers: Sequence[Scorer], *, flips: Flips | None = None
) -> torch.Tensor:
    """Mean probabilities (K, *S) float32 of `image` (C, *S), on its device.

    Windows of `patch_size` overlap by `overlap` and count less towards their edge (a Gaussian of σ = patch/8, as in
    nnU-Net). All scorers and flips see one batch of windows before the next. A volume smaller than the window is
    padded with 0, as in training.
    """
    shape = tuple(image.shape[1:])
    patch = config.patch_size
    padded = tuple(max(s, p) for s, p in zip(shape, patch))
    start = [-((p - s) // 2) for s, p in zip(shape, padded)]
    volume = cut(image, start, padded)
    weight = importance(patch).to(image.device)
    total: torch.Tensor | None = None
    norm = torch.zeros(padded, device=image.device)
    corners = list(itertools.product(*(starts(s, p, config.overlap) for s, p in zip(padded, patch))))
    for n in range(0, len(corners), config.batch_size):
        here = corners[n : n + config.batch_size]
        scores = _score(torch.stack([cut(volume, c, patch) for c in here]), scorers, flips or Flips())
        if total is None:
            total = torch.zeros((scores.shape[1], *padded), device=image.device)
        for corner, window in zip(here, scores):
            box = tuple(slice(c, c + p) for c, p in zip(corner, patch))
            total[(slice(None), *box)].addcmul_(window.float(), weight)
            norm[box] += weight
    if total is None:
        raise ValueError("no window in an empty volume")
    inner = tuple(slice(-a, -a + s) for a, s in zip(start, shape))
    return total.div_(norm)[(slice(None), *inner)]


def starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of windows that cover `size` evenly, neighbours sharing at least `overlap` of a patch."""
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    count = -(-(size - patch) // step) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def importance(patch_size: Sequence[int]) -> torch.Tensor:
    """Weight (*patch_size) of a window's voxels: 1 in the middle, never below 1e-3."""
    axes = [np.exp(-0.5 * ((np.arange(p) - (p - 1) / 2) / (p / 8)) ** 2) for p in patch_size]
    weight = axes[0]
    for axis in axes[1:]:
        weight = np.multiply.outer(weight, axis)
    return torch.as_tensor(np.maximum(weight / weight.max(), 1e-3), dtype=torch.float32)


def _score(windows: torch.Tensor, scorers: Sequence[Scorer], flips: Flips) -> torch.Tensor:
    total, count = None, 0
    for axes in flips.combinations():
        dims = [a + 2 for a in axes]
        turned = windows.flip(dims) if dims else windows
        for scorer in scorers:
            scores = scorer(turned)
            scores = scores.flip(dims) if dims else scores
            total = scores if total is None else total + scores
            count += 1
    if total is None:
        raise ValueError("no network to score with")
    return total / count
