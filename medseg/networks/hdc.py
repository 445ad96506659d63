"""Hybrid dilated convolution: a backbone whose dilations share no factor, and dense upsampling; no ASPP."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import CoarseHead, check_input, initialise
from medseg.networks._encoder import Encoder
from medseg.networks.encoders import build_encoder

DEFAULTS = {
    "hdc": {
        "encoder": "resnet101",
        "output_stride": 8,
        "dilations": (1, 2, 5),
        "norm": "batch",
        "leak": 0.0,
        "upsampling": "subpixel",
    }
}


class HybridDilated(nn.Module):
    """Wang et al. 2018, arXiv:1702.08502: against gridding, with their dense upsampling convolution as `subpixel`.

    The 3-wide convolutions of all stages that lost their stride take `dilations` in turn, whatever the stride was;
    2, 2, 2 leaves holes in what a voxel sees, 1, 2, 5 does not. Difference: one sequence runs through all these stages,
    where the paper groups the blocks of each (1, 2, 3 and 3, 4, 5, or 1, 2, 5, 9 and 5, 9, 17). Reads encoder (light or
    a ResNet), width, output_stride, strides, dilations, norm, leak, dropout, upsampling.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels, rates=config.dilations)
        if max(self.encoder.dilation) == 1:
            raise ConfigError(
                f"network.output_stride {config.output_stride} leaves `{config.name}` with no dilated stage to give "
                f"network.dilations {list(config.dilations)} to; lower network.output_stride"
            )
        self.min_shape = self.encoder.min_shape
        self.dropout = nn.Dropout(config.dropout)
        channels, strides = self.encoder.out_channels[-1], self.encoder.strides[-1]
        self.classifier = CoarseHead(channels, out_channels, strides, config.upsampling)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        return self.classifier(self.dropout(self.encoder(images)[-1]), images.shape[2:])  # type: ignore[no-any-return]


def rescale(config: NetworkConfig, before: Encoder, after: Encoder) -> NetworkConfig:
    """Refuses: its dilations belong to the output stride that they were trained at."""
    raise ConfigError(
        "network.output_stride: the dilations of `hdc` do not follow from its strides, so that it sees something else "
        "at another output stride; train it at the one you want"
    )


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The network as `config` describes it."""
    return HybridDilated(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
