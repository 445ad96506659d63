"""Scores of a volume window by window, handed on in pieces as soon as they are final; all on the network's grid."""

from __future__ import annotations

import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional

from medseg.body import Air
from medseg.config import WindowsConfig
from medseg.device import (
    batch_that_fits,
    beyond_memory,
    check_held,
    forget_peak,
    is_out_of_memory,
    most_voxels,
    release_memory,
)
from medseg.errors import DataError
from medseg.patches import cut
from medseg.restore import Piece

log = logging.getLogger(__name__)

# scores of one batch of windows: (B, C, *S) → (B, K, *S), probabilities
Scorer = Callable[[torch.Tensor], torch.Tensor]
# what the members of an ensemble said of one batch, each (B, K, *S), and their mean
Observer = Callable[[Sequence[torch.Tensor], torch.Tensor], None]

Done = TypeVar("Done")

# tiles begin where every stride of a network has a voxel, so that they see the grid that the whole volume would
ALIGNMENT = 32


@dataclass(frozen=True)
class View:
    """A copy of a window that a network looks at: mirrored along `flips`, resized by `scale`, moved by `shift` voxels.

    It is moved into a border of 0, which a volume smaller than a patch has too, so that no voxel of it is lost.
    """

    flips: tuple[int, ...] = ()
    scale: float = 1.0
    shift: tuple[int, ...] = ()

    def scores(self, scorer: Scorer, windows: torch.Tensor) -> torch.Tensor:
        """What `scorer` says of the view of `windows` (B, C, *S), turned and sized back: (B, K, *S)."""
        size = tuple(windows.shape[2:])
        dims = [a + 2 for a in self.flips]
        seen = windows.flip(dims) if dims else windows
        if self.scale != 1:
            # never below 2: a norm over one voxel has nothing to normalise
            seen = _resized(seen, [max(2, round(n * self.scale)) for n in size])
        if any(self.shift):
            seen = functional.pad(seen, [n for s in reversed(self.shift) for n in (s, 0)])
        scores = scorer(seen)
        if any(self.shift):
            scores = scores[(slice(None), slice(None), *(slice(s, None) for s in self.shift))]
        scores = _resized(scores.float(), size) if self.scale != 1 else scores
        return scores.flip(dims) if dims else scores


def views(config: WindowsConfig) -> tuple[View, ...]:
    """All views that `config` asks for, the plain one first.

    Mirrored and moved copies are not combined one with all, which would take long, but in turns: each kind as often.
    """
    subsets = [flips for n in range(len(config.flip_axes) + 1) for flips in itertools.combinations(config.flip_axes, n)]
    shifts = ((), *config.shifts)
    turns = range(math.lcm(len(subsets), len(shifts)))
    turned = [(subsets[n % len(subsets)], shifts[n % len(shifts)]) for n in turns]
    return tuple(View(flips, scale, shift) for scale in config.scales for flips, shift in turned)


