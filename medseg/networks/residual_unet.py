"""A residual U-Net: pooling by strides, learned upsampling and skips; the strong baseline, without dilation."""

from __future__ import annotations

from math import prod

import torch
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import (
    Axes,
    Style,
    check_input,
    conv_norm_act,
    crop,
    initialise,
    least_shape,
    make_classifier,
)
from medseg.networks._encoder import Stage, strides_of
from medseg.networks.resnet import BasicBlock, make_stage, natural_dilations

DEFAULTS = {"residual_unet": {"channels": (32, 64, 128, 256, 320)}}
BLOCKS = (1, 2, 3, 4)
"""Residual blocks of the first stages; deeper ones have as many as the last."""


class ResidualUNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) in the residual form of Isensee et al. 2024, arXiv:2404.09556.

    Residual encoder from full resolution on, transposed convolutions, one convolution on each way up. Differences: no
    deep supervision, fewer blocks in the deep stages. Reads channels (one for each stage), width, strides (between the
    stages), norm, leak.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        style = Style.of(config, spatial_dims)
        channels = [style.wide(c) for c in config.channels]
        strides = stage_strides(config, spatial_dims)
        ones = (1,) * spatial_dims
        self.in_channels = in_channels
        self.min_shape = least_shape(tuple(prod(a) for a in zip(*strides, ones)))
        self.down, self.ups, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        previous = in_channels
        for number, (planes, stride) in enumerate(zip(channels, (ones, *strides))):
            stage = Stage(stride, ones, ones, stride)
            blocks = BLOCKS[min(number, len(BLOCKS) - 1)]
            dilations = natural_dilations(BasicBlock, stage, blocks)
            self.down.append(make_stage(BasicBlock, style, previous, planes, stage=stage, dilations=dilations))
            previous = planes
        transposed = Conv[Conv.CONVTRANS, spatial_dims]
        for planes, stride in zip(channels[-2::-1], strides[::-1]):
            self.ups.append(transposed(previous, planes, kernel_size=stride, stride=stride))
            self.decoder.append(conv_norm_act(style, 2 * planes, planes, 3))
            previous = planes
        self.classifier = make_classifier(spatial_dims, previous, out_channels)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        skips: list[Tensor] = []
        current = images
        for stage in self.down:
            current = stage(current)
            skips.append(current)
        for up, conv, skip in zip(self.ups, self.decoder, skips[-2::-1]):
            current = conv(torch.cat((crop(up(current), skip.shape[2:]), skip), dim=1))
        return self.classifier(current)  # type: ignore[no-any-return]


def stage_strides(config: NetworkConfig, spatial_dims: int) -> tuple[Axes, ...]:
    """Strides between the stages. Raises `ConfigError` where there are not as many as the stages need."""
    if len(config.channels) < 2:
        raise ConfigError(f"network.channels {list(config.channels)}: `{config.name}` needs at least two stages")
    return strides_of(config, [f"the way to stage {n}" for n in range(1, len(config.channels))], spatial_dims)


def halvings(config: NetworkConfig) -> int:
    """Halving steps that `network.strides` has an entry for: those between the stages."""
    return len(config.channels) - 1


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The U-Net as `config` describes it."""
    return ResidualUNet(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
