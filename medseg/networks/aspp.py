"""Atrous spatial pyramid pooling and the capping of its rates; no network of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.errors import ConfigError
from medseg.networks._blocks import LEAK, Axes, NormKind, Rate, conv_norm_act, make_conv, make_norm, per_axis


class ASPP(nn.Module):
    """Branches of several dilations side by side, joined by a 1×1 projection (Chen et al. 2017, arXiv:1706.05587).

    One difference: the image-level branch is added after the projection's norm, not concatenated before it. It is
    constant over space, so an instance norm would subtract it again to the last digit.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        rates: Sequence[Rate],
        *,
        pooling: bool = True,
        norm: NormKind = "instance",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not rates:
            raise ConfigError("network.aspp_rates is empty, expected at least one rate")
        self.branches = nn.ModuleList([conv_norm_act(spatial_dims, in_channels, out_channels, 1, norm=norm)])
        for rate in rates:
            self.branches.append(conv_norm_act(spatial_dims, in_channels, out_channels, 3, norm=norm, dilation=rate))
        self.project = make_conv(spatial_dims, out_channels * len(self.branches), out_channels, 1)
        self.norm = make_norm(norm, spatial_dims, out_channels)
        self.pooling = ImagePooling(spatial_dims, in_channels, out_channels) if pooling else None
        self.act = nn.LeakyReLU(LEAK, inplace=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, *spatial)."""
        joined: Tensor = self.norm(self.project(torch.cat([branch(maps) for branch in self.branches], dim=1)))
        if self.pooling is not None:
            joined = joined + self.pooling(maps)
        return self.dropout(self.act(joined))  # type: ignore[no-any-return]


class ImagePooling(nn.Module):
    """The mean over space through two 1×1 convolutions.

    A map of one voxel has no variance over space, nor over a batch of one: the norm between them goes over channels.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = make_conv(spatial_dims, in_channels, out_channels, 1)
        self.norm = nn.GroupNorm(1, out_channels)
        self.act = nn.LeakyReLU(LEAK, inplace=True)
        self.project = make_conv(spatial_dims, out_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, 1, …, 1)."""
        mean = maps.mean(dim=list(range(2, maps.ndim)), keepdim=True)
        return self.project(self.act(self.norm(self.conv(mean))))  # type: ignore[no-any-return]


def cap_rates(rates: Sequence[Rate], feature_shape: Axes) -> tuple[Rate, ...]:
    """`rates` cut, by axis, to (n − 1) // 2 of the `feature_shape` (patch / output stride), at least 1.

    Up to there the central voxel meets real data with both outer taps of the 3-wide kernel, and every other voxel with
    one of them; beyond, a band in the middle meets padding on both sides and the kernel wears down to its centre.
    Rates that become equal are kept once; a rate equal on all axes is given as one number.
    """
    caps = tuple(max(1, (n - 1) // 2) for n in feature_shape)
    capped = (tuple(map(min, per_axis(rate, len(caps)), caps)) for rate in rates)
    kept: dict[Rate, None] = dict.fromkeys(r[0] if len(set(r)) == 1 else r for r in capped)
    if not kept:
        raise ConfigError("network.aspp_rates is empty, expected at least one rate")
    return tuple(kept)
