"""Our readers in the form that MONAI's LoadImage takes; reading itself is in the package beside this file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.data.image_reader import ImageReader

from medseg.readers import Image, is_image_file, read_images, read_label

log = logging.getLogger(__name__)

Names = Sequence[str | Path] | str | Path


class VolumeReader(ImageReader):  # type: ignore[misc,unused-ignore]
    """Reads the images, or with `labels` the label map, of one case for `monai.transforms.LoadImage(reader=…)`.

    Files are opened by `get_data`, not by `read`: LoadImage answers any error of `read` by trying other readers, and
    these accept what is refused here.
    """

    def __init__(self, *, spatial_dims: int | None = None, channels: int | None = None, labels: bool = False) -> None:
        super().__init__()
        self._spatial_dims = spatial_dims
        self._channels = channels
        self._labels = labels

    def verify_suffix(self, filename: Names) -> bool:
        """Whether all names are of known formats."""
        return all(is_image_file(path) for path in _paths(filename))

    def read(self, data: Names, **kwargs: object) -> tuple[Path, ...]:
        """The paths of one case, unopened."""
        return _paths(data)

    def get_data(self, img: Sequence[Path]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Voxels (C, …) and MONAI's metadata; the affine is 4×4 also in 2D. Raises `DataError`, `GeometryError`."""
        if self._labels:
            label = read_label(img[0], spatial_dims=self._spatial_dims)
            image = Image(label.array[None], label.geometry)
        else:
            image = read_images(img, spatial_dims=self._spatial_dims, channels=self._channels)
        for warning in image.geometry.warnings:
            log.warning("%s: %s", img[0], warning)
        affine = image.grid.affine_4x4
        meta = {
            "affine": affine,
            "original_affine": affine.copy(),
            "spatial_shape": np.asarray(image.grid.shape),
            "original_channel_dim": 0,
            "space": "RAS",
        }
        return image.array, meta


def _paths(names: Names) -> tuple[Path, ...]:
    return (Path(names),) if isinstance(names, str | Path) else tuple(Path(name) for name in names)
