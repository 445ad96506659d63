"""What the scores of a case say about themselves, and where its labels lie; no knowledge of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from medseg.config import DataConfig
from medseg.grid import Grid
from medseg.preprocess import IGNORE_INDEX, Prepared
from medseg.restore import Piece

Floats = npt.NDArray[np.float64]
Features = dict[str, float]
# a label touches the edge if this share of its voxels lies there: a stray voxel does not count
TOUCHING = 0.005


class Evidence:
    """What the scores of a case say about themselves, gathered box by box in memory that depends on labels only."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        n = len(data.foreground)
        self.voxels = np.zeros(n)
        self.border = np.zeros(n)
        self._confident = np.zeros(n)
        self._mass = np.zeros(n)
        self._position = np.zeros((n, data.spatial_dims))
        self._brightness: Floats | None = None
        self._agreeing = np.zeros(n)
        self._decided = np.zeros(n)

    def add(
        self, scores: torch.Tensor, start: Sequence[int], shape: Sequence[int], image: torch.Tensor | None = None
    ) -> None:
        """Probabilities (K, *box) of the box that begins at voxel `start` of the network's grid of `shape`.

        Boxes are disjoint and cover the grid, in any order. `image` (C, *box): the normalised image there; without it
        the brightness of labels is not judged.
        """
        flat = scores.flatten(1)
        if self.data.is_regions:
            self._mass += _array(flat.sum(dim=1))
            label, at = (flat > 0.5).nonzero().T
            confidence = flat[label, at]
        else:
            self._mass += _array(flat.sum(dim=1))[1:]
            best, winner = flat.max(dim=0)
            at = winner.nonzero()[:, 0]
            label, confidence = winner[at] - 1, best[at]
        self._confident += _tally(label, len(self.voxels), confidence)
        self.count(label, at, scores.shape[1:], start, shape, image)

    def add_piece(self, piece: Piece, image: torch.Tensor) -> None:
        """`add` a piece of the scores of a normalised `image` (C, *S), wherever each of them lies."""
        seen = image[(slice(None), *piece.box)].to(piece.scores.device)
        self.add(piece.scores.movedim(-1, 0), piece.start, tuple(image.shape[1:]), seen)

    def count(
        self,
        label: torch.Tensor,
        at: torch.Tensor,
        box: Sequence[int],
        start: Sequence[int],
        shape: Sequence[int],
        image: torch.Tensor | None = None,
    ) -> None:
        """Voxels of labels: `label` (V) counts from 0 in the order of `data.foreground`, `at` (V) into the flat box."""
        n = len(self.voxels)
        self.voxels += _tally(label, n)
        edge = torch.zeros(len(at), dtype=torch.bool, device=at.device)
        for axis, index in enumerate(torch.unravel_index(at, tuple(box))):
            index = index + start[axis]
            self._position[:, axis] += _tally(label, n, (index + 0.5) / shape[axis])
            # an image one or two voxels thick is all edge
            if shape[axis] > 2:
                edge |= (index == 0) | (index == shape[axis] - 1)
        self.border += _tally(label, n, edge)
        if image is not None:
            bright = np.stack([_tally(label, n, channel.flatten()[at]) for channel in image], axis=1)
            self._brightness = bright if self._brightness is None else self._brightness + bright

    def add_members(self, members: Sequence[torch.Tensor], mean: torch.Tensor) -> None:
        """Scores of each flip, scale or model for a batch of windows, and their mean: all (B, K, *patch)."""
        whole = self._decide(mean)
        size = self._sizes(whole)
        for member in members:
            one = self._decide(member)
            self._decided += size + self._sizes(one)
            self._agreeing += 2 * self._sizes(torch.where(whole == one, one, 0))

    def label_features(self) -> dict[str, Features]:
        """By label: logits of `confidence` (the Dice that the scores expect of themselves), of `certainty` (mean score
        where the label is chosen) and of `agreement` (Dice of members against their mean) where members were added.
        """
        found = {}
        for n, name in enumerate(self.data.foreground):
            numbers = {
                "confidence": _logit(_share(2 * self._confident[n], self._mass[n] + self.voxels[n])),
                "certainty": _logit(_share(self._confident[n], self.voxels[n])),
            }
            if self._decided.any():
                numbers["agreement"] = _logit(_share(self._agreeing[n], self._decided[n]))
            found[name] = numbers
        return found

    def measured(self, grid: Grid) -> dict[str, Features]:
        """By label that was found: its volume, place and brightness; `grid` is the network's."""
        found: dict[str, Features] = {}
        for n, name in enumerate(self.data.foreground):
            if not self.voxels[n]:
                continue
            found[name] = {"volume": math.log(self.voxels[n] * _voxel_size(grid))}
            for axis, sum_of in enumerate(self._position[n]):
                found[name][f"position.{axis}"] = sum_of / self.voxels[n]
            if self._brightness is not None:
                for c, sum_of in enumerate(self._brightness[n]):
                    found[name][f"brightness.{c}"] = sum_of / self.voxels[n]
        return found

    def touching(self) -> set[str]:
        """Labels that the edge of the image cuts."""
        cut = (self.border > 0) & (self.border >= TOUCHING * self.voxels)
        return {name for name, c in zip(self.data.foreground, cut) if c}

    def _decide(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores > 0.5).int() if self.data.is_regions else scores.argmax(dim=1)

    def _sizes(self, decided: torch.Tensor) -> Floats:
        if self.data.is_regions:
            return _array(decided.transpose(0, 1).flatten(1).sum(dim=1))
        return _tally(decided.flatten(), len(self.voxels) + 1)[1:]


def of_reference(prepared: Prepared, data: DataConfig) -> Evidence:
    """Where the reference of a training case lies. Raises `ValueError` where it has none."""
    if prepared.label is None:
        raise ValueError(f"{prepared.id}: no label found, expected a training case")
    evidence = Evidence(data)
    shape = prepared.grid.shape
    flat = prepared.label.flatten().long()
    if not data.is_regions:
        at = ((flat != 0) & (flat != IGNORE_INDEX)).nonzero()[:, 0]
        evidence.count(flat[at] - 1, at, shape, (0,) * len(shape), shape, prepared.image)
        return evidence
    for n, name in enumerate(data.foreground):
        values = torch.tensor(data.labels[name]).reshape(-1)
        at = torch.isin(flat, values).nonzero()[:, 0]
        evidence.count(torch.full_like(at, n), at, shape, (0,) * len(shape), shape, prepared.image)
    return evidence


def _voxel_size(grid: Grid) -> float:
    """Of a volume in ml; of a picture, which has no size in mm, in % of the image."""
    return grid.voxel_mm3 / 1000 if grid.spatial_dims == 3 else 100 / math.prod(grid.shape)


def _tally(label: torch.Tensor, size: int, weights: torch.Tensor | None = None) -> Floats:
    weights = None if weights is None else weights.double()
    return _array(torch.bincount(label, weights, minlength=size))


def _array(values: torch.Tensor) -> Floats:
    return np.asarray(values.double().cpu().numpy())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _logit(share: float) -> float:
    share = min(max(share, 0.01), 0.995)
    return math.log(share / (1 - share))
