"""The small parts that networks share: convolutions, norms, upsampling, input checks; no whole network."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from monai.networks.layers.factories import Conv, Norm
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.device import memory_format
from medseg.errors import ConfigError, DataError
from medseg.networks._dilated import DilatedConv3d, is_recorded

Axes = tuple[int, ...]
"""One number for each spatial axis."""
Rate = int | Axes
"""A dilation: one number for all axes or one for each."""
NormKind = Literal["batch", "instance", "group", "none"]
Upsampling = Literal["subpixel", "interpolate", "resize"]

MAX_GROUPS = 32
CHANNELS_PER_GROUP = 16
WIDE = 16
"""From this many channels torch's channels-last kernels are the faster ones on a CPU (measured)."""
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def per_axis(value: Rate, spatial_dims: int) -> Axes:
    """`value` as one number for each axis. Raises `ConfigError` where a tuple has another length."""
    if isinstance(value, int):
        return (value,) * spatial_dims
    if len(value) != spatial_dims:
        raise ConfigError(f"{tuple(value)} has {len(value)} numbers, expected {spatial_dims}, one for each axis")
    return tuple(value)


def times(a: Axes, b: Axes) -> Axes:
    """The product axis by axis."""
    return tuple(i * j for i, j in zip(a, b))


@dataclass(frozen=True)
class Style:
    """What all layers of a network have in common. `leak` is the rectifiers' slope below zero."""

    spatial_dims: int
    norm: NormKind = "instance"
    leak: float = 0.01
    width: float = 1.0

    @staticmethod
    def of(config: NetworkConfig, spatial_dims: int) -> Style:
        """The style that `config` asks for."""
        return Style(spatial_dims, config.norm, config.leak, config.width)

    def wide(self, channels: int) -> int:
        """`channels` times the width, rounded to a multiple of 8 unless the width is 1; at least 8."""
        return channels if self.width == 1 else max(8, round(channels * self.width / 8) * 8)

    def rectifier(self) -> nn.Module:
        """(Leaky) ReLU, in place."""
        return nn.LeakyReLU(self.leak, inplace=True) if self.leak else nn.ReLU(inplace=True)


