"""What is shown of a case: prediction, reference and image standing upright in space; no drawing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.errors import DataError
from medseg.evaluate import Evaluation
from medseg.evaluate.pairs import GRID_TOLERANCE_VOXELS, Pair, read_maps
from medseg.grid import Grid
from medseg.metrics import Labels, judged
from medseg.readers import is_picture, read_image

logger = logging.getLogger(__name__)

_WINDOW_PERCENTILES = (1, 99)
_WINDOW_ROOM = 4.0
# enough for quantiles to a thousandth, and sorted at once
_WINDOW_VALUES = 200_000


@dataclass(frozen=True, eq=False)
class Layers:
    """Maps and image (None: there is none) of one case, all (*grid.shape); the axes run nearest to x, y(, z) in RAS.

    The maps are 0 wherever a voxel belongs to no label or is ignored.
    """

    prediction: Labels
    reference: Labels
    image: npt.NDArray[Any] | None
    grid: Grid

    @property
    def outlined(self) -> npt.NDArray[np.bool_]:
        """Where either map has a label."""
        return np.asarray((self.prediction != 0) | (self.reference != 0))

    def cropped(self, box: tuple[slice, ...]) -> Layers:
        """What lies in `box`, whose slices have a start, an end and no step."""
        affine = self.grid.affine.copy()
        n = self.grid.spatial_dims
        affine[:n, n] += affine[:n, :n] @ [part.start for part in box]
        image = None if self.image is None else self.image[box]
        prediction = self.prediction[box]
        return Layers(prediction, self.reference[box], image, Grid(prediction.shape, affine))


def read_layers(pair: Pair, evaluation: Evaluation) -> Layers:
    """The layers of `pair`, upright. Raises `DataError` where a map cannot be read or there is no prediction.

    An image that cannot be read or lies on another grid is left out with a warning.
    """
    if pair.prediction is None:
        raise DataError(f"{pair.reference}: no prediction of this case, so there is nothing to show")
    options = evaluation.options
    read = read_maps(pair.prediction, pair.reference, resample_prediction=options.resample_prediction)
    values = list(evaluation.labels.values())
    maps = judged(read.prediction, read.reference, values, ignore_value=options.ignore_value)
    image = _image(pair, read.grid)
    order, flips, upright = _standing(read.grid)
    turned = [layer.transpose(order)[flips] for layer in (*maps, *([] if image is None else [image]))]
    return Layers(turned[0], turned[1], turned[2] if len(turned) > 2 else None, upright)


def window(image: npt.NDArray[Any], outlined: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Black and white: the shortest range that holds half of what is outlined, and four times as much on both sides.

    That is six standard deviations of one tissue each way. Of many tissues the most frequent ones decide: in a CT of
    all organs soft tissue, within 40 HU of the usual −160 to 240, where a range over all of them (lung to bone) shows
    organs as one grey. The shortest half: Rousseeuw and Leroy 1988. Where it has no width (half of the voxels are
    equal) or nothing is outlined, the 1st to 99th percentile. Never beyond the range of the image; NaN is passed over.
    """
    known = image[np.isfinite(image)]
    if not known.size:
        return 0.0, 1.0
    inside = np.sort(_some(image[outlined]))
    inside = inside[np.isfinite(inside)]
    low, high = np.percentile(inside if inside.size else _some(known), _WINDOW_PERCENTILES)
    half = len(inside) // 2
    if half:
        widths = inside[half:] - inside[: len(inside) - half]
        first = int(np.argmin(widths))
        if widths[first] > 0:
            room = _WINDOW_ROOM * widths[first]
            low, high = inside[first] - room, inside[first + half] + room
    low, high = max(float(low), float(known.min())), min(float(high), float(known.max()))
    return low, max(high, low + 1e-6)


def _some(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Evenly chosen ones of very many values."""
    return np.asarray(values.ravel()[:: max(1, values.size // _WINDOW_VALUES)], dtype=np.float64)


def _standing(grid: Grid) -> tuple[list[int], tuple[slice, ...], Grid]:
    """The order of the voxel axes, their flips, and the grid after both."""
    n = grid.spatial_dims
    share = np.abs(grid.affine[:n, :n]) / np.asarray(grid.spacing_mm)
    order: list[int] = []
    for axis in range(n):
        left = [voxel_axis for voxel_axis in range(n) if voxel_axis not in order]
        order.append(max(left, key=lambda voxel_axis: float(share[axis, voxel_axis])))
    flipped = [bool(grid.affine[axis, order[axis]] < 0) for axis in range(n)]
    affine = grid.affine.copy()
    for axis, (source, flip) in enumerate(zip(order, flipped)):
        affine[:, axis] = -grid.affine[:, source] if flip else grid.affine[:, source]
        affine[:, n] += grid.affine[:, source] * (grid.shape[source] - 1 if flip else 0)
    shape = tuple(grid.shape[source] for source in order)
    return order, tuple(slice(None, None, -1 if flip else 1) for flip in flipped), Grid(shape, affine)


def _image(pair: Pair, grid: Grid) -> npt.NDArray[Any] | None:
    if pair.image is None:
        return None
    try:
        image = read_image(pair.image, channels=1 if is_picture(pair.image) else None, finite=False)
    except DataError as error:
        logger.warning("left out of the pictures: %s", error)
        return None
    if not image.grid.matches(grid, tolerance=GRID_TOLERANCE_VOXELS):
        logger.warning("%s: lies on another grid than the reference and is left out of the pictures", pair.image)
        return None
    array: npt.NDArray[Any] = image.array[0]
    return array
