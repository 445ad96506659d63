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
from medseg.readers import Geometry, is_picture, read_image, same_kind_or_raise
from medseg.views import standing

logger = logging.getLogger(__name__)


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
    image = _image(pair, read.geometry)
    order, flips, upright = standing(read.grid)
    turned = [layer.transpose(order)[flips] for layer in (*maps, *([] if image is None else [image]))]
    return Layers(turned[0], turned[1], turned[2] if len(turned) > 2 else None, upright)


def _image(pair: Pair, geometry: Geometry) -> npt.NDArray[Any] | None:
    if pair.image is None:
        return None
    try:
        same_kind_or_raise(pair.image, pair.reference)
        image = read_image(pair.image, channels=1 if is_picture(pair.image) else None, finite=False)
    except DataError as error:
        logger.warning("left out of the pictures: %s", error)
        return None
    if not image.geometry.matches(geometry, tolerance=GRID_TOLERANCE_VOXELS):
        logger.warning("%s: lies on another grid than the reference and is left out of the pictures", pair.image)
        return None
    array: npt.NDArray[Any] = image.array[0]
    return array
