"""Random changes of a training batch: `draw` the numbers of all samples first, then apply them, on any device."""

from medseg.augment.draws import Draws, draw
from medseg.augment.geometry import resample, source_box
from medseg.augment.intensity import change_intensity

__all__ = ["Draws", "change_intensity", "draw", "resample", "source_box"]
