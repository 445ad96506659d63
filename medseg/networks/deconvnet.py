"""DeconvNet: VGG-16 and its mirror image, in which every voxel goes back to where its maximum came from."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks._blocks import Style, check_input, conv_norm_act, initialise, least_shape, make_classifier
from medseg.networks._encoder import strides_of
from medseg.networks.vgg import STEPS, VGG16

DEFAULTS = {"deconvnet": {"hidden_channels": 4096, "norm": "batch", "leak": 0.0}}


class DeconvNet(nn.Module):
    """Noh et al. 2015, arXiv:1505.04366: pooling that remembers, unpooling by the remembered places, convolutions.

    Differences: the fully connected layers are 7-wide convolutions that keep the size, so that any input size works
    (an odd last voxel is a window of its own). The output stride in the middle is 32 and cannot be changed. Reads
    width, hidden_channels, strides, norm, leak.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        style = Style.of(config, spatial_dims)
        hidden = style.wide(config.hidden_channels)
        widths = [style.wide(c) for c in VGG16.CHANNELS]
        self.in_channels = in_channels
        self.strides = strides_of(config, STEPS, spatial_dims)
        self.min_shape = least_shape(tuple(prod(s[axis] for s in self.strides) for axis in range(spatial_dims)))
        self.down, self.pools = nn.ModuleList(), nn.ModuleList()
        self.up = nn.ModuleList()
        previous = in_channels
        for width, depth, stride in zip(widths, VGG16.DEPTHS, self.strides):
            self.down.append(_convs(style, [previous, *[width] * depth]))
            self.pools.append(Pool[Pool.MAX, spatial_dims](stride, stride=stride, ceil_mode=True, return_indices=True))
            previous = width
        self.middle = nn.Sequential(
            conv_norm_act(style, previous, hidden, 7),
            conv_norm_act(style, hidden, hidden, 1),
            conv_norm_act(style, hidden, previous, 7),
        )
        finer = [widths[0], *widths[:-1]]
        for width, depth, after in zip(widths[::-1], VGG16.DEPTHS[::-1], finer[::-1]):
            self.up.append(_convs(style, [*[width] * depth, after]))
        self.classifier = make_classifier(spatial_dims, widths[0], out_channels)
        initialise(self, leak=config.leak)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        places: list[tuple[Tensor, Tensor]] = []
        current = images
        for block, pool in zip(self.down, self.pools):
            before = block(current)
            current, indices = pool(before)
            places.append((before, indices))
        current = self.middle(current)
        for block, (before, indices) in zip(self.up, reversed(places)):
            current = block(unpool(current, indices, before))
        return self.classifier(current)  # type: ignore[no-any-return]


def unpool(maps: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Each value of `maps` (B, C, *coarse) at its place in the shape of `like` (B, C, *spatial), 0 elsewhere."""
    empty = torch.zeros_like(like, dtype=maps.dtype).flatten(2)
    return empty.scatter(2, indices.flatten(2), maps.flatten(2)).reshape(like.shape)


def halvings(config: NetworkConfig) -> int:
    """Halving steps that `network.strides` has an entry for."""
    return len(STEPS)


def _convs(style: Style, widths: list[int]) -> nn.Sequential:
    return nn.Sequential(*(conv_norm_act(style, a, b, 3) for a, b in pairwise(widths)))


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DeconvNet as `config` describes it."""
    return DeconvNet(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
