"""Worse versions of a case, as other scanners and other hands would give it: what an estimate of Dice learns from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from medseg.grid import Grid, axis_maps, resample, resample_labels
from medseg.preprocess import PERCENTILES, Prepared

Volume = npt.NDArray[np.floating[Any]]
Degradation = Literal["noise", "blur", "low_resolution", "inversion", "gamma", "spacing", "crop", "ghosting", "shading"]
DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)


def degrade(prepared: Prepared, kind: Degradation, strength: float, generator: np.random.Generator) -> Prepared:
    """A case as a worse scan would give it, on the network's grid. `strength` 0–1, 0 changes (almost) nothing.

    A channel of mean 0 and SD 1 keeps both, as the normalisation of a worse file would see to; others keep their unit.
    Raises `ValueError` for an unknown kind.
    """
    axis, sign = int(generator.integers(prepared.image.ndim - 1)), int(generator.choice([-1, 1]))
    if kind == "spacing":
        return _zoom(prepared, math.exp(sign * strength * math.log(2.5)))
    if kind == "crop":
        return _crop(prepared, axis, 1 - 0.8 * strength, at_end=sign > 0)
    channels = []
    for channel in prepared.image.numpy():
        noise = generator.standard_normal(channel.shape, dtype=np.float32) if kind == "noise" else channel
        worse = _worse(channel, kind, strength, axis, sign, noise)
        channels.append(worse)
    image = torch.as_tensor(np.stack(channels).astype(np.float32))
    return _with_image(prepared, image)


def _worse(channel: Volume, kind: str, strength: float, axis: int, sign: int, noise: Volume) -> Volume:
    sd = float(channel.std())
    if kind == "noise":
        return channel + 2 * strength * sd * noise
    if kind == "blur":
        return np.asarray(ndimage.gaussian_filter(channel, 4 * strength))
    if kind == "low_resolution":
        size = channel.shape[axis]
        coarse = ndimage.gaussian_filter1d(channel, 3 * strength, axis=axis)
        kept = np.unique(np.linspace(0, size - 1, max(2, round(size / (1 + 7 * strength)))).round().astype(int))
        nearest = kept[np.abs(np.arange(size)[:, None] - kept).argmin(axis=1)]
        return np.asarray(np.take(coarse, nearest, axis=axis))
    if kind == "inversion":
        # what is brighter than a quantile is mirrored there; at full strength everything is
        turn = np.quantile(channel, 1 - strength)
        return np.where(channel > turn, 2 * turn - channel, channel)
    if kind == "gamma":
        low, high = channel.min(), max(channel.max(), channel.min() + 1e-6)
        return np.asarray(((channel - low) / (high - low)) ** math.exp(sign * 1.6 * strength) * (high - low) + low)
    if kind == "ghosting":
        size = channel.shape[axis]
        ghosts = sum(np.roll(channel, round(size * part), axis) for part in (0.25, 0.5, 0.75))
        return np.asarray(channel + sign * 0.6 * strength * ghosts)
    if kind == "shading":
        ramp = np.linspace(0, sign * 4 * strength * sd, channel.shape[axis], dtype=np.float32)
        return channel + ramp.reshape([-1 if a == axis else 1 for a in range(channel.ndim)])
    raise ValueError(f"degradation {kind!r}: expected one of {', '.join(DEGRADATIONS)}")


def _with_image(prepared: Prepared, image: torch.Tensor) -> Prepared:
    """The case with other intensities, of which `raw` is told as the file would have it."""
    raw = prepared.raw.clone()
    for c, (old, new) in enumerate(zip(prepared.image, image)):
        before, after = (torch.as_tensor(np.percentile(v.numpy(), PERCENTILES)) for v in (old, new))
        unit = (raw[c, -2] - raw[c, 1]) / max(float(before[-2] - before[1]), 1e-6)
        raw[c] += (after - before) * unit
        if abs(float(old.mean())) < 0.01 and abs(float(old.std(correction=0)) - 1) < 0.01:
            new.sub_(new.mean()).div_(max(float(new.std(correction=0)), 1e-6))
    return replace(prepared, image=image, raw=raw)


def _crop(prepared: Prepared, axis: int, share: float, *, at_end: bool) -> Prepared:
    size = prepared.grid.shape[axis]
    kept = max(1, round(size * share))
    first = 0 if at_end else size - kept
    box = [slice(None)] * prepared.grid.spatial_dims
    box[axis] = slice(first, first + kept)
    label = None if prepared.label is None else prepared.label[tuple(box)]
    m = axis_maps(prepared.source, prepared.grid)[axis]
    ends = sorted(m.scale * edge + m.offset for edge in (first - 0.5, first + kept - 0.5))
    there = prepared.source.shape[m.source]
    start, stop = max(0, round(ends[0] + 0.5)), min(there, round(ends[1] + 0.5))
    return replace(
        _with_image(prepared, prepared.image[(slice(None), *box)].clone()),
        label=label,
        grid=_part(prepared.grid, axis, first, kept),
        source=_part(prepared.source, m.source, start, max(1, stop - start)),
    )


def _part(grid: Grid, axis: int, first: int, size: int) -> Grid:
    affine = grid.affine.copy()
    affine[:, -1] += first * grid.affine[:, axis]
    return Grid(tuple(size if a == axis else s for a, s in enumerate(grid.shape)), affine)


def _zoom(prepared: Prepared, factor: float) -> Prepared:
    """Content `factor` times as large in voxels that claim their old spacing; never more voxels than before."""
    shape = tuple(max(1, min(s, round(s * factor))) for s in prepared.grid.shape)
    source = tuple(max(1, min(s, round(s * factor))) for s in prepared.source.shape)
    steps = np.diag([1 / factor] * len(shape) + [1.0])
    steps[:-1, -1] = [(s - 1) / 2 - (t - 1) / 2 / factor for s, t in zip(prepared.grid.shape, shape)]
    there = Grid(shape, prepared.grid.affine @ steps)
    image = resample(prepared.image, prepared.grid, there, kernel="cubic")
    label = None if prepared.label is None else resample_labels(prepared.label, prepared.grid, there)
    claimed = Grid(shape, prepared.grid.affine)
    return replace(_with_image(prepared, image), label=label, grid=claimed, source=Grid(source, prepared.source.affine))