@dataclass(frozen=True)
class Ensemble:
    """The mean of several networks and views; all of them see one batch of windows before the next."""

    scorers: tuple[Scorer, ...]
    views: tuple[View, ...] = (View(),)
    observe: Observer | None = None

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) → mean probabilities (B, K, *S) float32."""
        count = len(self.views) * len(self.scorers)
        if not count:
            raise ValueError("no network to score with")
        members = (view.scores(scorer, windows) for view in self.views for scorer in self.scorers)
        if self.observe is None:
            total = next(members).float()
            for scores in members:
                total = total + scores
            return total / count if count > 1 else total
        kept = [scores.float() for scores in members]
        mean = torch.stack(kept).mean(dim=0) if len(kept) > 1 else kept[0]
        self.observe(kept, mean)
        return mean


@torch.inference_mode()
def stream(
    config: WindowsConfig,
    image: torch.Tensor,
    scorer: Scorer,
    *,
    device: torch.device,
    out_channels: int = 1,
    air: Air | None = None,
    tick: Callable[[float], None] | None = None,
) -> Iterator[Piece]:
    """Final scores of `image` (C, *S), wherever it lies, as pieces in the order of `stream_order`.

    They lie on `device`, or on the CPU where the memory of the device ran out or a window was divided. A volume smaller
    than a patch is padded with 0, as in training. What is held at a time grows with the section of the volume across
    its first axis in `stream_order` times the number of channels, not with the volume. `tick` hears the share that is
    done after each window; what it raises ends the work.

    Where memory runs out, the batch is halved, then sums are kept on the CPU, and nothing is computed twice. A tile or
    a whole volume that does not fit is divided into parts that see a margin of each other; a CPU tells it beforehand,
    by what `out_channels` scores a voxel take. Raises `DataError` where the network gives NaN.
    """
    plan = _plan(config, image)
    runner = _Runner(scorer, device, config.batch_size, plan, most_voxels(device, out_channels))
    for done, (window, scores) in enumerate(runner.run(image, air), start=1):
        yield runner.finish(window, scores)
        if tick is not None:
            tick(done / len(plan.windows))
    if runner.skipped:
        log.info("%d of %d windows lie outside the body: background", runner.skipped, len(plan.windows))


def stream_order(config: WindowsConfig, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes from the slowest to the fastest in which pieces come: sums are kept across the smallest section."""
    patch = config.tile_size or config.patch_size
    shared = [max(1, p - max(1, int(p * (1 - config.overlap)))) for p in patch]
    return tuple(sorted(range(len(shape)), key=lambda a: -shape[a] / shared[a]))


def predict(
    config: WindowsConfig, image: torch.Tensor, scorer: Scorer, *, device: torch.device | None = None
) -> torch.Tensor:
    """`stream` in one tensor: mean probabilities (K, *S) float32 of `image` (C, *S), on the image's device."""
    return assemble(stream(config, image, scorer, device=device or image.device), image.shape[1:], image.device)


