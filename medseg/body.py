"""Which part of a CT is the patient, so that the air around needs no look; other images have no fixed value for air."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from medseg.config import DataConfig, PreprocessConfig, WindowsConfig
from medseg.units import AIR_HU, is_ct

# cells of so many voxels along an edge are looked at as one: outlines need not be exact, and large volumes are cheap
CELL = 4


@dataclass(frozen=True)
class Air:
    """What needs no look: boxes without any of `body` (cells of `CELL` voxels, bool) have `scores` (K,) everywhere."""

    body: torch.Tensor
    scores: torch.Tensor

    def fills(self, start: Sequence[int], size: Sequence[int]) -> bool:
        """Whether the box of voxels `start` … `start + size` holds air alone; outside the image there is nothing."""
        cells = tuple(slice(max(0, a // CELL), max(0, -(-(a + n) // CELL))) for a, n in zip(start, size))
        return not bool(self.body[cells].any())


def air_of(config: WindowsConfig, data: DataConfig, preprocess: PreprocessConfig, image: torch.Tensor) -> Air | None:
    """The air around the patient in a prepared `image` (C, *S), or None where windows are not to be skipped.

    `skip_air: auto` looks for it in 3D CT with fixed normalisation: those values can be traced back to Hounsfield
    units, but not where they are clipped above `AIR_HU`, as plans for organs without air do: then None.
    """
    how = preprocess.intensity[0]
    wanted = config.skip_air == "on" or (config.skip_air == "auto" and is_ct(data.channels[0]))
    known = data.spatial_dims == 3 and how.normalise == "fixed"
    # clipped above what air is told from, soft tissue and air may have one value
    if not wanted or not known or (how.clip is not None and how.clip[0] > AIR_HU):
        return None
    cells = body_cells(image[0], (AIR_HU - how.mean) / how.sd)
    if not cells.any():
        return None
    scores = torch.zeros(data.out_channels)
    if not data.is_regions:
        scores[0] = 1
    return Air(torch.as_tensor(cells), scores)


def body_cells(image: torch.Tensor, threshold: float) -> np.ndarray:
    """Cells (bool) of `image` (*S) that belong to the body or lie beside it: above `threshold`, and what that encloses.

    Lungs and bowel gas are enclosed in some plane, also where the scan cuts them off.
    """
    tissue = _largest_in_cells(image) > threshold
    body = tissue.copy()
    for axis in range(tissue.ndim):
        planes, filled = np.moveaxis(tissue, axis, 0), np.moveaxis(body, axis, 0)
        for number, plane in enumerate(planes):
            filled[number] |= ndimage.binary_fill_holes(plane)
    return np.asarray(ndimage.binary_dilation(body, np.ones((3,) * body.ndim, bool)))


def _largest_in_cells(image: torch.Tensor) -> np.ndarray:
    """The largest value in each cell; slab by slab."""
    slabs = [_pooled(image[a : a + CELL].amax(dim=0)) for a in range(0, image.shape[0], CELL)]
    return np.stack(slabs)


def _pooled(plane: torch.Tensor) -> np.ndarray:
    pooled = torch.nn.functional.max_pool2d(plane[None, None].float(), CELL, ceil_mode=True)
    return np.asarray(pooled[0, 0].numpy())
