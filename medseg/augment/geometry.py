"""One resampling from a case to a patch: crop, rotation, shear, scale, shift and flips together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F

# what lies midway between two voxels, by the cubic through them and their neighbours (Keys 1981, a = −1/2)
MIDWAY = (-1 / 16, 9 / 16, 9 / 16, -1 / 16)
# it reads so many voxels more on either side
MARGIN = 1

Box = tuple[tuple[int, ...], tuple[int, ...]]


def source_box(matrix: torch.Tensor, centre: Sequence[float], patch_size: Sequence[int], shape: Sequence[int]) -> Box:
    """Start and size of the box of a case of `shape` that a patch around `centre` (voxels) is made from.

    It holds every voxel that `resample` reads, and one more beyond each edge of the case that the patch crosses; no
    more of a case need be read, or be on the device.
    """
    reach = (matrix[:, :-1].abs() @ torch.tensor([(p - 1) / 2 for p in patch_size])).tolist()
    start, size = [], []
    for middle, shift, half, whole in zip(centre, matrix[:, -1].tolist(), reach, shape):
        first = min(max(math.floor(middle + shift - half) - MARGIN, -1), whole)
        last = min(max(math.ceil(middle + shift + half) + MARGIN, -1), whole)
        start.append(first)
        size.append(last - first + 1)
    return tuple(start), tuple(size)


def resample(
    matrix: torch.Tensor,
    centre: Sequence[float],
    image: torch.Tensor,
    label: torch.Tensor,
    patch_size: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patch (C, *patch_size), (*patch_size) of `image` (C, *S) float32 and `label` (*S), n = 1, 2 or 3 dimensions.

    Position p of the patch, in voxels from its middle, reads `centre` + matrix · (p, 1); the image linearly
    between its voxels and what a cubic puts midway between them, which blurs it little; the label what linear
    interpolation of each label by itself would give the most, so that it keeps its values and type. Beyond the box its
    outermost voxels go on: `source_box` puts what is outside the case there.
    """
    if is_whole(matrix, centre, patch_size):
        return _copy(matrix, centre, image, label, patch_size)
    n = len(patch_size)
    matrix = torch.cat([matrix[:, :n], matrix[:, n:] + torch.tensor(centre)[:, None]], dim=1)
    new_label = _weightiest(_positions(matrix, patch_size, label.device), label).reshape(tuple(patch_size))
    # voxels → −1…1 between the centres of the outermost, the last axis first
    theta = matrix * (2 / (torch.tensor(label.shape) - 1).clamp(min=1))[:, None]
    theta[:, n:] -= 1
    where = _positions(theta.flip(0), patch_size, image.device)
    image = _with_midpoints(image)
    if n == 1:
        # grid_sample begins at two dimensions
        where, image = F.pad(where, (0, 1))[:, None], image[..., None, :]
    # on a CPU the threads share the samples of a batch: the patch becomes a batch of slabs of one image
    slabs = _slabs(len(where)) if where.device.type == "cpu" else 1
    where = where.view(slabs, -1, *where.shape[1:])
    source = image.expand(slabs, *image.shape)
    moved = F.grid_sample(source, where, mode="bilinear", padding_mode="border", align_corners=True)
    return moved.movedim(1, 0).reshape(len(image), *patch_size), new_label


def is_whole(matrix: torch.Tensor, centre: Sequence[float], patch_size: Sequence[int]) -> bool:
    """Whether the patch lies on voxels of the case, mirrored or not: nothing is interpolated then."""
    linear = matrix[:, :-1]
    first = [c + s - (p - 1) / 2 for c, s, p in zip(centre, matrix[:, -1].tolist(), patch_size)]
    return bool(torch.equal(linear.abs(), torch.eye(len(linear)))) and all(f == round(f) for f in first)


def _slabs(size: int) -> int:
    return max(n for n in range(1, torch.get_num_threads() + 1) if size % n == 0)


