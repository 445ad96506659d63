"""DeepLabv3+: DeepLabv3's encoder and ASPP with a decoder that sees high resolution, and the image itself."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks._blocks import (
    Axes,
    NormKind,
    check_input,
    conv_norm_act,
    crop,
    enlarge,
    gather_pixels,
    initialise,
    make_classifier,
    shuffle_pixels,
)
from medseg.networks.aspp import ASPP
from medseg.networks.resnet import Encoder, build_encoder

SKIP_STRIDE = 4
"""The decoder works at the coarsest stride up to this one that is finer than the output stride."""
FULL_CHANNELS = 8
"""Channels of the last map for every voxel of a block."""


class DeepLabV3Plus(nn.Module):
    """Chen et al. 2018, arXiv:1802.02611, with a choice of how the decoder's maps reach the input's resolution."""

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        norm, width = config.norm, config.decoder_channels
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        self.skip_level = _skip_level(self.encoder)
        self.strides = self.encoder.strides[self.skip_level]
        self.rise = tuple(d // s for d, s in zip(self.encoder.strides[-1], self.strides))
        self.aspp = ASPP(
            spatial_dims,
            self.encoder.out_channels[-1],
            config.aspp_channels,
            config.aspp_rates,
            pooling=config.image_pooling,
            norm=norm,
            dropout=config.dropout,
        )
        self.skip = conv_norm_act(
            spatial_dims, self.encoder.out_channels[self.skip_level], config.skip_channels, 1, norm=norm
        )
        self.decoder = nn.Sequential(
            conv_norm_act(spatial_dims, config.aspp_channels + config.skip_channels, width, 3, norm=norm),
            conv_norm_act(spatial_dims, width, width, 3, norm=norm),
        )
        self.head: nn.Module
        if config.upsampling == "subpixel":
            self.head = SubpixelHead(in_channels, width, out_channels, self.strides, norm=norm)
        else:
            self.head = InterpolationHead(width, out_channels, self.strides)
        initialise(self)
        if isinstance(self.head, SubpixelHead):
            self.head.even_out()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        maps = self.encoder(images)
        skip = self.skip(maps[self.skip_level])
        context = enlarge(self.aspp(maps[-1]), self.rise, skip.shape[2:])
        decoded = self.decoder(torch.cat((context, skip), dim=1))
        return self.head(decoded, images)  # type: ignore[no-any-return]


class InterpolationHead(nn.Module):
    """A classifier at the decoder's resolution, its logits interpolated linearly to the image's."""

    def __init__(self, in_channels: int, out_channels: int, strides: Axes) -> None:
        super().__init__()
        self.strides = strides
        self.classifier = make_classifier(len(strides), in_channels, out_channels)

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """(B, C, *coarse) and (B, any, *spatial) → (B, out_channels, *spatial)."""
        return enlarge(self.classifier(decoded), self.strides, images.shape[2:])


class SubpixelHead(nn.Module):
    """Full resolution without a map at full resolution: sub-pixel convolution (Shi et al. 2016) both ways.

    The image's voxels are gathered into channels at the decoder's resolution, where one convolution sees them beside
    the decoder's maps; the classifier then gives the logits of all voxels of a block at once.
    """

    def __init__(
        self, image_channels: int, in_channels: int, out_channels: int, strides: Axes, *, norm: NormKind
    ) -> None:
        super().__init__()
        dims, block = len(strides), prod(strides)
        self.strides = strides
        width = FULL_CHANNELS * block
        self.refine = conv_norm_act(dims, in_channels + image_channels * block, width, 3, norm=norm)
        self.classifier = make_classifier(dims, width, out_channels * block)

    def even_out(self) -> None:
        """Start with equal sub-pixels, so that no checkerboard has to be unlearned (Aitken et al. 2017, ICNR)."""
        weight = self.classifier.weight
        if isinstance(weight, Tensor):
            count = prod(self.strides)
            with torch.no_grad():
                weight.copy_(weight[::count].repeat_interleave(count, dim=0))

    def forward(self, decoded: Tensor, images: Tensor) -> Tensor:
        """(B, C, *coarse) and (B, image_channels, *spatial) → (B, out_channels, *spatial)."""
        blocks = gather_pixels(images, self.strides).to(decoded.dtype)
        logits = self.classifier(self.refine(torch.cat((decoded, blocks), dim=1)))
        return crop(shuffle_pixels(logits, self.strides), images.shape[2:])


def _skip_level(encoder: Encoder) -> int:
    finer = [max(s) for s in encoder.strides if max(s) <= SKIP_STRIDE and max(s) < max(encoder.strides[-1])]
    return finer.index(max(finer)) if finer else 0


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DeepLabv3+ as `config` describes it."""
    return DeepLabV3Plus(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
