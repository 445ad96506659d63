"""Which part of which case comes into a training batch; what then happens to it is in augment.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from medseg.preprocess import Prepared

# augmentation turns and scales a patch: this much of its surroundings is cut out with it
MARGIN = 1.25
MAX_LOCATIONS = 4096


@dataclass(frozen=True)
class Batch:
    """`image` (B, C, *S) float32, `label` (B, *S), `spacing_mm` (B, n), `cases`: where each sample comes from."""

    image: torch.Tensor
    label: torch.Tensor
    spacing_mm: torch.Tensor
    cases: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.image.to(device), self.label.to(device), self.spacing_mm.to(device), self.cases)


class PatchSampler:
    """Cuts batches out of prepared cases. Every case comes equally often: cases are dealt like cards, then reshuffled.

    A share `foreground_fraction` of the patches is centred on a labelled voxel, the label drawn evenly from those
    that the case has; the others anywhere. Patches have `patch_size` plus a margin; what lies outside a case is 0.
    """

    def __init__(
        self,
        cases: Sequence[Prepared],
        *,
        patch_size: Sequence[int],
        batch_size: int,
        foreground_fraction: float,
        generator: torch.Generator,
        ignore_value: int | None = None,
    ) -> None:
        self._cases = cases
        self._batch_size = batch_size
        self._foreground_fraction = foreground_fraction
        self._generator = generator
        self._patch = tuple(patch_size)
        # as much on both sides: the patch then lies on voxels of the cut, not between them
        self._size = tuple(p + 2 * math.ceil(p * (MARGIN - 1) / 2) for p in patch_size)
        self._locations = [foreground_locations(c, generator, ignore_value) for c in cases]
        self._deck: list[int] = []

    def draw(self) -> Batch:
        """The next batch."""
        chosen = [self._deal() for _ in range(self._batch_size)]
        parts = [self._cut(index) for index in chosen]
        return Batch(
            image=torch.stack([image for image, _ in parts]),
            label=torch.stack([label for _, label in parts]),
            spacing_mm=torch.tensor([self._cases[i].grid.spacing_mm for i in chosen], dtype=torch.float32),
            cases=tuple(self._cases[i].id for i in chosen),
        )

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases that patches are cut from."""
        return tuple(case.id for case in self._cases)

    def state(self) -> list[int]:
        """What, beside the generator's own state, decides the next batches."""
        return list(self._deck)

    def load_state(self, deck: Sequence[int]) -> None:
        """Go on from `state()`."""
        self._deck = [int(i) for i in deck]

    def _deal(self) -> int:
        if not self._deck:
            self._deck = torch.randperm(len(self._cases), generator=self._generator).tolist()
        return self._deck.pop()

    def _cut(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        case = self._cases[index]
        if case.label is None:
            raise ValueError(f"{case.id} was prepared without its label")
        start = self._start(case.grid.shape, self._locations[index])
        return cut(case.image, start, self._size), cut(case.label, start, self._size)

    def _start(self, shape: Sequence[int], locations: Sequence[torch.Tensor]) -> list[int]:
        random = torch.rand(3 + len(shape), generator=self._generator)
        if locations and random[0] < self._foreground_fraction:
            voxels = locations[int(random[1] * len(locations))]
            centre = voxels[int(random[2] * len(voxels))].tolist()
            return [int(c) - p // 2 for c, p in zip(centre, self._size)]
        starts = []
        for r, size, window, inner in zip(random[3:].tolist(), shape, self._size, self._patch):
            # the margin may hang over the edge, so that the edge is in a patch as often as it can be
            over = (window - inner) // 2
            low, high = -over, size - inner - over
            starts.append(low + int(r * (high - low + 1)) if high > low else (size - window) // 2)
        return starts


def foreground_locations(
    case: Prepared, generator: torch.Generator, ignore_value: int | None = None
) -> tuple[torch.Tensor, ...]:
    """For each label present, up to 4096 of its voxels (N, n), drawn evenly; none of `ignore_value`."""
    if case.label is None:
        return ()
    found = []
    for value in torch.unique(case.label).tolist():
        if value in (0, ignore_value):
            continue
        voxels = torch.nonzero(case.label == value)
        found.append(voxels[torch.randperm(len(voxels), generator=generator)[:MAX_LOCATIONS]])
    return tuple(found)


def cut(volume: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """The box `start` … `start + size` of the last axes of `volume`; voxels outside are 0."""
    lead = volume.ndim - len(size)
    inside, pad = [slice(None)] * lead, []
    for first, length, whole in zip(start, size, volume.shape[lead:]):
        inside.append(slice(max(first, 0), max(0, min(first + length, whole))))
        pad.append((min(length, max(0, -first)), min(length, max(0, first + length - whole))))
    part = volume[tuple(inside)]
    if not any(a or b for a, b in pad):
        return part
    return F.pad(part, [n for pair in reversed(pad) for n in pair])
