"""Residual encoders whose output stride is chosen by trading strides for dilation; heads and decoders are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import Axes, Rate, Style, conv_norm_act, make_conv, make_norm, norm_act, per_axis
from medseg.networks._encoder import Encoder, Stage, plan_stages

QUIET = 0.1
"""Factor on the last convolution of a residual branch without a norm, at the start."""


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """What a residual block is made of; `dilations` are those of its 3-wide convolutions in turn."""

    style: Style
    in_channels: int
    planes: int
    stride: Axes
    dilations: tuple[Axes, ...]
    projects: bool
    """Whether the shortcut has a convolution: where channels change or a step is made, be it by dilation. So the names
    of the parameters do not depend on the output stride."""

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: Axes, dilation: Axes) -> nn.Module:
        """A convolution; with a bias where no norm has one."""
        dims, bias = self.style.spatial_dims, self.style.norm == "none"
        return make_conv(dims, in_channels, out_channels, kernel, stride=stride, dilation=dilation, bias=bias)

    def shortcut(self, out_channels: int) -> nn.Module | None:
        """The 1×1 convolution and norm of the shortcut, where it has them."""
        if not self.projects and self.in_channels == out_channels:
            return None
        ones = (1,) * self.style.spatial_dims
        conv = self.conv(self.in_channels, out_channels, 1, self.stride, ones)
        return nn.Sequential(conv, make_norm(self.style, out_channels))


class BasicBlock(nn.Module):
    """Two 3-wide convolutions and a shortcut (He et al. 2016)."""

    expansion, wide_convs = 1, 2

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        ones = (1,) * spec.style.spatial_dims
        first, second = spec.dilations
        self.conv1 = spec.conv(spec.in_channels, spec.planes, 3, spec.stride, first)
        self.bn1 = make_norm(spec.style, spec.planes)
        self.conv2 = spec.conv(spec.planes, spec.planes, 3, ones, second)
        self.bn2 = make_norm(spec.style, spec.planes)
        self.last = "conv2"
        self.downsample = spec.shortcut(spec.planes)
        self.act = spec.style.rectifier()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *n) → (B, planes, *ceil(n / stride))."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = norm_act(self.bn1, self.act, self.conv1(maps))
        return self.act(self.bn2(self.conv2(inner)) + shortcut)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1-wide, 3-wide, 1-wide convolutions and a shortcut; the stride sits on the 3-wide one, as in torchvision."""

    expansion, wide_convs = 4, 1

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        ones = (1,) * spec.style.spatial_dims
        out_channels = spec.planes * self.expansion
        self.conv1 = spec.conv(spec.in_channels, spec.planes, 1, ones, ones)
        self.bn1 = make_norm(spec.style, spec.planes)
        self.conv2 = spec.conv(spec.planes, spec.planes, 3, spec.stride, spec.dilations[0])
        self.bn2 = make_norm(spec.style, spec.planes)
        self.conv3 = spec.conv(spec.planes, out_channels, 1, ones, ones)
        self.bn3 = make_norm(spec.style, out_channels)
        self.last = "conv3"
        self.downsample = spec.shortcut(out_channels)
        self.act = spec.style.rectifier()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, *n) → (B, 4·planes, *ceil(n / stride))."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = norm_act(self.bn1, self.act, self.conv1(maps))
        inner = norm_act(self.bn2, self.act, self.conv2(inner))
        return self.act(self.bn3(self.conv3(inner)) + shortcut)  # type: ignore[no-any-return]


Block = type[BasicBlock] | type[Bottleneck]


def quieten(network: nn.Module) -> None:
    """Let residual branches without a norm begin small: each would add its variance to that of all before it."""
    for block in network.modules():
        if isinstance(block, BasicBlock | Bottleneck) and isinstance(block.bn1, nn.Identity):
            with torch.no_grad():
                block.get_submodule(block.last).get_parameter("weight").mul_(QUIET)


def make_stage(
    block: Block,
    style: Style,
    in_channels: int,
    planes: int,
    *,
    stage: Stage,
    dilations: Sequence[tuple[Axes, ...]],
) -> nn.Sequential:
    """One residual block for each entry of `dilations`; the first may stride, as `stage` says."""
    layers: list[nn.Module] = []
    ones = (1,) * style.spatial_dims
    for number, inner in enumerate(dilations):
        first = number == 0
        spec = BlockSpec(
            style=style,
            in_channels=in_channels if first else planes * block.expansion,
            planes=planes,
            stride=stage.stride if first else ones,
            dilations=inner,
            projects=first and (max(stage.stride) > 1 or stage.dilation != stage.dilation_before),
        )
        layers.append(block(spec))
    return nn.Sequential(*layers)


def natural_dilations(
    block: Block, stage: Stage, blocks: int, multi_grid: Sequence[int] = (1,)
) -> list[tuple[Axes, ...]]:
    """Dilations by block that keep what a strided stage sees; `multi_grid` factors multiply them in turn.

    The first 3-wide convolution still works on what came in, so at the dilation before the step.
    """
    found = []
    for number in range(blocks):
        factor = multi_grid[number % len(multi_grid)]
        inner = [tuple(d * factor for d in stage.dilation)] * block.wide_convs
        if number == 0:
            inner[0] = tuple(d * factor for d in stage.dilation_before)
        found.append(tuple(inner))
    return found


