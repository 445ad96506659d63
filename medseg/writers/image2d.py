"""Label maps of pictures as PNG index pictures, and colour; names and renaming are the package's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL.PngImagePlugin import PngInfo


def write(path: Path, array: npt.NDArray[Any], names: Mapping[int, str]) -> None:
    """Writes `array` (rows, columns), uint8 or uint16, as grey PNG; the value of a pixel is its label."""
    info = PngInfo()
    info.add_text("labels", json.dumps({str(value): names[value] for value in sorted(names)}))
    Picture.fromarray(np.ascontiguousarray(array)).save(path, format="PNG", pnginfo=info)


def write_rgb(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Writes `pixels` (rows, columns, 3) as colour PNG."""
    Picture.fromarray(pixels).save(path, format="PNG")
