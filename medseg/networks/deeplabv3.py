"""DeepLabv3: a dilated encoder, ASPP, a classifier at the output stride, and interpolation to the input's size."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks._blocks import check_input, conv_norm_act, enlarge, initialise, make_classifier
from medseg.networks.aspp import ASPP
from medseg.networks.resnet import build_encoder


class DeepLabV3(nn.Module):
    """Chen et al. 2017, arXiv:1706.05587. It has no decoder: `upsampling` and the decoder's settings do not apply."""

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = config.aspp_channels
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        self.aspp = ASPP(
            spatial_dims,
            self.encoder.out_channels[-1],
            width,
            config.aspp_rates,
            pooling=config.image_pooling,
            norm=config.norm,
            dropout=config.dropout,
        )
        self.head = conv_norm_act(spatial_dims, width, width, 3, norm=config.norm)
        self.classifier = make_classifier(spatial_dims, width, out_channels)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        logits = self.classifier(self.head(self.aspp(self.encoder(images)[-1])))
        return enlarge(logits, self.encoder.strides[-1], images.shape[2:])


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DeepLabv3 as `config` describes it."""
    return DeepLabV3(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