class Dilations:
    """Which dilation each 3-wide convolution of an encoder has.

    `rates` empty: what the output stride asks for, times `multi_grid` from the stage `grid_from` on. Else the
    convolutions of all dilated stages take the `rates` one after the other (hybrid dilated convolution, Wang et al.
    2018, arXiv:1702.08502).
    """

    def __init__(self, multi_grid: Sequence[int], rates: Sequence[Axes], *, grid_from: int) -> None:
        self._multi_grid = multi_grid
        self._grid_from = grid_from
        self._rates: Iterator[Axes] | None = cycle(rates) if rates else None

    def of(self, block: Block, stage: Stage, number: int, blocks: int) -> list[tuple[Axes, ...]]:
        """Dilations by block and 3-wide convolution of the stage `number`."""
        if self._rates is not None and stage.dilated:
            rates = self._rates
            return [tuple(next(rates) for _ in range(block.wide_convs)) for _ in range(blocks)]
        return natural_dilations(block, stage, blocks, self._multi_grid if number >= self._grid_from else (1,))


class DilatedResNet(Encoder):
    """ResNet (He et al. 2016) with dilation in place of late strides, in 1D, 2D and 3D.

    Parameter names are those of torchvision's and MONAI's ResNet. Maps: the stem's, then one for each of the four
    layers, then one for each of `more` copies of the last (layer5, layer6, …).
    """

    STEPS = ("conv1", "maxpool", "layer2", "layer3", "layer4")
    STEM_CHANNELS = 64

    def __init__(
        self,
        config: NetworkConfig,
        *,
        spatial_dims: int,
        in_channels: int,
        block: Block,
        depths: tuple[int, int, int, int],
        more: int = 0,
        rates: Sequence[Rate] = (),
    ) -> None:
        super().__init__()
        # the published rectifiers of a ResNet are plain
        style = Style(spatial_dims, config.norm, 0.0, config.width)
        stem_channels = style.wide(self.STEM_CHANNELS)
        steps = (*self.STEPS, *(f"layer{5 + n}" for n in range(more)))
        stem, pool, *later = plan_stages(config, steps, spatial_dims=spatial_dims, fixed=2)
        layer1 = Stage((1,) * spatial_dims, pool.dilation, pool.dilation, pool.reached)
        bias = style.norm == "none"
        self.conv1 = make_conv(spatial_dims, in_channels, stem_channels, 7, stride=stem.stride, bias=bias)
        self.bn1 = make_norm(style, stem_channels)
        self.act = style.rectifier()
        self.maxpool: nn.Module = Pool[Pool.MAX, spatial_dims](kernel_size=3, stride=pool.stride, padding=1)
        channels = [stem_channels]
        depths_all = (*depths, *depths[-1:] * more)
        inner = Dilations(config.multi_grid, [per_axis(r, spatial_dims) for r in rates], grid_from=len(depths) - 1)
        for number, (stage, depth) in enumerate(zip((layer1, *later), depths_all)):
            planes = stem_channels * 2 ** min(number, len(depths) - 1)
            dilations = inner.of(block, stage, number, depth)
            layer = make_stage(block, style, channels[-1], planes, stage=stage, dilations=dilations)
            self.add_module(f"layer{number + 1}", layer)
            channels.append(planes * block.expansion)
        self.layers = tuple(f"layer{n + 1}" for n in range(len(depths_all)))
        self.out_channels = tuple(channels)
        self.strides = (stem.reached, layer1.reached, *(s.reached for s in later))
        self.dilation = later[-1].dilation

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, *spatial) → maps as announced."""
        maps = [norm_act(self.bn1, self.act, self.conv1(images))]
        current = self.maxpool(maps[0])
        for name in self.layers:
            current = self.get_submodule(name)(current)
            maps.append(current)
        return maps


class LightResNet(Encoder):
    """A small residual encoder: a strided 3-wide stem with one block, then two basic blocks for each further stage."""

    def __init__(
        self,
        config: NetworkConfig,
        *,
        spatial_dims: int,
        in_channels: int,
        more: int = 0,
        rates: Sequence[Rate] = (),
    ) -> None:
        super().__init__()
        if len(config.channels) < 2:
            raise ConfigError(f"network.channels {list(config.channels)}: the light encoder needs at least two stages")
        style = Style.of(config, spatial_dims)
        channels = tuple(style.wide(c) for c in config.channels)
        channels += channels[-1:] * more
        plans = plan_stages(config, light_steps(config, more), spatial_dims=spatial_dims, fixed=1)
        self.stem = conv_norm_act(style, in_channels, channels[0], 3, stride=plans[0].stride)
        self.stages = nn.ModuleList()
        inner = Dilations(
            config.multi_grid, [per_axis(r, spatial_dims) for r in rates], grid_from=len(config.channels) - 1
        )
        previous = channels[0]
        for number, (plan, planes) in enumerate(zip(plans, channels)):
            if number == 0:
                # the stem has made the first step
                plan = plan._replace(stride=(1,) * spatial_dims, dilation_before=plan.dilation)
            dilations = inner.of(BasicBlock, plan, number, 1 if number == 0 else 2)
            self.stages.append(make_stage(BasicBlock, style, previous, planes, stage=plan, dilations=dilations))
            previous = planes
        self.out_channels = channels
        self.strides = tuple(p.reached for p in plans)
        self.dilation = plans[-1].dilation

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, *spatial) → one map for each stage."""
        maps: list[Tensor] = []
        current = self.stem(images)
        for stage in self.stages:
            current = stage(current)
            maps.append(current)
        return maps


def light_steps(config: NetworkConfig, more: int = 0) -> tuple[str, ...]:
    """Names of the halving steps of the light encoder."""
    return ("stem", *(f"stage {n}" for n in range(1, len(config.channels) + more)))
