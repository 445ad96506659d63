"""Changes of the intensities of a whole batch at once: bias field, blur, low resolution, contrast, gamma, noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from medseg.augment.draws import DEGREES, Draws

Change = Callable[..., torch.Tensor]


def change_intensity(draws: Draws, image: torch.Tensor) -> torch.Tensor:
    """`image` (B, C, *S) with what was drawn done to each sample, in the order in which a scanner would.

    A sample to which nothing is to happen keeps its values to the bit.
    """
    image = _some(image, draws.bias.flatten(1).any(1), _multiply_field, draws.bias)
    image = _some(image, (draws.blur > 0).any(1), _blur, draws.blur)
    image = _some(image, (draws.low_resolution < 1).any(1), _lower_resolutions, draws.low_resolution)
    chosen = ((draws.contrast != 1) | (draws.brightness != 0)).any(1)
    image = _some(image, chosen, _stretch, draws.contrast, draws.brightness)
    image = _some(image, (draws.inverted_gamma != 1).any(1), lambda i, g: -_bend(-i, g), draws.inverted_gamma)
    image = _some(image, (draws.gamma != 1).any(1), _bend, draws.gamma)
    return _some(image, draws.noise > 0, _add_noise, draws.noise, draws.seed)


def _some(image: torch.Tensor, chosen: torch.Tensor, change: Change, *numbers: torch.Tensor) -> torch.Tensor:
    """`image` with `change(image, *numbers)` done to the `chosen` (B,) samples."""
    if not chosen.any():
        return image
    if chosen.all():
        return change(image, *numbers)
    rows = torch.nonzero(chosen)[:, 0]
    there = rows.to(image.device, non_blocking=True)
    changed = change(image.index_select(0, there), *(n[rows] for n in numbers))
    return image.index_copy(0, there, changed)


def _spread(numbers: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """`numbers` (K, C) or (K,) beside every voxel of `image` (K, C, *S)."""
    numbers = numbers.to(image.device, non_blocking=True)
    return numbers.view(*numbers.shape, *[1] * (image.ndim - numbers.ndim))


def _voxels(image: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(2, image.ndim))


def _multiply_field(image: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """A slow change of brightness: exp of a polynomial of degree 3 (Van Leemput 1999), times what is above the minimum.

    `coefficients` (K, C, 4, …): of products of Legendre polynomials over −1…1 along each axis.
    """
    field = coefficients.to(image.device, non_blocking=True)
    for size in image.shape[2:]:
        # the first axis of degrees becomes the last axis of voxels: after n turns the order is restored
        field = torch.tensordot(field, _legendre(size).to(image.device), dims=([2], [1]))
    low = image.amin(_voxels(image), keepdim=True)
    return (image - low) * field.exp() + low


def _legendre(size: int) -> torch.Tensor:
    """(size, 4): the Legendre polynomials of degree 0–3 at the voxel centres of −1…1."""
    x = (torch.arange(size) + 0.5) * 2 / size - 1
    table = [torch.ones(size), x]
    for degree in range(1, DEGREES - 1):
        table.append(((2 * degree + 1) * x * table[-1] - degree * table[-2]) / (degree + 1))
    return torch.stack(table, dim=1)


def _blur(image: torch.Tensor, sigma_voxels: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with `sigma_voxels` (K, C), cut at 3 sigma; the edge voxel continues outside."""
    reach = torch.ceil(3 * sigma_voxels).clamp(min=1)
    most = int(reach.max())
    at = torch.arange(-most, most + 1)
    kernel = torch.exp(-0.5 * (at / sigma_voxels[..., None].clamp(min=1e-3)) ** 2) * (at.abs() <= reach[..., None])
    kernel = kernel / kernel.sum(-1, keepdim=True)
    for axis in range(2, image.ndim):
        size = image.shape[axis]
        line = torch.arange(-most, size + most, device=image.device).clamp_(0, size - 1)
        padded = image.index_select(axis, line)
        image = _spread(kernel[..., most], image) * image
        for tap in range(1, most + 1):
            both = padded.narrow(axis, most - tap, size) + padded.narrow(axis, most + tap, size)
            image.addcmul_(both, _spread(kernel[..., most + tap], image))
    return image


def _lower_resolutions(image: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    # each factor has another size in between, so that one call cannot do them all
    done = [_lower_resolution(c, f) for s, row in zip(image, factors.tolist()) for c, f in zip(s, row)]
    return torch.stack(done).view(image.shape)


def _lower_resolution(image: torch.Tensor, factor: float) -> torch.Tensor:
    """(*S) as if scanned with voxels 1/factor as large: down by nearest, up by linear interpolation."""
    size = [max(1, round(s * factor)) for s in image.shape]
    small = F.interpolate(image[None, None], size=size, mode="nearest-exact")
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[image.ndim]
    return F.interpolate(small, size=image.shape, mode=mode, align_corners=False)[0, 0]


def _stretch(image: torch.Tensor, contrast: torch.Tensor, brightness: torch.Tensor) -> torch.Tensor:
    factor = _spread(contrast, image)
    # (x − mean) · factor + mean + addition in one pass
    offset = image.mean(_voxels(image), keepdim=True) * (1 - factor) + _spread(brightness, image)
    return torch.addcmul(offset, image, factor)


def _bend(image: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Each channel bent by a power between its own extremes; mean and standard deviation stay."""
    axes = _voxels(image)
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    spread = (high - low).clamp(min=1e-6)
    bent = ((image - low) / spread) ** _spread(gamma, image)
    # of one voxel too
    sd, mean = torch.std_mean(image, axes, correction=0, keepdim=True)
    bent_sd, bent_mean = torch.std_mean(bent, axes, correction=0, keepdim=True)
    factor = sd / bent_sd.clamp(min=1e-6)
    return torch.addcmul(mean - bent_mean * factor, bent, factor)


def _add_noise(image: torch.Tensor, level: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """White noise with `level` (K,), each sample's from its own seed: the same whatever else is in the batch."""
    noise = torch.empty_like(image, memory_format=torch.contiguous_format)
    for sample, start in zip(noise, seed.tolist()):
        sample.normal_(generator=torch.Generator(image.device).manual_seed(start))
    return torch.addcmul(image, noise, _spread(level, image))
