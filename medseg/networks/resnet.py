"""Residual encoders whose output stride is chosen by trading strides for dilation; heads and decoders are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import LEAK, Axes, NormKind, conv_norm_act, make_conv, make_norm, times


class Encoder(nn.Module):
    """An image (B, C, *spatial) to feature maps from high to low resolution.

    `out_channels` and `strides` (cumulative, by axis) announce the maps; a map has ceil(n / stride) voxels on an axis
    of n. The output stride is the largest stride over the axes of the last map. Inputs below `min_shape` leave a single
    voxel on a strided axis, where a norm has nothing to normalise.
    """

    out_channels: tuple[int, ...]
    strides: tuple[Axes, ...]

    @property
    def min_shape(self) -> Axes:
        """Fewest voxels by axis that the encoder takes."""
        return tuple(s + 1 if s > 1 else 1 for s in self.strides[-1])


class Stage(NamedTuple):
    """How a halving step is carried out: `reached` is the cumulative stride after it, all by axis."""

    stride: Axes
    dilation_before: Axes
    dilation: Axes
    reached: Axes


def build_encoder(config: NetworkConfig, *, spatial_dims: int, in_channels: int) -> Encoder:
    """The encoder that `config` describes. Raises `ConfigError` for strides or an output stride it cannot have."""
    if not config.multi_grid:
        raise ConfigError("network.multi_grid is empty, expected at least one factor, such as [1]")
    return ENCODERS[config.encoder](config, spatial_dims=spatial_dims, in_channels=in_channels)


def plan_stages(config: NetworkConfig, steps: Sequence[str], *, spatial_dims: int, fixed: int) -> tuple[Stage, ...]:
    """Strides and dilations of the halving `steps`, of which the first `fixed` are never replaced.

    A step that would take the stride of any axis beyond `output_stride`, and every step after it, multiplies the
    dilation by its stride instead (Chen et al. 2017, arXiv:1706.05587).
    """
    strides = _strides(config, steps, spatial_dims)
    reached = dilation = ones = (1,) * spatial_dims
    stages: list[Stage] = []
    natural = ones
    for number, stride in enumerate(strides):
        natural = times(natural, stride)
        if number < fixed or max(natural) <= config.output_stride:
            reached = natural
            stages.append(Stage(stride, dilation, dilation, reached))
        else:
            before, dilation = dilation, times(dilation, stride)
            stages.append(Stage(ones, before, dilation, reached))
    if max(reached) != config.output_stride:
        possible = sorted({max(_cumulative(strides[:n], spatial_dims)) for n in range(fixed, len(strides) + 1)})
        raise ConfigError(
            f"network.output_stride {config.output_stride} is not possible for the encoder `{config.encoder}` with "
            f"strides {tuple(strides)}; it can have {', '.join(map(str, possible))}"
        )
    return tuple(stages)


def _strides(config: NetworkConfig, steps: Sequence[str], spatial_dims: int) -> tuple[Axes, ...]:
    strides = config.strides
    if strides is None:
        return ((2,) * spatial_dims,) * len(steps)
    if len(strides) != len(steps):
        raise ConfigError(
            f"network.strides has {len(strides)} entries, the encoder `{config.encoder}` needs {len(steps)}: "
            f"one for each of {', '.join(steps)}"
        )
    for number, stride in enumerate(strides):
        if len(stride) != spatial_dims:
            raise ConfigError(f"network.strides[{number}] is {stride}, expected {spatial_dims} numbers, one an axis")
    return strides


def _cumulative(strides: Sequence[Axes], spatial_dims: int) -> Axes:
    total: Axes = (1,) * spatial_dims
    for stride in strides:
        total = times(total, stride)
    return total


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """What a residual block is made of; `dilation_before` is the dilation of what comes in."""

    spatial_dims: int
    in_channels: int
    planes: int
    norm: NormKind
    stride: Axes
    dilation_before: Axes
    dilation: Axes
    leak: float

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: Axes, dilation: Axes) -> nn.Module:
        """A convolution without bias."""
        return make_conv(self.spatial_dims, in_channels, out_channels, kernel, stride=stride, dilation=dilation)

    def norm_layer(self, channels: int) -> nn.Module:
        """The norm over `channels`."""
        return make_norm(self.norm, self.spatial_dims, channels)

    def downsample(self, out_channels: int) -> nn.Module | None:
        """The shortcut's 1×1 convolution and norm, where channels change or a step is made, be it by dilation.

        So the names of the parameters do not depend on the output stride.
        """
        steps = max(self.stride) > 1 or self.dilation != self.dilation_before
        if not steps and self.in_channels == out_channels:
            return None
        ones = (1,) * self.spatial_dims
        conv = self.conv(self.in_channels, out_channels, 1, self.stride, ones)
        return nn.Sequential(conv, self.norm_layer(out_channels))


class BasicBlock(nn.Module):
    """Two 3-wide convolutions and a shortcut (He et al. 2016); the first works on what comes in, so at its dilation."""

    expansion = 1

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        ones = (1,) * spec.spatial_dims
        self.conv1 = spec.conv(spec.in_channels, spec.planes, 3, spec.stride, spec.dilation_before)
        self.bn1 = spec.norm_layer(spec.planes)
        self.conv2 = spec.conv(spec.planes, spec.planes, 3, ones, spec.dilation)
        self.bn2 = spec.norm_layer(spec.planes)
        self.downsample = spec.downsample(spec.planes)
        self.act = nn.LeakyReLU(spec.leak, inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *n) → (B, planes, *ceil(n / stride))."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = self.act(self.bn1(self.conv1(maps)))
        return self.act(self.bn2(self.conv2(inner)) + shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1-wide, 3-wide, 1-wide convolutions and a shortcut; the stride sits on the 3-wide one, as in torchvision."""

    expansion = 4

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        ones = (1,) * spec.spatial_dims
        out_channels = spec.planes * self.expansion
        self.conv1 = spec.conv(spec.in_channels, spec.planes, 1, ones, ones)
        self.bn1 = spec.norm_layer(spec.planes)
        self.conv2 = spec.conv(spec.planes, spec.planes, 3, spec.stride, spec.dilation_before)
        self.bn2 = spec.norm_layer(spec.planes)
        self.conv3 = spec.conv(spec.planes, out_channels, 1, ones, ones)
        self.bn3 = spec.norm_layer(out_channels)
        self.downsample = spec.downsample(out_channels)
        self.act = nn.LeakyReLU(spec.leak, inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *n) → (B, 4·planes, *ceil(n / stride))."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = self.act(self.bn1(self.conv1(maps)))
        inner = self.act(self.bn2(self.conv2(inner)))
        return self.act(self.bn3(self.conv3(inner)) + shortcut)  # type: ignore[no-any-return]


