"""Several sizes of one image through one network, and how their scores become one; the network is any."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg.config import NetworkConfig
from medseg.errors import ConfigError
from medseg.networks._blocks import INTERPOLATION, Style, conv_norm_act, initialise, make_classifier

ATTENTION_CHANNELS = 32


class MultiScale(nn.Module):
    """An image pyramid with shared weights: the mean, the maximum, or an attention over the scales for every voxel.

    Chen et al. 2016, Attention to Scale, arXiv:1511.03339. Differences: the attention reads the scores of all scales,
    not the maps before them, so that it works behind any network; no extra loss at each scale. Reads scales and
    scale_fusion.
    """

    def __init__(self, network: nn.Module, config: NetworkConfig, *, spatial_dims: int, out_channels: int) -> None:
        super().__init__()
        self.network = network
        # as fractions, sizes are whole-number arithmetic that an export keeps for any input
        self.scales = tuple(Fraction(s).limit_denominator(64) for s in config.scales)
        if len(set(self.scales)) < len(self.scales) or min(self.scales) <= 0:
            raise ConfigError(f"network.scales {list(config.scales)}: expected different numbers above 1/64")
        self.fusion = config.scale_fusion
        smallest: tuple[int, ...] = getattr(network, "min_shape", (1,) * spatial_dims)
        self.in_channels = getattr(network, "in_channels", None)
        self.min_shape = tuple(max(n, *(-(-n * s.denominator // s.numerator) for s in self.scales)) for n in smallest)
        self.attention: nn.Module | None = None
        if self.fusion == "attention":
            style = Style(spatial_dims, "none", config.leak)
            self.attention = nn.Sequential(
                conv_norm_act(style, out_channels * len(self.scales), ATTENTION_CHANNELS, 3),
                make_classifier(spatial_dims, ATTENTION_CHANNELS, len(self.scales)),
            )
            initialise(self.attention)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) → logits (B, out_channels, *spatial)."""
        shape, mode = images.shape[2:], INTERPOLATION[images.ndim - 2]
        found = []
        for scale in self.scales:
            if scale == 1:
                found.append(self.network(images))
                continue
            size = [(n * scale.numerator + scale.denominator - 1) // scale.denominator for n in shape]
            logits = self.network(functional.interpolate(images, size=size, mode=mode, align_corners=False))
            found.append(functional.interpolate(logits, size=list(shape), mode=mode, align_corners=False))
        if self.attention is not None:
            weights = self.attention(torch.cat(found, dim=1)).softmax(dim=1)
            return torch.stack([w.unsqueeze(1) * y for w, y in zip(weights.unbind(1), found)]).sum(0)
        stacked = torch.stack(found)
        return stacked.mean(0) if self.fusion == "mean" else stacked.amax(0)
