"""The way back: scores on the network's grid become labels on the file's grid, piece by piece; no network, no files.

Scores are interpolated linearly, and the label is decided where the interpolation has been done: all scores of a volume
never exist at the same time. A piece needs a margin of its neighbours, which is kept until they are there.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from medseg.config import DataConfig
from medseg.device import is_out_of_memory, release_memory
from medseg.errors import GeometryError
from medseg.grid import AxisMap, AxisWeights, Grid, apply_weights, axis_maps
from medseg.readers.probabilities import STEPS

log = logging.getLogger(__name__)

# voxels along an edge of the blocks in which labels are decided: few labels meet in a small one, and it stays in cache
BLOCK, SMALLEST_BLOCK = 48, 6
# labels whose largest score in a block is below these are tried without, one after the other
THRESHOLDS = (0.25, 0.1, 0.03)


@dataclass(frozen=True)
class Piece:
    """Final scores of a box of the network's grid: `scores` (*size, K), its first voxel at `start`."""

    start: tuple[int, ...]
    scores: torch.Tensor

    @property
    def box(self) -> tuple[slice, ...]:
        """Where the piece lies, by axis."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.scores.shape))


class Decision(Protocol):
    """How scores become labels."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the labels."""

    def candidates(self, scores: torch.Tensor) -> Sequence[int]:
        """The channels that can decide anywhere between the voxels of `scores` (*S, K)."""

    def constant(self, channels: Sequence[int]) -> int | None:
        """The label that is everywhere, where these candidates alone tell."""

    def decide(self, scores: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
        """Labels (…) of `scores` (…, k), those of the `channels` alone."""

    def settle(self, steps: torch.Tensor, channels: Sequence[int], labels: torch.Tensor) -> torch.Tensor:
        """`steps` (…, k) int32 of the `channels`, changed where they would not say `labels` (…)."""


class Keeper(Protocol):
    """Keeps the scores on the file's grid, for whom labels are not enough."""

    def add(self, channel: int, box: tuple[slice, ...], steps: np.ndarray[Any, np.dtype[np.uint16]]) -> None:
        """Keep a box of a channel, in steps of 1/65535; a box may come again."""


@dataclass(frozen=True)
class _Valued:
    """The value that each channel writes."""

    values: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or uint16 where a value is above 255."""
        return torch.uint8 if max(self.values, default=0) <= 255 else torch.uint16


@dataclass(frozen=True)
class Strongest(_Valued):
    """The label with the highest score; of equal ones the first."""

    def candidates(self, scores: torch.Tensor) -> Sequence[int]:
        """Exact: interpolation never exceeds the largest score around, so a label below what others surely have is out.

        Where the scores of the n kept labels add up to q or more in every voxel, so they do between voxels, and the
        strongest of them has q / n or more.
        """
        if len(self.values) <= 2:
            return range(len(self.values))
        highest = scores.flatten(0, -2).amax(dim=0).tolist()
        for threshold in THRESHOLDS:
            kept = [k for k, score in enumerate(highest) if score >= threshold]
            left = max((score for score in highest if score < threshold), default=0.0)
            if len(kept) == len(highest):
                break
            if kept and float(scores[..., kept].sum(dim=-1).min()) / len(kept) > left:
                return kept
        return range(len(highest))

    def constant(self, channels: Sequence[int]) -> int | None:
        """The value of an only candidate."""
        return self.values[channels[0]] if len(channels) == 1 else None

    def decide(self, scores: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
        """The value of the strongest channel."""
        values = [self.values[c] for c in channels]
        if len(values) == 2:
            second = scores[..., 1] > scores[..., 0]
            return torch.where(second, values[1], values[0]).to(self.dtype)
        lookup = torch.tensor(values, dtype=torch.int32, device=scores.device)
        return lookup[scores.argmax(dim=-1)].to(self.dtype)

    def settle(self, steps: torch.Tensor, channels: Sequence[int], labels: torch.Tensor) -> torch.Tensor:
        """Where rounding made scores equal and another is the first of them, that of the label gets a step more."""
        place = torch.zeros(max(self.values) + 1, dtype=torch.int64, device=steps.device)
        place[[self.values[c] for c in channels]] = torch.arange(len(channels), device=steps.device)
        wanted = place[labels.to(torch.int64).to(steps.device)]
        first = steps.argmax(dim=-1)
        other = first != wanted
        steps[other, wanted[other]] = steps[other].amax(dim=-1) + (first < wanted)[other].to(steps.dtype)
        return steps


@dataclass(frozen=True)
class Regions(_Valued):
    """Each region where its score is above one half; later ones overwrite earlier ones."""

    def candidates(self, scores: torch.Tensor) -> Sequence[int]:
        """Regions that are above one half somewhere."""
        highest = scores.flatten(0, -2).amax(dim=0).tolist()
        return [k for k, score in enumerate(highest) if score > 0.5]

    def constant(self, channels: Sequence[int]) -> int | None:
        """0 where no region is."""
        return None if channels else 0

    def decide(self, scores: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
        """The value of the last region above one half, else 0."""
        labels = torch.zeros(scores.shape[:-1], dtype=torch.int32, device=scores.device)
        for number, channel in enumerate(channels):
            labels[scores[..., number] > 0.5] = self.values[channel]
        return labels.to(self.dtype)

    def settle(self, steps: torch.Tensor, channels: Sequence[int], labels: torch.Tensor) -> torch.Tensor:
        """As they are: one half is rounded down, so what is above it stays above."""
        return steps


def decision_of(data: DataConfig) -> Strongest | Regions:
    """How the scores of a network for `data` become values in a file."""
    return Regions(data.out_values) if data.is_regions else Strongest(data.out_values)


class Restorer:
    """Labels on `to_grid` from pieces of scores on `from_grid`, which come in any order of axes, each axis ascending.

    `order`: the axes of `from_grid` from the slowest to the fastest in which the pieces come; the pieces are those of
    a partition of every axis. Voxels of `to_grid` outside `from_grid` (it was cropped) are 0. `keep` gets the scores
    inside it too. Raises `GeometryError` if the grids are oblique to each other.
    """

    def __init__(
        self, from_grid: Grid, to_grid: Grid, decision: Decision, *, order: Sequence[int], keep: Keeper | None = None
    ) -> None:
        maps = axis_maps(from_grid, to_grid)
        self._decision, self._keep = decision, keep
        self._order = tuple(order)
        self._axes = [
            _Axis.of(m, from_grid.shape[m.source], to_grid.shape[t]) for t, m in sorted(enumerate(maps), key=_source)
        ]
        self._tails: dict[tuple[int, ...], torch.Tensor] = {}
        self._edge = BLOCK
        self.labels = torch.zeros(to_grid.shape, dtype=decision.dtype)
        # the same memory with its axes in the order of from_grid
        self._turned = self.labels.permute([t for t, _ in sorted(enumerate(maps), key=_source)])
        # and the way back: for each axis of to_grid that of from_grid
        self._sources = [m.source for m in maps]

    @torch.inference_mode()
    def add(self, piece: Piece) -> None:
        """Decide all labels that `piece` and its earlier neighbours settle."""
        try:
            scores, start = self._with_margin(piece)
        except RuntimeError as error:
            if not is_out_of_memory(error) or piece.scores.device.type == "cpu":
                raise
            release_memory(piece.scores.device)
            scores, start = self._with_margin(Piece(piece.start, piece.scores.cpu()))
        targets = [axis.settled(box.start, box.stop) for axis, box in zip(self._axes, piece.box)]
        self._decide_all(scores, start, targets)

    def _decide_all(self, scores: torch.Tensor, start: Sequence[int], targets: Sequence[range]) -> None:
        edge = self._edge
        for block in _blocks(targets, edge):
            self._decide(scores, start, block, edge)

    def _decide(self, scores: torch.Tensor, start: Sequence[int], block: tuple[slice, ...], edge: int) -> None:
        # an earlier block may have shown that those of this size do not fit
        if edge == self._edge:
            try:
                labels = self._labels(scores, start, block)
                self._turned[block] = labels.cpu()
                if self._keep is not None:
                    self._keep_scores(self._keep, scores, start, block)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error) or edge <= SMALLEST_BLOCK:
                    raise
            self._edge //= 2
            log.warning("out of memory while labels are decided: blocks of %d voxels from here on", self._edge)
            release_memory(scores.device)
        self._decide_all(scores, start, [range(b.start, b.stop) for b in block])

    def _labels(self, scores: torch.Tensor, start: Sequence[int], block: tuple[slice, ...]) -> torch.Tensor:
        around, sources = self._around(scores, start, block)
        channels = self._decision.candidates(around)
        constant = self._decision.constant(channels)
        if constant is not None:
            return torch.tensor(constant, dtype=self._decision.dtype)
        return self._decision.decide(self._interpolated(around, channels, block, sources), channels)

    def _keep_scores(self, keep: Keeper, scores: torch.Tensor, start: Sequence[int], block: tuple[slice, ...]) -> None:
        around, sources = self._around(scores, start, block)
        highest = around.flatten(0, -2).amax(dim=0).tolist()
        # the others are 0 in steps; the first is background, which is not 0 unless it is told
        channels = [k for k, score in enumerate(highest) if k == 0 or score * STEPS > 0.5]
        exact = self._interpolated(around, channels, block, sources).float() * STEPS
        steps = exact.sub_(0.5).ceil_().clamp_(0, STEPS).to(torch.int32)
        steps = self._decision.settle(steps, channels, self._turned[block])
        box = tuple(block[s] for s in self._sources)
        # as a file has it: the channel slowest, the first axis fastest
        turned = steps.to(torch.uint16).permute(-1, *self._sources[::-1]).contiguous().cpu().numpy()
        for channel, values in zip(channels, turned):
            keep.add(channel, box, values.T)

    def _around(
        self, scores: torch.Tensor, start: Sequence[int], block: tuple[slice, ...]
    ) -> tuple[torch.Tensor, list[slice]]:
        """The scores that the voxels of `block` read, and where these are."""
        sources = [axis.needed(b) for axis, b in zip(self._axes, block)]
        return scores[tuple(slice(s.start - a, s.stop - a) for s, a in zip(sources, start))], sources

    def _interpolated(
        self, around: torch.Tensor, channels: Sequence[int], block: tuple[slice, ...], sources: Sequence[slice]
    ) -> torch.Tensor:
        """Scores (*block, k) of the `channels`."""
        if len(channels) < around.shape[-1]:
            around = around[..., list(channels)]
        for number, (axis, b, s) in enumerate(zip(self._axes, block, sources)):
            around = apply_weights(around, axis.weights.block(b, s), number)
        return around

    def _with_margin(self, piece: Piece) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The scores of a piece and of the voxels before it that interpolation reaches, and where they start."""
        scores, start = piece.scores, list(piece.start)
        tails: dict[tuple[int, ...], torch.Tensor | None] = {}
        for place, axis in enumerate(self._order):
            margin = self._axes[axis].margin
            if not margin:
                continue
            key = (axis, *(piece.start[inner] for inner in self._order[place + 1 :]))
            before = self._tails.get(key)
            tails[key] = None
            if before is not None and piece.start[axis] > 0:
                scores = torch.cat([before.to(scores.device), scores], dim=axis)
                start[axis] -= before.shape[axis]
            if piece.box[axis].stop < self._axes[axis].size:
                kept = min(margin, scores.shape[axis])
                tails[key] = scores.narrow(axis, scores.shape[axis] - kept, kept).clone()
        # only now: where memory runs out above, nothing has changed
        self._tails = {k: t for k, t in (self._tails | tails).items() if t is not None}
        return scores, tuple(start)


def restore(
    scores: torch.Tensor, from_grid: Grid, to_grid: Grid, decision: Decision, *, keep: Keeper | None = None
) -> torch.Tensor:
    """Labels on `to_grid` from `scores` (K, *from_grid.shape). Raises `GeometryError` as `Restorer` does."""
    if tuple(scores.shape[1:]) != from_grid.shape:
        raise GeometryError(f"scores of shape {tuple(scores.shape[1:])} on a grid of {from_grid.shape}")
    dims = from_grid.spatial_dims
    restorer = Restorer(from_grid, to_grid, decision, order=range(dims), keep=keep)
    restorer.add(Piece((0,) * dims, scores.float().movedim(0, -1)))
    return restorer.labels


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of the source: `weights` (T, size) of the target's voxels, and the source voxels that each reads."""

    size: int
    weights: AxisWeights
    first: np.ndarray
    last: np.ndarray
    inside: range

    @staticmethod
    def of(axis: AxisMap, size: int, target: int) -> _Axis:
        weights = AxisWeights(size, target, axis.scale, axis.offset, "linear")
        at = axis.scale * np.arange(target) + axis.offset
        # half a source voxel beyond the last centre still belongs to that voxel
        within = np.flatnonzero((at >= -0.5 - 1e-6) & (at <= size - 0.5 + 1e-6))
        inside = range(int(within[0]), int(within[-1]) + 1) if len(within) else range(0)
        return _Axis(size, weights, *weights.reach, inside)

    @property
    def margin(self) -> int:
        """Voxels before its last one that a target voxel may read."""
        return int((self.last - self.first).max())

    def settled(self, start: int, stop: int) -> range:
        """Target voxels whose last source voxel lies in `start` … `stop`."""
        here = np.flatnonzero((self.last >= start) & (self.last < stop))
        if not len(here):
            return range(0)
        return range(max(int(here[0]), self.inside.start), min(int(here[-1]) + 1, self.inside.stop))

    def needed(self, target: slice) -> slice:
        """Source voxels that the voxels of `target` read."""
        return slice(int(self.first[target].min()), int(self.last[target].max()) + 1)


def _source(entry: tuple[int, AxisMap]) -> int:
    return entry[1].source


def _blocks(targets: Sequence[range], edge: int) -> Iterator[tuple[slice, ...]]:
    cut = [[slice(a, min(a + edge, t.stop)) for a in range(t.start, t.stop, edge)] for t in targets]
    return itertools.product(*cut)
