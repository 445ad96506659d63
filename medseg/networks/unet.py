"""MONAI's U-Net, padded so that any size goes through it."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

import torch
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.networks._blocks import Style, check_input, crop, least_shape, norm_groups, pad_to
from medseg.networks.residual_unet import halvings, stage_strides

__all__ = ["DEFAULTS", "WrappedUNet", "build", "halvings"]

DEFAULTS = {"unet": {"channels": (32, 64, 128, 256, 512)}}


class WrappedUNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597; Çiçek et al. 2016, arXiv:1606.06650), as MONAI has it.

    MONAI's differences: residual units, strided convolutions instead of pooling. Ours: sizes that the strides do not
    divide are padded with 0 at the end and cropped again; where a norm takes the convolutions' biases away there are
    none, but one for the logits. Reads channels (one for each stage), width, strides (between the stages), norm, leak,
    dropout.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        style = Style.of(config, spatial_dims)
        strides = stage_strides(config, spatial_dims)
        self.in_channels = in_channels
        self.multiples = tuple(prod(a) for a in zip(*strides))
        self.min_shape = least_shape(self.multiples)
        channels = [style.wide(c) for c in config.channels]
        act: tuple[str, dict[str, Any]] = ("leakyrelu", {"negative_slope": config.leak, "inplace": True})
        norms: dict[str, Any] = {
            "batch": "batch",
            "instance": ("instance", {"affine": True}),
            # MONAI's layers differ in width and take one number of groups, which has to divide them all
            "group": ("group", {"num_groups": gcd(*(norm_groups(c) for c in (*channels, out_channels)))}),
            "none": None,
        }
        self.network = UNet(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            strides=strides,
            kernel_size=3,
            up_kernel_size=3,
            num_res_units=2,
            act=act,
            norm=norms[config.norm],
            dropout=config.dropout,
            bias=config.norm == "none",
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        logits = crop(self.network(pad_to(images, self.multiples)), images.shape[2:])
        return logits + self.bias.reshape(-1, *(1,) * (images.ndim - 2))


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """MONAI's U-Net as `config` describes it."""
    return WrappedUNet(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
