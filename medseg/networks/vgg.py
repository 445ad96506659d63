"""VGG-16 turned convolutional in any dimension: the encoder, whose late poolings may lose their stride, and its top."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.layers.factories import Pool
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import Axes, Rate, Style, conv_norm_act
from medseg.networks._encoder import Encoder, plan_stages

STEPS = ("pool1", "pool2", "pool3", "pool4", "pool5")


class MaxPool(nn.Module):
    """The maximum over 3 voxels on each axis, `dilation` apart; n voxels become ceil(n / stride)."""

    def __init__(self, stride: Axes, dilation: Axes) -> None:
        super().__init__()
        # torch pads a pooling by one voxel here, whatever its dilation: the rest is done beforehand
        self.margin = tuple(d - 1 for d in dilation)
        self.pool = Pool[Pool.MAX, len(stride)](3, stride=stride, padding=1, dilation=dilation)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, *n) → (B, C, *ceil(n / stride))."""
        if max(self.margin):
            maps = functional.pad(maps, [m for m in reversed(self.margin) for _ in range(2)], value=float("-inf"))
        return self.pool(maps)  # type: ignore[no-any-return]


def make_top(config: NetworkConfig, encoder: Encoder, *, spatial_dims: int) -> nn.Sequential:
    """The two layers behind the encoder that were fully connected, 7 and 1 wide, each with dropout."""
    style = Style.of(config, spatial_dims)
    hidden = style.wide(config.hidden_channels)
    return nn.Sequential(
        conv_norm_act(style, encoder.out_channels[-1], hidden, 7, dilation=encoder.dilation),
        nn.Dropout(config.dropout),
        conv_norm_act(style, hidden, hidden, 1),
        nn.Dropout(config.dropout),
    )


class VGG16(Encoder):
    """The thirteen convolutions of VGG-16 (Simonyan & Zisserman 2015, arXiv:1409.1556), a map after each pooling.

    Differences: the poolings are 3 wide, as in DeepLab, so that map voxel i lies on voxel i·stride at any size; a norm
    follows each convolution unless `norm` is none. A pooling that loses its stride stays with stride 1 (`late_pools`,
    as in DeepLab, and dilated as what comes before it, so that the maps are the strided ones on a denser grid) or goes
    (as in Yu & Koltun 2016); what comes after it is dilated. `more` copies of the last block may follow.
    """

    DEPTHS = (2, 2, 3, 3, 3)
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(
        self,
        config: NetworkConfig,
        *,
        spatial_dims: int,
        in_channels: int,
        late_pools: bool,
        more: int = 0,
        rates: Sequence[Rate] = (),
    ) -> None:
        super().__init__()
        if rates:
            raise ConfigError(
                f"network.encoder {config.encoder} has no residual blocks to give network.dilations to; use light or "
                "one of the ResNets"
            )
        style = Style.of(config, spatial_dims)
        channels = tuple(style.wide(c) for c in self.CHANNELS)
        channels += channels[-1:] * more
        steps = (*STEPS, *(f"pool{6 + n}" for n in range(more)))
        stages = plan_stages(config, steps, spatial_dims=spatial_dims, fixed=1)
        ones = (1,) * spatial_dims
        self.blocks, self.pools = nn.ModuleList(), nn.ModuleList()
        previous, dilation = in_channels, ones
        for stage, depth, planes in zip(stages, (*self.DEPTHS, *self.DEPTHS[-1:] * more), channels):
            convs = []
            for _ in range(depth):
                convs.append(conv_norm_act(style, previous, planes, 3, dilation=dilation))
                previous = planes
            self.blocks.append(nn.Sequential(*convs))
            if max(stage.stride) > 1 or late_pools:
                self.pools.append(MaxPool(stage.stride, stage.dilation_before))
            else:
                self.pools.append(nn.Identity())
            dilation = stage.dilation
        self.out_channels = channels
        self.strides = tuple(s.reached for s in stages)
        self.dilation = dilation
        self.is_same_denser = late_pools

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, *spatial) → a map after each pooling."""
        maps: list[Tensor] = []
        current = images
        for block, pool in zip(self.blocks, self.pools):
            current = pool(block(current))
            maps.append(current)
        return maps
