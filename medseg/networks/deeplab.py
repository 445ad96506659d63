"""DeepLab's first two versions: a dilated VGG-16, classifiers that see far, and logits interpolated to the image."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks._blocks import Style, check_input, enlarge, initialise
from medseg.networks.aspp import SummedASPP, rescale_rates
from medseg.networks.encoders import build_encoder

_PUBLISHED = {
    "encoder": "vgg16",
    "output_stride": 8,
    "hidden_channels": 1024,
    "norm": "none",
    "leak": 0.0,
    "dropout": 0.5,
    "upsampling": "interpolate",
}
DEFAULTS = {
    "deeplabv1": {**_PUBLISHED, "aspp_rates": (12,)},
    "deeplabv2": {**_PUBLISHED, "aspp_rates": (6, 12, 18, 24)},
}


class DeepLab(nn.Module):
    """DeepLabv1 with a large field of view and v2 with ASPP-L; they differ in the number of rates alone.

    v1: Chen et al. 2015, arXiv:1412.7062: the layer that was fully connected is 3 wide with dilation 12. v2: Chen et
    al. 2016, arXiv:1606.00915: four such branches with rates 6, 12, 18, 24, their logits summed. The random field that
    both papers end with is `postprocess.crf`. Reads encoder, width, hidden_channels, output_stride, strides,
    aspp_rates, norm, leak, dropout, separable.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        style = Style.of(config, spatial_dims)
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        self.aspp = SummedASPP(
            style,
            self.encoder.out_channels[-1],
            style.wide(config.hidden_channels),
            out_channels,
            config.aspp_rates,
            dropout=config.dropout,
            separable=config.separable,
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        return enlarge(self.aspp(self.encoder(images)[-1]), self.encoder.strides[-1], images.shape[2:])


# at another output stride ASPP's rates follow
rescale = rescale_rates


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """DeepLabv1 or v2 as `config` describes it."""
    return DeepLab(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
