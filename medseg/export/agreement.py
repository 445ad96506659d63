"""Whether a network that was handed on still gives PyTorch's logits: what is tried, and how near is near enough."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from medseg.config import IntensityConfig
from medseg.device import most_voxels
from medseg.errors import ModelError
from medseg.model import Model
from medseg.networks.aspp import pools_locally
from medseg.progress import Progress

log = logging.getLogger(__name__)

# images (B, C, *S) → logits (B, K, *S)
Logits = Callable[[Tensor], Tensor]
Made = TypeVar("Made")
Shape = tuple[int, ...]
Free = Literal["batch and sizes", "batch", "nothing"]
"""Which axes of an image may have another length than in the image that a network was written with."""

FREEDOMS: tuple[Free, ...] = ("batch and sizes", "batch", "nothing")
# share of the largest logit. float32 has 24 bits, 6e-8 a step; sums in another order, through layers whose norms divide
# by small standard deviations, differed by 1e-6 (hippocampus) to 2e-5 (the worst of all networks, tiny and random)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Checked(Generic[Made]):
    """What was `made`, and which axes are `free` in it.

    `difference`: how far its logits were from PyTorch's at most, as a share of the largest, over `images` images.
    """

    made: Made
    free: Free
    difference: float
    images: int


def make_and_check(
    model: Model, make: Callable[[Free], tuple[Made, Logits]], *, name: str, progress: Progress
) -> Checked[Made]:
    """What `make` makes of the network with as many axes free as agree with PyTorch; it gives the logits beside it.

    Raises `ModelError` where nothing agrees: with the figures, or with what `make` said last.
    """
    failure: Exception | None = None
    # beyond its window an image pooling is another graph, and images of the sizes tried may all lie within
    for free in FREEDOMS[1:] if pools_locally(model.network) else FREEDOMS:
        shapes = shapes_to_try(model, free)
        if free != "nothing" and all(shape[0] == 1 for shape in shapes):
            log.info("%s: memory holds one image at a time, so several are not tried", name)
            continue
        try:
            progress("convert", 0, 1)
            made, logits = make(free)
            progress("convert", 1, 1)
            difference = _difference(model, logits, shapes, name=name, progress=progress)
        except Exception as error:  # noqa: BLE001
            # converters and runtimes fail in any way there is; the next try asks less of them
            log.info("%s: with %s free: %s: %s", name, free, type(error).__name__, error)
            failure = error
        else:
            return Checked(made, free, difference, sum(shape[0] for shape in shapes))
    if isinstance(failure, ModelError):
        raise failure
    reason = (str(failure).strip() or "no reason given").splitlines()[0]
    raise ModelError(
        f"{name}: `{model.config.network.name}` cannot be written in this form ({type(failure).__name__}: {reason}); "
        "nothing was written; -v shows all of it, and another --to may do"
    ) from failure


def free_axes(free: Free, spatial_dims: int) -> dict[int, str]:
    """The names of the axes that are `free`, by their place in (B, C, *S)."""
    names = {} if free == "nothing" else {0: "batch"}
    return names | ({2 + n: "ijk"[n] for n in range(spatial_dims)} if free == "batch and sizes" else {})


def min_shape(model: Model) -> Shape:
    """The smallest image (*S) that the network takes as it is; one voxel where it does not say."""
    least: Shape = getattr(model.network, "min_shape", (1,) * len(model.config.windows.patch_size))
    # what one of MONAI's enlarges before it looks, its other forms do not
    unchanged: int = getattr(model.network, "least", 1)
    return tuple(max(n, unchanged) for n in least)


def shapes_to_try(model: Model, free: Free) -> tuple[Shape, ...]:
    """Of three batches (B, C, *S): the patch, larger ones of odd sizes, and smaller ones, as far as axes are `free`.

    Of so many images as memory holds at that size, at most 1, 2 and 3.
    """
    channels, patch = len(model.config.data.channels), model.config.windows.patch_size
    odd = tuple(n + 1 + n % 2 for n in patch)
    smaller = tuple(max(m, n - n // 3) for n, m in zip(patch, min_shape(model)))
    sizes = (patch, odd, smaller) if free == "batch and sizes" else (patch,) * 3
    most = most_voxels(torch.device("cpu"), model.config.data.out_channels)
    counts = (1, 1, 1) if free == "nothing" else (1, 2, 3)
    return tuple((max(1, int(min(b, most / math.prod(size)))), channels, *size) for b, size in zip(counts, sizes))


def _difference(model: Model, other: Logits, shapes: Sequence[Shape], *, name: str, progress: Progress) -> float:
    """How far `other` is from the network of `model`, float32 on the CPU, for noise of `shapes` as that sees images.

    Labels must be the same wherever the two best logits are not within the tolerance of each other, regions wherever
    their own logit is not within it of 0. Raises `ModelError` with the figures.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for number, shape in enumerate(shapes):
        progress("compare", number, len(shapes))
        image = _image(shape, model.config.preprocess.intensity, generator)
        with torch.inference_mode():
            expected = model.network(image)
            found = other(image)
        if found.shape != expected.shape:
            raise ModelError(
                f"{name}: logits of shape {tuple(found.shape)} for an image of {shape}, expected "
                f"{tuple(expected.shape)} as from PyTorch; nothing was written"
            )
        largest = float(expected.abs().max())
        difference, allowed = float((found - expected).abs().max()), TOLERANCE * largest
        compare = _regions_changed if model.config.data.is_regions else _labels_changed
        changed = compare(found, expected, allowed)
        # written so that NaN is refused too
        if not difference <= allowed or changed:
            raise ModelError(
                f"{name}: for an image of {shape} the logits differ from PyTorch's by up to {difference:.2g}, expected "
                f"at most {allowed:.2g} ({TOLERANCE:.0e} of the largest), and {changed} voxels get another label; "
                "nothing was written"
            )
        worst = max(worst, difference / largest if largest else 0.0)
    progress("compare", len(shapes), len(shapes))
    return worst


def _labels_changed(found: Tensor, expected: Tensor, allowed: float) -> int:
    """Voxels whose label is another, though it was no close call."""
    best = expected.topk(2, dim=1)
    clear = best.values[:, 0] - best.values[:, 1] > allowed
    return int(((found.argmax(dim=1) != best.indices[:, 0]) & clear).sum())


def _regions_changed(found: Tensor, expected: Tensor, allowed: float) -> int:
    """Voxels that are in other regions, though it was no close call."""
    differs = ((found > 0) != (expected > 0)) & (expected.abs() > allowed)
    return int(differs.any(dim=1).sum())


def _image(shape: Shape, intensity: Sequence[IntensityConfig], generator: torch.Generator) -> Tensor:
    """Noise (B, C, *S) in the range that normalised images have."""
    image = torch.randn(shape, generator=generator)
    for channel, how in enumerate(intensity):
        if how.clip is not None and how.normalise != "image":
            mean, sd = (how.mean, how.sd) if how.normalise == "fixed" else (0.0, 1.0)
            low, high = ((end - mean) / sd for end in how.clip)
            image[:, channel] = low + (high - low) * torch.rand(image[:, channel].shape, generator=generator)
    return image
