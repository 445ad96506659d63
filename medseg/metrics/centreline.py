"""Overlap of the centre lines of two masks, for vessels and other thin tubes."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medseg.metrics.codes import Mask


def centreline_dice(prediction: Mask, reference: Mask) -> float:
    """clDice (Shit et al., CVPR 2021) of two masks (I, J) or (I, J, K); NaN where both are empty, 0 where one is.

    Harmonic mean of the share of the prediction's centre line that lies in the reference and of the reference's that
    lies in the prediction. Centre lines are those of Lee et al. 1994 in steps of voxels, whatever the spacing; they
    may differ by a voxel between a mask and its mirror image. A blob that leaves none has its deepest voxel. Raises
    `ModuleNotFoundError` without scikit-image.
    """
    if not prediction.any() or not reference.any():
        return 0.0 if prediction.any() or reference.any() else float("nan")
    precision = _share_inside(_centreline(prediction), reference)
    sensitivity = _share_inside(_centreline(reference), prediction)
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0


def _centreline(mask: Mask) -> Mask:
    # imported here: scikit-image is needed for this measure only
    from skimage.morphology import skeletonize

    line = np.asarray(skeletonize(mask, method="lee"), dtype=bool)
    # thinning wipes out blobs of even sides whole, a cube of 2 × 2 × 2 for one: their deepest voxel stands for them
    blobs, n_blobs = ndimage.label(mask, np.ones((3,) * mask.ndim))
    kept = np.zeros(n_blobs + 1, bool)
    kept[blobs[line]] = True
    for number, box in enumerate(ndimage.find_objects(blobs), start=1):
        if not kept[number]:
            depth = ndimage.distance_transform_edt(np.pad(blobs[box] == number, 1))[(slice(1, -1),) * mask.ndim]
            line[box].flat[int(np.argmax(depth))] = True
    return line


def _share_inside(line: Mask, mask: Mask) -> float:
    return float(np.count_nonzero(line & mask) / np.count_nonzero(line))
