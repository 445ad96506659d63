"""Fully convolutional networks: VGG-16 turned convolutional, scores at several strides, learned up-convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import (
    Axes,
    Style,
    check_input,
    crop,
    initialise,
    make_classifier,
    shuffle_pixels,
)
from medseg.networks._encoder import Encoder
from medseg.networks.encoders import build_encoder
from medseg.networks.vgg import make_top

LEVELS = {"fcn32s": 1, "fcn16s": 2, "fcn8s": 3}
_PUBLISHED = {
    "encoder": "vgg16",
    "output_stride": 32,
    "hidden_channels": 4096,
    "norm": "none",
    "leak": 0.0,
    "dropout": 0.5,
}
DEFAULTS = dict.fromkeys(LEVELS, _PUBLISHED)
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


class FCN(nn.Module):
    """Long et al. 2015, arXiv:1411.4038: 32s, 16s and 8s use the scores of one, two and three strides.

    Differences: no padding of the image by 100 pixels, since the up-convolutions begin as the interpolation that leaves
    map voxel i on voxel i·stride at any size; the last one is learned too; each class has a kernel of its own instead
    of one for every pair. Reads encoder, width, hidden_channels, output_stride, strides, norm,
    leak, dropout; the skips come from the two next finer strides of whatever encoder is chosen.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = Style.of(config, spatial_dims).wide(config.hidden_channels)
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        wanted = LEVELS[config.name]
        levels = self.encoder.levels()[::-1]
        if len(levels) < wanted:
            raise ConfigError(
                f"{config.name} fuses {wanted} strides, network.output_stride {config.output_stride} leaves "
                f"{len(levels)}; raise network.output_stride or choose one of fcn32s, fcn16s, fcn8s with fewer"
            )
        self.levels = levels[:wanted]
        self.fully = make_top(config, self.encoder, spatial_dims=spatial_dims)
        widths = [hidden, *(self.encoder.out_channels[level] for level in self.levels[1:])]
        self.scores = nn.ModuleList(make_classifier(spatial_dims, w, out_channels) for w in widths)
        strides = [self.encoder.strides[level] for level in self.levels]
        ones = (1,) * spatial_dims
        steps = [tuple(c // f for c, f in zip(coarse, fine)) for coarse, fine in zip(strides, [*strides[1:], ones])]
        self.ups = nn.ModuleList(UpConvolution(out_channels, step) for step in steps)
        initialise(self)
        for score in self.scores[1:]:
            # the finer nets begin as the coarser one
            nn.init.zeros_(score.get_parameter("weight"))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        maps = self.encoder(images)
        logits = self.scores[0](self.fully(maps[-1]))
        for up, score, level in zip(self.ups, self.scores[1:], self.levels[1:]):
            logits = up(logits, maps[level].shape[2:]) + score(maps[level])
        return self.ups[-1](logits, images.shape[2:])  # type: ignore[no-any-return]


class UpConvolution(nn.Module):
    """A transposed convolution of each channel that starts as linear interpolation by whole factors, and is learned.

    Its kernel is twice the factor wide, so that a voxel sees the two map voxels around it. It is computed as a 2-wide
    convolution to the voxels of a block at once: what torch's own takes 63-wide kernels for.
    """

    def __init__(self, channels: int, factors: Axes) -> None:
        super().__init__()
        self.factors = factors
        # as many axes as every kernel has: (C, 1, *2f)
        self.weight = nn.Parameter(_triangle(factors).repeat(channels, 1, *(1,) * len(factors)))

    def forward(self, maps: Tensor, shape: Axes) -> Tensor:
        """(B, C, *coarse) → (B, C, *shape); beyond the last map voxel its value is repeated."""
        if max(self.factors) == 1:
            return maps
        dims = len(self.factors)
        for axis in range(2, 2 + dims):
            maps = torch.cat((maps, maps.narrow(axis, maps.shape[axis] - 1, 1)), dim=axis)
        channels = len(self.weight)
        # tap k reaches from the map voxel before by k − f and from the one after by k: the later half comes first
        halves = self.weight.reshape(channels, *(n for f in self.factors for n in (2, f)))
        halves = halves.flip([1 + 2 * n for n in range(dims)])
        order = [0, *(2 + 2 * n for n in range(dims)), *(1 + 2 * n for n in range(dims))]
        kernel = halves.permute(order).reshape(-1, 1, *(2,) * dims)
        return crop(shuffle_pixels(_CONVOLUTIONS[dims - 1](maps, kernel, groups=channels), self.factors), shape)


def _triangle(factors: Axes) -> Tensor:
    """Weights of linear interpolation between voxels `factors` apart: 1 in the middle, 0 one factor away."""
    kernel = torch.ones(1)
    for factor in factors:
        axis = 1 - (torch.arange(2 * factor) - factor).abs() / factor
        kernel = kernel[..., None] * axis
    return kernel


def rescale(config: NetworkConfig, before: Encoder, after: Encoder) -> NetworkConfig:
    """Refuses: its learned up-convolutions belong to their strides."""
    raise ConfigError(
        f"network.output_stride: the up-convolutions of `{config.name}` learned their strides; train it at the "
        "one you want"
    )


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The FCN that `config.name` says."""
    return FCN(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
