"""Random changes of a whole training batch, on the device it lives on: first drawn, then applied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from medseg.config import AugmentConfig


def augment(
    config: AugmentConfig,
    image: torch.Tensor,
    label: torch.Tensor,
    *,
    patch_size: Sequence[int],
    spacing_mm: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of `patch_size` from the middle of `image` (B, C, *S) and `label` (B, *S), each changed at random.

    Crop, rotation, scale, shift and flips are one resampling (image linear, label nearest; outside: 0); intensities
    follow. `generator` lives on the CPU, so that a seed means the same on every device.
    """
    matrices = draw_affines(config, len(image), patch_size, spacing_mm, generator)
    image, label = apply_affines(matrices.to(image.device), image, label, patch_size)
    return change_intensity(config, image, generator), label


def draw_affines(
    config: AugmentConfig, batch: int, patch_size: Sequence[int], spacing_mm: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """(B, n, n+1): patch position → source position, both in voxels from the centre. Rotations are rigid in mm."""
    n = len(patch_size)
    size = torch.tensor([float(p) for p in patch_size])
    spacing = torch.diag_embed(spacing_mm.cpu().expand(batch, n))
    use = torch.rand(batch, generator=generator) < config.p_affine
    limits = torch.deg2rad(torch.tensor(config.rotation_deg[: 1 if n == 2 else n]))
    angles = _uniform((batch, len(limits)), -1, 1, generator) * limits * use[:, None]
    log_scale = _uniform((batch,), math.log(config.scale[0]), math.log(config.scale[1]), generator) * use
    shift = _uniform((batch, n), -config.shift, config.shift, generator) * size * use[:, None]
    flip = torch.ones(batch, n)
    for axis in config.flip_axes:
        flip[torch.rand(batch, generator=generator) < config.p_flip, axis] = -1
    linear = torch.linalg.solve(spacing, rotations(angles, n) @ spacing)
    linear = linear * torch.exp(-log_scale)[:, None, None] * flip[:, None, :]
    return torch.cat([linear, shift[..., None]], dim=-1)


def rotations(angles: torch.Tensor, spatial_dims: int) -> torch.Tensor:
    """(B, n, n) rotation matrices from radians; 2D: one angle, 3D: about the first, the second, then the third axis."""
    if spatial_dims == 1:
        return torch.ones(len(angles), 1, 1)
    if spatial_dims == 2:
        return _plane_rotation(angles[:, 0], 2, 0, 1)
    first, second, third = (_plane_rotation(angles[:, a], 3, (a + 1) % 3, (a + 2) % 3) for a in range(3))
    return third @ second @ first


def apply_affines(
    matrices: torch.Tensor, image: torch.Tensor, label: torch.Tensor, patch_size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and label resampled by `draw_affines`' matrices: (B, C, *patch_size), (B, *patch_size)."""
    n = len(patch_size)
    source = torch.tensor(image.shape[2:], dtype=torch.float32, device=image.device)
    target = torch.tensor([float(p) for p in patch_size], device=image.device)
    # voxels from the centre → grid_sample's −1…1 with the outer faces at ±1, and its x-first order
    theta = matrices.clone()
    theta[..., :n] = theta[..., :n] * target / source[:, None]
    theta[..., n] = theta[..., n] * 2 / source
    theta = torch.cat([theta[..., :n].flip(1).flip(2), theta[..., n:].flip(1)], dim=-1)
    where = F.affine_grid(theta, [len(image), 1, *patch_size], align_corners=False)
    moved = F.grid_sample(image, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    # float32 holds label values up to 2^24 exactly
    values = F.grid_sample(label[:, None].float(), where, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved, values[:, 0].to(label.dtype)


def change_intensity(config: AugmentConfig, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, lower resolution, noise, brightness, contrast and gamma, each with its own probability per sample."""
    image = image.clone()
    batch = len(image)
    n = image.ndim - 2

    def chosen(probability: float) -> list[int]:
        return torch.nonzero(torch.rand(batch, generator=generator) < probability)[:, 0].tolist()

    def number(low: float, high: float) -> float:
        return float(_uniform((1,), low, high, generator))

    for b in chosen(config.p_blur):
        image[b] = _blur(image[b], number(*config.blur_voxels))
    for b in chosen(config.p_low_resolution):
        image[b] = _lower_resolution(image[b], number(*config.low_resolution))
    for b in chosen(config.p_intensity):
        mean = image[b].mean()
        image[b] = (image[b] - mean) * number(*config.contrast) + mean + number(-config.brightness, config.brightness)
    for b in chosen(config.p_gamma):
        image[b] = _gamma(image[b], number(*config.gamma))
    noisy = chosen(config.p_noise)
    if noisy:
        level = _uniform((len(noisy), *([1] * (n + 1))), 0, config.noise, generator)
        noise = torch.randn(image[noisy].shape, generator=generator)
        image[noisy] += (level * noise).to(image.device)
    return image


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _plane_rotation(angle: torch.Tensor, n: int, a: int, b: int) -> torch.Tensor:
    matrix = torch.eye(n).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = torch.cos(angle)
    matrix[:, a, b] = -torch.sin(angle)
    matrix[:, b, a] = torch.sin(angle)
    return matrix


def _blur(image: torch.Tensor, sigma_voxels: float) -> torch.Tensor:
    """Gaussian blur of (C, *S); the edge voxel continues outside."""
    reach = max(1, math.ceil(3 * sigma_voxels))
    at = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (at / sigma_voxels) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(1, image.ndim):
        line = image.movedim(axis, -1)
        padded = F.pad(line.reshape(-1, 1, line.shape[-1]), (reach, reach), mode="replicate")
        image = F.conv1d(padded, kernel[None, None]).reshape(line.shape).movedim(-1, axis)
    return image


def _lower_resolution(image: torch.Tensor, factor: float) -> torch.Tensor:
    """(C, *S) as if scanned with voxels 1/factor as large: down by nearest, up by linear interpolation."""
    size = [max(1, round(s * factor)) for s in image.shape[1:]]
    small = F.interpolate(image[None], size=size, mode="nearest-exact")
    mode = {2: "linear", 3: "bilinear", 4: "trilinear"}[image.ndim]
    return F.interpolate(small, size=image.shape[1:], mode=mode, align_corners=False)[0]


def _gamma(image: torch.Tensor, gamma: float) -> torch.Tensor:
    """(C, *S) bent by a power between its own extremes; mean and standard deviation stay."""
    low, high = image.min(), image.max()
    spread = (high - low).clamp(min=1e-6)
    bent = ((image - low) / spread) ** gamma * spread + low
    return (bent - bent.mean()) / bent.std().clamp(min=1e-6) * image.std() + image.mean()