def _positions(matrix: torch.Tensor, patch_size: Sequence[int], device: torch.device) -> torch.Tensor:
    """(*patch_size, n): matrix · (p, 1) for each voxel of a patch, p counted from its middle."""
    n = len(patch_size)
    steps = [torch.arange(p) - (p - 1) / 2 for p in patch_size]
    # of each axis, its part of the sum: (p, n)
    parts = [step[:, None] * matrix[None, :, axis] for axis, step in enumerate(steps)]
    parts[-1] = parts[-1] + matrix[:, n]
    # a GPU need not have done all before it for these to be sent
    parts = [part.to(device, non_blocking=True) for part in parts]
    if n == 1:
        return parts[0]
    # the last axis and the n numbers are one long line, which a processor adds at once
    lines = (parts[0][:, None] + parts[-1]).flatten(1)
    if n == 2:
        return lines.view(*patch_size, n)
    across = parts[1].repeat(1, patch_size[2])
    return (lines[:, None] + across).view(*patch_size, n)


def _with_midpoints(image: torch.Tensor) -> torch.Tensor:
    """(C, *S) → (C, *(2S − 1)): the voxels, and between each two of them what a cubic says is there."""
    far, near, next_, beyond = MIDWAY
    for axis in range(1, image.ndim):
        size = image.shape[axis]
        line = torch.arange(-1, size + 1, device=image.device).clamp_(0, size - 1)
        longer = image.index_select(axis, line)
        around = [longer.narrow(axis, start, size - 1) for start in range(4)]
        midway = torch.mul(around[0], far).add_(around[1], alpha=near)
        midway.add_(around[2], alpha=next_).add_(around[3], alpha=beyond)
        first = image.narrow(axis, 0, 1)
        pairs = torch.stack([midway, image.narrow(axis, 1, size - 1)], dim=axis + 1).flatten(axis, axis + 1)
        image = torch.cat([first, pairs], dim=axis)
    return image


def _weightiest(position: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """(V,) of the labels of the voxels around each `position` (*P, n) that with the greatest sum of linear weights."""
    n = label.ndim
    position = position.reshape(-1, n)
    first = position.floor()
    # what the lower and the upper voxel along each axis add to the index, in whole numbers, which a float32 does not
    # hold beyond 2^24
    parts: list[tuple[torch.Tensor, ...]] = []
    stride = 1
    for axis in reversed(range(n)):
        last = label.shape[axis] - 1
        both = (first[:, axis].add(side).clamp_(0, last).to(torch.int32).mul_(stride) for side in (0, 1))
        parts.insert(0, tuple(both))
        stride *= last + 1
    flat, corners = label.reshape(-1), list(itertools.product((0, 1), repeat=n))
    around = []
    for corner in corners:
        index = parts[0][corner[0]]
        for part, side in zip(parts[1:], corner[1:]):
            index = index + part[side]
        around.append(flat.index_select(0, index))
    found = around[0].clone()
    # nearly all positions lie inside one label
    mixed = torch.zeros(len(found), dtype=torch.bool, device=label.device)
    for values in around[1:]:
        mixed |= values != found
    at = mixed.nonzero()[:, 0]
    values = torch.stack([v[at] for v in around])
    upper = position[at] - first[at]
    sides = (1 - upper, upper)
    shares = [[sides[side][:, axis] for axis, side in enumerate(corner)] for corner in corners]
    weights = torch.stack([reduce(torch.mul, share) for share in shares])
    sums = torch.stack([((values == value) * weights).sum(dim=0) for value in values])
    found[at] = values.gather(0, sums.argmax(dim=0, keepdim=True))[0]
    return found


def _copy(
    matrix: torch.Tensor,
    centre: Sequence[float],
    image: torch.Tensor,
    label: torch.Tensor,
    patch_size: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    first = [round(c + s - (p - 1) / 2) for c, s, p in zip(centre, matrix[:, -1].tolist(), patch_size)]
    mirrored = [a for a in range(len(first)) if matrix[a, a] < 0]
    for axis, (start, length) in enumerate(zip(first, patch_size)):
        size = label.shape[axis]
        if start >= 0 and start + length <= size:
            image, label = image.narrow(axis + 1, start, length), label.narrow(axis, start, length)
        else:
            line = torch.arange(start, start + length, device=image.device).clamp_(0, size - 1)
            image, label = image.index_select(axis + 1, line), label.index_select(axis, line)
    return image.flip([a + 1 for a in mirrored]), label.flip(mirrored)
