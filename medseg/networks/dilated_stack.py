"""A stack of dilated convolutions at full resolution, for signals and thin volumes; it never strides."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import (
    Axes,
    Rate,
    Style,
    check_input,
    conv_norm_act,
    initialise,
    make_classifier,
    make_conv,
    make_norm,
    per_axis,
)
from medseg.networks._encoder import strides_of

DEFAULTS = {
    "dilated_stack": {
        "channels": (64,),
        "dilations": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        "norm": "none",
        "leak": 0.0,
    }
}


class DilatedStack(nn.Module):
    """WaveNet's stack (van den Oord et al. 2016, arXiv:1609.03499) of exponentially growing dilation.

    Differences: the convolutions look both ways, 3 wide instead of 2, and a norm may precede the gate. With `gated`
    false it is the plain sequence of convolutions and rectifiers of the textbooks, without shortcuts. Reads channels
    (the first), width, dilations, gated, norm, leak.
    """

    def __init__(self, config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if len(config.channels) != 1:
            raise ConfigError(
                f"network.channels {list(config.channels)}: `dilated_stack` has one width, expected one number"
            )
        if config.strides:
            strides_of(config, (), spatial_dims)
        style = Style.of(config, spatial_dims)
        width = style.wide(config.channels[0])
        self.in_channels = in_channels
        # an instance norm has nothing to normalise in a single voxel
        self.min_shape = (2,) * spatial_dims
        self.gated = config.gated
        self.layers = nn.ModuleList()
        if config.gated:
            self.stem = make_conv(spatial_dims, in_channels, width, 1, bias=True)
            last = len(config.dilations) - 1
            self.layers.extend(GatedUnit(style, width, rate, last=n == last) for n, rate in enumerate(config.dilations))
            self.head = nn.Sequential(style.rectifier(), conv_norm_act(style, width, width, 1))
        else:
            widths = [in_channels, *[width] * (len(config.dilations) - 1)]
            self.layers.extend(
                conv_norm_act(style, before, width, 3, dilation=rate) for before, rate in zip(widths, config.dilations)
            )
        self.classifier = make_classifier(spatial_dims, width, out_channels)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial). Raises `DataError` if too small or C is wrong."""
        check_input(images, in_channels=self.in_channels, min_shape=self.min_shape)
        if not self.gated:
            for layer in self.layers:
                images = layer(images)
            return self.classifier(images)  # type: ignore[no-any-return]
        current = self.stem(images)
        total = 0
        for unit in self.layers:
            current, skip = unit(current)
            total = total + skip
        return self.classifier(self.head(total))  # type: ignore[no-any-return]


class GatedUnit(nn.Module):
    """tanh times sigmoid of one dilated convolution, then 1×1 convolutions to the next unit and to the output.

    The `last` has no next unit.
    """

    def __init__(self, style: Style, width: int, dilation: Rate, *, last: bool = False) -> None:
        super().__init__()
        dims = style.spatial_dims
        self.conv = make_conv(dims, width, 2 * width, 3, dilation=dilation, bias=style.norm == "none")
        self.norm = make_norm(style, 2 * width)
        self.onward = None if last else make_conv(dims, width, width, 1, bias=True)
        self.skip = make_conv(dims, width, width, 1, bias=True)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width, *spatial) → the maps for the next unit and those for the output, of the same shape."""
        value, gate = self.norm(self.conv(maps)).chunk(2, dim=1)
        gated = value.tanh() * gate.sigmoid()
        onward = maps if self.onward is None else maps + self.onward(gated)
        return onward, self.skip(gated)


def fit_to_patch(config: NetworkConfig, patch_size: Axes) -> NetworkConfig:
    """Without the dilations that reach from the middle of a patch beyond its end on all axes."""
    dims = len(patch_size)
    kept = tuple(r for r in config.dilations if any(d <= p // 2 for d, p in zip(per_axis(r, dims), patch_size)))
    return config.model_copy(update={"dilations": kept or config.dilations[:1]})


def halvings(config: NetworkConfig) -> int:
    """Halving steps that `network.strides` has an entry for: none."""
    return 0


def build(config: NetworkConfig, *, spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The stack as `config` describes it."""
    return DilatedStack(config, spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels)
