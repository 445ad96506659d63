"""Where the cases lie while batches are made of them, and boxes of them on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medseg.patches.boxes import cut
from medseg.preprocess import Prepared

# of the memory of a GPU that is free before training has taken any
HELD_SHARE = 0.25
# between these, float16 has all the digits that it can have: the largest intensity of a case must lie there
HALF_RANGE = (2**-4, 2.0**15)


class Shelf:
    """The cases, as near to the device as there is room.

    On a CPU they stay what `prepare_cached` gives: mapped from the cache file, so that the system keeps in memory as
    much as there is room for. On a GPU as many as fit in `room_bytes` (a quarter of what is free, unless said) are put
    there when they first come; of the others, boxes are copied while the GPU computes. What is copied is float16,
    whether a case has room or not: its rounding, 2^-11 of a value, is an eighth of that of bf16.
    """

    def __init__(self, cases: Sequence[Prepared], device: torch.device, *, room_bytes: int | None = None) -> None:
        self._cases = cases
        self._device = device
        if room_bytes is None:
            room_bytes = int(HELD_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
        self._room = room_bytes
        self._in_place = device.type == "cpu" and room_bytes == 0
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._dtypes: dict[int, torch.dtype] = {}

    @property
    def held(self) -> tuple[int, ...]:
        """The cases that lie on the device."""
        return tuple(self._held)

    def cut(self, index: int, start: Sequence[int], size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A box of image (C, *size) float32 and label (*size) of a case on the device; 0 where outside the case."""
        case = self._cases[index]
        if case.label is None:
            raise ValueError(f"{case.id} was prepared without its label")
        if self._in_place:
            return cut(case.image, start, size), cut(case.label, start, size)
        dtype = self._dtype(index)
        taken = case.image.numel() * dtype.itemsize + case.label.nbytes
        if index not in self._held and taken <= self._room:
            self._room -= taken
            self._held[index] = case.image.to(dtype).to(self._device), case.label.to(self._device)
        if index in self._held:
            image, label = self._held[index]
            return cut(image, start, size).float(), cut(label, start, size)
        image = self._send(cut(case.image, start, size).to(dtype))
        return image.float(), self._send(cut(case.label, start, size))

    def _dtype(self, index: int) -> torch.dtype:
        if index not in self._dtypes:
            low, high = self._cases[index].image.aminmax()
            largest = max(-float(low), float(high))
            self._dtypes[index] = torch.float16 if HALF_RANGE[0] <= largest <= HALF_RANGE[1] else torch.float32
        return self._dtypes[index]

    def _send(self, box: torch.Tensor) -> torch.Tensor:
        # only from memory that is locked does a copy run beside the computation
        source = box.contiguous().pin_memory() if self._device.type == "cuda" else box
        return source.to(self._device, non_blocking=True)