def make_conv(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: Rate = 1,
    dilation: Rate = 1,
    bias: bool = False,
    groups: int = 1,
) -> nn.Module:
    """A convolution, zero-padded so that n voxels become ceil(n / stride)."""
    dilations, strides = per_axis(dilation, spatial_dims), per_axis(stride, spatial_dims)
    kind = Conv[Conv.CONV, spatial_dims]
    if spatial_dims == 3 and max(dilations) > 1 and max(strides) == 1 and groups == 1:
        kind = DilatedConv3d
    conv: nn.Module = kind(
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=strides,
        padding=tuple(d * (kernel // 2) for d in dilations),
        dilation=dilations,
        bias=bias,
        groups=groups,
    )
    return conv


def norm_groups(channels: int) -> int:
    """Groups of a group norm: the largest divisor of `channels` that leaves about 16 channels a group, at most 32."""
    most = min(MAX_GROUPS, max(1, channels // CHANNELS_PER_GROUP))
    return next(g for g in range(most, 0, -1) if channels % g == 0)


class InstanceNorm(nn.Module):
    """Affine instance norm (Ulyanov et al. 2016, arXiv:1607.08022) that keeps channels-last memory on a CPU."""

    EPSILON = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, *spatial) of at least two voxels → the same shape, mean `bias` and SD `weight` over space."""
        if _keeps_channels_last(maps):
            return self.rectified(maps, None)
        return functional.instance_norm(maps, weight=self.weight, bias=self.bias, eps=self.EPSILON)

    def rectified(self, maps: Tensor, leak: float | None) -> Tensor:
        """The norm of channels-last `maps` and, unless `leak` is None, a rectifier of that slope below zero."""
        return _ChannelsLastNorm.apply(maps, self.weight, self.bias, self.EPSILON, leak)  # type: ignore[no-any-return,no-untyped-call]


def norm_act(norm: nn.Module, act: nn.Module, maps: Tensor) -> Tensor:
    """`act(norm(maps))`: where a CPU trains in one go for each image, while it is in the processor's cache."""
    rectifies = isinstance(act, nn.LeakyReLU | nn.ReLU)
    if isinstance(norm, InstanceNorm) and rectifies and maps.requires_grad and _keeps_channels_last(maps):
        return norm.rectified(maps, act.negative_slope if isinstance(act, nn.LeakyReLU) else 0.0)
    return act(norm(maps))  # type: ignore[no-any-return]


class Chain(nn.Sequential):
    """Layers in turn, each norm together with the rectifier after it."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, *spatial) through all layers."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            maps = norm_act(layer, layers.pop(0), maps) if isinstance(layer, InstanceNorm) else layer(maps)
        return maps


class _ChannelsLastNorm(torch.autograd.Function):
    """Instance norm as batch norm of one image at a time, each written to its place: nothing is copied or reordered."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, epsilon: float, leak: float | None) -> Tensor:
        out = torch.empty_like(maps)
        batch, channels = maps.shape[:2]
        means, inverse_sds = weight.new_empty(batch, channels), weight.new_empty(batch, channels)
        for n in range(batch):
            places = out[n : n + 1], means[n], inverse_sds[n]
            torch.native_batch_norm(maps[n : n + 1], weight, bias, None, None, True, 0.0, epsilon, out=places)
            if leak is not None:
                functional.leaky_relu_(out[n : n + 1], leak)
        # a rectifier's own output tells where it let through
        ctx.save_for_backward(maps, weight, means, inverse_sds, None if leak is None else out)
        ctx.epsilon, ctx.leak = epsilon, leak
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        maps, weight, means, inverse_sds, out = ctx.saved_tensors
        of_maps = torch.empty_like(maps)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        for n in range(len(maps)):
            towards, image, mean, inverse_sd = gradient[n : n + 1], maps[n : n + 1], means[n], inverse_sds[n]
            if out is not None:
                towards = torch.ops.aten.leaky_relu_backward(towards, out[n : n + 1], ctx.leak, True)
            found = torch.ops.aten.native_batch_norm_backward(
                towards, image, weight, None, None, mean, inverse_sd, True, ctx.epsilon, [True] * 3
            )
            of_maps[n : n + 1] = found[0]
            of_weight += found[1]
            of_bias += found[2]
        return of_maps, of_weight, of_bias, None, None


def _keeps_channels_last(maps: Tensor) -> bool:
    if is_recorded() or maps.device.type != "cpu":
        return False
    return maps.shape[1] >= WIDE and maps.stride(1) == 1


def _is_tracing() -> bool:
    # a trace must not take the sizes of its example for constants
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def make_norm(style: Style, channels: int) -> nn.Module:
    """An affine norm layer; nothing where the style has no norm."""
    if style.norm == "none":
        return nn.Identity()
    if style.norm == "instance":
        return InstanceNorm(channels)
    if style.norm == "group":
        return nn.GroupNorm(norm_groups(channels), channels)
    norm: nn.Module = Norm[Norm.BATCH, style.spatial_dims](channels)
    return norm


def conv_norm_act(
    style: Style,
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: Rate = 1,
    dilation: Rate = 1,
    separable: bool = False,
) -> nn.Module:
    """Convolution, norm, rectifier; n voxels become ceil(n / stride). The convolution has a bias where no norm has.

    `separable`: one kernel for each channel, norm, rectifier, then a 1×1 convolution (Chen et al. 2018).
    """
    dims, bias = style.spatial_dims, style.norm == "none"
    layers: list[nn.Module] = []
    if separable and kernel > 1:
        layers = [
            make_conv(
                dims, in_channels, in_channels, kernel, stride=stride, dilation=dilation, bias=bias, groups=in_channels
            ),
            make_norm(style, in_channels),
            style.rectifier(),
        ]
        kernel, stride, dilation = 1, 1, 1
    layers.append(make_conv(dims, in_channels, out_channels, kernel, stride=stride, dilation=dilation, bias=bias))
    return Chain(*layers, make_norm(style, out_channels), style.rectifier())


class Dropout(nn.Dropout):
    """Dropout whose draws depend on the seed and the shape alone.

    torch draws in the order of memory, and which order a map has depends on the convolution kernels that it came from:
    on the processor, on how many threads there are.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, *spatial) with a share p of the numbers 0 and the others larger by 1 / (1 − p); unchanged in eval."""
        if not self.training or not self.p:
            return maps
        mask = torch.empty_like(maps, memory_format=memory_format(maps.ndim - 2, maps.device))
        return maps * mask.bernoulli_(1 - self.p).div_(1 - self.p)


def make_classifier(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The 1×1 convolution with bias that gives logits."""
    conv: nn.Module = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=1)
    return conv


class CoarseHead(nn.Module):
    """A classifier on maps of a stride, and how its logits reach the image's size.

    `subpixel` gives the logits of all voxels of a block at once (dense upsampling convolution, Wang et al. 2018,
    arXiv:1702.08502), `interpolate` is `enlarge`, `resize` is linear interpolation between voxel centres.
    """

    def __init__(self, in_channels: int, out_channels: int, strides: Axes, upsampling: Upsampling) -> None:
        super().__init__()
        self.strides = strides
        self.upsampling = upsampling
        block = prod(strides) if upsampling == "subpixel" else 1
        self.conv = make_classifier(len(strides), in_channels, out_channels * block)

    def forward(self, maps: Tensor, shape: Axes) -> Tensor:
        """(B, in_channels, *coarse) → (B, out_channels, *shape)."""
        logits = self.conv(maps)
        if self.upsampling == "subpixel":
            return crop(shuffle_pixels(logits, self.strides), shape)
        if self.upsampling == "interpolate":
            return enlarge(logits, self.strides, shape)
        return functional.interpolate(logits, size=shape, mode=INTERPOLATION[len(shape)], align_corners=False)

    def even_out(self) -> None:
        """Start with equal sub-pixels."""
        if self.upsampling == "subpixel":
            even_out(self.conv, prod(self.strides))


def even_out(conv: nn.Module, count: int) -> None:
    """Equal sub-pixels, so that no checkerboard has to be unlearned (Aitken et al. 2017, ICNR): groups of `count`."""
    weight = conv.weight
    if isinstance(weight, Tensor):
        with torch.no_grad():
            weight.copy_(weight[::count].repeat_interleave(count, dim=0))


def initialise(module: nn.Module, *, leak: float = 0.01) -> None:
    """He's normal initialisation (He et al. 2015) of every convolution in `module`, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, a=leak, mode="fan_in")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, CoarseHead):
            layer.even_out()


def enlarge(maps: Tensor, strides: Axes, shape: Axes) -> Tensor:
    """Linear interpolation of `maps` (B, C, *coarse) to (B, C, *shape), where map voxel i lies on voxel i·stride.

    That is where same-padded strided convolutions put it: nothing shifts, whatever the size. Beyond the last map voxel
    its value is repeated.
    """
    if max(strides) == 1:
        return maps
    if maps.requires_grad and maps.device.type == "cpu" and not is_recorded():
        for axis in reversed(range(len(strides))):
            if strides[axis] > 1:
                maps = _Stretch.apply(maps, axis, strides[axis])  # type: ignore[no-untyped-call]
            maps = maps.narrow(axis + 2, 0, shape[axis])
        return maps
    for axis, stride in enumerate(strides, start=2):
        if stride > 1:
            maps = torch.cat((maps, maps.narrow(axis, maps.shape[axis] - 1, 1)), dim=axis)
    size = [(n - 1) * s + 1 for n, s in zip(maps.shape[2:], strides)]
    mode = INTERPOLATION[len(strides)]
    return crop(functional.interpolate(maps, size=size, mode=mode, align_corners=True), shape)


class _Stretch(torch.autograd.Function):
    """Linear interpolation along one axis as sums of shifted maps: torch's own gradient is many times slower."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, axis: int, stride: int) -> Tensor:
        ctx.axis, ctx.stride = axis + 1, stride
        inner = maps.movedim(1, -1)
        n = inner.shape[axis + 1]
        out = inner.new_empty(*inner.shape[: axis + 2], stride, *inner.shape[axis + 2 :])
        out.select(axis + 2, 0).copy_(inner)
        here, there = inner.narrow(axis + 1, 0, n - 1), inner.narrow(axis + 1, 1, n - 1)
        for step in range(1, stride):
            places = out.select(axis + 2, step)
            torch.lerp(here, there, step / stride, out=places.narrow(axis + 1, 0, n - 1))
            places.select(axis + 1, n - 1).copy_(inner.select(axis + 1, n - 1))
        return out.flatten(axis + 1, axis + 2).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        axis, stride = ctx.axis, ctx.stride
        inner = gradient.movedim(1, -1).unflatten(axis, (-1, stride))  # type: ignore[no-untyped-call]
        n = inner.shape[axis]
        found = inner.select(axis + 1, 0).to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        for step in range(1, stride):
            part = inner.select(axis + 1, step)
            found.add_(part, alpha=1 - step / stride)
            found.narrow(axis, 1, n - 1).add_(part.narrow(axis, 0, n - 1), alpha=step / stride)
            found.select(axis, n - 1).add_(part.select(axis, n - 1), alpha=step / stride)
        return found.to(gradient.dtype).movedim(-1, 1), None, None


def shuffle_pixels(maps: Tensor, factors: Axes) -> Tensor:
    """(B, C·∏factors, *coarse) → (B, C, *coarse·factors): sub-pixel convolution (Shi et al. 2016), factors by axis."""
    dims = len(factors)
    batch, channels, coarse = maps.shape[0], maps.shape[1] // prod(factors), maps.shape[2:]
    split = maps.reshape(batch, channels, *factors, *coarse)
    order = [axis for n in range(dims) for axis in (2 + dims + n, 2 + n)]
    return split.permute(0, 1, *order).reshape(batch, channels, *(n * f for n, f in zip(coarse, factors)))


def gather_pixels(maps: Tensor, factors: Axes) -> Tensor:
    """(B, C, *spatial) → (B, C·∏factors, *ceil(spatial / factors)): undoes `shuffle_pixels`; 0 beyond the end.

    In channels-last memory, as are the maps that it joins.
    """
    dims = len(factors)
    maps = pad_to(maps, factors)
    batch, channels = maps.shape[:2]
    coarse = [n // f for n, f in zip(maps.shape[2:], factors)]
    split = maps.reshape(batch, channels, *(n for pair in zip(coarse, factors) for n in pair))
    order = [*(2 + 2 * n for n in range(dims)), 1, *(3 + 2 * n for n in range(dims))]
    return split.permute(0, *order).reshape(batch, *coarse, channels * prod(factors)).movedim(-1, 1)


def pad_to(maps: Tensor, multiples: Axes) -> Tensor:
    """`maps` (B, C, *spatial) with zeros at the end of each axis up to the next multiple."""
    missing = [-n % m for n, m in zip(maps.shape[2:], multiples)]
    return functional.pad(maps, [p for m in reversed(missing) for p in (0, m)])


def crop(maps: Tensor, shape: Axes) -> Tensor:
    """The first `shape` voxels of `maps` (B, C, *larger)."""
    for axis, size in enumerate(shape, start=2):
        maps = maps.narrow(axis, 0, size)
    return maps


def least_shape(strides: Axes) -> Axes:
    """Fewest voxels by axis that leave two on an axis that is strided: of a single one a norm has nothing to say."""
    return tuple(s + 1 if s > 1 else 1 for s in strides)


def check_input(images: Tensor, *, in_channels: int, min_shape: Axes) -> None:
    """Raises `DataError` unless `images` is (B, in_channels, *spatial) with each axis at least `min_shape` long."""
    if _is_tracing():
        return
    dims = len(min_shape)
    if images.ndim != dims + 2:
        raise DataError(
            f"input of shape {tuple(images.shape)} has {images.ndim} axes, expected {dims + 2}: "
            f"batch, channel and {dims} spatial"
        )
    if images.shape[1] != in_channels:
        raise DataError(f"input has {images.shape[1]} channels, the network was built for {in_channels}")
    if any(n < least for n, least in zip(images.shape[2:], min_shape)):
        raise DataError(
            f"input of spatial shape {tuple(images.shape[2:])} is too small for this network, which needs at least "
            f"{min_shape}; pad it or lower network.output_stride"
        )
