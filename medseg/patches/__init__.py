"""Training batches: which part of which case comes into one, and where the cases lie; what is drawn is in augment."""

from medseg.patches.boxes import cut
from medseg.patches.locations import foreground_locations
from medseg.patches.sampler import Batch, PatchSampler
from medseg.patches.shelf import Shelf

__all__ = ["Batch", "PatchSampler", "Shelf", "cut", "foreground_locations"]
