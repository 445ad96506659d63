"""What a look at the files of a data set yields: facts of a case and findings; nothing is judged here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# voxels of a channel that its percentiles are measured on
SAMPLED = 50_000


@dataclass(frozen=True)
class Finding:
    """One row of the table; `case` is empty where it concerns the whole data set."""

    severity: Severity
    case: str
    file: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        subject = ": ".join(dict.fromkeys(part for part in (self.case, self.file) if part))
        expected = f", expected {self.expected}" if self.expected else ""
        return f"{subject}{': ' if subject else ''}{self.found}{expected}; {self.fix}"


@dataclass(frozen=True)
class Intensities:
    """Of one channel the smallest and the largest value, and between them its percentiles 1 and 99."""

    lowest: float
    low: float
    high: float
    highest: float


@dataclass(frozen=True)
class CaseFacts:
    """What the scan measured of a case; `axcodes` as in RAS, empty for 2D; `label_voxels`: voxels by label value.

    `intensities`: of every channel; empty where some are not finite. `voxels`: a digest of the image's numbers, equal
    for one image in whatever file: of any type of number and, of a volume, any order and direction of the axes.
    `channel_voxels`: those of its channels, without constant ones. `stored_voxels`: a digest of the numbers as they are
    stored, which is what earlier versions had.
    """

    case: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    axcodes: str
    dtype: str
    channels: int
    label_voxels: Mapping[int, int]
    intensities: tuple[Intensities, ...] = ()
    voxels: str = ""
    channel_voxels: tuple[str, ...] = ()
    stored_voxels: str = ""

    @property
    def is_coloured(self) -> bool:
        """Whether it is a picture in colour, if it is one file."""
        return len(self.shape) == 2 and self.channels == 3


def is_flat(shape: Sequence[int]) -> bool:
    """Whether an image is a plane: of two axes, or a volume of one slice."""
    return len(shape) == 2 or shape[-1] == 1


def measure_intensities(channel: npt.NDArray[Any]) -> Intensities:
    """What the intensities of a finite `channel` (*S) are like; the percentiles on an even selection of its voxels."""
    # in the order of memory, so that nothing is copied whole
    flat = channel.ravel(order="K")
    step = max(1, flat.size // SAMPLED)
    # without a common factor with any axis: else only some columns of the volume would be seen
    while any(math.gcd(step, size) > 1 for size in channel.shape):
        step += 1
    low, high = np.percentile(flat[::step].astype(np.float64), (1, 99))
    return Intensities(float(channel.min()), float(low), float(high), float(channel.max()))
