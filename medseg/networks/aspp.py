"""Atrous spatial pyramid pooling and the capping of its rates; no network of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Norm
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import Axes, Dropout, Rate, Style, conv_norm_act, make_conv, make_norm, per_axis
from medseg.networks._encoder import Encoder


class ASPP(nn.Module):
    """Branches of several dilations side by side, joined by a 1×1 projection (Chen et al. 2017, arXiv:1706.05587).

    One difference: with an instance or group norm the image-level branch is added after the projection's norm, not
    concatenated before it. It is constant over space, so such a norm would subtract it again to the last digit.
    `pooling_window`: voxels of the map over which the image-level branch takes its mean, None: all of them.
    """

    def __init__(
        self,
        style: Style,
        in_channels: int,
        out_channels: int,
        rates: Sequence[Rate],
        *,
        pooling: bool = True,
        pooling_window: Axes | None = None,
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
            self.pooling = kind(style, in_channels, out_channels, window=pooling_window)
        joined = out_channels * (len(self.branches) + self.concatenates)
        self.project = make_conv(style.spatial_dims, joined, out_channels, 1, bias=style.norm == "none")
        self.norm = make_norm(style, out_channels)
        self.act = style.rectifier()
        self.dropout = Dropout(dropout)

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

    def __init__(self, style: Style, in_channels: int, out_channels: int, *, window: Axes | None = None) -> None:
        super().__init__()
        self.window = window
        self.conv = make_conv(style.spatial_dims, in_channels, out_channels, 1, bias=style.norm == "none")
        self.norm = make_norm(style, out_channels)
        self.act = style.rectifier()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, 1, …, 1), or *spatial where means are local."""
        pooled = self.conv(local_mean(maps, self.window))
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

    def __init__(self, style: Style, in_channels: int, out_channels: int, *, window: Axes | None = None) -> None:
        super().__init__()
        self.window = window
        self.conv = make_conv(style.spatial_dims, in_channels, out_channels, 1)
        self.norm = nn.GroupNorm(1, out_channels)
        self.act = style.rectifier()
        self.project = make_conv(style.spatial_dims, out_channels, out_channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *spatial) → (B, out_channels, 1, …, 1), or *spatial where means are local."""
        pooled = local_mean(maps, self.window)
        batch, channels, *size = pooled.shape
        # each voxel by itself, as a map of one voxel is: the norm must not mix them
        each = pooled.flatten(2).transpose(1, 2).reshape(-1, channels, *(1,) * len(size))
        found = self.project(self.act(self.norm(self.conv(each))))
        return found.reshape(batch, -1, found.shape[1]).transpose(1, 2).reshape(batch, -1, *size)  # type: ignore[no-any-return]


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
                Dropout(dropout),
                conv_norm_act(style, hidden_channels, hidden_channels, 1),
                Dropout(dropout),
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


def pools_locally(network: nn.Module) -> bool:
    """Whether any image pooling in `network` takes its mean over a window."""
    return any(isinstance(m, PooledBranch | ImageLevel) and m.window is not None for m in network.modules())


def spatial_mean(maps: Tensor) -> Tensor:
    """(B, C, *spatial) → (B, C, 1, …, 1)."""
    return maps.mean(dim=list(range(2, maps.ndim)), keepdim=True)


def local_mean(maps: Tensor, window: Axes | None) -> Tensor:
    """The mean of the box of `window` voxels around each voxel, moved to lie inside `maps` (B, C, *spatial).

    So a large map is pooled over what a network was trained to pool over, as DeepLab's evaluation does. Where the
    window covers the map, and where it is None, the mean over all: (B, C, 1, …, 1).
    """
    size = maps.shape[2:]
    if window is None or all(w >= n for w, n in zip(window, size)):
        return spatial_mean(maps)
    means = maps
    for axis, (width, length) in enumerate(zip(window, size), start=2):
        if width >= length:
            means = means.mean(dim=axis, keepdim=True)
            continue
        # one axis after the other: a box is separable
        rows = means.movedim(axis, -1)
        inside = functional.avg_pool1d(rows.flatten(0, -2)[:, None], width, stride=1)[:, 0]
        inside = inside.reshape(*rows.shape[:-1], -1).movedim(-1, axis)
        start = torch.arange(length, device=maps.device) - width // 2
        means = inside.index_select(axis, start.clamp(0, length - width))
    return means.expand(-1, -1, *size)


def pooling_window(config: NetworkConfig, stride: Axes) -> Axes | None:
    """`config.pooling_window` in voxels of a map of this stride. Raises `ConfigError` for another number of axes."""
    if config.pooling_window is None:
        return None
    if len(config.pooling_window) != len(stride):
        raise ConfigError(
            f"network.pooling_window is {config.pooling_window}, expected {len(stride)} numbers, one an axis"
        )
    return tuple(-(-w // s) for w, s in zip(config.pooling_window, stride))


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
