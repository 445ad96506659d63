"""Where the labels of a case are, as far as patches are centred on them."""

from __future__ import annotations

import zlib
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
    """For each label present, in rising order, up to 4096 of its voxels (N, n), drawn evenly; none of `ignore_value`.

    The draw depends on the case's id alone: found at the start or in the middle of a run, they are the same.
    """
    if case.label is None:
        return ()
    flat = case.label.numpy().reshape(-1)
    random = np.random.default_rng(zlib.crc32(case.id.encode()))
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
    return tuple(_voxels(kept[value][0], case.label.shape) for value in sorted(kept))


def _smallest(places: Places, keys: Keys) -> tuple[Places, Keys]:
    """The places with the smallest keys: an even draw, whatever the pieces in which they come."""
    if len(keys) <= MAX_LOCATIONS:
        return places, keys
    chosen = np.argpartition(keys, MAX_LOCATIONS)[:MAX_LOCATIONS]
    return places[chosen], keys[chosen]


def _voxels(places: Places, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.stack(np.unravel_index(places, shape), axis=1).astype(np.int32))
