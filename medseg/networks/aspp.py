"""Atrous spatial pyramid pooling and the capping of its rates; no network of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Norm
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import Axes, Rate, Style, conv_norm_act, make_conv, make_norm, per_axis
from medseg.networks._encoder import Encoder


class ASPP(nn.Module):
    """Branches of several dilations side by side, joined by a 1×1 projection (Chen et al. 2017, arXiv:1706.05587).

    One difference: with an instance or group norm the image-level branch is added after the projection's norm, not
    concatenated before it. It is constant over space, so such a norm would subtract it again to the last digit.
    """

    def __init__(
        self,
        style: Style,
        in_channels: int,
        out_channels: int,
        rates: Sequence[Rate],
        *,
        pooling: bool = True,
        separable: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_rates(rates)
        self.branches = nn.ModuleList([conv_norm_act(style, in_channels, out_channels, 1)])
        for rate in rates:
            branch = conv_norm_act(style, in_channels, out_channels, 3, dilation=rate, separable=separable)
            self.branches.append(branch)
        self.pooling: nn.Module | None = None
        self.concatenates = pooling and style.norm in ("batch", "none")
        if pooling:
            kind = PooledBranch if self.concatenates else ImageLevel
            self.pooling = kind(style, in_channels, out_channels)
        joined = out_channels * (len(self.branches) + self.concatenates)
        self.project = make_conv(style.spatial_dims, joined, out_channels, 1, bias=style.norm == "none")
        self.norm = make_norm(style, out_channels)
        self.act = style.rectifier()
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, *spatial)."""
        found = [branch(maps) for branch in self.branches]
        if self.pooling is not None and self.concatenates:
            found.append(self.pooling(maps).expand(-1, -1, *maps.shape[2:]))
        joined: Tensor = self.norm(self.project(torch.cat(found, dim=1)))
        if self.pooling is not None and not self.concatenates:
            joined = joined + self.pooling(maps)
        return self.dropout(self.act(joined))  # type: ignore[no-any-return]


class PooledBranch(nn.Module):
    """The mean over space through a 1×1 convolution, norm and rectifier, to be concatenated with other branches."""

    def __init__(self, style: Style, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = make_conv(style.spatial_dims, in_channels, out_channels, 1, bias=style.norm == "none")
        self.norm = make_norm(style, out_channels)
        self.act = style.rectifier()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, 1, …, 1)."""
        pooled = self.conv(spatial_mean(maps))
        if self.training and len(maps) == 1 and isinstance(self.norm, Norm[Norm.BATCH, maps.ndim - 2]):
            # one value a channel has no variance: a batch of one is normalised by what was seen so far
            norm = self.norm
            found = functional.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
            return self.act(found)  # type: ignore[no-any-return]
        return self.act(self.norm(pooled))  # type: ignore[no-any-return]


class ImageLevel(nn.Module):
    """The mean over space through two 1×1 convolutions, to be added to maps that are normalised over space.

    A map of one voxel has no variance over space, nor over a batch of one: the norm between them goes over channels.
    """

    def __init__(self, style: Style, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = make_conv(style.spatial_dims, in_channels, out_channels, 1)
        self.norm = nn.GroupNorm(1, out_channels)
        self.act = style.rectifier()
        self.project = make_conv(style.spatial_dims, out_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, 1, …, 1)."""
        return self.project(self.act(self.norm(self.conv(spatial_mean(maps)))))  # type: ignore[no-any-return]


class SummedASPP(nn.Module):
    """ASPP-L of DeepLabv2 (Chen et al. 2016, arXiv:1606.00915): a classifier behind each rate, their logits summed."""

    def __init__(
        self,
        style: Style,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        rates: Sequence[Rate],
        *,
        dropout: float,
        separable: bool = False,
    ) -> None:
        super().__init__()
        check_rates(rates)
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_norm_act(style, in_channels, hidden_channels, 3, dilation=rate, separable=separable),
                nn.Dropout(dropout),
                conv_norm_act(style, hidden_channels, hidden_channels, 1),
                nn.Dropout(dropout),
                # one bias is enough for a sum
                make_conv(style.spatial_dims, hidden_channels, out_channels, 1, bias=number == 0),
            )
            for number, rate in enumerate(rates)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → logits (B, out_channels, *spatial)."""
        first, *others = (branch(maps) for branch in self.branches)
        for logits in others:
            first = first + logits
        return first  # type: ignore[no-any-return]


def spatial_mean(maps: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, C, 1, …, 1)."""
    return maps.mean(dim=list(range(2, maps.ndim)), keepdim=True)


def check_rates(rates: Sequence[Rate]) -> None:
    """Raises `ConfigError` for no rates."""
    if not rates:
        raise ConfigError("network.aspp_rates is empty, expected at least one rate")


def rescale_rates(config: NetworkConfig, before: Encoder, after: Encoder) -> NetworkConfig:
    """`config` with ASPP's rates counted in voxels of the last map of `after`, not of `before`."""
    rates = rescale_all(config.aspp_rates, before.strides[-1], after.strides[-1], setting="network.aspp_rates")
    return config.model_copy(update={"aspp_rates": rates})


def rescale_all(rates: Sequence[Rate], before: Axes, after: Axes, *, setting: str) -> tuple[Rate, ...]:
    """`rates` at stride `after` that reach as far as they did at stride `before`. Raises `ConfigError` if none do."""
    found: list[Rate] = []
    for rate in rates:
        far = tuple(r * b for r, b in zip(per_axis(rate, len(before)), before))
        if any(f % a for f, a in zip(far, after)):
            raise ConfigError(
                f"network.output_stride: {rate} of {setting} at stride {before} is no whole number at stride {after}; "
                "stay at the stride the network was trained at"
            )
        near = tuple(f // a for f, a in zip(far, after))
        found.append(near[0] if len(set(near)) == 1 else near)
    return tuple(found)


def cap_rates(rates: Sequence[Rate], feature_shape: Axes) -> tuple[Rate, ...]:
    """`rates` cut, by axis, to (n − 1) // 2 of the `feature_shape` (patch / output stride), at least 1.

    Up to there the central voxel meets real data with both outer taps of the 3-wide kernel, and every other voxel with
    one of them; beyond, a band in the middle meets padding on both sides and the kernel wears down to its centre.
    Rates that become equal are kept once; a rate equal on all axes is given as one number.
    """
    check_rates(rates)
    caps = tuple(max(1, (n - 1) // 2) for n in feature_shape)
    capped = (tuple(map(min, per_axis(rate, len(caps)), caps)) for rate in rates)
    return tuple(dict.fromkeys(r[0] if len(set(r)) == 1 else r for r in capped))