def make_stage(
    block: type[BasicBlock] | type[Bottleneck], first: BlockSpec, *, blocks: int, multi_grid: Sequence[int] = (1,)
) -> nn.Sequential:
    """`blocks` residual blocks, the `first` may stride; `multi_grid` factors multiply the dilations in turn."""
    layers: list[nn.Module] = []
    for number in range(blocks):
        factor = multi_grid[number % len(multi_grid)]
        dilation = tuple(d * factor for d in first.dilation)
        if number == 0:
            before = tuple(d * factor for d in first.dilation_before)
            channels, stride = first.in_channels, first.stride
        else:
            before, channels, stride = dilation, first.planes * block.expansion, (1,) * first.spatial_dims
        spec = replace(first, in_channels=channels, stride=stride, dilation_before=before, dilation=dilation)
        layers.append(block(spec))
    return nn.Sequential(*layers)


class DilatedResNet(Encoder):
    """ResNet (He et al. 2016) with dilation in place of late strides, in 1D, 2D and 3D.

    Parameter names are those of torchvision's and MONAI's ResNet. Maps: the stem's, then one for each of four layers.
    """

    STEPS = ("conv1", "maxpool", "layer2", "layer3", "layer4")
    STEM_CHANNELS = 64

    def __init__(
        self,
        config: NetworkConfig,
        *,
        spatial_dims: int,
        in_channels: int,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        stem, pool, *later = plan_stages(config, self.STEPS, spatial_dims=spatial_dims, fixed=2)
        layer1 = Stage((1,) * spatial_dims, pool.dilation, pool.dilation, pool.reached)
        self.conv1 = make_conv(spatial_dims, in_channels, self.STEM_CHANNELS, 7, stride=stem.stride)
        self.bn1 = make_norm(config.norm, spatial_dims, self.STEM_CHANNELS)
        self.act = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = Pool[Pool.MAX, spatial_dims](kernel_size=3, stride=pool.stride, padding=1)
        channels = [self.STEM_CHANNELS]
        layers = []
        for number, (stage, depth) in enumerate(zip((layer1, *later), depths)):
            planes = self.STEM_CHANNELS * 2**number
            first = BlockSpec(
                spatial_dims=spatial_dims,
                in_channels=channels[-1],
                planes=planes,
                norm=config.norm,
                stride=stage.stride,
                dilation_before=stage.dilation_before,
                dilation=stage.dilation,
                leak=0.0,
            )
            grid = config.multi_grid if number == len(depths) - 1 else (1,)
            layers.append(make_stage(block, first, blocks=depth, multi_grid=grid))
            channels.append(planes * block.expansion)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.out_channels = tuple(channels)
        self.strides = (stem.reached, layer1.reached, *(s.reached for s in later))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, *spatial) → five maps as announced."""
        maps = [self.act(self.bn1(self.conv1(images)))]
        maps.append(self.layer1(self.maxpool(maps[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps


class LightResNet(Encoder):
    """A small residual encoder: a strided 3-wide stem with one block, then two basic blocks for each further stage."""

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int) -> None:
        super().__init__()
        steps = ("stem", *(f"stage {n}" for n in range(1, len(config.channels))))
        plans = plan_stages(config, steps, spatial_dims=spatial_dims, fixed=1)
        ones = (1,) * spatial_dims
        self.stem = conv_norm_act(
            spatial_dims, in_channels, config.channels[0], 3, norm=config.norm, stride=plans[0].stride
        )
        self.stages = nn.ModuleList()
        previous = config.channels[0]
        for number, (plan, channels) in enumerate(zip(plans, config.channels)):
            first = BlockSpec(
                spatial_dims=spatial_dims,
                in_channels=previous,
                planes=channels,
                norm=config.norm,
                stride=ones if number == 0 else plan.stride,
                dilation_before=plan.dilation_before,
                dilation=plan.dilation,
                leak=LEAK,
            )
            grid = config.multi_grid if number == len(plans) - 1 else (1,)
            self.stages.append(make_stage(BasicBlock, first, blocks=1 if number == 0 else 2, multi_grid=grid))
            previous = channels
        self.out_channels = config.channels
        self.strides = tuple(p.reached for p in plans)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, *spatial) → one map for each entry of `channels`."""
        maps: list[Tensor] = []
        current = self.stem(images)
        for stage in self.stages:
            current = stage(current)
            maps.append(current)
        return maps


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "light": LightResNet,
    "resnet18": partial(DilatedResNet, block=BasicBlock, depths=(2, 2, 2, 2)),
    "resnet34": partial(DilatedResNet, block=BasicBlock, depths=(3, 4, 6, 3)),
    "resnet50": partial(DilatedResNet, block=Bottleneck, depths=(3, 4, 6, 3)),
    "resnet101": partial(DilatedResNet, block=Bottleneck, depths=(3, 4, 23, 3)),
}
