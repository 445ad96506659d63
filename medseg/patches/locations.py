"""Where the labels of a case are, as far as patches are centred on them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medseg.preprocess import Prepared

Places = np.ndarray[Any, np.dtype[np.int64]]
Keys = np.ndarray[Any, np.dtype[np.float32]]

MAX_LOCATIONS = 4096
# voxels of a label that are looked at together: what is found in them takes little memory
PIECE = 2**20


def foreground_locations(case: Prepared, ignore_value: int | None = None) -> tuple[torch.Tensor, ...]:
    """For each label present, in rising order, up to 4096 of its voxels, drawn evenly; none of `ignore_value`.

    A voxel is its number (N,) in the flattened label map, in as few bytes as will do, since they are kept for every
    case of a training; `voxel_at` says where it lies. The draw depends on the case's id alone: found at the start or in
    the middle of a run, they are the same.
    """
    if case.label is None:
        return ()
    flat = case.label.numpy().reshape(-1)
    random = np.random.default_rng(zlib.crc32(case.id.encode("utf-8", "surrogateescape")))
    kept: dict[int, tuple[Places, Keys]] = {}
    for first in range(0, flat.size, PIECE):
        at = np.flatnonzero(flat[first : first + PIECE] != 0) + first
        values, keys = flat[at], random.random(len(at), dtype=np.float32)
        for value in np.unique(values).tolist():
            if value != ignore_value:
                mine = np.flatnonzero(values == value)
                found = _smallest(at[mine], keys[mine])
                if value in kept:
                    before = kept[value]
                    found = _smallest(np.concatenate([before[0], found[0]]), np.concatenate([before[1], found[1]]))
                kept[value] = found
    numbers = torch.int32 if flat.size <= torch.iinfo(torch.int32).max else torch.int64
    return tuple(torch.from_numpy(kept[value][0]).to(numbers) for value in sorted(kept))


def voxel_at(place: int, shape: Sequence[int]) -> list[int]:
    """Where the voxel of number `place` of a flattened map of `shape` lies."""
    return [int(i) for i in np.unravel_index(place, tuple(shape))]


def _smallest(places: Places, keys: Keys) -> tuple[Places, Keys]:
    """The places with the smallest keys: an even draw, whatever the pieces in which they come."""
    if len(keys) <= MAX_LOCATIONS:
        return places, keys
    chosen = np.argpartition(keys, MAX_LOCATIONS)[:MAX_LOCATIONS]
    return places[chosen], keys[chosen]
