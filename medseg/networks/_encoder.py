"""What an encoder announces, how strides are traded for dilation, the plainest use of one; no encoder itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import Axes, CoarseHead, Dropout, check_input, initialise, least_shape, times


class Encoder(nn.Module):
    """An image (B, C, *spatial) to feature maps from high to low resolution.

    `out_channels` and `strides` (cumulative, by axis) announce the maps; a map has ceil(n / stride) voxels on an axis
    of n. The output stride is the largest stride over the axes of the last map. `dilation` is what a convolution on
    the last map needs to see what it would have seen, had no stride been replaced. `is_same_denser`: at a smaller
    output stride the same weights give the same maps on a denser grid. Inputs below `min_shape` leave a single voxel on
    a strided axis, where a norm has nothing to normalise.
    """

    out_channels: tuple[int, ...]
    strides: tuple[Axes, ...]
    dilation: Axes
    is_same_denser = True

    @property
    def min_shape(self) -> Axes:
        """Fewest voxels by axis that the encoder takes."""
        return least_shape(self.strides[-1])

    def levels(self) -> tuple[int, ...]:
        """Numbers of the last map at each stride, from the finest on."""
        return tuple({stride: number for number, stride in enumerate(self.strides)}.values())


class EncoderClassifier(nn.Module):
    """An encoder, dropout and a classifier on its last map: all there is to a network whose encoder does the work."""

    def __init__(self, config: NetworkConfig, encoder: Encoder, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.encoder = encoder
        self.min_shape = encoder.min_shape
        self.dropout = Dropout(config.dropout)
        self.classifier = CoarseHead(encoder.out_channels[-1], out_channels, encoder.strides[-1], config.upsampling)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        return self.classifier(self.dropout(self.encoder(images)[-1]), images.shape[2:])  # type: ignore[no-any-return]


class Stage(NamedTuple):
    """How a halving step is carried out: `reached` is the cumulative stride after it, all by axis."""

    stride: Axes
    dilation_before: Axes
    dilation: Axes
    reached: Axes

    @property
    def dilated(self) -> bool:
        """Whether a stride was traded for dilation, in this step or before it."""
        return max(self.dilation) > 1


def plan_stages(config: NetworkConfig, steps: Sequence[str], *, spatial_dims: int, fixed: int) -> tuple[Stage, ...]:
    """Strides and dilations of the halving `steps`, of which the first `fixed` are never replaced.

    A step that would take the stride of any axis beyond `output_stride`, and every step after it, multiplies the
    dilation by its stride instead (Chen et al. 2017, arXiv:1706.05587).
    """
    strides = strides_of(config, steps, spatial_dims)
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


def strides_of(config: NetworkConfig, steps: Sequence[str], spatial_dims: int) -> tuple[Axes, ...]:
    """The stride of each of the `steps`. Raises `ConfigError` where the given ones are too many, few or short."""
    strides = config.strides
    if strides is None:
        return ((2,) * spatial_dims,) * len(steps)
    if len(strides) != len(steps):
        raise ConfigError(
            f"network.strides has {len(strides)} entries, `{config.name}` as configured needs {len(steps)}"
            f"{': one for each of ' if steps else ''}{', '.join(steps)}"
        )
    for number, stride in enumerate(strides):
        if len(stride) != spatial_dims:
            raise ConfigError(f"network.strides[{number}] is {stride}, expected {spatial_dims} numbers, one an axis")
    return strides


def stride_by_axis(config: NetworkConfig, spatial_dims: int) -> Axes:
    """What `output_stride` is on each axis, where `strides` halve some axes later than others."""
    if config.strides is None:
        return (config.output_stride,) * spatial_dims
    reached = (_cumulative(config.strides[:n], spatial_dims) for n in range(len(config.strides) + 1))
    return [axes for axes in reached if max(axes) <= config.output_stride][-1]


def _cumulative(strides: Sequence[Axes], spatial_dims: int) -> Axes:
    total: Axes = (1,) * spatial_dims
    for stride in strides:
        total = times(total, stride)
    return total
