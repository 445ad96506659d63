"""Hybrid dilated convolution: a backbone whose dilations share no factor, and dense upsampling; no ASPP."""

from __future__ import annotations

from torch import nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._encoder import Encoder, EncoderClassifier
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


class HybridDilated(EncoderClassifier):
    """Wang et al. 2018, arXiv:1702.08502: against gridding, with their dense upsampling convolution as `subpixel`.

    The 3-wide convolutions of all stages that lost their stride take `dilations` in turn, whatever the stride was;
    2, 2, 2 leaves holes in what a voxel sees, 1, 2, 5 does not. Difference: one sequence runs through all these stages,
    where the paper groups the blocks of each (1, 2, 3 and 3, 4, 5, or 1, 2, 5, 9 and 5, 9, 17). Reads encoder (light or
    a ResNet), width, output_stride, strides, dilations, norm, leak, dropout, upsampling.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels, rates=config.dilations)
        if max(encoder.dilation) == 1:
            raise ConfigError(
                f"network.output_stride {config.output_stride} leaves `{config.name}` with no dilated stage to give "
                f"network.dilations {list(config.dilations)} to; lower network.output_stride"
            )
        super().__init__(config, encoder, in_channels=in_channels, out_channels=out_channels)


def rescale(config: NetworkConfig, before: Encoder, after: Encoder) -> NetworkConfig:
    """Refuses: its dilations belong to the output stride that they were trained at."""
    raise ConfigError(
        "network.output_stride: the dilations of `hdc` do not follow from its strides, so that it sees something else "
        "at another output stride; train it at the one you want"
    )


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The network as `config` describes it."""
    return HybridDilated(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
