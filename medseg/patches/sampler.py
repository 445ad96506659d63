"""Batches of patches: which case, which place and which changes are drawn; what lies where is in shelf.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medseg.augment import Draws, change_intensity, draw, resample, source_box
from medseg.config import AugmentConfig
from medseg.patches.locations import foreground_locations, voxel_at
from medseg.patches.shelf import Shelf
from medseg.preprocess import Prepared

# an augmentation that leaves every sample as it is
NOTHING = AugmentConfig(
    p_affine=0,
    flip_axes=(),
    p_bias_field=0,
    p_blur=0,
    p_low_resolution=0,
    p_intensity=0,
    p_gamma_inverted=0,
    p_gamma=0,
    p_noise=0,
)


@dataclass(frozen=True)
class Batch:
    """`image` (B, C, *patch_size) float32, `label` (B, *patch_size), `cases`: where each sample comes from."""

    image: torch.Tensor
    label: torch.Tensor
    cases: tuple[str, ...]


class PatchSampler:
    """Makes batches of prepared cases. Every case comes equally often: cases are dealt like cards, then reshuffled.

    A share `foreground_fraction` of the patches is centred on a labelled voxel, the label drawn evenly from those
    that the case has; the others anywhere. `augment` says how they are changed at random, None: not at all. First all
    that is random is drawn, for the whole batch, then only the `rows` of it are made: processes that share a batch
    each make their own part of the same one. What lies outside a case is 0, as in the windows of inference.
    """

    def __init__(
        self,
        cases: Sequence[Prepared],
        *,
        patch_size: Sequence[int],
        batch_size: int,
        foreground_fraction: float,
        generator: torch.Generator,
        augment: AugmentConfig | None = None,
        ignore_value: int | None = None,
        device: torch.device | None = None,
        rows: slice = slice(None),
    ) -> None:
        self._cases = cases
        self._batch_size = batch_size
        self._foreground_fraction = foreground_fraction
        self._generator = generator
        self._augment = augment or NOTHING
        self._patch = tuple(patch_size)
        self._ignore_value = ignore_value
        self._rows = rows
        self._shelf = Shelf(cases, device or torch.device("cpu"))
        self._locations: dict[int, tuple[torch.Tensor, ...]] = {}
        self._deck: list[int] = []

    def draw(self) -> Batch:
        """The next batch, or the `rows` of it, on the device."""
        chosen = [self._deal() for _ in range(self._batch_size)]
        starts = [self._start(index) for index in chosen]
        draws = draw(
            self._augment,
            patch_size=self._patch,
            spacing_mm=torch.tensor([self._cases[i].grid.spacing_mm for i in chosen], dtype=torch.float32),
            channels=len(self._cases[0].image),
            generator=self._generator,
        )
        return self._make(chosen[self._rows], starts[self._rows], draws.rows(self._rows))

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

    def _start(self, index: int) -> list[int]:
        """The first voxel of a patch in its case; below 0 where it hangs over the edge."""
        case = self._cases[index]
        shape = case.grid.shape
        random = torch.rand(3 + len(shape), generator=self._generator)
        if random[0] < self._foreground_fraction:
            if index not in self._locations:
                self._locations[index] = foreground_locations(case, self._ignore_value)
            if locations := self._locations[index]:
                voxels = locations[int(random[1] * len(locations))]
                centre = voxel_at(int(voxels[int(random[2] * len(voxels))]), shape)
                return [c - p // 2 for c, p in zip(centre, self._patch)]
        room = [size - p for size, p in zip(shape, self._patch)]
        return [int(r * (free + 1)) if free > 0 else free // 2 for r, free in zip(random[3:].tolist(), room)]

    def _make(self, chosen: Sequence[int], starts: Sequence[Sequence[int]], draws: Draws) -> Batch:
        images, labels = [], []
        for index, start, matrix in zip(chosen, starts, draws.matrix):
            centre = [s + (p - 1) / 2 for s, p in zip(start, self._patch)]
            first, size = source_box(matrix, centre, self._patch, self._cases[index].grid.shape)
            image, label = self._shelf.cut(index, first, size)
            inside = [c - f for c, f in zip(centre, first)]
            image, label = resample(matrix, inside, image, label, self._patch)
            images.append(image)
            labels.append(label)
        image = change_intensity(draws, torch.stack(images))
        return Batch(image, torch.stack(labels), tuple(self._cases[i].id for i in chosen))
