"""Yu and Koltun's front end, VGG-16 with dilation in place of its last poolings, and the context module behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import (
    CoarseHead,
    Rate,
    Style,
    check_input,
    initialise,
    make_classifier,
    make_conv,
)
from medseg.networks._encoder import Encoder
from medseg.networks.aspp import rescale_all
from medseg.networks.encoders import build_encoder
from medseg.networks.vgg import make_top

_PUBLISHED = {
    "encoder": "vgg16_frontend",
    "output_stride": 8,
    "hidden_channels": 4096,
    "dilations": (1, 1, 2, 4, 8, 16, 1),
    "norm": "none",
    "leak": 0.0,
    "dropout": 0.5,
    "upsampling": "interpolate",
}
DEFAULTS = dict.fromkeys(("dilated_frontend", "dilated_context"), _PUBLISHED)
CONTEXT_WIDTHS = {"basic": (1, 1, 1, 1, 1, 1, 1), "large": (2, 2, 4, 8, 16, 32, 32)}
"""Channels of the context module's layers, as multiples of the number of classes."""
LITTLE = 1e-2
"""Noise of the large module's initialisation, as a share of its other weights."""


class DilatedFrontend(nn.Module):
    """Yu & Koltun 2016, arXiv:1511.07122, section 4: no fourth and fifth pooling, dilation 2 and 4 after them.

    The layer that was fully connected is 7 wide with dilation 4; logits of stride 8 are interpolated. Difference: the
    image is padded with zeros, not by reflection. Reads encoder, width, hidden_channels, output_stride, strides, norm,
    leak, dropout, upsampling; with `dilated_context` also context and dilations.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = Style.of(config, spatial_dims).wide(config.hidden_channels)
        self.in_channels = in_channels
        self.encoder = build_encoder(config, spatial_dims=spatial_dims, in_channels=in_channels)
        self.min_shape = self.encoder.min_shape
        self.fully = make_top(config, self.encoder, spatial_dims=spatial_dims)
        self.context: nn.Module | None = None
        classes = hidden
        if config.name == "dilated_context":
            self.score = make_classifier(spatial_dims, hidden, out_channels)
            self.context = ContextModule(spatial_dims, out_channels, config.dilations, kind=config.context)
            classes = self.context.out_channels
        self.classifier = CoarseHead(classes, out_channels, self.encoder.strides[-1], config.upsampling)
        initialise(self)
        if isinstance(self.context, ContextModule):
            self.context.pass_through()
            self.context.pass_on(self.classifier.conv, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        maps = self.fully(self.encoder(images)[-1])
        if self.context is not None:
            maps = self.context(self.score(maps))
        return self.classifier(maps, images.shape[2:])  # type: ignore[no-any-return]


class ContextModule(nn.Module):
    """Yu & Koltun 2016, section 3: seven 3-wide convolutions of growing dilation on the classes' maps.

    Each begins as the identity (for `large`: as a copy of each map into its share of the wider layer, and a little
    noise), so that the module at first changes nothing but negative scores, which become 0; the paper's last, 1×1,
    layer is the classifier behind it. Differences: a wider layer's copies add up to its map whatever the widths, where
    the paper's weights do for basic alone; front end and module are trained together from the start. It has no norm:
    that would undo the identity. Nor does `width` change it: its widths are multiples of the classes.
    """

    def __init__(self, spatial_dims: int, classes: int, dilations: Sequence[Rate], *, kind: str) -> None:
        super().__init__()
        factors = CONTEXT_WIDTHS[kind]
        if len(dilations) != len(factors):
            raise ConfigError(
                f"network.dilations has {len(dilations)} entries, the context module has {len(factors)} layers; "
                f"published are {_PUBLISHED['dilations']}"
            )
        self.classes = classes
        widths = [classes, *(classes * f for f in factors)]
        self.out_channels = widths[-1]
        self.convs = nn.ModuleList(
            make_conv(spatial_dims, a, b, 3, dilation=rate, bias=True)
            for a, b, rate in zip(widths, widths[1:], dilations)
        )
        self.act = nn.ReLU()

    def pass_through(self) -> None:
        """Make every layer copy its input."""
        for conv in self.convs:
            self.pass_on(conv, self.classes)

    @staticmethod
    def pass_on(conv: nn.Module, classes: int) -> None:
        """Initialise `conv` so that each output channel is the mean of the input channels of its class."""
        weight = conv.get_parameter("weight")
        out_channels, in_channels = weight.shape[:2]
        with torch.no_grad():
            target = torch.arange(out_channels) * classes // out_channels
            source = torch.arange(in_channels) * classes // in_channels
            share = (target[:, None] == source[None, :]).to(weight) * (classes / in_channels)
            noise = 0.0 if out_channels == in_channels == classes else LITTLE * classes / in_channels
            weight.normal_(0.0, noise) if noise else weight.zero_()
            centre = tuple(k // 2 for k in weight.shape[2:])
            weight[(slice(None), slice(None), *centre)] += share  # type: ignore[index]
            conv.get_parameter("bias").zero_()

    def forward(self, maps: Tensor) -> Tensor:
        """(B, classes, *coarse) → (B, out_channels, *coarse)."""
        for conv in self.convs:
            maps = self.act(conv(maps))
        return maps


def rescale(config: NetworkConfig, before: Encoder, after: Encoder) -> NetworkConfig:
    """The context module's dilations count voxels of the coarsest map."""
    if config.name != "dilated_context":
        return config
    strides = before.strides[-1], after.strides[-1]
    dilations = rescale_all(config.dilations, *strides, setting="network.dilations")
    return config.model_copy(update={"dilations": dilations})


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The front end, alone or with the context module, as `config.name` says."""
    return DilatedFrontend(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
