"""DeepLabv3: a dilated encoder, ASPP, a classifier at the output stride, and interpolation to the input's size."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks._blocks import CoarseHead, Style, check_input, conv_norm_act, initialise
from medseg.networks.aspp import ASPP, pooling_window, rescale_rates
from medseg.networks.encoders import build_encoder

DEFAULTS = {
    "deeplabv3": {
        "encoder": "resnet50",
        "output_stride": 8,
        "aspp_rates": (12, 24, 36),
        "aspp_channels": 256,
        "dropout": 0.5,
        "norm": "batch",
        "leak": 0.0,
        "upsampling": "resize",
    }
}


class DeepLabV3(nn.Module):
    """Chen et al. 2017, arXiv:1706.05587: the backbone of a chosen output stride, ASPP with image pooling.

    Reads encoder, width, output_stride, strides, multi_grid, norm, leak, aspp_rates, aspp_channels, image_pooling,
    pooling_window, separable, dropout, upsampling. With the defaults it is torchvision's `deeplabv3_resnet50`: there,
    as here and not in the paper, a 3-wide convolution stands between ASPP and classifier; it is not dilated, so that it
    sees half as far when a trained network is used at half its output stride.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        style = Style.of(config, spatial_dims)
        width = style.wide(config.aspp_channels)
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        self.aspp = ASPP(
            style,
            self.encoder.out_channels[-1],
            width,
            config.aspp_rates,
            pooling=config.image_pooling,
            pooling_window=pooling_window(config, self.encoder.strides[-1]),
            separable=config.separable,
            dropout=config.dropout,
        )
        self.head = conv_norm_act(style, width, width, 3, separable=config.separable)
        self.classifier = CoarseHead(width, out_channels, self.encoder.strides[-1], config.upsampling)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        decoded = self.head(self.aspp(self.encoder(images)[-1]))
        return self.classifier(decoded, images.shape[2:])  # type: ignore[no-any-return]


# at another output stride ASPP's rates follow
rescale = rescale_rates


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DeepLabv3 as `config` describes it."""
    return DeepLabV3(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
