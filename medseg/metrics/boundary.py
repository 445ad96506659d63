"""Overlap of the rims of two masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medseg.metrics.codes import Mask
from medseg.metrics.surfaces import TIE_TOLERANCE

# voxels of a slab: a distance transform needs some fifty bytes for each
_SLAB_VOXELS = 1 << 20


def boundary_iou(prediction: Mask, reference: Mask, *, spacing_mm: Sequence[float], within_mm: float) -> float:
    """IoU of the two rims (Cheng et al., "Boundary IoU", CVPR 2021); NaN where both masks are empty, 0 where one is.

    A rim is what of a mask lies within `within_mm` of the nearest voxel outside, from centre to centre, and always its
    outermost voxels. Beyond the map is outside. Cheng et al. take the distance from how far annotators disagree, and
    2 % of the diagonal where that is unknown; a diagonal changes with the field of view, so here it is in mm.
    """
    one, other = (_rim(mask, spacing_mm, within_mm) for mask in (prediction, reference))
    both = int(np.count_nonzero(one & other))
    either = int(np.count_nonzero(one | other))
    return both / either if either else float("nan")


def _rim(mask: Mask, spacing_mm: Sequence[float], within_mm: float) -> Mask:
    if within_mm >= min((n + 1) / 2 * mm for n, mm in zip(mask.shape, spacing_mm)):
        # no voxel lies deeper than the middle of the map's shortest side
        return mask
    # what is farther than `within_mm` away changes nothing: slabs with that much on both sides are exact
    reach = math.ceil(within_mm / spacing_mm[0]) + 1
    # slabs below that much would be read many times over
    rows = max(_SLAB_VOXELS // mask[0].size, reach)
    cross = ndimage.generate_binary_structure(mask.ndim, 1)
    rim: Mask = mask & ~ndimage.binary_erosion(mask, cross)
    for first in range(0, len(mask), rows):
        start, stop = max(first - reach, 0), min(first + rows + reach, len(mask))
        ends = (int(start == 0), int(stop == len(mask)))
        slab = np.pad(mask[start:stop], [ends, *[(1, 1)] * (mask.ndim - 1)])
        distance = ndimage.distance_transform_edt(slab, sampling=spacing_mm)
        inner = distance[(slice(first - start + ends[0], None), *[slice(1, -1)] * (mask.ndim - 1))]
        here = slice(first, min(first + rows, len(mask)))
        near = inner[: here.stop - first] <= within_mm + TIE_TOLERANCE * min(spacing_mm)
        rim[here] |= near & mask[here]
    return rim
