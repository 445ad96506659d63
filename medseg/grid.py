"""Grids in space and the way from one to another: geometry and separable resampling; no files, no settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from medseg.errors import GeometryError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Kernel = Literal["nearest", "linear", "cubic"]

# an axis is parallel to another if the rest of its direction is below this share: 0.06 degrees
PARALLEL_TOLERANCE = 1e-3
# headers of one scan written by two programs differ by rounding: up to this share of a voxel they are one grid
ROUNDING_TOLERANCE = 0.1
SLAB_BYTES = 2**26
# of one axis, weights that are made at once (134 MB), and else the most rows of which they are
MOST_WEIGHTS, ROWS = 2**24, 256


@dataclass(frozen=True, eq=False)
class Grid:
    """`shape` voxels placed in space by `affine`: (n+1, n+1), voxel index → RAS mm (pictures: pixel → pixel size 1).

    Raises `GeometryError` where the affine is not finite, singular, or of another size than the shape.
    """

    shape: tuple[int, ...]
    affine: Array

    def __post_init__(self) -> None:
        n = len(self.shape)
        affine = np.asarray(self.affine, dtype=np.float64)
        object.__setattr__(self, "affine", affine)
        if affine.shape != (n + 1, n + 1):
            raise GeometryError(f"affine of shape {affine.shape} found for {n} axes, expected {(n + 1, n + 1)}")
        if any(s < 1 for s in self.shape):
            raise GeometryError(f"shape {self.shape} found, expected at least one voxel on every axis")
        if not np.isfinite(affine).all():
            raise GeometryError("affine with NaN or infinity found, expected finite numbers")
        if min(self.spacing_mm) <= 0 or abs(np.linalg.det(self._directions)) < 1e-6:
            raise GeometryError(
                f"spacing {_round(self.spacing_mm)} mm with a singular affine found, expected three independent axes "
                "longer than 0; correct the header"
            )

    @property
    def spatial_dims(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between neighbours along each voxel axis."""
        n = len(self.shape)
        return tuple(float(s) for s in np.sqrt((self.affine[:n, :n] ** 2).sum(axis=0)))

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel, also where axes are not at right angles; of a plane its area in mm²."""
        n = len(self.shape)
        return abs(float(np.linalg.det(self.affine[:n, :n])))

    @property
    def skew(self) -> float:
        """The largest cosine between two axes: 0 where all are at right angles."""
        return float(np.abs(np.triu(self._directions.T @ self._directions, 1)).max())

    @property
    def affine_4x4(self) -> Array:
        """The affine as files and MONAI want it whatever the axes: a plane lies in the first two of three."""
        n = len(self.shape)
        affine = np.eye(4)
        affine[:n, :n], affine[:n, 3] = self.affine[:n, :n], self.affine[:n, n]
        return affine

    @property
    def _directions(self) -> Array:
        n = len(self.shape)
        spacing = np.asarray(self.spacing_mm)
        return self.affine[:n, :n] / np.where(spacing > 0, spacing, 1)

    def matches(self, other: Grid, *, tolerance: float = 1e-3) -> bool:
        """Whether both are the same voxels: equal shapes, and no corner apart by more than `tolerance` of a voxel."""
        if self.shape != other.shape:
            return False
        corners = np.stack(np.meshgrid(*[(0, s - 1) for s in self.shape], indexing="ij"), -1).reshape(
            -1, len(self.shape)
        )
        corners = np.concatenate([corners, np.ones((len(corners), 1))], axis=1)
        apart = np.abs(corners @ (self.affine - other.affine).T).max()
        return bool(apart <= tolerance * min(self.spacing_mm))

    def with_spacing(self, spacing_mm: Sequence[float]) -> Grid:
        """The grid of this spacing and centre that covers all of this one, so that `restore` loses nothing."""
        shape = tuple(whole_voxels(s * a / b) for s, a, b in zip(self.shape, self.spacing_mm, spacing_mm))
        return self._rescaled(shape, np.asarray(spacing_mm) / np.asarray(self.spacing_mm))

    def with_shape(self, shape: Sequence[int]) -> Grid:
        """The grid of this shape over the same extent."""
        return self._rescaled(tuple(shape), np.asarray(self.shape) / np.asarray(shape))

    def _rescaled(self, shape: tuple[int, ...], steps: Array) -> Grid:
        # both grids share their centre, so rounding of the shape is split evenly over both ends
        n = len(shape)
        change = np.eye(n + 1)
        change[:n, :n] = np.diag(steps)
        change[:n, n] = (np.asarray(self.shape) - 1) / 2 - steps * (np.asarray(shape) - 1) / 2
        return Grid(shape, self.affine @ change)

    def __repr__(self) -> str:
        return f"Grid(shape={self.shape}, spacing_mm={_round(self.spacing_mm)})"


def whole_voxels(length: float) -> int:
    """The fewest voxels, at least one, that cover a `length` in voxels.

    Whole numbers stay, also if a float32 header puts them a hair above: copies of one scan get one shape.
    """
    return max(1, math.ceil(length - 1e-3))


@dataclass(frozen=True)
class AxisMap:
    """Index on the source axis `source` = scale · index on the target axis + offset."""

    source: int
    scale: float
    offset: float


def axis_maps(from_grid: Grid, to_grid: Grid) -> tuple[AxisMap, ...]:
    """For each target axis, the source axis it runs along. Raises `GeometryError` if the grids are not parallel."""
    n = from_grid.spatial_dims
    if to_grid.spatial_dims != n:
        raise GeometryError(f"grids of {n} and {to_grid.spatial_dims} axes cannot be brought together")
    relative = np.linalg.solve(from_grid.affine, to_grid.affine)
    linear = relative[:n, :n]
    # compared in voxels of the source at the far end of each target axis
    strongest = np.abs(linear).argmax(axis=0)
    rest = np.abs(linear).copy()
    rest[strongest, np.arange(n)] = 0
    if sorted(strongest) != list(range(n)) or (rest > PARALLEL_TOLERANCE * np.abs(linear).max(axis=0)).any():
        raise GeometryError("the grids are oblique to each other; resampling along axes needs parallel axes")
    return tuple(
        AxisMap(int(s), _snap(float(linear[s, t])), _snap(float(relative[s, n]))) for t, s in enumerate(strongest)
    )


def turned(array: npt.NDArray[Any], grid: Grid, like: Grid) -> tuple[npt.NDArray[Any], Grid]:
    """`array` (*grid.shape) with its axes in the order and direction of `like`, and the grid it then lies on.

    Nothing is resampled: shape, spacing and place may still differ. Raises `GeometryError` for oblique grids.
    """
    n = grid.spatial_dims
    change = np.zeros((n + 1, n + 1))
    change[n, n] = 1
    for axis, along in enumerate(axis_maps(grid, like)):
        flipped = along.scale < 0
        change[along.source, axis] = -1 if flipped else 1
        change[along.source, n] = grid.shape[along.source] - 1 if flipped else 0
    order = [int(np.flatnonzero(change[:n, axis])[0]) for axis in range(n)]
    moved = np.flip(array.transpose(order), tuple(axis for axis in range(n) if change[:n, axis].sum() < 0))
    return moved, Grid(moved.shape, grid.affine @ change)


def nearest_ras(array: npt.NDArray[Any], grid: Grid) -> npt.NDArray[Any]:
    """A view of `array` (*grid.shape), a volume, whose axes run as near to right, front and top as they can.

    However a volume is stored, it comes out in one order; an axis at 45 degrees between two may be either.
    """
    directions = grid.affine[:3, :3] / grid.spacing_mm
    near = np.abs(directions).tolist()
    order = max(permutations(range(3)), key=lambda axes: sum(near[world][axis] for world, axis in enumerate(axes)))
    return np.flip(array.transpose(order), tuple(w for w, axis in enumerate(order) if directions[w, axis] < 0))


@dataclass(frozen=True)
class AxisWeights:
    """Interpolation weights (size_to, size_from) of one axis: row t reads the source at scale·t + offset.

    Outside the source the nearest edge voxel is used. When shrinking, `linear` and `cubic` are stretched by the step,
    which removes what the coarser grid cannot hold (as in antialiased image resizing); rows sum to 1.
    `cubic` is the convolution kernel of Keys 1981 with a = −1/2. Of a long axis nearly all weights are 0, and more than
    a memory holds: they are made where they are asked for.
    """

    size_from: int
    size_to: int
    scale: float
    offset: float
    kernel: Kernel

    @cached_property
    def whole(self) -> Array | None:
        """All weights; None where these are more than `MOST_WEIGHTS`."""
        if self.size_from * self.size_to > MOST_WEIGHTS:
            return None
        return self._made(slice(0, self.size_to), slice(0, self.size_from))

    @cached_property
    def reach(self) -> tuple[Indices, Indices]:
        """The first and the last source voxel that each row reads: (size_to,) each."""
        if self.kernel == "nearest":
            index = self._nearest
            return index, index
        support = (2 if self.kernel == "cubic" else 1) * self._stretch
        first, last = np.floor(self._at - support) + 1, np.ceil(self._at + support) - 1
        return first.clip(0).astype(int), last.clip(max=self.size_from - 1).astype(int)

    def block(self, rows: slice, columns: slice) -> Array:
        """The weights of some rows on the source voxels `columns`, which hold all that these rows read."""
        return self._made(rows, columns) if self.whole is None else self.whole[rows, columns]

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """All weights, some rows after the other: the source voxels that these read, and their weights."""
        first, last = self.reach
        step = self.size_to if self.whole is not None else self._rows
        for start in range(0, self.size_to, step):
            rows = slice(start, min(start + step, self.size_to))
            columns = slice(int(first[rows].min()), int(last[rows].max()) + 1)
            yield columns, self.block(rows, columns)

    @property
    def _rows(self) -> int:
        # r rows read at most (r + 4) · stretch voxels: a step each, and the reach of the cubic kernel on either side
        return max(1, min(ROWS, math.isqrt(int(MOST_WEIGHTS / self._stretch) + 4) - 2))

    @property
    def _stretch(self) -> float:
        return max(1.0, abs(self.scale))

    @cached_property
    def _at(self) -> Array:
        return np.asarray(np.clip(self.scale * np.arange(self.size_to) + self.offset, 0, self.size_from - 1))

    @property
    def _nearest(self) -> Indices:
        # ties go down: the snap keeps 0.4999999 and 0.5 on one side
        return np.ceil(self._at - 0.5 - 1e-6).astype(int)

    def _made(self, rows: slice, columns: slice) -> Array:
        at, voxels, kernel = self._at[rows, None], np.arange(columns.start, columns.stop), _KERNELS.get(self.kernel)
        if kernel is None:
            return np.asarray(self._nearest[rows, None] == voxels, dtype=np.float64)
        weights = kernel(np.abs(at - voxels) / self._stretch)
        # the edge voxel stands for everything beyond it
        if self.kernel == "cubic":
            beyond, end = np.arange(1, int(np.ceil(2 * self._stretch)) + 1), self.size_from - 1
            if columns.start == 0:
                weights[:, 0] += kernel(np.abs(at + beyond) / self._stretch).sum(axis=1)
            if columns.stop > end:
                weights[:, -1] += kernel(np.abs(end + beyond - at) / self._stretch).sum(axis=1)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def resample(volume: torch.Tensor, from_grid: Grid, to_grid: Grid, *, kernel: Kernel = "linear") -> torch.Tensor:
    """`volume` (C, *from_grid.shape) read on `to_grid`: (C, *to_grid.shape), float32; outside: the edge voxel.

    Turns, flips and crops come out exact. Raises `GeometryError` if the grids are oblique to each other.
    """
    import torch

    if tuple(volume.shape[1:]) != from_grid.shape:
        raise GeometryError(f"volume of shape {tuple(volume.shape[1:])} on a grid of {from_grid.shape}")
    maps = axis_maps(from_grid, to_grid)
    turned = volume.permute(0, *(m.source + 1 for m in maps))
    weights = [
        AxisWeights(size, target, m.scale, m.offset, kernel)
        for m, size, target in zip(maps, turned.shape[1:], to_grid.shape)
    ]
    # axes that shrink most go first; along the last one, slabs are taken one by one, so that a volume of small integers
    # never exists as a large one of float32
    *first, last = sorted(range(len(maps)), key=lambda a: to_grid.shape[a] / turned.shape[a + 1])
    step = max(1, SLAB_BYTES * turned.shape[last + 1] // (4 * turned.numel()))
    slabs = []
    for start in range(0, turned.shape[last + 1], step):
        slab = turned.narrow(last + 1, start, min(step, turned.shape[last + 1] - start)).float()
        for axis in first:
            slab = _apply_all(slab, weights[axis], axis + 1)
        slabs.append(slab)
    whole = torch.cat(slabs, dim=last + 1) if len(slabs) > 1 else slabs[0]
    del slabs
    return _apply_all(whole, weights[last], last + 1).contiguous()


def resample_labels(labels: torch.Tensor, from_grid: Grid, to_grid: Grid) -> torch.Tensor:
    """Label map (*from_grid.shape) on `to_grid`: linear interpolation of each label by itself, the strongest wins.

    Smoother than nearest neighbour, and no value appears that was not there.
    """
    import torch

    maps = axis_maps(from_grid, to_grid)
    if all(abs(m.scale) == 1 and m.offset == round(m.offset) for m in maps):
        return resample(labels[None].float(), from_grid, to_grid, kernel="nearest")[0].to(labels.dtype)
    best = torch.full(to_grid.shape, -1.0)
    result = torch.zeros(to_grid.shape, dtype=labels.dtype)
    for value in torch.unique(labels):
        score = resample((labels == value)[None].float(), from_grid, to_grid)[0]
        wins = score > best
        best[wins] = score[wins]
        result[wins] = value
    return result


def apply_weights(volume: torch.Tensor, weights: Array, axis: int) -> torch.Tensor:
    """`volume` with its `axis` resampled by `weights` (size after, size before)."""
    import torch

    used = np.flatnonzero(weights.any(axis=0))
    chosen = weights[:, used[0] : used[-1] + 1]
    volume = volume.narrow(axis, int(used[0]), chosen.shape[1])
    if ((chosen != 0).sum(axis=1) == 1).all():
        # a turn, flip, crop or nearest neighbour: voxels are moved, not computed
        index = chosen.argmax(axis=1)
        if len(index) == volume.shape[axis] and (index == np.arange(len(index))).all():
            return volume
        return volume.index_select(axis, torch.as_tensor(index, device=volume.device))
    matrix = torch.as_tensor(chosen, dtype=volume.dtype, device=volume.device)
    if axis == volume.ndim - 1:
        return volume @ matrix.T
    # all axes behind are one: a product of matrices, without turning the volume
    lead, tail = volume.shape[:axis], volume.shape[axis + 1 :]
    return (matrix @ volume.flatten(axis + 1)).reshape(*lead, len(matrix), *tail)


def _apply_all(volume: torch.Tensor, weights: AxisWeights, axis: int) -> torch.Tensor:
    """`volume` with its `axis` resampled by all of `weights`."""
    import torch

    read = ((volume.narrow(axis, c.start, c.stop - c.start), part) for c, part in weights.parts())
    parts = [apply_weights(source, part, axis) for source, part in read]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _linear(distance: Array) -> Array:
    return np.maximum(0, 1 - distance)


def _cubic(distance: Array) -> Array:
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


_KERNELS: dict[str, Callable[[Array], Array]] = {"linear": _linear, "cubic": _cubic}


def _snap(value: float) -> float:
    # headers hold float32: 0.99999994 is 1, and exactly so, or a flip would blur
    nearest = round(value)
    return float(nearest) if abs(value - nearest) < 1e-4 else value


def _round(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values)
