"""DeepLabv3's cascade: copies of the last stage one behind the other, dilated instead of strided; no ASPP."""

from __future__ import annotations

from torch import nn

from medseg.config import NetworkConfig
from medseg.networks import encoders
from medseg.networks._encoder import EncoderClassifier
from medseg.networks.encoders import build_encoder

MORE = 3
"""Copies of the last stage: block5, block6 and block7 of the paper."""
DEFAULTS = {
    "deeplabv3_cascade": {
        "encoder": "resnet50",
        "output_stride": 16,
        "multi_grid": (1, 2, 1),
        "norm": "batch",
        "leak": 0.0,
        "upsampling": "interpolate",
    }
}


class DeepLabV3Cascade(EncoderClassifier):
    """Chen et al. 2017, arXiv:1706.05587, section 3.2: going deeper with atrous convolution.

    Every copy of the last stage doubles the dilation, where strides would have led to an output stride of 256;
    `output_stride` takes any power of two up to there. Reads encoder, width, output_stride, strides, multi_grid (which
    the copies share), norm, leak, dropout, upsampling.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels, more=MORE)
        super().__init__(config, encoder, in_channels=in_channels, out_channels=out_channels)


def halvings(config: NetworkConfig) -> int:
    """Halving steps that `network.strides` has an entry for."""
    return encoders.halvings(config) + MORE


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The cascade as `config` describes it."""
    return DeepLabV3Cascade(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