def assemble(pieces: Iterable[Piece], shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """All scores (K, *shape) of the `pieces` of a volume, on `device`.

    Raises `MemoryError` where they are more than this machine can hold: there they come in the end, from any device.
    """
    total: torch.Tensor | None = None
    for piece in pieces:
        if total is None:
            channels, voxels = piece.scores.shape[-1], math.prod(shape)
            if taken := beyond_memory(channels * voxels):
                raise MemoryError(
                    f"{channels} scores of {voxels:,} voxels at once take {taken}; use a machine with more, or cut the "
                    "image"
                )
            total = torch.zeros((channels, *shape), device=device)
        total[(slice(None), *piece.box)] = piece.scores.movedim(-1, 0).to(device)
    if total is None:
        raise ValueError("no window in an empty volume")
    return total


def starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of windows that cover `size` evenly, neighbours sharing at least `overlap` of a patch."""
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    count = -(-(size - patch) // step) + 1
    return [round(n * (size - patch) / (count - 1)) for n in range(count)]


def edge_weights(patch: int) -> torch.Tensor:
    """Weight (patch,) of a window's voxels along an axis: a Gaussian of σ = patch/8, as in nnU-Net."""
    return torch.as_tensor(np.exp(-0.5 * ((np.arange(patch) - (patch - 1) / 2) / (patch / 8)) ** 2))


@dataclass(frozen=True)
class _Window:
    """What one pass of the network reads: a box of the padded volume, and its place in the plan."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    index: tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """A part of a window: what is read, what of its scores counts, and where that belongs among those of the window."""

    window: _Window
    core: tuple[slice, ...]
    place: tuple[slice, ...]


class _Plan(ABC):
    """Windows of a volume, in raster order of `order`, and what makes final pieces of their scores."""

    def __init__(self, config: WindowsConfig, image: torch.Tensor) -> None:
        self.shape = tuple(image.shape[1:])
        self.order = stream_order(config, self.shape)
        # a volume smaller than a patch lies in the middle of it
        least = config.patch_size
        if config.mode == "blend" and config.tile_size is not None:
            least = config.tile_size
        self.padded = tuple(max(s, p) for s, p in zip(self.shape, least))
        self.offset = tuple((p - s) // 2 for s, p in zip(self.shape, self.padded))
        self.windows: list[_Window] = []

    def read(self, image: torch.Tensor, window: _Window) -> torch.Tensor:
        """The voxels (C, *size) of a window."""
        return cut(image, self.place(window), window.size)

    def place(self, window: _Window) -> list[int]:
        """The first voxel of a window in the image, negative in the padding before it."""
        return [a - o for a, o in zip(window.start, self.offset)]

    @abstractmethod
    def finish(self, window: _Window, scores: torch.Tensor) -> Piece:
        """The piece that the scores (K, *size) of `window` settle."""

    def spare(self) -> bool:
        """Free memory of the device; False where nothing is left to free."""
        return False

    def divided(self, window: _Window) -> list[_Part]:
        """Two parts of a window that each see a margin of the other; none where it cannot be divided."""
        return []

    def _in_order(self, counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Indices of windows by axis, `order`'s last axis fastest."""
        for found in itertools.product(*(range(counts[a]) for a in self.order)):
            yield tuple(found[self.order.index(a)] for a in range(len(counts)))

    def _inside(self, start: Sequence[int], scores: torch.Tensor) -> Piece:
        """The part of `scores` (*size, K) that is not padding."""
        first = [max(a, o) for a, o in zip(start, self.offset)]
        stop = [min(a + n, o + s) for a, n, o, s in zip(start, scores.shape, self.offset, self.shape)]
        box = tuple(slice(f - a, e - a) for f, e, a in zip(first, stop, start))
        return Piece(tuple(f - o for f, o in zip(first, self.offset)), scores[box])


class _Blend(_Plan):
    """Overlapping windows. Their weights add up to 1 in every voxel, so that sums are final without a division.

    A window settles the box from its own start to that of the next window by axis. What it adds beyond is carried: the
    part beyond along the fastest axis to the next window, along the others to the window there, one row later.
    """

    def __init__(self, config: WindowsConfig, image: torch.Tensor) -> None:
        super().__init__(config, image)
        self._tile = tuple(
            # a window larger than the volume would only look at padding
            min(t, p)
            for t, p in zip(config.tile_size or config.patch_size, self.padded)
        )
        self._starts = [starts(s, t, config.overlap) for s, t in zip(self.padded, self._tile)]
        self._weights = [_shares(found, tile, size) for found, tile, size in zip(self._starts, self._tile, self.padded)]
        self._carried: dict[tuple[int, ...], torch.Tensor] = {}
        self._spare = False
        self.windows = [
            _Window(tuple(s[i] for s, i in zip(self._starts, index)), self._tile, index)
            for index in self._in_order([len(s) for s in self._starts])
        ]

    def finish(self, window: _Window, scores: torch.Tensor) -> Piece:
        block = scores.movedim(0, -1)
        if len(self.windows) > 1:
            # only what lies along the axes goes to a GPU, and is multiplied there
            weight = torch.ones((), device=block.device)
            for axis, index in enumerate(window.index):
                weight = weight[..., None] * self._weights[axis][index].to(block.device)
            block = block * weight[..., None].to(block.dtype)
        settled_by, kept_by = [], {}
        for place in reversed(range(len(self.order))):
            axis = self.order[place]
            index, found = window.index[axis], self._starts[axis]
            key = (axis, *(window.index[inner] for inner in self.order[place + 1 :]))
            carried = self._carried.get(key)
            if carried is not None and index > 0:
                block.narrow(axis, 0, carried.shape[axis]).add_(carried.to(block.device))
                settled_by.append(key)
            if index + 1 < len(found):
                settled = found[index + 1] - found[index]
                beyond = block.narrow(axis, settled, block.shape[axis] - settled)
                kept_by[key] = beyond.to("cpu" if self._spare else beyond.device, copy=True).contiguous()
                block = block.narrow(axis, 0, settled)
        # only now: where memory runs out above, nothing has changed
        for key in settled_by:
            self._carried.pop(key)
        self._carried |= kept_by
        return self._inside(window.start, block)

    def spare(self) -> bool:
        if self._spare:
            return False
        self._spare = True
        self._carried = {key: carried.cpu() for key, carried in self._carried.items()}
        log.warning("out of memory: the sums of windows are kept on the CPU from here on")
        return True


class _Tiles(_Plan):
    """Tiles side by side that see a margin of their neighbours; the volume itself where there is but one."""

    def __init__(self, config: WindowsConfig, image: torch.Tensor) -> None:
        super().__init__(config, image)
        # a margin that keeps the strides of the network where they would be in the whole volume
        wanted = config.halo or tuple(p // 2 for p in config.patch_size)
        self._margin = tuple(-(-h // ALIGNMENT) * ALIGNMENT for h in wanted)
        tile, halo = self.padded, (0,) * len(self.padded)
        if config.mode == "halo":
            tile = tuple(
                min(s, max(ALIGNMENT, t // ALIGNMENT * ALIGNMENT))
                for s, t in zip(self.padded, config.tile_size or config.patch_size)
            )
            halo = self._margin
        self._tile = tile
        for index in self._in_order([-(-s // t) for s, t in zip(self.padded, tile)]):
            inside = zip(index, tile, self.offset, self.shape)
            if not all(i * t < o + s and o < (i + 1) * t for i, t, o, s in inside):
                # in the padding alone, where nothing is asked
                continue
            first = [max(0, i * t - h) for i, t, h in zip(index, tile, halo)]
            last = [min(s, (i + 1) * t + h) for i, t, h, s in zip(index, tile, halo, self.padded)]
            self.windows.append(_Window(tuple(first), tuple(b - a for a, b in zip(first, last)), index))

    def finish(self, window: _Window, scores: torch.Tensor) -> Piece:
        first = [i * t for i, t in zip(window.index, self._tile)]
        stop = [min(s, f + t) for s, f, t in zip(self.padded, first, self._tile)]
        core = tuple(slice(f - a, e - a) for f, e, a in zip(first, stop, window.start))
        return self._inside(first, scores.movedim(0, -1)[core])

    def divided(self, window: _Window) -> list[_Part]:
        axis = max(range(len(window.size)), key=lambda a: window.size[a])
        size, margin = window.size[axis], self._margin[axis]
        middle = -(-size // 2 // ALIGNMENT) * ALIGNMENT
        if middle + margin >= size or middle - margin <= 0:
            return []
        parts = []
        for first, stop in ((0, middle), (middle, size)):
            seen = max(0, first - margin), min(size, stop + margin)
            start = tuple(s + seen[0] if a == axis else s for a, s in enumerate(window.start))
            shape = tuple(seen[1] - seen[0] if a == axis else n for a, n in enumerate(window.size))
            place = tuple(slice(first, stop) if a == axis else slice(None) for a in range(len(shape)))
            core = tuple(
                slice(first - seen[0], stop - seen[0]) if a == axis else slice(None) for a in range(len(shape))
            )
            parts.append(_Part(_Window(start, shape, window.index), core, place))
        return parts


def _plan(config: WindowsConfig, image: torch.Tensor) -> _Plan:
    voxels = image[0].numel()
    if config.mode == "whole" and voxels > (config.whole_voxels or voxels):
        log.info("%d voxels are more than whole volumes were judged on (%s): blended", voxels, config.whole_voxels)
        return _Blend(config.model_copy(update={"mode": "blend"}), image)
    return _Blend(config, image) if config.mode == "blend" else _Tiles(config, image)


class _Runner:
    """Runs the windows of a plan in batches of as many as fit; what an out-of-memory error undoes was not finished."""

    def __init__(
        self, scorer: Scorer, device: torch.device, batch: int | None, plan: _Plan, most_voxels: float
    ) -> None:
        self._scorer = scorer
        self._most_voxels = most_voxels
        self._device = device
        self._plan = plan
        self._measure = batch is None
        # the first window alone shows what one takes
        self._batch = batch or 1
        self._divides = False
        self.skipped = 0

    def run(self, image: torch.Tensor, air: Air | None) -> Iterator[tuple[_Window, torch.Tensor]]:
        """Each window with its scores (K, *size), in order."""
        for group in self._groups(air):
            scores = self._scores([window for window, empty in group if not empty], image)
            for window, empty in group:
                if empty and air is not None:
                    self.skipped += 1
                    flat = air.scores.to(self._device).reshape(-1, *(1,) * len(window.size))
                    yield window, flat.expand(-1, *window.size)
                else:
                    yield window, next(scores)

    def finish(self, window: _Window, scores: torch.Tensor) -> Piece:
        """The piece that a window settles; on the CPU where the device has no room for sums."""
        piece = self._unless_full(lambda: self._plan.finish(window, scores))
        if piece is not None:
            return piece
        release_memory(self._device)
        self._plan.spare()
        return self._plan.finish(window, scores.cpu())

    def _groups(self, air: Air | None) -> Iterator[list[tuple[_Window, bool]]]:
        """Consecutive windows, whether each is air, with as many that are not as a batch holds; all of one size."""
        group: list[tuple[_Window, bool]] = []
        seen = 0
        for window in self._plan.windows:
            empty = air is not None and air.fills(self._plan.place(window), window.size)
            if group and (seen >= self._batch or window.size != group[0][0].size):
                yield group
                group, seen = [], 0
            group.append((window, empty))
            seen += not empty
        if group:
            yield group

    def _scores(self, windows: Sequence[_Window], image: torch.Tensor) -> Iterator[torch.Tensor]:
        n = 0
        while n < len(windows):
            part = windows[n : n + self._batch]
            if math.prod(part[0].size) > self._most_voxels and self._plan.divided(part[0]):
                yield self._in_parts(part[0], image)
                n += 1
                continue
            scores = self._attempt([self._plan.read(image, window) for window in part])
            if scores is not None:
                yield from scores
                n += len(part)
                continue
            release_memory(self._device)
            self._measure = False
            if self._batch > 1:
                self._batch //= 2
                log.warning("out of memory: %d windows at a time from here on", self._batch)
            elif not self._plan.spare():
                yield self._in_parts(windows[n], image)
                n += 1

    def _in_parts(self, window: _Window, image: torch.Tensor) -> torch.Tensor:
        """Scores (K, *size) of a window that does not fit, on the CPU. Raises `OutOfMemoryError` where no part fits."""
        parts = self._plan.divided(window)
        if not parts:
            raise torch.OutOfMemoryError(f"one window of {window.size} voxels does not fit")
        if not self._divides:
            log.warning("too large for the memory: windows of %s voxels are done in parts", window.size)
            self._divides = True
        found: torch.Tensor | None = None
        for part in parts:
            scores = next(self._scores([part.window], image))[(slice(None), *part.core)]
            if found is None:
                check_held(len(scores), math.prod(window.size))
                found = torch.zeros((len(scores), *window.size))
            found[(slice(None), *part.place)] = scores.cpu()
        if found is None:
            raise RuntimeError("a divided window has parts")
        return found

    def _attempt(self, windows: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Scores (B, K, *size), or None where memory ran out; then nothing of the attempt is held."""
        if self._measure:
            forget_peak(self._device)
        scores = self._unless_full(lambda: self._scorer(torch.stack(list(windows)).to(self._device)))
        if scores is None:
            return None
        # a sum is NaN or infinite if any score is
        if not bool(torch.isfinite(scores.sum())):
            raise DataError("the network gave scores that are no numbers; use --precision 32, or look at the image")
        if self._measure:
            self._measure = False
            self._batch = batch_that_fits(self._device, scores)
        return scores

    def _unless_full(self, attempt: Callable[[], Done]) -> Done | None:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.debug("%s", error)
        return None


def _shares(first: Sequence[int], tile: int, size: int) -> list[torch.Tensor]:
    """For each window along an axis, what its voxels count; over all windows these add up to 1 in every voxel."""
    weight = edge_weights(tile)
    total = torch.zeros(size, dtype=torch.float64)
    for start in first:
        total[start : start + tile] += weight
    return [(weight / total[start : start + tile]).float() for start in first]


def _resized(windows: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return functional.interpolate(windows, size=list(size), mode=mode, align_corners=False)
