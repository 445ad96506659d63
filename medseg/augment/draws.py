"""What is drawn for a batch before anything is changed: one row of numbers per sample, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from medseg.config import AugmentConfig

# a row's noise is drawn where it is applied, from a seed of its own
SEEDS = 2**31
# Legendre polynomials of a bias field: of degree 0–3 along each axis and of total degree 1–3
DEGREES = 4


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of B samples with C channels in n dimensions; neutral where nothing is to happen.

    `matrix` (B, n, n+1): patch position → source position, both in voxels from the centre of the patch. (B, C) each:
    `blur` sigma in voxels (0: none), `low_resolution` factor (1), `contrast` factor (1), `brightness` addition (0),
    `inverted_gamma` and `gamma` exponents (1). `bias` (B, C, 4, …): coefficients of a bias field (0). `noise` (B,): its
    standard deviation (0); `seed` (B,): where it comes from. Geometry is shared by the channels, and so is whether
    something happens; how much is drawn for each channel, but for noise, whose level they share.
    """

    matrix: torch.Tensor
    bias: torch.Tensor
    blur: torch.Tensor
    low_resolution: torch.Tensor
    contrast: torch.Tensor
    brightness: torch.Tensor
    inverted_gamma: torch.Tensor
    gamma: torch.Tensor
    noise: torch.Tensor
    seed: torch.Tensor

    def rows(self, which: slice) -> Draws:
        """The numbers of some of the samples: what they become does not depend on the others."""
        return Draws(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def draw(
    config: AugmentConfig,
    *,
    patch_size: Sequence[int],
    spacing_mm: torch.Tensor,
    channels: int,
    generator: torch.Generator,
) -> Draws:
    """The numbers of a batch with `spacing_mm` (B, n).

    `generator` lives on the CPU, so that a seed means the same on every device. What is drawn for a sample is as much
    whether it is used or not: one probability does not move the numbers of another change.
    """
    batch, n = spacing_mm.shape
    shape = (batch, channels)

    def numbers(probability: float, low: float, high: float, neutral: float) -> torch.Tensor:
        chosen = torch.rand(batch, generator=generator) < probability
        return torch.where(chosen[:, None], _uniform(shape, low, high, generator), neutral)

    matrix = draw_affines(config, patch_size, spacing_mm, generator)
    bends = torch.rand(batch, generator=generator) < config.p_bias_field
    terms = _uniform((*shape, *[DEGREES] * n), -config.bias_field, config.bias_field, generator)
    degree = sum(torch.meshgrid(*[torch.arange(DEGREES)] * n, indexing="ij"), torch.zeros((), dtype=torch.long))
    terms = terms * ((degree > 0) & (degree < DEGREES)) * bends.view(-1, *[1] * (n + 1))
    blur = numbers(config.p_blur, *config.blur_voxels, 0.0)
    low_resolution = numbers(config.p_low_resolution, *config.low_resolution, 1.0)
    changes = torch.rand(batch, generator=generator)[:, None] < config.p_intensity
    contrast = torch.where(changes, _uniform(shape, *config.contrast, generator), 1.0)
    brightness = torch.where(changes, _uniform(shape, -config.brightness, config.brightness, generator), 0.0)
    inverted_gamma = numbers(config.p_gamma_inverted, *config.gamma, 1.0)
    gamma = numbers(config.p_gamma, *config.gamma, 1.0)
    noisy = torch.rand(batch, generator=generator) < config.p_noise
    noise = _uniform((batch,), 0, config.noise, generator) * noisy
    seed = torch.randint(SEEDS, (batch,), generator=generator)
    return Draws(
        matrix, terms, blur, low_resolution, contrast, brightness, inverted_gamma, gamma, noise, seed
    )  # fmt: skip


def draw_affines(
    config: AugmentConfig, patch_size: Sequence[int], spacing_mm: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """(B, n, n+1): patch position → source position, both in voxels from the centre.

    Rotation, shear and scale are those of a body measured in mm: with unequal spacing a rotation stays rigid.
    """
    batch, n = spacing_mm.shape
    spacing = torch.diag_embed(spacing_mm.to("cpu", torch.float32))
    use = (torch.rand(batch, generator=generator) < config.p_affine).float()
    limits = torch.deg2rad(torch.tensor(config.rotation_deg[: 1 if n == 2 else n]))
    angles = _uniform((batch, len(limits)), -1, 1, generator) * limits * use[:, None]
    log_scale = _uniform((batch, 1), math.log(config.scale[0]), math.log(config.scale[1]), generator)
    log_stretch = _uniform((batch, n), -1, 1, generator) * math.log1p(config.stretch)
    lean = _uniform((batch, n, n), -config.shear, config.shear, generator) * use[:, None, None]
    shift = _uniform((batch, n), -config.shift, config.shift, generator) * torch.tensor(patch_size) * use[:, None]
    flip = torch.ones(batch, n)
    for axis in config.flip_axes:
        flip[torch.rand(batch, generator=generator) < config.p_flip, axis] = -1
    size = torch.diag_embed(torch.exp(-(log_scale + log_stretch) * use[:, None]))
    shear = torch.eye(n) + lean * (1 - torch.eye(n))
    linear = torch.linalg.solve(spacing, rotations(angles, n) @ shear @ size @ spacing)
    return torch.cat([linear * flip[:, None, :], shift[..., None]], dim=-1)


def rotations(angles: torch.Tensor, spatial_dims: int) -> torch.Tensor:
    """(B, n, n) rotation matrices from radians; 2D: one angle, 3D: about the first, the second, then the third axis."""
    if spatial_dims == 1:
        return torch.ones(len(angles), 1, 1)
    if spatial_dims == 2:
        return _plane_rotation(angles[:, 0], 2, 0, 1)
    first, second, third = (_plane_rotation(angles[:, a], 3, (a + 1) % 3, (a + 2) % 3) for a in range(3))
    return third @ second @ first


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _plane_rotation(angle: torch.Tensor, n: int, a: int, b: int) -> torch.Tensor:
    matrix = torch.eye(n).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = torch.cos(angle)
    matrix[:, a, b] = -torch.sin(angle)
    matrix[:, b, a] = torch.sin(angle)
    return matrix
