"""DeepLabv3+: DeepLabv3's encoder and ASPP with a decoder that sees high resolution, and the image itself."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import (
    Axes,
    CoarseHead,
    Style,
    check_input,
    conv_norm_act,
    crop,
    enlarge,
    even_out,
    gather_pixels,
    initialise,
    make_classifier,
    shuffle_pixels,
)
from medseg.networks._encoder import Encoder
from medseg.networks.aspp import ASPP, pooling_window, rescale_rates
from medseg.networks.encoders import build_encoder

DEFAULTS = {"deeplabv3plus": {"aspp_rates": (2, 4, 6)}}
SKIP_STRIDE = 4
"""The decoder works at the coarsest stride up to this one that is finer than the output stride."""
FULL_CHANNELS = 8
"""Channels of the last map for every voxel of a block."""


class DeepLabV3Plus(nn.Module):
    """Chen et al. 2018, arXiv:1802.02611, with a choice of how the decoder's maps reach the input's resolution.

    Reads encoder, channels (light), width, output_stride, strides, multi_grid, norm, leak, aspp_rates, aspp_channels,
    image_pooling, pooling_window, separable, dropout, skip_channels, decoder_channels, upsampling. The settings' own
    defaults are this network's: a light encoder and `subpixel`, which sees the image itself again; published were
    Xception or ResNet-101, an output stride of 16, rates 6, 12, 18, separable convolutions and `interpolate`.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        style = Style.of(config, spatial_dims)
        width, context, skip = map(style.wide, (config.decoder_channels, config.aspp_channels, config.skip_channels))
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        self.skip_level = _skip_level(self.encoder)
        self.strides = self.encoder.strides[self.skip_level]
        self.rise = tuple(d // s for d, s in zip(self.encoder.strides[-1], self.strides))
        self.aspp = ASPP(
            style,
            self.encoder.out_channels[-1],
            context,
            config.aspp_rates,
            pooling=config.image_pooling,
            pooling_window=pooling_window(config, self.encoder.strides[-1]),
            separable=config.separable,
            dropout=config.dropout,
        )
        self.skip = conv_norm_act(style, self.encoder.out_channels[self.skip_level], skip, 1)
        self.decoder = nn.Sequential(
            conv_norm_act(style, context + skip, width, 3, separable=config.separable),
            conv_norm_act(style, width, width, 3, separable=config.separable),
        )
        self.head: nn.Module
        if config.upsampling == "subpixel":
            self.head = ImageHead(style, in_channels, width, out_channels, self.strides)
        else:
            self.head = CoarseHead(width, out_channels, self.strides, config.upsampling)
        initialise(self)
        if isinstance(self.head, ImageHead):
            even_out(self.head.classifier, prod(self.strides))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        maps = self.encoder(images)
        skip = self.skip(maps[self.skip_level])
        context = enlarge(self.aspp(maps[-1]), self.rise, skip.shape[2:])
        decoded = self.decoder(torch.cat((context, skip), dim=1))
        if isinstance(self.head, ImageHead):
            return self.head(decoded, images)  # type: ignore[no-any-return]
        return self.head(decoded, images.shape[2:])  # type: ignore[no-any-return]


class ImageHead(nn.Module):
    """Full resolution without a map at full resolution: sub-pixel convolution (Shi et al. 2016) both ways.

    The image's voxels are gathered into channels at the decoder's resolution, where one convolution sees them beside
    the decoder's maps; the classifier then gives the logits of all voxels of a block at once.
    """

    def __init__(self, style: Style, image_channels: int, in_channels: int, out_channels: int, strides: Axes) -> None:
        super().__init__()
        block = prod(strides)
        self.strides = strides
        width = FULL_CHANNELS * block
        self.refine = conv_norm_act(style, in_channels + image_channels * block, width, 3)
        self.classifier = make_classifier(len(strides), width, out_channels * block)

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """(B, C, *coarse) and (B, image_channels, *spatial) → (B, out_channels, *spatial)."""
        blocks = gather_pixels(images, self.strides).to(decoded.dtype)
        logits = self.classifier(self.refine(torch.cat((decoded, blocks), dim=1)))
        return crop(shuffle_pixels(logits, self.strides), images.shape[2:])


def _skip_level(encoder: Encoder) -> int:
    finer = [max(s) for s in encoder.strides if max(s) <= SKIP_STRIDE and max(s) < max(encoder.strides[-1])]
    return finer.index(max(finer)) if finer else 0


def rescale(config: NetworkConfig, before: Encoder, after: Encoder) -> NetworkConfig:
    """ASPP's rates for the map of `after`. Raises `ConfigError` where the decoder would take its skip elsewhere."""
    skips = [(_skip_level(e), e.strides[_skip_level(e)]) for e in (before, after)]
    if skips[0] != skips[1]:
        raise ConfigError(
            f"network.output_stride: from {max(before.strides[-1])} to {max(after.strides[-1])} the decoder of "
            f"`{config.name}` would take its skip at stride {skips[1][1]}, not at {skips[0][1]} as it learned; "
            "train it at the one you want"
        )
    return rescale_rates(config, before, after)


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DeepLabv3+ as `config` describes it."""
    return DeepLabV3Plus(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
